"""How ranks of tests wait for each other."""

import time
from collections.abc import Callable
from typing import Any

__all__ = ["meet"]


# What a test does between two meetings takes less.
_LATE_S = 60


def meet(comm: Any, when_late: Callable[[], object] | None = None) -> None:
    """Wait for all ranks, asleep: MPI's own barrier would keep the cores busy that the others need; collective.

    Where a rank has not come after a minute, ``when_late`` is called once, on those that have.
    """
    arrived = comm.Ibarrier()
    late = time.monotonic() + _LATE_S
    while not arrived.Test():
        time.sleep(5e-4)
        if when_late is not None and time.monotonic() > late:
            when_late()
            when_late = None
