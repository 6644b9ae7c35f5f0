"""The optimizers of other packages: what there is, how each is made, and how a user calls it.

Every class below ``torch.optim.Optimizer`` in :data:`PACKAGES` is found by looking; what needs more than parameters
stands in :data:`ARGUMENTS`, what cannot be tried in :data:`NOT_TRIED`, with the reason. Of timm its registry is
taken, which names 88 optimizers by class and options.
"""

import importlib
import importlib.util
import inspect
import pkgutil
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["KNOWN", "NOT_TRIED", "PACKAGES", "Entry", "classes", "entries", "versions"]

PACKAGES = {
    "pytorch_optimizer": "pytorch_optimizer",
    "timm": "timm.optim",
    "schedulefree": "schedulefree",
    "prodigyopt": "prodigyopt",
    "lion-pytorch": "lion_pytorch",
    "torch-optimi": "optimi",
    "dadaptation": "dadaptation",
    "madgrad": "madgrad",
    "torch_optimizer": "torch_optimizer",
}
_ALSO_OF = {"torch_optimizer": "pytorch_ranger"}  # a package that another one needs and exports
_LR = 1e-2  # where a class has no default


@dataclass(frozen=True)
class Entry:
    """One optimizer to try.

    Parameters
    ----------
    name : str
        Package and class, or what wraps what.
    package : str
        As the package index knows it.
    make : callable
        Makes it from a model, and from what wraps an optimizer in a ``DataParallelOptimizer`` or leaves it alone.
    way : str, optional
        How a step is made (``training.WAYS``), if it is not found by trying.
    kind : str
        ``"class"``, ``"theirs around ours"`` or ``"ours around theirs"``.
    """

    name: str
    package: str
    make: Callable[[nn.Module, Callable[[Optimizer], Any], list[dict[str, Any]]], Any] = field(repr=False)
    way: str | None = None
    kind: str = "class"


def _muon_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Divide groups into matrices, which Muon steps, and the rest."""
    return [
        {**group, "params": [p for p in group["params"] if (p.ndim == 2) == use_muon], "use_muon": use_muon}
        for group in groups
        for use_muon in (True, False)
    ]


def _without(ndim: int, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out of groups the tensors of more dims than a class can step."""
    return [{**group, "params": [p for p in group["params"] if p.ndim <= ndim]} for group in groups]


def _matrices(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**group, "params": [p for p in group["params"] if p.ndim == 2]} for group in groups]


def _adalomo(kind: Any, model: nn.Module, groups: list[dict[str, Any]]) -> Optimizer:
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim <= 2)
    return kind(model)


def _rho_scheduler() -> Any:
    module = importlib.import_module("pytorch_optimizer")
    rates = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    return module.ProportionScheduler(rates, max_lr=0.1, min_lr=0.01, max_value=0.05, min_value=0.01)


_SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}
# Arguments beyond the parameters: from the model and its groups.
ARGUMENTS: dict[str, Callable[[Any, nn.Module, list[dict[str, Any]]], Optimizer]] = {
    "pytorch_optimizer.SAM": lambda c, m, g: c(g, **_SGD),
    "pytorch_optimizer.LookSAM": lambda c, m, g: c(g, **_SGD),
    "pytorch_optimizer.FriendlySAM": lambda c, m, g: c(g, **_SGD),
    "pytorch_optimizer.WSAM": lambda c, m, g: c(m, g, **_SGD),
    "pytorch_optimizer.GSAM": lambda c, m, g: c(
        g, torch.optim.SGD(g, lr=0.1, momentum=0.9), m, rho_scheduler=_rho_scheduler()
    ),
    "pytorch_optimizer.BSAM": lambda c, m, g: c(g, num_data=100),
    "pytorch_optimizer.Ranger21": lambda c, m, g: c(g, num_iterations=20),
    "pytorch_optimizer.LOMO": lambda c, m, g: c(m),
    "pytorch_optimizer.AdaLOMO": _adalomo,
    "pytorch_optimizer.SpectralSphere": lambda c, m, g: c(_matrices(g)),
    # Larger preconditioners are of gradients of a low rank, whose null space any rounding error turns.
    "pytorch_optimizer.SOAP": lambda c, m, g: c(g, max_precondition_dim=8),
    "torch_optimizer.Adafactor": lambda c, m, g: c(_without(2, g)),
    "pytorch_optimizer.AdamMini": lambda c, m, g: c(m, num_embeds=8, num_heads=2),
    **{
        f"pytorch_optimizer.{name}": lambda c, m, g: c(_muon_groups(g))
        for name in ("Muon", "AdaMuon", "AdaGO", "NorMuon", "MuonClip")
    },
}
WAYS = {
    **dict.fromkeys(("pytorch_optimizer.AdaHessian", "pytorch_optimizer.SophiaH", "timm.adahessian"), "graph"),
    "torch_optimizer.Adahessian": "graph",
    "pytorch_optimizer.AliG": "closure",
    "pytorch_optimizer.GSAM": "set_closure",
    "pytorch_optimizer.WSAM": "closure",
    **dict.fromkeys(("pytorch_optimizer.LOMO", "pytorch_optimizer.AdaLOMO"), "backward alone"),
    "pytorch_optimizer.SafeFP16Optimizer": "its backward",
    "pytorch_optimizer.PCGrad": "pc_backward",
    **dict.fromkeys([f"pytorch_optimizer.{name}" for name in ("SAM", "LookSAM", "FriendlySAM", "BSAM")], "sam"),
}
NOT_TRIED = {
    "pytorch_optimizer.DistributedMuon": "divides its own work by torch.distributed",
    "pytorch_optimizer.DeMo": "exchanges its own gradients by torch.distributed",
    "lion_pytorch.triton": "needs triton, a compiler for GPUs",
    "optimi.prepare_for_gradient_release": "a function that steps within backward, before gradients can be reduced",
    "timm.fused* and timm.bnb*": "of the packages apex and bitsandbytes, for GPUs",
}

