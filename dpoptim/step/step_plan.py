"""Plan: which implementation steps what in one optimizer's step.

Tests: ``tests/step/test_implementations.py``.

Note [How a step is divided]
----------------------------
Parameters of groups that have equal hyper-parameters go into one *call*: of the fused kernel, or of the loop over
blocks (:mod:`dpoptim.step.step_blocks`). What no fast implementation is right for
(:mod:`dpoptim.step.implementations`), or pays, is *left* to torch's default, in torch's order. The arithmetic is
torch's own throughout: its ``step`` runs on a stand-in for the optimizer, which hands over the lists.

A plan is for what it was made for: parameters by identity and address, what the kernels read by dtype, size and memory
layout, hyper-parameters by value. Rates may change as long as those that were equal still are.
"""

from collections.abc import Hashable, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from dpoptim.partition import picker
from dpoptim.step.compiled_step import CompiledStep, StandIn
from dpoptim.step.found import Found
from dpoptim.step.implementations import Implementations, sharing_memory
from dpoptim.step.step_blocks import is_plain
from dpoptim.step.step_call import CallKey, StepCall
from dpoptim.tuning import TUNING

__all__ = ["Plan"]

# Groups that have a rate of their own are put together if at least so many have, each of fewer elements than this in
# all: the more a group has, the less a call of its own counts (measured with benchmarks/optimizers.py --groups).
_MIN_GROUPS = TUNING.min_rate_groups
_RATES_BELOW = TUNING.rate_group_numel
# Where small tensors are not put together, one of fewer elements is stepped as fast by the loop.
_ALONE_BELOW = TUNING.alone_numel

_DTYPE, _NBYTES = attrgetter("dtype"), attrgetter("nbytes")


