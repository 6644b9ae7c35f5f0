"""SmallSums: the transport of small tensors, and of a few numbers, among ranks of a node that share cores. No MPI here.

Note [Slots]
------------
A message among ranks that take turns on a core costs each of them several looks at whether it has come. Here each
writes its values to a slot of its own and sleeps until all have (:mod:`dpoptim.comm.node.sleeping_barrier`); then each
reads all slots. The slots are used in turns of two: a rank that starts a turn has ended the one before, so that all
have read the one before that.
"""

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dpoptim.comm.node.shared_memory import Node, SharedMemory
from dpoptim.comm.node.sleeping_barrier import SleepingBarrier
from dpoptim.comm.summing import sum_in_order
from dpoptim.comm.transport import Transport
from dpoptim.comm.work import DONE, Work
from dpoptim.partition import aligned, start_offsets

__all__ = ["SmallSum", "SmallSums"]

# Two cache lines.
_NUMBERS_BYTES = 128


class SmallSums(Transport):
    """The small collectives of one node (Note [Slots]); construction is collective in the node.

    Those of tensors block. A rank ends the sum of numbers before it starts anything else here.

    Parameters
    ----------
    node : Node
        The ranks.
    slot_bytes : int
        The size of the largest tensor.

    Attributes
    ----------
    slot_bytes : int
        As given, or a little more.
    max_numbers : int
        How many numbers are summed at most.

    Raises
    ------
    OSError
        On every rank of the node, if there is no memory to share.
    """

    def __init__(self, node: Node, slot_bytes: int = _NUMBERS_BYTES) -> None:
        self._rank, self._size, self._progress = node.rank, node.world_size, node.progress
        self.slot_bytes = aligned(max(slot_bytes, _NUMBERS_BYTES))
        self.max_numbers = self.slot_bytes // ctypes.sizeof(ctypes.c_double)
        slots_bytes = 2 * self._size * self.slot_bytes
        numel = SleepingBarrier.words_needed(self._size)
        self._memory = SharedMemory(node, slots_bytes + 4 * numel)
        words = self._memory.tensor(torch.int32, [numel], slots_bytes)
        self._barrier = SleepingBarrier(words, self._rank, self._size, node.progress)
        self._bytes = self._memory.tensor(torch.uint8, [slots_bytes])  # what the numbers are a view of
        start = self._bytes.data_ptr()
        kind = ctypes.c_double * self.max_numbers
        slots = [kind.from_address(start + number * self.slot_bytes) for number in range(2 * self._size)]
        self._numbers = slots[: self._size], slots[self._size :]
        self._tensors: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        self._turn = 0

    def start(self, numbers: Sequence[float]) -> "SmallSum":
        """Start to sum at most ``max_numbers`` numbers over the ranks; collective, does not block."""
        self._turn = 1 - self._turn
        slots = self._numbers[self._turn]
        own: list[ctypes.c_double | float] = list(numbers)
        slots[self._rank][: len(own)] = own
        self._barrier.arrive()
        return SmallSum(self._barrier, self._progress, slots, len(numbers))

    def all_reduce(self, tensor: Tensor, scale: float = 1.0) -> Work:
        """Sum over the ranks, in place; each sums everything itself."""
        if tensor.numel():
            sum_in_order(self._exchanged(tensor, 0, tensor.numel(), scale), out=tensor)
        return DONE

    def reduce_scatter(self, output: Tensor, source: Tensor, counts: Sequence[int], scale: float = 1.0) -> Work:
        """Sum parts over the ranks; each keeps its own."""
        slots = self._exchanged(source, 0, source.numel(), scale)
        start, count = start_offsets(counts)[self._rank], counts[self._rank]
        if count:
            sum_in_order([slot[start : start + count] for slot in slots], out=output)
        return DONE

    def all_gather(self, tensor: Tensor, counts: Sequence[int]) -> Work:
        """Collect every rank's part."""
        starts = start_offsets(counts)
        slots = self._exchanged(tensor.view(torch.uint8), *self._in_bytes(tensor, starts, counts, self._rank), 1.0)
        for rank, slot in enumerate(slots):
            if rank != self._rank:
                start, count = self._in_bytes(tensor, starts, counts, rank)
                tensor.view(torch.uint8)[start : start + count] = slot[start : start + count]
        return DONE

    def _exchanged(self, tensor: Tensor, start: int, count: int, scale: float) -> list[Tensor]:
        """Write some elements to this rank's slot, and return all ranks' slots when all have done so."""
        self._turn = 1 - self._turn
        slots = [slot[: tensor.numel()] for slot in self._slots(tensor.dtype)[self._turn]]
        own, values = slots[self._rank][start : start + count], tensor[start : start + count]
        if scale == 1.0:
            own.copy_(values)
        else:
            torch.mul(values, scale, out=own)
        self._barrier.wait()
        return slots

    def _slots(self, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        if dtype not in self._tensors:
            numel = self.slot_bytes // dtype.itemsize
            slots = [self._memory.tensor(dtype, [numel], number * self.slot_bytes) for number in range(2 * self._size)]
            self._tensors[dtype] = slots[: self._size], slots[self._size :]
        return self._tensors[dtype]

    @staticmethod
    def _in_bytes(tensor: Tensor, starts: Sequence[int], counts: Sequence[int], rank: int) -> tuple[int, int]:
        """Return where a rank's part begins, and how long it is."""
        return starts[rank] * tensor.element_size(), counts[rank] * tensor.element_size()


class SmallSum:
    """A sum of numbers under way."""

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