# What can't be put right from within a DataParallelOptimizer, by entry and verdict.
KNOWN = {
    (f"pytorch_optimizer.Magma(ours({base}))", "replicas differ"): (
        "draws random numbers of its own around ours' step: with seeds that differ between ranks replicas part; "
        "`DataParallelOptimizer(Magma(...))` is right"
    )
    for base in ("SGD", "AdamW")
}


def versions() -> dict[str, str]:
    """Return the version of every package."""
    from importlib.metadata import version

    return {name: version(name) for name in PACKAGES}


@cache
def entries() -> list[Entry]:
    """Return everything to try, in the same order in every process."""
    return [*_of_classes(), *_of_timm(), *_of_wrappers()]


@cache
def classes() -> dict[str, type[Optimizer]]:
    """Return all classes but timm's, each once, by a name of its package's."""
    found: dict[type[Optimizer], str] = {}
    for package, top in PACKAGES.items():
        if package == "timm":
            continue
        for module in _modules(top):
            for kind in vars(module).values():
                if _is_optimizer(kind, top) and kind not in found:
                    found[kind] = f"{top}.{kind.__name__}"
    taken: dict[str, type[Optimizer]] = {}
    for kind, name in found.items():
        taken[name if name not in taken else f"{kind.__module__}.{kind.__name__}"] = kind
    return taken


def _is_optimizer(kind: object, top: str) -> bool:
    if not (inspect.isclass(kind) and issubclass(kind, Optimizer)):
        return False
    if kind.__module__.partition(".")[0] not in (top, _ALSO_OF.get(top)):
        return False
    is_base = inspect.isabstract(kind) or "defaults" in inspect.signature(kind).parameters
    return not is_base


