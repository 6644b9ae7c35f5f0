"""What an optimizer refuses, said before anything is changed and with the names of parameters. Nothing collective."""

import contextlib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from dpoptim.checks.layers import layer_error
from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.gradients.bucket import gradient_dtype
from dpoptim.gradients.reducer import is_reduced
from dpoptim.step.facts import FACTS, NUMBERS
from dpoptim.step.implementations import sharing_memory
from dpoptim.step.inner_step import needs_closure

__all__ = [
    "already_reduced",
    "argument_error",
    "check_closure",
    "check_loadable",
    "check_not_stepped_by_another",
    "check_one_group",
    "check_same_parameters",
    "division_error",
    "memory_error",
    "naming_gradients",
    "parameter_error",
]

# Hyper-parameters that torch has added to optimizers, so that older states lack them; it fills them in.
_ADDED_LATER = {"foreach", "fused", "maximize", "capturable", "differentiable", "decoupled_weight_decay"}
# Packages whose optimizers around others pass on what they are told, and how far up they stand.
_ONLY_PASS_ON = ("torch", "dpoptim", "accelerate", "lightning", "pytorch_lightning", "heat")
_MAX_FRAMES = 8
_NO_HYPER_PARAMETERS = {"params", "param_names", "self", "initial_lr"}


def argument_error(
    optimizer: object, module: object, bucket_mb: float, overlap: bool | str, comm_hook: object, accumulate: object
) -> Exception | None:
    """Return what is wrong with the arguments of this rank, if anything is."""
    if not isinstance(optimizer, Optimizer):
        return TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not isinstance(getattr(optimizer, "param_groups", None), list):
        return TypeError(f"optimizer must have a list of param_groups, {type(optimizer).__name__} has none")
    if module is not None and not isinstance(module, nn.Module):
        return TypeError(f"module must be a torch.nn.Module or None, got {type(module).__name__}")
    if not isinstance(bucket_mb, (int, float)) or not bucket_mb > 0:
        return ValueError(f"bucket_mb must be > 0, got {bucket_mb!r}")
    if overlap not in ("auto", True, False):
        return ValueError(f'overlap must be "auto", True or False, got {overlap!r}')
    if comm_hook is not None and not callable(comm_hook):
        return TypeError(f"comm_hook must be callable, got {type(comm_hook).__name__}")
    if not isinstance(accumulate, int) or accumulate < 1:
        return ValueError(f"accumulate must be an integer >= 1, got {accumulate!r}")
    return already_reduced([parameter for group in optimizer.param_groups for parameter in group["params"]])


def division_error(optimizer: Optimizer, shard: object, node_shared: object) -> Exception | None:
    """Return what is wrong with how the step is to be divided, if anything is."""
    for name, value in (("shard", shard), ("node_shared", node_shared)):
        if not isinstance(value, bool):
            return TypeError(f"{name} must be True or False, got {value!r}")
    if not (shard or node_shared):
        return None
    if shard and node_shared:
        return ValueError("shard and node_shared exclude each other: node_shared divides the step as well")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return ValueError("differentiable=True does not go with shard or node_shared, which step parts of parameters")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    other = next((parameter.device for parameter in parameters if parameter.device.type != "cpu"), None)
    if node_shared and other is not None:
        return ValueError(f"node_shared=True needs all parameters on cpu, got one on {other}: use shard=True")
    return None


def already_reduced(parameters: Sequence[Tensor]) -> ValueError | None:
    """Return an error if one of these parameters belongs to an optimizer. Local."""
    for index, parameter in enumerate(parameters):
        if is_reduced(parameter):
            return ValueError(
                f"parameter {index} of shape {tuple(parameter.shape)} belongs to another DataParallelOptimizer: "
                "detach() that one first"
            )
    return None


