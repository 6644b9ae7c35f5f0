"""How ranks of tests wait for each other."""

import time
from typing import Any

__all__ = ["meet"]


def meet(comm: Any) -> None:
    """Wait for all ranks, asleep: MPI's own barrier would keep the cores busy that the others need; collective."""
    arrived = comm.Ibarrier()
    while not arrived.Test():
        time.sleep(5e-4)
