"""Copies of a model with the optimizer that trains it, to train them without touching either. Local.

Tests: ``tests/utils/test_verify.py``.
"""

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["TrainingCopy", "is_own_hook", "make_plain"]


@dataclass
class TrainingCopy:
    """A model and its optimizer, copied together, so that the one's parameters are the other's.

    Hooks of modules and of parameters are those of the original, but for dpoptim's own. Hooks around the step and the
    state are not copied: what they do is not known to be undone.

    Attributes
    ----------
    model, optimizer : nn.Module, Optimizer
        The copies.
    parameters : list of Tensor
        All parameters of the copied optimizer, in order.
    """

    model: nn.Module
    optimizer: Optimizer
    parameters: list[Tensor] = field(default_factory=list)
    _late_hooks: list[tuple[Tensor, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, wrapper: Any, model: nn.Module) -> "TrainingCopy":
        """Copy a model and the optimizer that ``wrapper`` wraps; the wrapper itself is not copied.

        Raises
        ------
        TypeError
            Something in the model or in the optimizer can't be copied; the message says what.
        """
        memo: dict[int, Any] = {id(wrapper): wrapper}
        optimizers: dict[int, Optimizer] = {}
        _find_optimizers(wrapper.optimizer, optimizers)
        memo |= {number: object.__new__(type(optimizer)) for number, optimizer in optimizers.items()}
        made = cls(_copied(model, memo, f"the model ({type(model).__name__})"), memo[id(wrapper.optimizer)])
        made._carry_over(list(model.parameters()), memo)
        for number, optimizer in optimizers.items():
            for name, value in vars(optimizer).items():
                what = f"attribute '{name}' of {type(optimizer).__name__}"
                if name.startswith("_optimizer_") and name.endswith("_hooks"):
                    memo[number].__dict__[name] = OrderedDict()
                elif name != "step":  # put there by a scheduler: it steps the original
                    memo[number].__dict__[name] = _copied(value, memo, what)
        made.parameters = [p for group in made.optimizer.param_groups for p in group["params"]]
        return made

    def add_late_hooks(self) -> None:
        """Register the user's hooks that come after dpoptim's own, when those are there."""
        for parameter, hook in self._late_hooks:
            parameter.register_post_accumulate_grad_hook(hook)

    def _carry_over(self, originals: list[nn.Parameter], memo: dict[int, Any]) -> None:
        """Give the copied parameters what ``copy.deepcopy`` leaves out: attributes, layout, hooks."""
        num_users = Counter(p.untyped_storage().data_ptr() for p in originals)
        storages: dict[int, Any] = {}
        for original in originals:
            made = memo[id(original)]
            made.__dict__.update(vars(original))
            storage = original.untyped_storage()
            if num_users[storage.data_ptr()] > 1 or made.stride() != original.stride():
                own = storages.setdefault(storage.data_ptr(), storage.clone())
                layout = (original.storage_offset(), original.shape, original.stride())
                made.data = torch.empty(0, dtype=original.dtype, device=original.device).set_(own, *layout)
            if not original.requires_grad:
                continue
            for hook in (original._backward_hooks or {}).values():
                if not is_own_hook(hook):
                    made.register_hook(hook)
            is_late = False
            for hook in (original._post_accumulate_grad_hooks or {}).values():
                if is_own_hook(hook):
                    is_late = True
                elif is_late:
                    self._late_hooks.append((made, hook))
                else:
                    made.register_post_accumulate_grad_hook(hook)


def make_plain(optimizer: Optimizer) -> None:
    """Turn a copied optimizer of dpoptim's own classes into torch's, that steps one parameter after another."""
    found: dict[int, Optimizer] = {}
    _find_optimizers(optimizer, found)
    for each in found.values():
        if type(each).__module__ == "dpoptim.torch_optim":
            each.__class__ = next(kind for kind in type(each).__mro__ if kind.__module__.startswith("torch."))
            for group in each.param_groups:
                group.update({key: False for key in ("foreach", "fused") if key in group})


def _find_optimizers(optimizer: Optimizer, found: dict[int, Optimizer]) -> None:
    """Collect an optimizer and those that it holds: torch copies them without their attributes."""
    if id(optimizer) in found:
        return
    found[id(optimizer)] = optimizer
    for value in vars(optimizer).values():
        for item in _items(value):
            if isinstance(item, Optimizer):
                _find_optimizers(item, found)


def _items(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, (list, tuple)):
        yield from value
    elif isinstance(value, dict):
        yield from value.values()


def _copied(value: Any, memo: dict[int, Any], what: str) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        raise TypeError(f"{what} can't be copied, which verify_step needs: {error}") from error


def is_own_hook(hook: Any) -> bool:
    """Whether a hook is one of dpoptim's."""
    while hasattr(hook, "func"):
        hook = hook.func
    module: str = getattr(hook, "__module__", None) or ""
    return module.split(".", maxsplit=1)[0] == "dpoptim"
