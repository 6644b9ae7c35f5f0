"""Batches of collectives among ranks that read each other's memory: what is noted of each, and their two meetings.

Tests: ``tests/comm/test_batch.py``.
"""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from dpoptim.comm.transport import Batch
from dpoptim.comm.work import Work

__all__ = ["MAX_COLLECTIVES", "Collective", "PeerBatch", "Row"]

# The kernel takes at most 1024 spans a call.
MAX_COLLECTIVES = 512

_Result = TypeVar("_Result")


class Row(ctypes.Structure):
    """What a rank tells the others of a batch, in memory that they share."""

    _fields_ = (
        ("addresses", ctypes.c_int64 * MAX_COLLECTIVES),
        ("scales", ctypes.c_double * MAX_COLLECTIVES),
        ("failed", ctypes.c_int64),
        ("_padding", ctypes.c_int64 * 7),
    )


@dataclass(eq=False)
class Collective:
    """A collective of a batch: this rank's tensor, which part of it each rank owns, and its address on each rank."""

    tensor: Tensor
    starts: Sequence[int]
    counts: Sequence[int]
    output: Tensor | None  # where this rank's sum goes, if there is one
    scale: float
    gathers: bool
    is_kept: bool = False  # to be started again
    divisor: float = 1.0
    addresses: Sequence[int] = ()
    scales: Sequence[float] = ()


class Framed(Protocol):
    """Collectives whose first and last meeting may be another's."""

    def open_with(self, meet: Callable[[], _Result]) -> _Result:
        """Do without the first meeting of a batch, since all ranks meet in ``meet()``; return its result."""

    def close_with(self, meet: Callable[[], _Result]) -> _Result:
        """Do without the last meeting of a batch, which ends within ``meet()``; return its result."""

    def divide(self, divisor: float) -> None:
        """Divide the scales of all collectives that are noted, on all ranks by the same."""


class PeerBatch(Batch):
    """Collectives that are noted before all ranks meet, done when the first is waited for, and end with the numbers.

    Parameters
    ----------
    peers : Framed
        The ranks, of which all read each other's memory.
    sum_numbers : callable
        Returns the sums of numbers over all ranks; collective. All ranks meet in it.
    """

    is_deferred = True

    def __init__(self, peers: Framed, sum_numbers: Callable[[Sequence[float]], list[float]]) -> None:
        self._peers, self._sum_numbers = peers, sum_numbers

    def open(self, start: Callable[[float], object], meeting: Callable[[], float]) -> None:
        """Note the collectives, meet, and divide their scales; collective, blocks."""
        start(1.0)
        self._peers.divide(self._peers.open_with(meeting))

    def close(self, works: Iterable[Work], numbers: Callable[[], Sequence[float]]) -> list[float]:
        """Wait for works, then sum a few numbers over all ranks, in float64; collective, blocks."""

        def wait_and_sum() -> list[float]:
            for work in works:
                work.wait()
            return self._sum_numbers(numbers())

        return self._peers.close_with(wait_and_sum)
