"""KeptAttributes: the state that an optimizer keeps outside of ``state`` and its groups, in a state dict. Local.

Note [State elsewhere]
----------------------
Some classes outside of torch count their steps in an attribute, or wrap another optimizer that has a state of its own.
Neither is in the state dict of ``torch.optim.Optimizer``, so that a resumed training would go on otherwise, in silence.
A state dict of the wrapper has them under ``"attributes"``, which torch passes over when it loads one. torch's own
classes keep nothing elsewhere.
"""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dpoptim.divisibility import is_known, nested_optimizers

__all__ = ["KeptAttributes"]

_NOT_KEPT = ("state", "param_groups", "defaults", "step")
_PLAIN = (bool, int, float, complex, str, type(None))


class KeptAttributes:
    """What one optimizer keeps in its attributes (Note [State elsewhere]).

    Parameters
    ----------
    optimizer : Optimizer
        Whose numbers and tensors are noted now: what has changed later is state.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._at_start: dict[str, Any] = {}
        if not is_known(type(optimizer)):
            self._at_start = {
                key: copy.deepcopy(value) if _is_data(value) else _Other(value) for key, value in self._own()
            }

    def entry(self) -> dict[str, Any]:
        """Return the entry of a state dict, ``{"attributes": {...}}``; nothing if there is nothing to keep.

        Warns if an attribute has changed that can't be saved.
        """
        if is_known(type(self._optimizer)):
            return {}
        kept: dict[str, Any] = {}
        for key, value in self._own():
            start = self._at_start.get(key)
            if _is_data(value):
                if isinstance(start, _Other) or not _same(value, start):
                    kept[key] = copy.deepcopy(value)
            elif _has_tensors(value) and not (isinstance(start, _Other) and start.was_so(value)):
                warnings.warn(
                    f"{type(self._optimizer).__name__} keeps state in its attribute '{key}' that can't be saved: a "
                    "resumed training may go on otherwise",
                    stacklevel=3,
                )
        for key, nested in self._nested().items():
            kept[key] = nested.state_dict()
        return {"attributes": kept} if kept else {}

    def load(self, attributes: Mapping[str, Any]) -> None:
        """Take over copies of what :meth:`entry` returned."""
        nested = self._nested()
        for key, value in attributes.items():
            if key in nested:
                inner = nested[key]
                groups = self._optimizer.param_groups
                inner.load_state_dict(value)
                if len(groups) == len(inner.param_groups):
                    inner.param_groups = groups  # they share them
            else:
                vars(self._optimizer)[key] = copy.deepcopy(value)

    def _own(self) -> list[tuple[str, Any]]:
        return [
            (key, value)
            for key, value in vars(self._optimizer).items()
            if key not in _NOT_KEPT and not key.startswith(("_optimizer_", "_zero_grad", "_opt_called", "_warned"))
        ]

    def _nested(self) -> dict[str, Optimizer]:
        """Return the optimizers that this one steps and that have a state of their own."""
        nested = nested_optimizers(self._optimizer)
        return {key: inner for key, inner in nested.items() if inner.state is not self._optimizer.state}


class _Other:
    """Stands for a value that is not data, as it was at the start."""

    def __init__(self, value: Any) -> None:
        self._size = len(value) if hasattr(value, "__len__") else None

    def was_so(self, value: Any) -> bool:
        return self._size == (len(value) if hasattr(value, "__len__") else None)


def _is_data(value: Any) -> bool:
    """Whether a value is made of numbers, texts and tensors."""
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) and _is_data(one) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_data, value))
    return isinstance(value, _PLAIN) or (isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter))


def _has_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_tensors(one) for one in value.values())
    if isinstance(value, (list, tuple)):
        return any(map(_has_tensors, value))
    return isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter)


def _same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, Tensor) or isinstance(theirs, Tensor):
        return isinstance(mine, Tensor) and isinstance(theirs, Tensor) and torch.equal(mine, theirs)
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return mine.keys() == theirs.keys() and all(_same(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, (list, tuple)) and isinstance(theirs, (list, tuple)):
        return len(mine) == len(theirs) and all(map(_same, mine, theirs))
    return bool(mine == theirs) and type(mine) is type(theirs)
