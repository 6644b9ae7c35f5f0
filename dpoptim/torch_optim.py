"""Every optimizer of ``torch.optim`` under its own name, with the fastest implementation that the device has.

torch implements a step up to three times: *fused* (one kernel for all parameters), *foreach* (one kernel for each
operation on all parameters) and a loop over parameters. On CPU it takes the loop unless told otherwise, at 4 to 7
times the time of the fused step. The classes here are subclasses of torch's, with the same arguments, state and
``state_dict``; they differ only where the caller names neither ``fused`` nor ``foreach``.

Note [Choosing the implementation]
----------------------------------
:data:`CHOICES` says what is fastest on each device; it was measured (``benchmarks/optimizers.py``). Where torch has a
fused kernel that is right for the device and dtype of every parameter it is fused, and small tensors are stepped
together (:mod:`dpoptim.flat_step`). Where it has none, the step on CPU is *flat*: the loop over few blocks of a size
that fits the cache, with the same bits as the loop over parameters. Elsewhere it is foreach. None supports
``differentiable``; fused takes no tensor ``betas``, and foreach takes a tensor ``lr`` only if ``capturable``. A sparse
gradient, known only when it comes, needs the loop: the group falls back then. A loaded ``state_dict`` whose groups name
none (torch saves ``None``) is chosen for again. A group that names ``foreach`` or ``fused=False`` is stepped by torch
alone.
"""

import inspect
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from dpoptim.compiled_step import check_compiler
from dpoptim.flat_step import FlatStep
from dpoptim.reducer import is_reduced

if TYPE_CHECKING:
    from torch.optim import (
        ASGD,
        LBFGS,
        SGD,
        Adadelta,
        Adafactor,
        Adagrad,
        Adam,
        Adamax,
        AdamW,
        Muon,
        NAdam,
        RAdam,
        RMSprop,
        Rprop,
        SparseAdam,
    )

__all__ = [
    "ASGD",
    "LBFGS",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SparseAdam",
    "compile_step",
    "implementation",
]


@dataclass(frozen=True)
class Choice:
    """The fastest implementation of an optimizer on a kind of device.

    Attributes
    ----------
    kind : str
        ``"fused"``, ``"foreach"``, ``"flat"`` or ``"for-loop"``.
    flat_below : int
        If fused or flat, parameters with fewer elements are stepped together; see :mod:`dpoptim.flat_step`.
    cut_large : bool
        If flat, whether large parameters are stepped in parts.
    foreach_below : int, optional
        If foreach, only for groups whose parameters have fewer elements in the mean; the loop for others.
    """

    kind: str
    flat_below: int = 0
    cut_large: bool = False
    foreach_below: int | None = None


_FUSED_FLAT = Choice("fused", flat_below=512)
_FLAT = Choice("flat", flat_below=4096, cut_large=True)
_LOOP = Choice("for-loop")

# Measured with benchmarks/optimizers.py; on a device that is not here: fused, else foreach, else the loop.
CHOICES: dict[str, dict[str, Choice]] = {
    "cpu": {
        "SGD": Choice("fused"),  # a step without momentum costs less than the copies
        "Adam": _FUSED_FLAT,
        "AdamW": _FUSED_FLAT,
        "Adagrad": _FUSED_FLAT,
        "RMSprop": _FLAT,
        "Adadelta": _FLAT,
        "Adamax": _FLAT,
        "NAdam": _FLAT,
        "RAdam": _FLAT,
        "Rprop": _FLAT,
        "ASGD": Choice("flat", flat_below=4096),  # few operations: parts cost more than they save
        "Adafactor": Choice("foreach", foreach_below=16384),
        "Muon": _LOOP,
        "LBFGS": _LOOP,
        "SparseAdam": _LOOP,
    },
}


