"""Sums of a few numbers by the ranks of a node that share cores, in memory that they share. No MPI here.

A message among ranks that take turns on a core costs each of them several looks at whether it has come. Here each
writes its numbers down and sleeps until all have (:mod:`dpoptim.comm.node.sleeping_barrier`). The slots are used in
turns of two: who starts a sum has ended the one before, so that all have read the one before that.
"""

import ctypes
from collections.abc import Callable, Sequence

import torch

from dpoptim.comm.node.shared_memory import Node, SharedMemory
from dpoptim.comm.node.sleeping_barrier import SleepingBarrier

__all__ = ["SmallSum", "SmallSums"]

# Two cache lines.
_MAX_NUMBERS = 16


class SmallSums:
    """The sums of one node; construction is collective in the node.

    Parameters
    ----------
    node : Node
        The ranks.

    Attributes
    ----------
    max_numbers : int
        How many numbers are summed at most.

    Raises
    ------
    OSError
        On every rank of the node, if there is no memory to share.
    """

    max_numbers = _MAX_NUMBERS

    def __init__(self, node: Node) -> None:
        rank, size = node.rank, node.world_size
        slot = ctypes.c_double * _MAX_NUMBERS
        slots_bytes = 2 * size * ctypes.sizeof(slot)
        numel = SleepingBarrier.words_needed(size)
        memory = SharedMemory(node, slots_bytes + 4 * numel)
        self._memory = memory.tensor(torch.uint8, [slots_bytes])
        start = self._memory.data_ptr()
        slots = [slot.from_address(start + number * ctypes.sizeof(slot)) for number in range(2 * size)]
        self._slots = slots[:size], slots[size:]
        self._barrier = SleepingBarrier(memory.tensor(torch.int32, [numel], slots_bytes), rank, size, node.progress)
        self._rank, self._progress = rank, node.progress
        self._turn = 0

    def start(self, numbers: Sequence[float]) -> "SmallSum":
        """Start to sum at most ``max_numbers`` numbers over the ranks; collective, does not block.

        A rank ends it before it starts another.
        """
        self._turn = 1 - self._turn
        slots = self._slots[self._turn]
        own: list[ctypes.c_double | float] = list(numbers)
        slots[self._rank][: len(own)] = own
        self._barrier.arrive()
        return SmallSum(self._barrier, self._progress, slots, len(numbers))


class SmallSum:
    """A sum under way."""

    def __init__(
        self,
        barrier: SleepingBarrier,
        progress: Callable[[], object],
        slots: Sequence["ctypes.Array[ctypes.c_double]"],
        count: int,
    ) -> None:
        self._barrier, self._progress, self._slots, self._count = barrier, progress, slots, count

    def wait(self) -> list[float]:
        """Block until the sums are there, and return them: in float64, in the order of ranks."""
        self._barrier.wait_for_others()
        return list(map(sum, zip(*[slot[: self._count] for slot in self._slots], strict=True)))

    def test(self) -> bool:
        """Whether :meth:`wait` does not block."""
        self._progress()
        return self._barrier.are_all_here()
