"""Work and Pending: the two handles of a collective under way, whatever carries it.

Tests: ``tests/comm/test_communicator.py``.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol, TypeVar

__all__ = ["DONE", "Pending", "Submitted", "Together", "Work"]

_Result_co = TypeVar("_Result_co", covariant=True)


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Block until the result is there; errors of the collective are raised here.

        Collective: all ranks wait for their works in the order in which they started them.
        """


class Pending(Protocol[_Result_co]):
    """A collective under way that can be asked whether it has ended."""

    def wait(self) -> _Result_co:
        """Block until it has ended, and return its result."""

    def test(self) -> bool:
        """Whether it has ended; not asked again then."""


class _Done:
    def wait(self) -> None:
        pass


# What has ended when it was started.
DONE = _Done()


class Submitted:
    """A collective that a communicator's own thread makes."""

    def __init__(self, future: "Future[None]") -> None:
        self._future = future

    def wait(self) -> None:
        """Block until the thread has made it."""
        self._future.result()


class Together:
    """Several collectives under way that make one; they were started in this order."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._works = works

    def wait(self) -> None:
        """Block until all have ended."""
        for work in self._works:
            work.wait()