class Plan:
    """Which call steps what, and what is left to torch (Note [How a step is divided]).

    Parameters
    ----------
    found : Found
        What is to be stepped.
    how : Implementations
        What there is to step with.
    state : mapping
        The optimizer's ``state``.
    compiled : CompiledStep, optional
        What steps the blocks instead of torch's loop.

    Attributes
    ----------
    calls : list
        Empty if all is left to torch.
    """

    def __init__(self, found: Found, how: Implementations, state: Any, compiled: CompiledStep | None) -> None:
        self._how = how
        self._counts, self._uses, self._results = found.counts, found.uses, found.results
        self._values = _Values(_read(found.groups, how))
        self._parameters = list(found.lists[0])
        is_dense = all(gradient.layout == torch.strided for gradient in found.lists[1])
        self._facts = _facts(found.lists) if is_dense else None
        self._number_of = [number for number, count in enumerate(found.counts) for _ in range(count)]
        members: dict[CallKey, list[int]] = {}
        left: list[int] = []
        shared = sharing_memory([found.lists[0], *found.lists[2:]])
        is_free = [how.are_free(group) for group in found.groups]
        if how.choice.kind == "foreach":  # Adafactor's loop takes the epsilon of a group's first parameter for all
            dtypes: dict[int, set[torch.dtype]] = {}
            for number, parameter in zip(self._number_of, found.lists[0], strict=True):
                dtypes.setdefault(number, set()).add(parameter.dtype)
            is_free = [free and len(dtypes[number]) == 1 for number, free in enumerate(is_free)]
        for index, number in enumerate(self._number_of):
            uses, rate = found.uses[number], found.groups[number]["lr"]
            entries = [entries[index] for entries, used in zip(found.lists, uses, strict=True) if used]
            way = how.way_of(entries, rate) if is_free[number] and index not in shared else None
            if way is None:
                left.append(index)
                continue
            if entries[0].device.type != "cpu":
                _bring_numbers(found.lists[2:], index, state[entries[0]], entries[0].device)
            is_first = way != "foreach" and any(entry is None for entry in entries)
            dtype = entries[0].dtype if way == "foreach" else None
            key = CallKey(self._values.exact[number], uses, way, is_first, dtype)
            members.setdefault(key, []).append(index)
        # What has no momentum yet has some next time.
        self._is_kept = self._facts is not None and not any(key.is_first for key in members)
        self.calls: list[StepCall] = []
        if how.is_linear and len(found.groups) >= _MIN_GROUPS:
            for key, indices in self._take_different_rates(members, found):
                self.calls.append(StepCall(key, indices, self._number_of, found, how, compiled, have_rates=True))
        for key, indices in members.items():
            if self._pays(key, indices):
                self.calls.append(StepCall(key, indices, self._number_of, found, how, compiled))
            else:
                left += indices
        self._left: dict[int, list[int]] = {}
        for index in sorted(left):
            self._left.setdefault(self._number_of[index], []).append(index)

    def _take_different_rates(self, members: dict[CallKey, list[int]], found: Found) -> list[tuple[CallKey, list[int]]]:
        """Take out of ``members``, and return, what goes into blocks of several rates."""
        alike: dict[Hashable, list[CallKey]] = {}
        for key, indices in members.items():
            if not any(key.uses[2:]):
                continue  # SGD without momentum: the loop takes less than the copies
            number = self._number_of[indices[0]]
            lists = [entries for entries in found.select(picker(indices), key.uses) if entries]
            if (
                sum(parameter.numel() for parameter in lists[0]) < _RATES_BELOW
                and not isinstance(found.groups[number]["lr"], Tensor)
                and all(parameter.dtype in (torch.float32, torch.float64) for parameter in lists[0])
                and all(map(is_plain, zip(*lists, strict=True)))
            ):
                alike.setdefault((self._values.common[number], key.uses, key.way), []).append(key)
        return [
            (keys[0], sorted(index for key in keys for index in members.pop(key)))
            for keys in alike.values()
            if len(keys) >= _MIN_GROUPS
        ]

    def _pays(self, key: CallKey, indices: Sequence[int]) -> bool:
        """Whether a call is faster than what torch does."""
        numels = [self._parameters[index].numel() for index in indices]
        choice = self._how.choice
        if key.way == "foreach":
            return len(numels) > 1 and sum(numels) < (choice.foreach_below or 0) * len(numels)
        return len(numels) > 1 or (key.way == "fused" and choice.flat_below > 0) or numels[0] >= _ALONE_BELOW

    def fits(self, found: Found) -> bool:
        """Whether this is a plan for what was found, which it takes over then; nothing else is changed."""
        return (
            self._is_kept
            and found.counts == self._counts
            and found.uses == self._uses
            and found.results == self._results  # which tell whether gradients are sparse
            and all(map(is_, found.lists[0], self._parameters))
            and _facts(found.lists) == self._facts
            and self._follow(found.groups)
            and self.take(found)
        )

    def _follow(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Take over hyper-parameters; return False if other groups than before have equal ones."""
        values = _read(groups, self._how)
        if values == self._values.values:
            return True
        new = _Values(values)
        if new.partition != self._values.partition or new.fixed != self._values.fixed:
            return False
        self._values = new
        for call in self.calls:
            call.knows_rates = False
        return True

    def take(self, found: Found) -> bool:
        """Take over the lists; return False if the state no longer fits."""
        return all(call.take(found) for call in self.calls)

    def step(self, found: Found, state: Any) -> None:
        """Step what was taken over, and what is left."""
        for call in self.calls:
            call.step(found.groups, state)
        if self._left:
            lists = [found.select(picker(indices), found.uses[number]) for number, indices in self._left.items()]
            groups, results = ([values[number] for number in self._left] for values in (found.groups, found.results))
            self._how.body(StandIn(groups, lists, results, state))


class _Values:
    """The hyper-parameters of all groups, and which groups have equal ones.

    Attributes
    ----------
    values : list
        Of each group: those that must be equal within a call, and those that need not.
    fixed : list
        What else a plan depends on.
    common, exact : list of int
        The number of each group's values of the first kind, and of both kinds.
    """

    def __init__(self, values: list[tuple[Any, Any]]) -> None:
        self.values = values
        self.fixed = [common for common, _ in values]
        self.common, self.exact = _numbered(self.fixed), _numbered(values)
        self.partition = (self.common, self.exact)


def _read(groups: Sequence[dict[str, Any]], how: Implementations) -> list[tuple[Any, Any]]:
    """Return the hyper-parameters of each group; a rate with its type, since a tensor may equal a number."""
    names = how.common_names
    if not how.own_names:
        return [(tuple(map(group.get, names)), None) for group in groups]
    return [
        (
            tuple(map(group.get, names)),
            (rate.__class__, id(rate) if isinstance(rate, Tensor) else rate, group.get("weight_decay")),
        )
        for group in groups
        for rate in (group["lr"],)
    ]


def _numbered(keys: Sequence[Hashable]) -> list[int]:
    """Return a number for each key, the same for equal ones."""
    numbers: dict[Hashable, int] = {}
    try:
        return [numbers.setdefault(key, len(numbers)) for key in keys]
    except TypeError:  # a list among them: none is taken for equal to another
        return list(range(len(keys)))


def _facts(lists: Sequence[list[Any]]) -> list[Any] | None:
    """Return what a plan depends on of parameters and dense gradients; None if it can't be told."""
    parameters, gradients = lists[:2]
    try:
        return [
            list(map(Tensor.data_ptr, parameters)),
            list(map(_NBYTES, parameters)),
            list(map(Tensor.is_contiguous, parameters)),
            list(map(_DTYPE, gradients)),
            list(map(_NBYTES, gradients)),
        ]
    except RuntimeError:  # there is no memory to speak of
        return None


def _bring_numbers(lists: Sequence[list[Any]], index: int, kept: dict[str, Any], device: torch.device) -> None:
    """Bring a parameter's numbers, such as ``step``, to its device, where the fused kernels want them."""
    for entries in lists:
        number = entries[index]
        if isinstance(number, Tensor) and number.dim() == 0 and number.device != device:
            entries[index] = moved = number.to(device, torch.float32)
            kept[next(key for key, value in kept.items() if value is number)] = moved
