"""What of an optimizer must be alike on all ranks, in the words of the error messages.

Tests: ``tests/checks/test_ranks_alike.py``.
"""

import zlib
from collections.abc import Iterator, Sequence
from enum import Enum
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpoptim.comm.communicator import Communicator
from dpoptim.utils.consistency import ParameterFacts, check_optimizers_agree, digest, raise_together

__all__ = ["check_alike", "check_same_arguments", "parameter_names", "qualified_name", "settings_in_words"]


# What is the same on all ranks if it is written in the same way.
_PLAIN = (Number, str, bytes, Enum, range, slice, torch.dtype, torch.device, torch.layout, torch.memory_format)
_MAX_DEPTH = 8


def parameter_names(param_groups: Sequence[dict[str, Any]], module: nn.Module | None) -> list[str]:
    """Return a name for every parameter: the optimizer's own, else the module's, else its position."""
    by_identity = {} if module is None else {id(parameter): name for name, parameter in module.named_parameters()}
    names: list[str] = []
    for number, group in enumerate(param_groups):
        own = group.get("param_names")
        for index, parameter in enumerate(group["params"]):
            position = f"{index} of group {number}"
            names.append(own[index] if own else by_identity.get(id(parameter), position))
    return names


def qualified_name(function: Any) -> str:
    """Return where a callable, or a callable object's class, is defined."""
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{kind.__module__}.{kind.__qualname__}"


def settings_in_words(module: nn.Module | None, comm_hook: object, **others: object) -> dict[str, str]:
    """Describe what an optimizer was constructed with, by name, so that ranks can compare it."""
    settings = {"comm_hook": repr(comm_hook and qualified_name(comm_hook))}
    settings |= {name: repr(value) for name, value in others.items()}
    if module is not None:  # everything of it that is broadcast
        tensors = [*module.named_parameters(), *module.named_buffers()]
        layout = zlib.crc32(repr([(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]).encode())
        kind = type(module).__name__
        settings["module"] = f"{kind} with {len(tensors)} parameters and buffers, layout {layout:08x}"
    return settings


def check_alike(
    communicator: Communicator, optimizer: Optimizer, names: Sequence[str], settings: dict[str, str]
) -> None:
    """Raise on all ranks if their optimizers differ; collective."""
    parameters = [(number, p) for number, group in enumerate(optimizer.param_groups) for p in group["params"]]
    facts = [
        ParameterFacts(name, number, tuple(p.shape), str(p.dtype), p.requires_grad)
        for name, (number, p) in zip(names, parameters, strict=True)
    ]
    hyper_parameters = [
        {key: _as_text(value) for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]
    state = [{key: _state_text(value) for key, value in optimizer.state.get(p, {}).items()} for _, p in parameters]
    check_optimizers_agree(communicator, facts, hyper_parameters, {"optimizer": type(optimizer).__name__, **settings})
    for name, (first, *others) in zip(names, zip(*communicator.all_gather_object(state), strict=True), strict=True):
        for rank, other in enumerate(others, 1):
            if other != first:
                error = ValueError(
                    f"parameter '{name}' has optimizer state {first} on rank 0 but {other} on rank {rank}: load the "
                    "state on every rank, or on none"
                )
                raise_together(communicator, error)


def check_same_arguments(communicator: Communicator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ``ValueError`` on all ranks if they step with different arguments; collective."""
    own = [digest(value) if isinstance(value, Tensor) else repr(value) for value in _leaves((args, kwargs))]
    different = [rank for rank, other in enumerate(communicator.all_gather_object(own)) if other != own]
    error = None
    if different:
        error = ValueError(f"the arguments of step() must be the same on all ranks, not so on ranks 0 and {different}")
    raise_together(communicator, error)


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what is in nested tuples, lists and dicts, with the keys."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield key
            yield from _leaves(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def _as_text(value: Any, depth: int = 0) -> str:
    """Describe a value of a group as far as ranks can compare it: of other objects their class alone."""
    if isinstance(value, Tensor):
        return f"a tensor on {value.device}" if value.is_meta else repr(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        if depth == _MAX_DEPTH:
            return f"a {type(value).__name__}"
        inner = depth + 1
        if isinstance(value, dict):
            pairs = sorted((_as_text(key, inner), _as_text(item, inner)) for key, item in value.items())
            return "{" + ", ".join(f"{key}: {item}" for key, item in pairs) + "}"
        texts = [_as_text(item, inner) for item in value]
        if isinstance(value, (set, frozenset)):
            return "{" + ", ".join(sorted(texts)) + "}"
        return ("({})" if isinstance(value, tuple) else "[{}]").format(", ".join(texts))
    if value is None or isinstance(value, _PLAIN):
        return repr(value)
    return f"a {qualified_name(type(value))}"


def _state_text(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