def implementation(optimizer: torch.optim.Optimizer, group: int = 0) -> str:
    """Say how a parameter group is stepped: ``"fused"``, ``"foreach"``, ``"flat"`` or ``"for-loop"``."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # a DataParallelOptimizer steps as what it wraps
    options = optimizer.param_groups[group]
    if options.get("fused"):
        return "fused"
    if options.get("foreach"):
        return "foreach"
    our_class = _our_class(optimizer)
    if our_class is not None and _is_flat(our_class.__name__, options):
        return "flat"
    return "for-loop"


def compile_step(optimizer: torch.optim.Optimizer) -> None:
    """Compile the step of an optimizer with ``torch.compile``: one pass over the memory instead of a dozen. Local.

    It takes seconds at the first step, and again when a parameter's gradient comes or goes. The results are equal to
    rounding, not to the bit: call it on all ranks or on none, before the optimizer is wrapped. A copy of the
    optimizer, and its state in another program, is stepped uncompiled until this is called again.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        An optimizer of this module that has no fused kernel on CPU: RMSprop, Adadelta, Adamax, NAdam, RAdam, Rprop
        or ASGD, with a group at least whose step is flat (see :func:`implementation`).

    Raises
    ------
    TypeError
        ``optimizer`` is none of these.
    ValueError
        None of its groups is stepped flat, or it belongs to a ``DataParallelOptimizer`` already.
    RuntimeError
        No C++ compiler works here.
    """
    our_class = _our_class(optimizer)
    if our_class is None or CHOICES["cpu"][our_class.__name__].kind != "flat":
        kind = type(optimizer).__name__
        flat_kinds = ", ".join(name for name, choice in CHOICES["cpu"].items() if choice.kind == "flat")
        raise TypeError(f"optimizer must be a dpoptim optimizer without a fused kernel ({flat_kinds}), got {kind}")
    kinds = [implementation(optimizer, number) for number in range(len(optimizer.param_groups))]
    if "flat" not in kinds:
        raise ValueError(f"a parameter group must be stepped flat to be compiled, got {', '.join(kinds)}")
    if any(is_reduced(parameter) for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError("compile_step must be called before the optimizer is wrapped in a DataParallelOptimizer")
    check_compiler()
    FlatStep.of(optimizer).compile(our_class.__bases__[0])


def _choose(name: str, options: dict[str, Any], accepted: Container[str], fused_devices: Container[str]) -> bool:
    """Choose for a parameter group that names neither; return whether fused was chosen now."""
    if options.get("fused") is not None or options.get("foreach") is not None or options.get("differentiable"):
        return False
    if _is_flat(name, options):
        return False
    parameters: list[Tensor] = options["params"]
    tensor_betas = any(isinstance(beta, Tensor) for beta in options.get("betas", ()))
    tensor_options = tensor_betas or isinstance(options["lr"], Tensor)
    if (
        "fused" in accepted
        and not tensor_betas
        and all(p.device.type in fused_devices and p.is_floating_point() for p in parameters)
        and not any((p.device.type, p.dtype) in _WRONG_FUSED_KERNEL.get(name, ()) for p in parameters)
    ):
        options["fused"] = True
        return True
    if "foreach" not in accepted or (tensor_options and not options.get("capturable")):
        return False
    limit = CHOICES["cpu"][name].foreach_below
    if limit is None or any(p.device.type != "cpu" for p in parameters) or _mean_numel(parameters) < limit:
        options["foreach"] = True
    return False


def _mean_numel(parameters: Sequence[Tensor]) -> float:
    return sum(parameter.numel() for parameter in parameters) / max(1, len(parameters))


def _is_flat(name: str, options: dict[str, Any]) -> bool:
    """Whether a group is stepped flat: none is named, real parameters on CPU."""
    return _may_be_flat(name, options) and all(
        p.device.type == "cpu" and p.is_floating_point() for p in options["params"]
    )


def _may_be_flat(name: str, options: dict[str, Any]) -> bool:
    if any(options.get(key) for key in ("differentiable", "capturable")) or options.get("foreach") is not None:
        return False
    return CHOICES["cpu"][name].kind == "flat"


def _our_class(optimizer: object) -> type[torch.optim.Optimizer] | None:
    """Return the class of this module that an optimizer is of, also if it is of a user's subclass."""
    return next((kind for kind in type(optimizer).__mro__ if kind in _OURS), None)


def _align(state: Any, lists: Sequence[list[Any]]) -> None:
    """Give gradients and state the memory layout of their parameter, which torch's fused kernels take for granted.

    They step element by element in memory, whatever the strides (seen with torch 2.13 on CPU): a contiguous gradient
    of a channels-last parameter would be applied to other elements.
    """
    arrays = [entries for entries in lists if any(isinstance(entry, Tensor) and entry.dim() for entry in entries)]
    if all(map(Tensor.is_contiguous, [entry for entry in chain.from_iterable(arrays) if entry is not None])):
        return
    for index, parameter in enumerate(lists[0]):
        for place, entries in enumerate(arrays[1:], 1):
            entry = entries[index]
            if entry is None or entry.is_sparse or entry.stride() == parameter.stride():
                continue
            entries[index] = aligned = torch.empty_like(parameter, dtype=entry.dtype).copy_(entry)
            if place > 1:
                kept = state[parameter]
                kept[next(key for key, value in kept.items() if value is entry)] = aligned


def _begin_adagrad(optimizer: Any, group: dict[str, Any]) -> None:
    """Give parameters of a group added later the state that torch up to 2.11 makes in the constructor alone."""
    for parameter in group["params"]:
        if parameter.grad is None or optimizer.state[parameter]:
            continue
        start = optimizer.defaults["initial_accumulator_value"]
        dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        fused = {"dtype": torch.float32, "device": parameter.device}
        optimizer.state[parameter] = {
            "step": torch.zeros((), **(fused if group["fused"] else {"dtype": dtype})),
            "sum": torch.full_like(parameter, complex(start, start) if parameter.is_complex() else start),
        }


