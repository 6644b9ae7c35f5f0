"""WrappingOptimizer: an optimizer that stands for another one: its groups, state, hooks and attributes. Local."""

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from torch.optim import Optimizer

from dpoptim.step.step_hooks import FIRST_HOOK, run_hooks_around_step

__all__ = ["WrappingOptimizer"]

_HOOK_DICTS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class WrappingOptimizer(Optimizer):
    """An optimizer whose groups, state, defaults and hooks are those of another one: there is no second copy of any.

    What else the wrapped optimizer has, methods and attributes, is there to read, call and set. A name that begins with
    an underscore, or that a class of the wrapper has, also if it only annotates it, is the wrapper's own.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        The wrapped one.
    """

    _is_constructed = True  # but while torch's constructor runs
    _accumulates = False  # whether some steps are only counted
    _optimizer: Optimizer

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._is_constructed = False
        super().__init__(optimizer.param_groups, getattr(optimizer, "defaults", {}))
        for hooks in _HOOK_DICTS:  # hooks registered on the inner optimizer go on working, with the wrapper
            setattr(self, hooks, getattr(optimizer, hooks, OrderedDict()))
        step_hooks = cast("OrderedDict[int, Any]", self._optimizer_step_pre_hooks)
        step_hooks[FIRST_HOOK] = self._before_step
        step_hooks.move_to_end(FIRST_HOOK, last=False)
        self._is_constructed = True

    def _patch_step_function(self) -> None:
        """Wrap this class's step, as torch does here (Note [A step without its mark] in step_hooks.py)."""
        run_hooks_around_step(type(self))
        super()._patch_step_function()

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The one live list of parameter groups, the wrapped optimizer's."""
        return self._optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        if self._is_constructed:  # before, torch's constructor sets what is there
            self._optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state."""
        return self._optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        if self._is_constructed:
            self._optimizer.state = value
            self._note_new_state()

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults."""
        return self._optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        if self._is_constructed:
            self._optimizer.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to those of the wrapped optimizer."""
        if self._is_constructed:  # before, torch's constructor adds those that are there
            self._optimizer.add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what ``load_state_dict`` has prepared, with the wrapped class's own adjustments."""
        self._optimizer.__setstate__(state)

    def __getattr__(self, name: str) -> Any:
        """Return what the wrapped optimizer has and this class has not."""
        optimizer = self.__dict__.get("_optimizer")
        if optimizer is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        try:
            value = getattr(optimizer, name)
        except AttributeError as error:
            kinds = f"neither {type(self).__name__} nor the wrapped {type(optimizer).__name__}"
            raise AttributeError(f"{kinds} has an attribute {name!r}") from error
        is_method = getattr(value, "__self__", None) is optimizer and not name.startswith("_")
        return partial(self._call_method, name, value) if is_method else value

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the wrapped optimizer, unless it is one of this class."""
        attributes = self.__dict__
        is_own = name.startswith("_") or name in attributes or name in _own_names(cast("Any", type(self)))
        if is_own or not attributes.get("_is_constructed"):
            super().__setattr__(name, value)
        else:
            setattr(self._optimizer, name, value)

    # ---------------------------------------------------------------- what a derived class may do

    def _before_step(self, stepped: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Do what is to be done before a step, and before the user's hooks see the gradients; here nothing."""

    def _count_batch(self, closure: Callable[[], Any] | None = None) -> bool:  # noqa: ARG002  others need it
        """Count a batch, if a step is made of several, and return whether it was counted rather than to be stepped."""
        return False

    def _note_new_state(self) -> None:
        """Do what is to be done when the wrapped optimizer was given another state; here nothing."""

    def _call_method(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002  others need it
        """Call a method of the wrapped optimizer, and return what it returns."""
        return method(*args, **kwargs)


@functools.cache
def _own_names(kind: Any) -> frozenset[str]:
    """Return the names of attributes that are the wrapper's own: of its classes, also what they only annotate."""
    annotated = (name for base in kind.__mro__ for name in inspect.get_annotations(base))
    return frozenset((*dir(kind), *annotated))
