"""Every optimizer of ``torch.optim`` under its own name, with the fastest implementation that the device has.

torch implements a step up to three times: *fused* (one kernel for all parameters), *foreach* (one kernel for each
operation on all parameters) and a loop over parameters. On CPU it takes the loop unless told otherwise, at 4 to 7
times the time of the fused step. The classes here are subclasses of torch's, with the same arguments, state and
``state_dict``; they differ only where the caller names neither ``fused`` nor ``foreach``, and give the same as torch's
default then, to rounding.

Tests: ``tests/step/test_implementations.py``.

Note [Choosing the implementation]
----------------------------------
:data:`CHOICES` says what is fastest on CPU; it was measured (``benchmarks/optimizers.py``). Where torch has a fused
kernel it is fused, and small tensors are stepped together (:mod:`dpoptim.step.step_blocks`). Where it has none, the
step is *flat*: the loop over few blocks of a size that fits the cache, with the same bits as the loop over parameters.
On another device it is fused where torch can, else torch's default. The choice is made for each parameter at each step,
since it may be wrong for some (:mod:`dpoptim.step.implementations`); ``param_groups`` keep no mark of it. A group that
names ``fused``, ``foreach``, ``differentiable`` or ``capturable`` is stepped by torch alone.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._foreach_utils import _get_foreach_kernels_supported_devices, _get_fused_kernels_supported_devices

from dpoptim.gradients.autograd_hooks import is_reduced
from dpoptim.step.compiled_step import check_compiler
from dpoptim.step.facts import FACTS, Choice
from dpoptim.step.flat_step import FlatStep
from dpoptim.step.implementations import Implementations

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


# What is fastest on each kind of device; on a device that is not here: fused, else torch's default.
CHOICES: dict[str, dict[str, Choice]] = {"cpu": {name: facts.on_cpu for name, facts in FACTS.items()}}


def implementation(optimizer: torch.optim.Optimizer, group: int = 0) -> str:
    """Say how a parameter group is stepped: ``"fused"``, ``"foreach"``, ``"flat"`` or ``"for-loop"``.

    Of a group that leaves the choice to dpoptim, what most of its parameters get, if their gradients are dense.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # a DataParallelOptimizer steps as what it wraps
    options = optimizer.param_groups[group]
    if options.get("fused"):
        return "fused"
    if options.get("foreach"):
        return "foreach"
    our_class = _our_class(optimizer)
    how = None if our_class is None else _HOW.get(our_class)
    parameters: list[Tensor] = options["params"]
    ways: list[str | None] = [None]
    if how is not None and parameters and how.are_free(options):
        ways = [how.way(parameter, options["lr"]) for parameter in parameters]
        limit = how.choice.foreach_below
        if limit is not None and sum(map(Tensor.numel, parameters)) >= limit * len(parameters):
            ways = [None if way == "foreach" else way for way in ways]
    way = max(ways, key=ways.count)
    if way is None and options.get("foreach", False) is None:  # torch's own default
        devices = _get_foreach_kernels_supported_devices()
        return "foreach" if all(parameter.device.type in devices for parameter in parameters) else "for-loop"
    return way or "for-loop"


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


def _our_class(optimizer: object) -> type[torch.optim.Optimizer] | None:
    """Return the class of this module that an optimizer is of, also if it is of a user's subclass."""
    return next((kind for kind in type(optimizer).__mro__ if kind in _OURS), None)


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


def _fastest(torch_class: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Derive a class that differs from torch's in the choice of implementation alone."""
    name = torch_class.__name__
    # As torch's AdamW is an Adam, so is ours.
    ours = [kind for kind in reversed(_OURS) if issubclass(torch_class, kind.__mro__[1])][:1]
    members: dict[str, Any] = {"__doc__": torch_class.__doc__, "__module__": __name__}
    if CHOICES["cpu"][name].kind == "for-loop":
        return type(name, (torch_class, *ours), members)
    fused_devices = set(_get_fused_kernels_supported_devices()) - FACTS[name].not_fused_on
    how = Implementations(torch_class, lambda: CHOICES["cpu"][name], fused_devices)
    torch_step = torch_class.step
    if getattr(torch_step, "hooked", False):  # by an instance made before: the hooks are those of this class, once
        torch_step = torch_step.__wrapped__  # type: ignore[attr-defined]

    def init_group(self: Any, group: dict[str, Any], *lists: list[Any]) -> Any:
        _begin_adagrad(self, group)
        return torch_class._init_group(self, group, *lists)  # type: ignore[attr-defined]

    def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        if torch.compiler.is_compiling() or not _is_ours_to_step(self, how):
            return torch_step(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            FlatStep.of(self).step(self, how)
        return loss

    def steps_fused(self: Any) -> bool:
        """Whether dense CPU tensors of one dtype, float32 or float64, are stepped by the fused kernel in all groups."""
        return all(
            group["fused"]
            if group.get("fused") is not None
            else how.choice.kind == "fused" and how.are_free(group) and not isinstance(group["lr"], Tensor)
            for group in self.param_groups
        )

    step.__doc__ = torch_class.step.__doc__
    members["step"] = step
    members["_steps_fused"] = steps_fused
    if name == "Adagrad":
        members["_init_group"] = init_group
    kind = type(name, (torch_class, *ours), members)
    _HOW[kind] = how
    return kind


def _is_ours_to_step(optimizer: Any, how: Implementations) -> bool:
    """Whether there is anything to choose, and no ``GradScaler`` that lets a kernel unscale the gradients."""
    return (
        getattr(optimizer, "grad_scale", None) is None
        and getattr(optimizer, "found_inf", None) is None
        and not optimizer.defaults.get("differentiable")
        and any(map(how.are_free, optimizer.param_groups))
    )


_OURS: list[type[torch.optim.Optimizer]] = []
_HOW: dict[type[torch.optim.Optimizer], Implementations] = {}

if not TYPE_CHECKING:
    for _name in __all__[:-2]:
        if hasattr(torch.optim, _name):  # Muon is new in torch 2.9
            globals()[_name] = _fastest(getattr(torch.optim, _name))
            _OURS.append(globals()[_name])
    __all__ = [name for name in __all__ if name in globals()]
