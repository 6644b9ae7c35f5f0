"""What an optimizer refuses, said before anything is changed and with the names of parameters. Nothing collective."""

import contextlib
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

from dpoptim.checks.alike import parameter_names
from dpoptim.checks.layers import layer_error
from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.gradients.autograd_hooks import is_reduced
from dpoptim.gradients.bucket import gradient_dtype
from dpoptim.step.classes import parameters_of
from dpoptim.step.implementations import sharing_memory
from dpoptim.step.inner_step import needs_closure
from dpoptim.wrapping_optimizer import WrappingOptimizer

__all__ = [
    "already_reduced",
    "check_closure",
    "check_not_stepped_by_another",
    "check_one_group",
    "check_same_parameters",
    "construction_error",
    "memory_error",
    "naming_gradients",
    "parameter_error",
]

# Packages whose optimizers around others pass on what they are told, and how far up they stand.
_ONLY_PASS_ON = ("torch", "dpoptim", "accelerate", "lightning", "pytorch_lightning", "heat")
_MAX_FRAMES = 9


def construction_error(
    optimizer: Optimizer,
    module: nn.Module | None,
    *,
    bucket_mb: float,
    overlap: bool | str,
    comm_hook: object,
    accumulate: int,
    shard: bool,
    node_shared: bool,
    is_alone: bool,
) -> Exception | None:
    """Return what is wrong with the arguments of this rank, or with the parameters, if anything is. Local.

    The arguments are those of ``DataParallelOptimizer``; ``is_alone`` says whether there is one rank only.
    """
    error = _argument_error(optimizer, module, bucket_mb, overlap, comm_hook, accumulate)
    if error is not None:
        return error
    names = parameter_names(optimizer.param_groups, module)
    return parameter_error(parameters_of(optimizer), names, module, is_alone=is_alone) or _division_error(
        optimizer, shard, node_shared
    )


def _argument_error(
    optimizer: object, module: object, bucket_mb: float, overlap: bool | str, comm_hook: object, accumulate: object
) -> Exception | None:
    """Return what is wrong with the arguments of this rank, if anything is."""
    if isinstance(optimizer, WrappingOptimizer):
        return TypeError("optimizer is already a DataParallelOptimizer: wrap the torch optimizer, once")
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


def _division_error(optimizer: Optimizer, shard: object, node_shared: object) -> Exception | None:
    """Return what is wrong with how the step is to be sharded, if anything is."""
    for name, value in (("shard", shard), ("node_shared", node_shared)):
        if not isinstance(value, bool):
            return TypeError(f"{name} must be True or False, got {value!r}")
    if not (shard or node_shared):
        return None
    if shard and node_shared:
        return ValueError("shard and node_shared exclude each other: node_shared shards the step as well")
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
    """Return an error if parameters can't be sharded among ranks for where they, or their gradients, lie. Local."""
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
    groups: Sequence[Mapping[str, Any]], known: Sequence[Sequence[Tensor]], *, are_sharded: bool
) -> None:
    """Raise ``RuntimeError`` if the groups have other parameters than those that are reduced. Local.

    Where they are sharded, each must be in the group that it was in.
    """
    now = [group["params"] for group in groups]
    if len(now) == len(known) and all(
        len(members) == len(others) and all(map(is_, members, others))
        for members, others in zip(now, known, strict=True)
    ):
        return
    parameters, before = list(chain.from_iterable(now)), list(chain.from_iterable(known))
    if len(parameters) == len(before) and all(map(is_, parameters, before)):
        if not are_sharded:
            return
        raise RuntimeError(
            "parameters were moved to another group, which a sharded step does not follow: detach() this optimizer, on "
            "all ranks, and wrap it anew"
        )
    index = next((i for i, (a, b) in enumerate(zip(parameters, before, strict=False)) if a is not b), None)
    what = f"{len(before)} became {len(parameters)}" if index is None else f"parameter {index} is another tensor now"
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
