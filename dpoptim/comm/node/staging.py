"""StagingArea: the transport among ranks of a node through a small area of memory that they share. No MPI here.

Tests: ``tests/comm/test_transport.py``.

Note [Staging]
--------------
Tensors stay in private memory and pass through a small staging area in chunks that fit the caches: a rank copies
in what the others need, all meet, each sums its part, all meet, each copies out the others' sums. Main memory is
read and written about once, whatever the number of ranks. The areas are used in turns of two, so that a rank writes
one while others still read the other, and one meeting a chunk is enough: what was written before meeting ``i`` is read
before meeting ``i + 1`` and written again only after it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dpoptim.comm.node.shared_memory import Node, SharedMemory
from dpoptim.comm.summing import sum_in_order
from dpoptim.comm.transport import NodeTransport
from dpoptim.comm.work import DONE, Work
from dpoptim.partition import aligned, even_counts, start_offsets
from dpoptim.tuning import TUNING

__all__ = ["ASLEEP_BYTES", "AWAKE_BYTES", "StagingArea"]

# What a rank copies in between two meetings: what suits caches; more for ranks that take turns on a core, where a
# meeting takes a turn of each (4 ranks on 2 cores: a tenth to a third less of the exchange than with 1 MiB).
AWAKE_BYTES, ASLEEP_BYTES = TUNING.staging_awake_bytes, TUNING.staging_asleep_bytes


class StagingArea(NodeTransport):
    """The collectives of one node through shared memory (Note [Staging]); construction is collective in the node.

    All of them block.

    Parameters
    ----------
    node : Node
        The ranks; messages on it are this object's alone.
    meet : callable
        Waits until all ranks of the node are there.
    chunk_bytes : int
        Bytes that a rank copies in between two meetings. If ``/dev/shm`` is too small for it, less is taken.

    Raises
    ------
    OSError
        On every rank of the node, if there is no memory to share.
    """

    def __init__(self, node: Node, meet: Callable[[], None], chunk_bytes: int) -> None:
        self._rank, self._size, self._meet = node.rank, node.world_size, meet
        while True:
            part_bytes = aligned(-(-chunk_bytes // self._size))
            self._in_bytes, self._out_bytes = part_bytes * self._size, part_bytes
            try:
                self._memory = SharedMemory(node, 2 * self._size * (self._in_bytes + self._out_bytes))
                break
            except OSError:
                if chunk_bytes <= 1 << 16:
                    raise
                chunk_bytes >>= 2
        self._turn = 0
        self._views: dict[torch.dtype, list[tuple[list[Tensor], list[Tensor]]]] = {}

    def all_reduce(self, tensor: Tensor, scale: float = 1.0) -> Work:
        """Sum over the ranks, in place."""
        chunks = torch.split(tensor, self._in_bytes // tensor.element_size())
        split_chunks = [torch.split(chunk, even_counts(chunk.numel(), self._size)) for chunk in chunks]
        if split_chunks:
            self._put(split_chunks[0], scale)
        for index, parts in enumerate(split_chunks):
            self._meet()
            if index:
                self._take_sums(split_chunks[index - 1], turn=self._turn - 1)
            self._sum(parts[self._rank], parts[self._rank], scale)
            self._turn += 1
            if index + 1 < len(split_chunks):
                self._put(split_chunks[index + 1], scale)
        if split_chunks:
            self._meet()
            self._take_sums(split_chunks[-1], turn=self._turn - 1)
        return DONE

    def reduce_scatter(
        self,
        output: Tensor,
        source: Tensor,
        counts: Sequence[int],
        scale: float = 1.0,
        *,
        starts: Sequence[int] | None = None,
    ) -> Work:
        """Sum parts over the ranks; each keeps its own."""
        parts = _parts(source, starts, counts)
        window = self._out_bytes // output.element_size()
        windows = [torch.split(part, window) if part.numel() else () for part in parts]
        outputs = torch.split(output, window) if output.numel() else ()
        num_chunks = max(map(len, windows))
        for index in range(num_chunks):
            pieces = [pieces[index] if index < len(pieces) else output[:0] for pieces in windows]
            self._put(pieces, scale)
            self._meet()
            if index < len(outputs):
                self._sum(outputs[index], pieces[self._rank], scale)
            self._turn += 1
        return DONE

    def all_gather(self, tensor: Tensor, counts: Sequence[int], *, starts: Sequence[int] | None = None) -> Work:
        """Collect every rank's part."""
        flat = [part.view(torch.uint8) for part in _parts(tensor, starts, counts)]
        num_chunks = max(-(-part.numel() // self._in_bytes) for part in flat)
        for index in range(num_chunks):
            slots = self._in(torch.uint8)
            pieces = [part[index * self._in_bytes : (index + 1) * self._in_bytes] for part in flat]
            slots[self._rank][: pieces[self._rank].numel()].copy_(pieces[self._rank])
            self._meet()
            for owner, piece in enumerate(pieces):
                if owner != self._rank and piece.numel():
                    piece.copy_(slots[owner][: piece.numel()])
            self._turn += 1
        return DONE

    # ---------------------------------------------------------------- how

    def _put(self, parts: Sequence[Tensor], scale: float) -> None:
        """Copy what others sum into this rank's area; each owner's part at the owner's offset."""
        slot = self._in(parts[0].dtype)[self._rank]
        room = slot.numel() // self._size
        for owner, part in enumerate(parts):
            if owner != self._rank and part.numel():
                _copy_scaled(slot[owner * room : owner * room + part.numel()], part, scale)

    def _sum(self, output: Tensor, own: Tensor, scale: float) -> None:
        """Sum this rank's part over all ranks, in its output area and ``output`` (Note [Order of sums])."""
        numel = own.numel()
        if not numel:
            return
        if scale != 1.0:
            _copy_scaled(output, own, scale)
            own = output
        slots = self._in(own.dtype)
        start = self._rank * (slots[0].numel() // self._size)
        values = [own if rank == self._rank else slot[start : start + numel] for rank, slot in enumerate(slots)]
        total = self._out(own.dtype)[self._rank][:numel]
        sum_in_order(values, out=total)
        output.copy_(total)

    def _take_sums(self, parts: Sequence[Tensor], turn: int) -> None:
        for owner, slot in enumerate(self._out(parts[0].dtype, turn)):
            if owner != self._rank and parts[owner].numel():
                parts[owner].copy_(slot[: parts[owner].numel()])

    def _in(self, dtype: torch.dtype) -> list[Tensor]:
        """Return the areas that every rank copies into, in this turn."""
        return self._areas(dtype)[self._turn % 2][0]

    def _out(self, dtype: torch.dtype, turn: int | None = None) -> list[Tensor]:
        """Return the areas of every rank's sums, in this turn."""
        return self._areas(dtype)[(self._turn if turn is None else turn) % 2][1]

    def _areas(self, dtype: torch.dtype) -> list[tuple[list[Tensor], list[Tensor]]]:
        if dtype not in self._views:
            rank_bytes = 2 * (self._in_bytes + self._out_bytes)
            self._views[dtype] = [
                (
                    [self._view(dtype, rank * rank_bytes + turn * self._in_bytes, self._in_bytes) for rank in ranks],
                    [
                        self._view(
                            dtype, rank * rank_bytes + 2 * self._in_bytes + turn * self._out_bytes, self._out_bytes
                        )
                        for rank in ranks
                    ],
                )
                for turn in range(2)
                for ranks in [range(self._size)]
            ]
        return self._views[dtype]

    def _view(self, dtype: torch.dtype, offset_bytes: int, num_bytes: int) -> Tensor:
        return self._memory.tensor(dtype, [num_bytes // dtype.itemsize], offset_bytes)


def _parts(tensor: Tensor, starts: Sequence[int] | None, counts: Sequence[int]) -> list[Tensor]:
    starts = start_offsets(counts) if starts is None else starts
    return [tensor[start : start + count] for start, count in zip(starts, counts, strict=True)]


def _copy_scaled(target: Tensor, source: Tensor, scale: float) -> None:
    if scale == 1.0:
        target.copy_(source)
    else:
        torch.mul(source, scale, out=target)