def memory_error(parameters: Sequence[Tensor], names: Sequence[str]) -> ValueError | None:
    """Return an error if parameters can't be divided among ranks for where they, or their gradients, lie. Local."""
    seen: dict[int, str] = {}
    for parameter, name in zip(parameters, names, strict=True):
        if id(parameter) in seen:
            return ValueError(f"parameters '{seen[id(parameter)]}' and '{name}' are one")
        seen[id(parameter)] = name
        if gradient_dtype(parameter) != parameter.dtype:
            dtypes = f"{parameter.dtype}, but its gradient is kept in {gradient_dtype(parameter)}"
            return ValueError(f"parameter '{name}' is {dtypes}")
        if any(stride == 0 and size > 1 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
            return ValueError(f"elements of parameter '{name}' are one (an expanded tensor)")
    shared = sorted(sharing_memory([parameters]))
    if shared:
        return ValueError(f"parameters {', '.join(repr(names[index]) for index in shared)} share memory")
    return None


def parameter_error(
    parameters: Sequence[Tensor], names: Sequence[str], module: nn.Module | None, *, is_alone: bool
) -> ValueError | None:
    """Return what is wrong with these parameters on several ranks, if anything is. Local."""
    if is_alone:
        return None
    for name, parameter in zip(names, parameters, strict=True):
        if is_lazy(parameter):
            return ValueError(
                f"parameter '{name}' is not initialised yet (a lazy module): run the module once, then construct the "
                "optimizer"
            )
        if parameter.is_meta:
            return ValueError(
                f"parameter '{name}' is on the meta device and has no values: call module.to_empty(device=...) and "
                "initialise it, then construct the optimizer"
            )
        if not parameter.is_leaf:
            return ValueError(
                f"parameter '{name}' is the result of a computation (not a leaf), whose gradients can't be reduced "
                "over ranks, with differentiable=True neither: give the optimizer the tensors that it was computed from"
            )
    return layer_error(parameters, names, module)


def check_loadable(optimizer: Optimizer, state_dict: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise ``ValueError`` that says what differs unless a state dict is one of such an optimizer. Local.

    Parameters
    ----------
    optimizer : Optimizer
        The one that is to load it; not changed.
    state_dict : mapping
        In torch's form: ``state`` and ``param_groups``.
    names : sequence of str
        A name for each parameter of the optimizer.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(
                f"the state dict of an optimizer must have '{key}', got only {sorted(map(str, state_dict))}"
            )
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if len(groups) != len(saved_groups):
        raise ValueError(
            f"the state dict must have {len(groups)} parameter groups, as the optimizer has, got {len(saved_groups)}"
        )
    for number, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                f"parameter group {number} must have {len(group['params'])} parameters in the state dict, as in the "
                f"optimizer, got {len(saved['params'])}"
            )
    torch_class = _torch_class(optimizer)
    if torch_class is None:
        return  # nobody else's state is known here
    for number, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        _check_hyper_parameters(torch_class, number, group, saved)
    parameters = [parameter for group in groups for parameter in group["params"]]
    places = [place for saved in saved_groups for place in saved["params"]]
    for parameter, place, name in zip(parameters, places, names, strict=True):
        entry = state_dict["state"].get(place)
        if entry:
            _check_state(torch_class, parameter, name, entry)


def _check_hyper_parameters(
    torch_class: type[Optimizer], number: int, group: Mapping[str, Any], saved: Mapping[str, Any]
) -> None:
    own = _hyper_parameters(torch_class)
    lacking = sorted((own & group.keys()) - saved.keys() - _ADDED_LATER)
    foreign = sorted((saved.keys() & _all_hyper_parameters()) - own - group.keys())
    if lacking or foreign:
        what = [f"has no {', '.join(lacking)}"] * bool(lacking) + [f"has {', '.join(foreign)}"] * bool(foreign)
        raise ValueError(
            f"the state dict must be one of {torch_class.__name__}, got one of another optimizer: its parameter group "
            f"{number} {' and '.join(what)}"
        )


def _check_state(torch_class: type[Optimizer], parameter: Tensor, name: str, entry: Mapping[str, Any]) -> None:
    kind = torch_class.__name__
    always, sometimes = FACTS[kind].keeps, FACTS[kind].may_keep
    if always is None:
        return  # LBFGS keeps a history in vectors of all parameters
    # What is no torch optimizer's was added by a wrapper of somebody else, such as a slow average.
    if not always <= entry.keys() or entry.keys() & _all_state_keys() - always - sometimes:
        expected = ", ".join(sorted(always)) or "nothing"
        optional = f" (or also {', '.join(sorted(sometimes))})" if sometimes else ""
        raise ValueError(
            f"the state of parameter '{name}' must hold {expected}{optional}, as that of {kind}, got "
            f"{', '.join(map(str, entry))}: the state dict is one of another optimizer"
        )
    for key, value in entry.items():
        expected_shape = _state_shape(key, parameter)
        if key in always | sometimes and isinstance(value, Tensor) and value.shape != expected_shape:
            raise ValueError(
                f"'{key}' of parameter '{name}' must have shape {tuple(expected_shape)} in the state dict, got "
                f"{tuple(value.shape)}: the parameter itself has shape {tuple(parameter.shape)}"
            )


@functools.cache
def _all_state_keys() -> frozenset[str]:
    return frozenset[str]().union(*((facts.keeps or frozenset()) | facts.may_keep for facts in FACTS.values()))


def _state_shape(key: str, parameter: Tensor) -> torch.Size:
    if key in NUMBERS:
        return torch.Size([])
    shape = list(parameter.shape)
    if key == "row_var":
        shape[-1] = 1
    elif key == "col_var":
        shape[-2] = 1
    return torch.Size(shape)


def _torch_class(optimizer: Optimizer) -> type[Optimizer] | None:
    """Return the class of ``torch.optim`` that an optimizer is of, if it is of one."""
    known: list[type[Optimizer]] = [getattr(torch.optim, name) for name in FACTS if hasattr(torch.optim, name)]
    return next((kind for kind in type(optimizer).__mro__ if kind in known), None)


def _hyper_parameters(torch_class: type[Optimizer]) -> set[str]:
    return set(inspect.signature(torch_class.__init__).parameters) - _NO_HYPER_PARAMETERS


@functools.cache
def _all_hyper_parameters() -> frozenset[str]:
    return frozenset[str]().union(
        *(_hyper_parameters(getattr(torch.optim, name)) for name in FACTS if hasattr(torch.optim, name))
    )


@contextlib.contextmanager
def naming_gradients(optimizer: Optimizer, names: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Let an optimizer that refuses sparse, or dense, gradients within say which parameter has one.

    Gradients are of one kind on all ranks when they have been reduced, so all raise the error.
    """
    try:
        yield
    except RuntimeError as error:
        refused = re.search(r"does not support (sparse|dense) gradients", str(error))
        if refused is None:
            raise
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        named = [
            f"'{name}'"
            for name, parameter in zip(names(), parameters, strict=True)
            if parameter.grad is not None and parameter.grad.is_sparse == (refused[1] == "sparse")
        ]
        message = f"the gradient of parameter {', '.join(named)} is {refused[1]}: {error}"
        raise raised_on_all_ranks(RuntimeError(message)) from error


def check_closure(optimizer: Optimizer, closure: object) -> None:
    """Raise ``TypeError`` if the optimizer steps with a closure only, as LBFGS, and there is none. Local."""
    if closure is None and needs_closure(optimizer):
        message = f"{type(optimizer).__name__}.step() missing 1 required positional argument: 'closure'"
        raise raised_on_all_ranks(TypeError(message))


def check_same_parameters(
    groups: Sequence[Mapping[str, Any]], known: Sequence[Sequence[Tensor]], *, are_divided: bool
) -> None:
    """Raise ``RuntimeError`` if the groups have other parameters than those that are reduced. Local.

    Where they are divided, each must be in the group that it was in.
    """
    now = [group["params"] for group in groups]
    if len(now) == len(known) and all(
        len(members) == len(others) and all(map(is_, members, others))
        for members, others in zip(now, known, strict=True)
    ):
        return
    parameters, before = list(chain.from_iterable(now)), list(chain.from_iterable(known))
    if len(parameters) == len(before) and all(map(is_, parameters, before)):
        if not are_divided:
            return
        raise RuntimeError(
            "parameters were moved to another group, which a divided step does not follow: detach() this optimizer, on "
            "all ranks, and wrap it anew"
        )
    place = next((i for i, (a, b) in enumerate(zip(parameters, before, strict=False)) if a is not b), None)
    what = f"{len(before)} became {len(parameters)}" if place is None else f"parameter {place} is another tensor now"
    raise RuntimeError(
        f"param_groups must keep the parameters that were wrapped, but {what}: add parameters with add_param_group(); "
        "to replace or remove some, detach() this optimizer first, on all ranks, and wrap the changed one anew"
    )


def check_not_stepped_by_another(optimizer: Optimizer) -> None:
    """Raise ``RuntimeError`` if the step of an optimizer is called by one that has it as its own part. Local.

    Lookahead and its kind read all gradients or write to all parameters around the step, on every rank.
    """
    frame = sys._getframe(1)
    for _ in range(_MAX_FRAMES):
        if frame.f_back is None:
            return
        frame = frame.f_back
        code = frame.f_code
        outer = frame.f_locals.get(code.co_varnames[0]) if code.co_name == "step" and code.co_argcount else None
        if outer is None or outer is optimizer or not hasattr(outer, "param_groups"):
            continue
        if type(outer).__module__.split(".")[0] in _ONLY_PASS_ON:
            continue
        raise RuntimeError(
            f"{type(outer).__name__} steps this DataParallelOptimizer and may read all gradients or write to all "
            "parameters around the step, while each rank has a part of them alone: wrap it the other way round, "
            f"DataParallelOptimizer({type(outer).__name__}(...)), or leave out shard and node_shared"
        )


def check_one_group(optimizer: Optimizer) -> None:
    """Raise ``ValueError`` if an optimizer that can't have several parameter groups is to get another one. Local."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS doesn't support per-parameter options (parameter groups)")
