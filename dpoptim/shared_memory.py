"""Memory that the ranks of one node share, and their collectives through it, at the speed of memory. No MPI here.

Note [A mapped file]
--------------------
The memory is a file in ``/dev/shm`` that one rank makes (mode 0600, a random name), all ranks map, and that is
unlinked at once. It is any MPI's, needs no one-sided component (MPI's own shared windows hang in ``MPI_Finalize`` after
a rank was killed), is closed to other users, and is gone when the last rank ends, however it ends. Every rank
allocates its share of the pages: a full ``/dev/shm`` is an error then and not a SIGBUS later, and on a machine with
several memory banks the pages lie near their rank.

Note [Staging]
--------------
Tensors stay in private memory and pass through a small staging area in chunks that fit the caches: a rank copies
in what the others need, all meet, each sums its part, all meet, each copies out the others' sums. Main memory is
read and written about once, whatever the number of ranks. The areas are used in turns of two, so that a rank writes
one while others still read the other, and one meeting a chunk is enough: what was written before meeting ``i`` is read
before meeting ``i + 1`` and written again only after it.

Note [Order of sums]
--------------------
Sums are taken in the order of ranks, in float32 for 16-bit dtypes. Their bits do not depend on how a tensor is
divided among owners, chunks or buckets.
"""

import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dpoptim.partition import even_counts, start_offsets
from dpoptim.sleeping_barrier import SleepingBarrier

__all__ = ["SUMMED_IN_FLOAT32", "Node", "SharedMemory", "StagingArea"]

_DIRECTORY = "/dev/shm"  # noqa: S108 - in memory; mkstemp makes the name and the mode safe
_CACHE_LINE_BYTES = 64
# What a rank copies in between two meetings: what suits caches; more for ranks that take turns on a core, where a
# meeting takes a turn of each (4 ranks on 2 cores: a tenth to a third less of the exchange than with 1 MiB).
_AWAKE_BYTES, _ASLEEP_BYTES = 1 << 20, 1 << 22
_SUMMED = (torch.float64, torch.float32, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
SUMMED_IN_FLOAT32 = (torch.bfloat16, torch.float16)


class Node(Protocol):
    """The ranks of one node; every method is collective among them."""

    rank: int
    world_size: int

    def barrier(self) -> None:
        """Wait until all ranks are here."""

    def all_gather_object(self, item: Any) -> list[Any]:
        """Return every rank's item."""

    def broadcast_object(self, item: Any, root: int) -> Any:
        """Return the root's item."""


class SharedMemory:
    """Memory that all ranks of a node map (Note [A mapped file]); construction is collective among them.

    Parameters
    ----------
    node : Node
        The ranks.
    num_bytes : int
        How much, > 0; the same on all.

    Raises
    ------
    OSError
        On every rank of the node, if one could not make, allocate or map it.
    """

    def __init__(self, node: Node, num_bytes: int) -> None:
        path, descriptor, error = None, -1, None
        if node.rank == 0:
            try:
                descriptor, path = tempfile.mkstemp(prefix="dpoptim-", dir=_DIRECTORY)
                os.ftruncate(descriptor, num_bytes)
            except OSError as caught:
                error = caught
        path = node.broadcast_object(path, root=0)
        try:
            if path is not None and error is None:
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC) if descriptor < 0 else descriptor
                counts = even_counts(num_bytes, node.world_size)
                if counts[node.rank]:
                    os.posix_fallocate(descriptor, start_offsets(counts)[node.rank], counts[node.rank])
                self._map = mmap.mmap(descriptor, num_bytes)
        except OSError as caught:
            error = caught
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        errors = node.all_gather_object(None if error is None else f"rank {node.rank} of the node: {error}")
        if node.rank == 0 and path is not None:
            Path(path).unlink()
        reason = next((text for text in errors if text is not None), None)
        if reason is not None:
            raise OSError(f"no {num_bytes / 2**20:.1f} MiB of memory to share in {_DIRECTORY} ({reason})")

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], offset_bytes: int = 0) -> Tensor:
        """Return a tensor in this memory, with a storage of its own that begins at ``offset_bytes``."""
        numel = torch.Size(shape).numel()
        if numel == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=numel, offset=offset_bytes).view(shape)


