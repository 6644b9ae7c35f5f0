"""What is left as it was: gradients, buffers, random numbers and hooks. Local.

Tests: ``tests/utils/test_verify.py``.
"""

import contextlib
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from dpoptim.utils.checkpoint.rng import get_rng, set_rng

__all__ = ["Hooks", "emptied", "global_step_hooks", "is_same", "untouched"]

Hooks = MutableMapping[Any, Any]


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Leave gradients, buffers and global random numbers as they are, whatever is done to them within."""
    random_numbers = get_rng()
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    kept = [gradient for _, gradient in gradients if gradient is not None] + list(model.buffers())
    copies = [(tensor, tensor._version, tensor.detach().clone()) for tensor in kept]
    try:
        yield
    finally:
        set_rng(random_numbers)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for tensor, version, values in copies:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(values)


@contextlib.contextmanager
def emptied(*hooks: Hooks) -> Iterator[None]:
    """Take these hooks off within."""
    before = [list(each.items()) for each in hooks]
    for each in hooks:
        each.clear()
    try:
        yield
    finally:
        for each, items in zip(hooks, before, strict=True):
            each.clear()
            each.update(items)


def global_step_hooks() -> tuple[Hooks, Hooks]:
    """Return the hooks that torch runs around the steps of all optimizers."""
    return torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks


def is_same(state: Any, other: Any) -> bool:
    """Whether two states of generators are equal."""
    if isinstance(state, Tensor):
        return torch.equal(state, other)
    if isinstance(state, dict):
        return all(is_same(value, other[key]) for key, value in state.items())
    if isinstance(state, (list, tuple)):
        return all(map(is_same, state, other))
    return bool(state == other)
