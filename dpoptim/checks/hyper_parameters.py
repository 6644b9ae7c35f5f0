"""HyperParameters: whether the numbers in parameter groups are still those of all ranks. No communication here.

Tests: ``tests/checks/test_ranks_alike.py``.

Note [Numbers that part]
------------------------
A scheduler that decides on a rank's own metric, or a branch that one rank takes, lets learning rates part: parameters
drift from then on, and nothing else shows it. So a fingerprint of the groups' numbers is part of every rank's answer to
the roll call (:mod:`dpoptim.comm.roll_call`). It is remembered, and what it is made of is compared by identity:
learning rates each time, the other numbers of a few groups in turn, the same on all ranks. A change is seen at once
where there are few groups, and some roll calls later where there are hundreds.
"""

import contextlib
import itertools
import math
import numbers
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any

from torch import Tensor

__all__ = ["HyperParameters", "first_difference"]

# Of so many groups all numbers are looked at in one roll call.
_GROUPS_IN_TURN = 8
_NOT_A_NUMBER = float("nan")
_NONE = -1.5e300


class HyperParameters:
    """The numbers in parameter groups: those that each group had when it was first looked at.

    Parameters
    ----------
    groups : callable
        Returns the live parameter groups.
    """

    def __init__(self, groups: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
        self._groups = groups
        self._rates: list[Any] = []
        self._rates_checksum = 0
        self._keys: list[list[str]] = []  # of each group
        self._values: list[list[Any]] = []
        self._checksums: list[int] = []
        self._tensors: dict[int, tuple[Tensor, int]] = {}  # numbers that may be written in place, and their versions
        self._turn = 0
        self._fingerprint = 0
        self._held: int | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep the fingerprint of now within, where a step writes numbers on the ranks that have something to step."""
        self._held = self.fingerprint()
        try:
            yield
        finally:
            self._held = None

    def fingerprint(self) -> int:
        """Return 32 bits that are equal on ranks whose numbers are; called as often on all of them."""
        if self._held is not None:
            return self._held
        groups = self._groups()
        if len(groups) != len(self._keys):
            self._settle(groups)
        written = bool(self._tensors) and self._are_written()
        changed = False
        rates = [group.get("lr") for group in groups]
        if written or not all(map(is_, rates, self._rates)):
            self._rates, self._rates_checksum, changed = rates, self._checksum(rates), True
        start = self._turn
        stop = min(start + _GROUPS_IN_TURN, len(groups))
        for number in range(start, stop) if not written else range(len(groups)):
            group = groups[number]
            values = [group.get(key) for key in self._keys[number]]
            if written or not all(map(is_, values, self._values[number])):
                self._values[number], self._checksums[number], changed = values, self._checksum(values), True
        self._turn = stop if stop < len(groups) else 0
        if changed:
            self._fingerprint = zlib.crc32(array("Q", [self._rates_checksum, *self._checksums]).tobytes())
        return self._fingerprint

    def texts(self) -> list[dict[str, str]]:
        """Return every group's numbers in words, as they are now."""
        self._settle(self._groups())
        return [
            {key: _as_text(group.get(key)) for key in ("lr", *keys) if key in group}
            for group, keys in zip(self._groups(), self._keys, strict=True)
        ]

    def difference(self, everybody: Sequence[Sequence[Mapping[str, str]]]) -> str | None:
        """Say where a rank's numbers differ from rank 0's, given all ranks' :meth:`texts`."""
        return first_difference(everybody)

    def _settle(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Look at all groups, of which there are more, or fewer, than before."""
        del self._keys[len(groups) :]
        for group in groups[len(self._keys) :]:
            self._keys.append([key for key in group if key not in ("lr", "params", "param_names")])
            self._keys[-1] = [key for key in self._keys[-1] if any(True for _ in _numbers_of(group[key]))]
        self._tensors.clear()
        self._rates = [group.get("lr") for group in groups]
        self._values = [[group.get(key) for key in keys] for group, keys in zip(groups, self._keys, strict=True)]
        self._rates_checksum = self._checksum(self._rates)
        self._checksums = [self._checksum(values) for values in self._values]
        self._fingerprint = zlib.crc32(array("Q", [self._rates_checksum, *self._checksums]).tobytes())
        self._turn = 0

    def _checksum(self, values: Sequence[Any]) -> int:
        try:
            found = array("d", values)  # fast, and right for floats
            tensors = [value for value in values if isinstance(value, Tensor)]
        except (TypeError, OverflowError, RuntimeError):  # values that are no numbers, or none of this kind
            tensors = [value for value in values if isinstance(value, Tensor)]
            found = array("d", [number for value in values for number in _numbers_of(value)])
        for tensor in tensors:
            self._tensors[id(tensor)] = tensor, _version(tensor)
        if math.isnan(sum(found)):  # the same bits for all that are none
            found = array("d", [_NOT_A_NUMBER if math.isnan(number) else number for number in found])
        return zlib.crc32(found.tobytes())

    def _are_written(self) -> bool:
        """Whether a tensor among the numbers was written to; all are taken note of anew then."""
        if all(_version(tensor) == version != -1 for tensor, version in self._tensors.values()):
            return False
        self._tensors.clear()
        return True


def first_difference(everybody: Sequence[Sequence[Mapping[str, str]]]) -> str | None:
    """Say where a rank's numbers differ from rank 0's, given all ranks' :meth:`HyperParameters.texts`."""
    for rank, groups in enumerate(everybody):
        if len(groups) != len(everybody[0]):
            return f"the optimizer has {len(everybody[0])} parameter groups on rank 0 but {len(groups)} on rank {rank}"
        for number, (first, other) in enumerate(zip(everybody[0], groups, strict=True)):
            for key in dict.fromkeys((*first, *other)):
                if first.get(key) != other.get(key):
                    return (
                        f"parameter group {number} has {key} = {first.get(key)} on rank 0 but {other.get(key)} on rank "
                        f"{rank}"
                    )
    return None


def _numbers_of(value: Any) -> Iterator[float]:
    """Yield the numbers that a hyper-parameter consists of, none if it is something else."""
    if value is None:
        yield _NONE
    elif isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex() and value.device.type != "meta":
            yield float(value.detach())
    elif isinstance(value, numbers.Real):
        try:
            yield float(value)
        except OverflowError:
            yield float(zlib.crc32(repr(value).encode()))
    elif isinstance(value, (tuple, list)):
        yield from itertools.chain.from_iterable(map(_numbers_of, value))


def _version(tensor: Tensor) -> int:
    """Return a number that changes when a tensor is written to in place; -1 if it has none."""
    return -1 if tensor.is_inference() else tensor._version


def _as_text(value: Any) -> str:
    return repr(value.tolist()) if isinstance(value, Tensor) and value.device.type != "meta" else repr(value)