class StagingArea:
    """The collectives of one node through shared memory (Note [Staging]); construction is collective in the node.

    Every method is collective among the ranks of the node, blocks, and gives the same bits on all. Tensors are flat,
    contiguous host tensors of one dtype; they belong to the call until it returns.

    Parameters
    ----------
    node : Node
        The ranks; messages on it are this object's alone.
    sleeping : bool
        Whether ranks that wait sleep, for those that share cores.
    chunk_bytes : int, optional
        Bytes that a rank copies in between two meetings; by default what suits caches. If ``/dev/shm`` is too small
        for it, less is taken.

    Raises
    ------
    OSError
        On every rank of the node, if there is no memory to share.
    """

    def __init__(self, node: Node, *, sleeping: bool = False, chunk_bytes: int | None = None) -> None:
        self._rank, self._size = node.rank, node.world_size
        wanted = chunk_bytes or max(_ASLEEP_BYTES if sleeping else _AWAKE_BYTES, self._size << 16)
        while True:
            part_bytes = _rounded_up(-(-wanted // self._size))
            self._in_bytes, self._out_bytes = part_bytes * self._size, part_bytes
            try:
                self._memory = SharedMemory(node, 2 * self._size * (self._in_bytes + self._out_bytes))
                break
            except OSError:
                if chunk_bytes or wanted <= 1 << 16:
                    raise
                wanted >>= 2
        self.meet = node.barrier
        if sleeping and SleepingBarrier.is_here():
            numel = SleepingBarrier.words_needed(self._size)
            words = SharedMemory(node, 4 * numel).tensor(torch.int32, [numel])
            self.meet = SleepingBarrier(words, self._rank, self._size).wait
        self._turn = 0
        self._views: dict[torch.dtype, list[tuple[list[Tensor], list[Tensor]]]] = {}

    @staticmethod
    def sums(dtype: torch.dtype) -> bool:
        """Whether it can sum tensors of this dtype."""
        return dtype in _SUMMED or dtype in SUMMED_IN_FLOAT32

    def all_reduce(self, tensor: Tensor, scale: float = 1.0) -> None:
        """Sum ``scale`` times the tensor over the ranks of the node, in place; every rank has a scale of its own."""
        chunks = torch.split(tensor, self._in_bytes // tensor.element_size())
        divided = [torch.split(chunk, even_counts(chunk.numel(), self._size)) for chunk in chunks]
        if divided:
            self._put(divided[0], scale)
        for index, parts in enumerate(divided):
            self.meet()
            if index:
                self._take_sums(divided[index - 1], turn=self._turn - 1)
            self._sum(parts[self._rank], parts[self._rank], scale)
            self._turn += 1
            if index + 1 < len(divided):
                self._put(divided[index + 1], scale)
        if divided:
            self.meet()
            self._take_sums(divided[-1], turn=self._turn - 1)

    def all_reduce_small(self, tensor: Tensor, scale: float = 1.0) -> None:
        """Do the same in one meeting: every rank sums everything itself. For tensors of at most :attr:`small_bytes`."""
        numel = tensor.numel()
        if not numel:
            return
        slots = [slot[:numel] for slot in self._in(tensor.dtype)]
        _copy_scaled(slots[self._rank], tensor, scale)
        self.meet()
        tensor.copy_(_sum_of(slots))
        self._turn += 1

    @property
    def small_bytes(self) -> int:
        """The size of what fits one rank's area."""
        return self._in_bytes

    def reduce_scatter(self, output: Tensor, parts: Sequence[Tensor], scale: float = 1.0) -> None:
        """Sum ``scale`` times the parts over the ranks of the node; each keeps its part.

        Parameters
        ----------
        output : Tensor, numel of ``parts[rank]``
            Receives the sum of this rank's part; may be ``parts[rank]`` itself.
        parts : sequence of Tensor
            This rank's values of every rank's part; those of the other ranks are left unchanged.
        scale : float
            Of this rank's values.
        """
        window = self._out_bytes // output.element_size()
        windows = [torch.split(part, window) if part.numel() else () for part in parts]
        outputs = torch.split(output, window) if output.numel() else ()
        num_chunks = max(map(len, windows))
        for index in range(num_chunks):
            pieces = [pieces[index] if index < len(pieces) else output[:0] for pieces in windows]
            self._put(pieces, scale)
            self.meet()
            if index < len(outputs):
                self._sum(outputs[index], pieces[self._rank], scale)
            self._turn += 1

    def all_gather(self, parts: Sequence[Tensor]) -> None:
        """Collect every rank's part in ``parts``, where its own already has the values. Any dtype."""
        flat = [part.view(torch.uint8) for part in parts]
        num_chunks = max(-(-part.numel() // self._in_bytes) for part in flat)
        for index in range(num_chunks):
            slots = self._in(torch.uint8)
            pieces = [part[index * self._in_bytes : (index + 1) * self._in_bytes] for part in flat]
            slots[self._rank][: pieces[self._rank].numel()].copy_(pieces[self._rank])
            self.meet()
            for owner, piece in enumerate(pieces):
                if owner != self._rank and piece.numel():
                    piece.copy_(slots[owner][: piece.numel()])
            self._turn += 1

    def wait(self) -> None:
        """Nothing is left to wait for: every method blocks."""

    # ---------------------------------------------------------------- how

    def _put(self, parts: Sequence[Tensor], scale: float) -> None:
        """Copy what others sum into this rank's area; each owner's part at the owner's place."""
        slot = self._in(parts[0].dtype)[self._rank]
        place = slot.numel() // self._size
        for owner, part in enumerate(parts):
            if owner != self._rank and part.numel():
                _copy_scaled(slot[owner * place : owner * place + part.numel()], part, scale)

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
        _sum_of(values, out=total)
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


def _sum_of(values: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """Sum two or more tensors (Note [Order of sums])."""
    if values[0].dtype in SUMMED_IN_FLOAT32:
        wide = values[0].float()
        for value in values[1:]:
            wide += value
        return wide if out is None else out.copy_(wide)
    total = torch.add(values[0], values[1], out=out)
    for value in values[2:]:
        total += value
    return total


def _copy_scaled(target: Tensor, source: Tensor, scale: float) -> None:
    if scale == 1.0:
        target.copy_(source)
    else:
        torch.mul(source, scale, out=target)


def _rounded_up(num_bytes: int) -> int:
    """Round up so that areas of any dtype begin on cache lines of their own."""
    return -(-num_bytes // _CACHE_LINE_BYTES) * _CACHE_LINE_BYTES