def _modules(top: str) -> Iterator[types.ModuleType]:
    module = importlib.import_module(top)
    yield module
    for info in pkgutil.walk_packages(module.__path__, f"{top}."):
        if info.name not in NOT_TRIED and not info.name.rpartition(".")[2].startswith("test_"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield importlib.import_module(info.name)


def _package_of(top: str) -> str:
    return next(package for package, name in PACKAGES.items() if name == top)


def _required(kind: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(kind).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]


def _plainly(kind: Callable[..., Any], _: nn.Module, groups: list[dict[str, Any]]) -> Optimizer:
    options = {"lr": _LR} if "lr" in _required(kind) else {}
    return kind(groups if len(groups) > 1 else groups[0]["params"], **options)


def _of_classes() -> Iterator[Entry]:
    for name, kind in classes().items():
        if name in NOT_TRIED or "optimizer" in _required(kind):
            continue  # of the latter, which wrap another, below
        how = partial(ARGUMENTS.get(name, _plainly), kind)
        make = partial(_made, how)
        yield Entry(name, _package_of(name.partition(".")[0]), make, WAYS.get(name))


def _made(how: Callable[..., Optimizer], model: nn.Module, wrap: Callable[[Optimizer], Any], groups: Any) -> Any:
    return wrap(how(model, groups))


# ---------------------------------------------------------------- timm


@cache
def _timm() -> types.ModuleType:
    """Import ``timm.optim`` alone: the whole of timm imports torchvision, which needs a torch of its own."""
    folder = importlib.util.find_spec("timm").submodule_search_locations[0]  # type: ignore[union-attr, index]
    for name in ("timm", "timm.models"):
        package = types.ModuleType(name)
        package.__path__ = [folder] if name == "timm" else []
        sys.modules[name] = package
    sys.modules["timm.models"].group_parameters = None  # type: ignore[attr-defined]  # for layer_decay, not used here
    return importlib.import_module("timm.optim")


def _of_timm() -> Iterator[Entry]:
    timm = _timm()
    for short in timm.list_optimizers():
        if isinstance(timm.get_optimizer_info(short).opt_class, str):
            continue  # apex and bitsandbytes
        name = f"timm.{short}"
        options = {"momentum": 0.9} if timm.get_optimizer_info(short).has_momentum else {}
        if short in ("sgdp", "csgdp"):  # whose default is torch's mark for an option that is required
            options["lr"] = _LR
        how = partial(_plainly, partial(timm.get_optimizer_class(short), **options))
        yield Entry(name, "timm", partial(_made, how), WAYS.get(name))


# ---------------------------------------------------------------- wrappers


def _wrapping() -> dict[str, tuple[Callable[[Optimizer], Any], str | None]]:
    """Return what wraps an optimizer, and how it is called."""
    from pytorch_optimizer import TRAC, Lookahead, OrthoGrad, PCGrad, SafeFP16Optimizer, ScheduleFreeWrapper
    from pytorch_optimizer.optimizer.magma import Magma
    from schedulefree import ScheduleFreeWrapper as FacebooksWrapper
    from schedulefree import ScheduleFreeWrapperReference
    from torch_optimizer import Lookahead as AnotherLookahead

    found = {
        "pytorch_optimizer.Lookahead": partial(Lookahead, k=3),
        "pytorch_optimizer.OrthoGrad": OrthoGrad,
        "pytorch_optimizer.TRAC": partial(TRAC, s_prev=0.01),
        "pytorch_optimizer.ScheduleFreeWrapper": ScheduleFreeWrapper,
        "pytorch_optimizer.PCGrad": PCGrad,
        "pytorch_optimizer.SafeFP16Optimizer": SafeFP16Optimizer,
        "pytorch_optimizer.Magma": Magma,
        "schedulefree.ScheduleFreeWrapper": FacebooksWrapper,
        "schedulefree.ScheduleFreeWrapperReference": ScheduleFreeWrapperReference,
        "timm.Lookahead": partial(_timm().Lookahead, k=3),
        "torch_optimizer.Lookahead": partial(AnotherLookahead, k=3),
    }
    return {name: (make, WAYS.get(name)) for name, make in found.items()}


_BASES: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01),
}


def _of_wrappers() -> Iterator[Entry]:
    for name, (outer, way) in _wrapping().items():
        package = _package_of(name.partition(".")[0]) if not name.startswith("timm") else "timm"
        for base_name, base in _BASES.items():
            if base_name == "AdamW" and name.startswith("schedulefree."):
                continue  # adds to its state before it has made one: KeyError
            around = partial(_theirs_around, outer, base)
            yield Entry(f"{name}(ours({base_name}))", package, around, way, "theirs around ours")
            if name not in ("schedulefree.ScheduleFreeWrapper", "schedulefree.ScheduleFreeWrapperReference"):
                within = partial(_ours_around, outer, base)  # those two are no torch.optim.Optimizer
                yield Entry(f"ours({name}({base_name}))", package, within, way, "ours around theirs")
    for name in ("SAM", "LookSAM", "FriendlySAM"):
        full = f"pytorch_optimizer.{name}"
        around = partial(_sam_around, classes()[full])
        yield Entry(f"{full}(ours(SGD))", "pytorch_optimizer", around, WAYS.get(full), "theirs around ours")


def _theirs_around(outer: Any, base: Any, model: nn.Module, wrap: Any, groups: Any) -> Any:
    return outer(wrap(base(groups)))


def _ours_around(outer: Any, base: Any, model: nn.Module, wrap: Any, groups: Any) -> Any:
    return wrap(outer(base(groups)))


def _sam_around(outer: Any, model: nn.Module, wrap: Any, groups: Any) -> Any:
    def base(groups: Any, **options: Any) -> Any:
        return wrap(torch.optim.SGD(groups, **options))

    return outer(groups, base, lr=0.1, momentum=0.9)
