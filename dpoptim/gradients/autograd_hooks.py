"""Hooks of autograd: what tells a reducer, or a gradient's home, that a gradient is made, added to, or ready. Local."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any, Protocol

from torch import Tensor

from dpoptim.gradients.homes import Home

__all__ = [
    "GradientHook",
    "Listener",
    "hear_after_adding",
    "hear_before_adding",
    "hear_before_making",
    "is_reduced",
    "listeners_of",
]


class Listener(Protocol):
    """What hears of gradients, by their parameters' numbers."""

    put_aside: dict[int, Tensor]

    def on_gradient(self, index: int, parameter: Tensor) -> None:
        """Take note that a parameter's gradient is ready."""

    def before_adding(self, index: int) -> None:
        """Take note that autograd is about to add to a gradient."""

    def before_making(self, index: int) -> None:
        """Take note that autograd is about to make a gradient of which a part is put aside."""


class GradientHook(partial[None]):
    """Tells a listener that autograd has accumulated a parameter's gradient; without a call of its own."""


class _BeforeAdding:
    def __init__(self, listener: Listener, index: int, parameter: Tensor) -> None:
        self._listener, self._index, self._parameter = listener, index, parameter
        self._put_aside = listener.put_aside

    def __call__(self, _: Tensor) -> None:
        if self._parameter.grad is not None:
            self._listener.before_adding(self._index)
        elif self._put_aside:
            self._listener.before_making(self._index)


def hear_after_adding(listener: Listener, index: int, parameter: Tensor) -> Any:
    """Let a listener hear when this parameter's gradient is ready; return the hook's handle."""
    hook = GradientHook(listener.on_gradient, index)
    return _add_hook(parameter, lambda p: p.register_post_accumulate_grad_hook(hook))


def hear_before_adding(listener: Listener, index: int, parameter: Tensor) -> Any:
    """Let a listener hear before autograd makes this parameter's gradient or adds to it; return the hook's handle."""
    return _add_hook(parameter, lambda p: p.register_hook(_BeforeAdding(listener, index, p)))


def hear_before_making(home: Home, parameter: Tensor) -> Any:
    """Let a gradient's home hear before autograd makes the gradient or adds to it; return the hook's handle."""
    return _add_hook(parameter, lambda p: p.register_hook(partial(home.before_adding, p)))


def is_reduced(parameter: Tensor) -> bool:
    """Whether somebody hears of this parameter's gradients."""
    return any(isinstance(hook, GradientHook) for hook in (parameter._post_accumulate_grad_hooks or {}).values())


def listeners_of(parameters: Iterable[Tensor]) -> set[Any]:
    """Return who hears of a gradient of one of these parameters."""
    hooks = chain.from_iterable((parameter._post_accumulate_grad_hooks or {}).values() for parameter in parameters)
    return {hook.func.__self__ for hook in hooks if isinstance(hook, GradientHook)}  # type: ignore[attr-defined]


def _add_hook(parameter: Tensor, register: Callable[[Any], Any]) -> Any:
    """Register a hook, on a frozen parameter too: it may be unfrozen later."""
    frozen = not parameter.requires_grad
    parameter.requires_grad_(True)
    handle = register(parameter)
    if frozen:
        parameter.requires_grad_(False)
    return handle