def _condense(name: str, optimizer: Any, group: dict[str, Any], lists: tuple[list[Any], ...]) -> None:
    """Put what ``_init_group`` has collected for one group into blocks, where that is faster."""
    if torch.compiler.is_compiling() or any(gradient.is_sparse for gradient in lists[1]):
        return
    choice = CHOICES["cpu"][name]
    if group.get("fused"):
        # A GradScaler lets the fused kernel unscale p.grad itself.
        scaled = getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None
        if choice.kind != "fused" or not choice.flat_below or scaled:
            return
    elif not _may_be_flat(name, group):
        return
    number = next(number for number, other in enumerate(optimizer.param_groups) if other is group)
    flat = FlatStep.of(optimizer)
    if not flat.is_open:
        return  # torch's step was called past ours
    compiled = None if group.get("fused") else flat.compiled
    cut_large = choice.cut_large and compiled is None
    flat.condense(number, optimizer.state, lists, flat_below=choice.flat_below, cut_large=cut_large)
    if compiled is not None and lists[0]:
        compiled(number, group, [list(entries) for entries in lists])
        for entries in lists:  # nothing is left for torch to step
            entries.clear()


def _fastest(torch_class: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Derive a class that differs from torch's in the choice of implementation alone."""
    name = torch_class.__name__
    accepted = inspect.signature(torch_class.__init__).parameters.keys() & {"fused", "foreach"}
    fused_devices = set(_get_fused_kernels_supported_devices()) - _NO_FUSED_KERNEL.get(name, set())
    torch_step = torch_class.step
    if getattr(torch_step, "hooked", False):  # by an instance made before: the hooks are those of this class, once
        torch_step = torch_step.__wrapped__  # type: ignore[attr-defined]

    def add_param_group(self: Any, param_group: dict[str, Any]) -> None:
        torch_class.add_param_group(self, param_group)
        if _choose(name, self.param_groups[-1], accepted, fused_devices):
            self._need_device_dtype_check_for_fused = True

    def set_state(self: Any, state: dict[str, Any]) -> None:
        torch_class.__setstate__(self, state)
        for options in self.param_groups:
            if not _choose(name, options, accepted, fused_devices):
                continue
            for parameter in options["params"]:
                entry = self.state.get(parameter, {})
                if "step" in entry:  # the fused kernels want it in float32 beside the parameter
                    entry["step"] = entry["step"].to(parameter.device, torch.float32)

    def init_group(self: Any, group: dict[str, Any], *lists: list[Any]) -> Any:
        if (
            name in _LOOP_TAKES_SPARSE
            and group.get("fused")
            and any(p.grad is not None and p.grad.is_sparse for p in group["params"])
        ):
            group["fused"] = False
        if name == "Adagrad":
            _begin_adagrad(self, group)
        found = torch_class._init_group(self, group, *lists)  # type: ignore[attr-defined]
        if group.get("fused"):
            _align(self.state, lists)
        _condense(name, self, group, lists)
        return found

    def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        if torch.compiler.is_compiling():  # by the user, the whole of it
            return torch_step(self, closure)
        with FlatStep.of(self).opened(self.state):
            return torch_step(self, closure)

    step.__doc__ = torch_class.step.__doc__
    members: dict[str, Any] = {"__doc__": torch_class.__doc__, "__module__": __name__}
    if accepted:
        members |= {"add_param_group": add_param_group, "__setstate__": set_state}
    if CHOICES["cpu"][name].kind == "flat" or CHOICES["cpu"][name].flat_below:
        members |= {"_init_group": init_group, "step": step}
    elif name in _LOOP_TAKES_SPARSE:
        members["_init_group"] = init_group
    return type(name, (torch_class,), members)


# Devices on which torch has fused kernels, but not of this optimizer.
_NO_FUSED_KERNEL = {"Adagrad": {"cuda"}}
# Kernels that leave most elements as they are and write uninitialised memory to the momentum (pytorch#191763).
_WRONG_FUSED_KERNEL = {"SGD": {("cpu", torch.bfloat16), ("cpu", torch.float16)}}
# Of the optimizers with a fused kernel, those whose loop takes sparse gradients.
_LOOP_TAKES_SPARSE = ("SGD", "Adagrad")
_OURS: list[type[torch.optim.Optimizer]] = []

if not TYPE_CHECKING:
    for _name in __all__[:-2]:
        if hasattr(torch.optim, _name):  # Muon is new in torch 2.9
            globals()[_name] = _fastest(getattr(torch.optim, _name))
            _OURS.append(globals()[_name])
    __all__ = [name for name in __all__ if name in globals()]
