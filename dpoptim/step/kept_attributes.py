"""KeptAttributes: the state that an optimizer keeps outside of ``state`` and its groups, in a state dict. Local.

Tests: ``tests/behaviour/test_other_classes.py``.

Note [State elsewhere]
----------------------
Some classes outside of torch count their steps in an attribute, or wrap another optimizer that has a state of its own.
Neither is in the state dict of ``torch.optim.Optimizer``, so that a resumed training would go on otherwise, in silence.
A state dict of the wrapper has them under ``"attributes"``, which torch passes over when it loads one. torch's own
classes keep nothing elsewhere.
"""

import contextlib
import copy
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dpoptim.step.classes import is_known, nested_optimizers, parameters_of, slots_of
from dpoptim.step.inner_step import InnerStep

__all__ = ["KeptAttributes", "aliases_kept"]

_NOT_KEPT = ("state", "param_groups", "defaults", "step")
# Key of the generators' states among the attributes.
_GENERATORS = "(generators)"
# How deep objects are looked into for what has changed.
_MAX_DEPTH = 4
_PLAIN = (bool, int, float, complex, str, type(None))


class KeptAttributes:
    """What one optimizer keeps in its attributes (Note [State elsewhere]).

    Parameters
    ----------
    optimizer : Optimizer
        Whose numbers and tensors are noted now: what has changed later is state.
    inner_step : InnerStep
        Has the generators that the class draws from, which are state too.
    """

    def __init__(self, optimizer: Optimizer, inner_step: InnerStep) -> None:
        self._optimizer = optimizer
        self._inner_step = inner_step
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
        ids = {id(parameter) for parameter in parameters_of(self._optimizer)}
        for key, value in self._own():
            start = self._at_start.get(key)
            if _has_one_of(value, ids):
                if not self._saves_itself and (isinstance(start, _Other) or not _same(value, start)):
                    self._warn_of(key)
            elif _is_data(value):
                if isinstance(start, _Other) or not _same(value, start):
                    kept[key] = list(copy.deepcopy(value)) if isinstance(value, deque) else copy.deepcopy(value)
            elif not (start.was_so(value) if isinstance(start, _Other) else _traits(value) is None):
                self._warn_of(key)
        for key, nested in self._nested().items():
            kept[key] = nested.state_dict()
        if generators := self._inner_step.generators():
            kept[_GENERATORS] = generators
        return {"attributes": kept} if kept else {}

    @property
    def _saves_itself(self) -> bool:
        return type(self._optimizer).state_dict is not Optimizer.state_dict

    def _warn_of(self, key: str) -> None:
        warnings.warn(
            f"{type(self._optimizer).__name__} keeps state in its attribute '{key}' that can't be saved: a resumed "
            "training may go on otherwise",
            stacklevel=4,
        )

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
            elif key == _GENERATORS:
                self._inner_step.load_generators(value)
            else:
                setattr(self._optimizer, key, _in_kind_of(getattr(self._optimizer, key, None), copy.deepcopy(value)))

    def _own(self) -> list[tuple[str, Any]]:
        optimizer = self._optimizer
        slots = [(name, getattr(optimizer, name)) for name in slots_of(optimizer)]
        return [
            (key, value)
            for key, value in [*vars(optimizer).items(), *slots]
            if key not in _NOT_KEPT and not key.startswith(("_optimizer_", "_zero_grad", "_opt_called", "_warned"))
        ]

    def _nested(self) -> dict[str, Optimizer]:
        """Return the optimizers that this one steps and that have a state of their own."""
        nested = nested_optimizers(self._optimizer)
        return {key: inner for key, inner in nested.items() if inner.state is not self._optimizer.state}


@contextlib.contextmanager
def aliases_kept(optimizer: Optimizer) -> Iterator[None]:
    """Let groups that have a list or dict in common have one in common after a state was loaded within, if it is equal.

    Some classes give each group the same list to remember something in.
    """
    before = [
        {key: id(value) for key, value in group.items() if key != "params" and isinstance(value, (list, dict))}
        for group in optimizer.param_groups
    ]
    yield
    first: dict[int, Any] = {}
    for ids, group in zip(before, optimizer.param_groups, strict=False):
        for key, identity in ids.items():
            value = first.setdefault(identity, group.get(key))
            if key in group and value is not group[key] and _same(value, group[key]):
                group[key] = value


class _Other:
    """Stands for a value that is not data, as it was at the start: its size, and the numbers in what it consists of."""

    def __init__(self, value: Any) -> None:
        self._traits = _traits(value)

    def was_so(self, value: Any) -> bool:
        return bool(self._traits == _traits(value))


def _traits(value: Any, depth: int = 0) -> Any:
    """Return numbers and texts that a value holds, by which a change of it is seen."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        return None if isinstance(value, torch.nn.Parameter) else value._version
    if depth == _MAX_DEPTH or isinstance(value, (torch.nn.Module, Optimizer, torch.Generator)) or callable(value):
        return None
    if isinstance(value, dict):
        return len(value), [_traits(one, depth + 1) for one in value.values()]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return len(value), [] if isinstance(value, (set, frozenset)) else [_traits(one, depth + 1) for one in value]
    held = getattr(value, "__dict__", None) or {name: getattr(value, name) for name in slots_of(value)}
    return len(value) if hasattr(value, "__len__") else None, [_traits(one, depth + 1) for one in held.values()]


def _in_kind_of(present: Any, value: Any) -> Any:
    """Return data as what stands in its place: a state dict has plain lists and dicts instead of their kin."""
    if isinstance(present, dict) and isinstance(value, dict):
        values = {key: _in_kind_of(present.get(key), one) for key, one in value.items()}
        if type(present) is dict:
            return values
        made = copy.copy(present)
        made.clear()
        made.update(values)
        return made
    return deque(value, present.maxlen) if isinstance(present, deque) else value


def _is_data(value: Any) -> bool:
    """Whether a value is made of numbers, texts and tensors."""
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) and _is_data(one) for key, one in value.items())
    if isinstance(value, (list, tuple, deque)):
        return all(map(_is_data, value))
    return isinstance(value, _PLAIN) or (isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter))


def _has_one_of(value: Any, ids: set[int]) -> bool:
    """Whether these identities, which are others in another program, are among the numbers in a value."""
    if isinstance(value, dict):
        return any(_has_one_of(one, ids) for pair in value.items() for one in pair)
    if isinstance(value, (list, tuple, deque)):
        return any(_has_one_of(one, ids) for one in value)
    return isinstance(value, int) and value in ids


def _same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, Tensor) or isinstance(theirs, Tensor):
        return isinstance(mine, Tensor) and isinstance(theirs, Tensor) and torch.equal(mine, theirs)
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return mine.keys() == theirs.keys() and all(_same(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, (list, tuple, deque)) and isinstance(theirs, (list, tuple, deque)):
        return len(mine) == len(theirs) and all(map(_same, mine, theirs))
    return bool(mine == theirs) and type(mine) is type(theirs)
