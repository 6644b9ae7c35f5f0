"""MeetingFirst: the batch of transports that gain nothing by one. What a batch is stands in transport.py."""

from collections.abc import Callable, Iterable, Sequence

from dpoptim.comm.transport import Batch
from dpoptim.comm.work import Work

__all__ = ["MeetingFirst"]


class MeetingFirst(Batch):
    """Collectives that start when all ranks have met, and end before numbers are summed.

    Parameters
    ----------
    sum_numbers : callable
        Returns the sums of numbers over all ranks; collective.
    """

    is_deferred = False

    def __init__(self, sum_numbers: Callable[[Sequence[float]], list[float]]) -> None:
        self._sum_numbers = sum_numbers

    def open(self, start: Callable[[float], object], meeting: Callable[[], float]) -> None:
        """Meet, then start the collectives; collective, blocks."""
        start(meeting())

    def close(self, works: Iterable[Work], numbers: Callable[[], Sequence[float]]) -> list[float]:
        """Wait for works, then sum a few numbers over all ranks, in float64; collective, blocks."""
        for work in works:
            work.wait()
        return self._sum_numbers(numbers())
