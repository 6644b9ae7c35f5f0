"""Hooks of autograd: what tells a reducer, or a gradient's home, that a gradient is made, added to, or ready. Local."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any, Protocol

from torch import Tensor

__all__ = [
    "AddingListener",
    "GradientHook",
    "Listener",
    "ParameterHooks",
    "hear_before_making",
    "is_reduced",
    "listeners_of",
]


class Listener(Protocol):
    """What hears of gradients, by their parameters' numbers."""

    def on_gradient(self, index: int, parameter: Tensor) -> None:
        """Take note that a parameter's gradient is ready."""


class AddingListener(Protocol):
    """What hears before autograd adds to gradients, by their parameters' numbers."""

    put_aside: dict[int, Tensor]

    def before_adding(self, index: int) -> None:
        """Take note that autograd is about to add to a gradient."""

    def before_making(self, index: int) -> None:
        """Take note that autograd is about to make a gradient, while a part of some is put aside."""


class GradientHook(partial[None]):
    """Tells a listener that autograd has accumulated a parameter's gradient; without a call of its own."""


class _BeforeAdding:
    def __init__(self, listener: AddingListener, index: int, parameter: Tensor) -> None:
        self._listener, self._index, self._parameter = listener, index, parameter
        self._put_aside = listener.put_aside

    def __call__(self, _: Tensor) -> None:
        if self._parameter.grad is not None:
            self._listener.before_adding(self._index)
        elif self._put_aside:
            self._listener.before_making(self._index)


class ParameterHooks:
    """The hooks on the parameters of one reducer."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._ids: dict[int, int] = {}

    def add(self, index: int, parameter: Tensor, listener: Listener, adding: AddingListener | None) -> None:
        """Let a listener hear of this parameter's gradients from now on, and another before autograd adds to them."""
        hook = GradientHook(listener.on_gradient, index)
        handle = _add_hook(parameter, lambda p: p.register_post_accumulate_grad_hook(hook))
        self._handles.append(handle)
        self._ids[index] = handle.id
        if adding is not None:
            before = _BeforeAdding(adding, index, parameter)
            self._handles.append(_add_hook(parameter, lambda p: p.register_hook(before)))

    def remove(self) -> None:
        """Take all of them off the parameters, which stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def is_last(self, index: int, parameter: Tensor) -> bool:
        """Whether no hook of the user's follows, which may change the gradient; else it goes first from now on."""
        hooks = parameter._post_accumulate_grad_hooks
        if hooks is None or len(hooks) == 1:
            return True
        own = self._ids[index]
        if next(reversed(hooks)) == own:
            return True
        hooks[own] = hooks.pop(own)
        return False


def hear_before_making(hear: Callable[[Tensor, Tensor], object], parameter: Tensor) -> Any:
    """Have this called with the parameter before its gradient is made or added to; return the hook's handle."""
    return _add_hook(parameter, lambda p: p.register_hook(partial(hear, p)))


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
