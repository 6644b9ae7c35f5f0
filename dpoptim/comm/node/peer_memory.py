"""Collectives of the ranks of a node that read each other's private memory. No MPI here.

Note [Reading each other's memory]
----------------------------------
Linux copies from the memory of another process of the same user (process_vm_readv(2), "cross-memory attach"; what MPIs
do for large messages). Where the ranks of a node may do that, nothing need pass through memory that they share but
addresses: each rank reads its part of the others' tensors, in pieces that fit a cache, and sums as it reads; of a
result each reads the others' parts to where they belong. That is one copy less than through a staging area
(:mod:`dpoptim.comm.node.staging`), and ranks meet a few times a batch of tensors rather than at every chunk: with
more ranks than cores each meeting costs a turn of all of them. What lies in memory that they lend each other
(:mod:`dpoptim.comm.node.lent_memory`) is summed from there.

A rank may be forbidden to read (Yama, seccomp, another user or process namespace), so that it is tried: each reads
a secret of each other. All agree on what came of it. Reading has one thread; ranks of several threads copy through a
staging area, with all of them.

Note [Batches]
--------------
A collective is noted first, and done with all others that were noted when the first one is waited for: all ranks
write down where their tensors are, meet, read, and meet again before anybody writes to them. So one meeting serves
all buckets of a step. The first and the last are left out where ranks are about to meet anyway
(:meth:`PeerMemory.announce_by`, :meth:`PeerMemory.end_by`).
"""

import ctypes
import os
import secrets
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.comm.node import process_memory
from dpoptim.comm.node.huge_pages import HugePages
from dpoptim.comm.node.lent_memory import LentMemory
from dpoptim.comm.node.peer_batch import MAX_NOTED, Cut, Noted, Row, windows
from dpoptim.comm.node.process_memory import SECRET_BYTES, Reading, error_of_reading
from dpoptim.comm.node.shared_memory import Node, SharedMemory
from dpoptim.comm.summing import SUMMED_IN_FLOAT32, accumulator
from dpoptim.partition import even_counts, start_offsets
from dpoptim.tuning import TUNING

__all__ = ["PeerMemory"]

# What is summed at once, of one tensor or several: so little that the sum and what was read stay in a cache, so much
# that what a call of the kernel takes beside its bytes hardly counts.
_WINDOW_BYTES = TUNING.window_bytes
# Larger tensors are worth huge pages.
_LARGE_BYTES = TUNING.huge_pages_bytes
_CLOSED = object()

_Result = TypeVar("_Result")


class PeerMemory:
    """The collectives of one node by reading each other's memory; construction is collective in the node.

    Every method is collective among the ranks of the node and gives the same bits on all. Tensors are flat,
    contiguous host tensors of one dtype, divided alike on all ranks. They belong to this object until :meth:`wait`
    returns.

    Parameters
    ----------
    node : Node
        The ranks.
    meet : callable
        Waits until all ranks of the node are there.

    Raises
    ------
    OSError
        On every rank of the node, if one may not read another's memory.
    """

    def __init__(self, node: Node, meet: Callable[[], None]) -> None:
        self._node, self._rank, self._size, self._meet = node, node.rank, node.world_size, meet
        secret = torch.frombuffer(bytearray(secrets.token_bytes(SECRET_BYTES)), dtype=torch.uint8)
        places = node.all_gather_object((os.getpid(), secret.data_ptr(), bytes(secret.tolist())))
        error = error_of_reading(places)
        # Also keeps every secret in its place until all have read it.
        errors = node.all_gather_object(None if error is None else f"rank {node.rank} of the node: {error}")
        reason = next((text for text in errors if text is not None), None)
        if reason is not None:
            raise OSError(reason)
        self._pids = [pid for pid, _, _ in places]
        num_bytes = ctypes.sizeof(Row)
        self._memory = SharedMemory(node, num_bytes * self._size).tensor(torch.uint8, [num_bytes * self._size])
        start = self._memory.data_ptr()
        self._rows = [Row.from_address(start + num_bytes * rank) for rank in range(self._size)]
        self._noted: list[Noted] = []
        self._is_announced = False
        self._leaves_open = False
        self._error: object = _CLOSED  # what went wrong in a batch that is done and not ended, or None
        self._first, self._further = (torch.empty(_WINDOW_BYTES, dtype=torch.uint8, device="cpu") for _ in range(2))
        self._huge_pages = HugePages()
        self._lent: LentMemory | None = None
        # What was gathered last of what is noted again and again, where that was, and how.
        self._gathered: tuple[list[tuple[Noted, Sequence[int]]], Sequence[Reading]] = [], []

    # ---------------------------------------------------------------- what to do

    def all_reduce(self, tensor: Tensor, scale: float = 1.0) -> None:
        """Note: sum ``scale`` times the tensor over the ranks, in place; every rank has a scale of its own."""
        counts = even_counts(len(tensor), self._size)
        starts = start_offsets(counts)
        own = tensor[starts[self._rank] : starts[self._rank] + counts[self._rank]]
        self._note(Noted(tensor, starts, counts, own, scale, gathers=True))

    def reduce_scatter(
        self, output: Tensor, tensor: Tensor, starts: Sequence[int], counts: Sequence[int], scale: float = 1.0
    ) -> None:
        """Note: sum ``scale`` times the parts of a tensor over the ranks; each keeps its own part.

        Parameters
        ----------
        output : Tensor, numel ``counts[rank]``
            Receives the sum of this rank's part; may be that part itself.
        tensor : Tensor
            This rank's values of every rank's part; those of the other ranks are left unchanged.
        starts, counts : sequence of int
            Where each rank's part begins, and how many elements it has; the same on all ranks.
        scale : float
            Of this rank's values.
        """
        self._note(Noted(tensor, starts, counts, output, scale, gathers=False))

    def all_gather(self, tensor: Tensor, starts: Sequence[int], counts: Sequence[int]) -> None:
        """Note: collect every rank's part of the tensor, where its own already has the values. Any dtype."""
        self._note(Noted(tensor, starts, counts, None, 1.0, gathers=True))

    def prepare_all_gathers(self, tensors: Sequence[tuple[Tensor, Sequence[int]]]) -> Callable[[], None]:
        """Return what notes :meth:`all_gather` of tensors divided by these counts, again and again; local."""
        prepared = [
            Noted(tensor, start_offsets(counts), counts, None, 1.0, gathers=True, is_kept=True)
            for tensor, counts in tensors
        ]

        def note() -> None:
            for noted in prepared:
                self._note(noted)

        return note

    def _note(self, noted: Noted) -> None:
        if not any(noted.counts):
            return
        self._noted.append(noted)
        if len(self._noted) == MAX_NOTED:
            self.wait()

    def lend(self, num_bytes: int) -> LentMemory:
        """Return memory for tensors that are to be summed; nothing is noted now, nothing lent before.

        Raises
        ------
        OSError
            On every rank, if there is none.
        """
        assert not self._noted
        self._lent = LentMemory(self._node, num_bytes, _WINDOW_BYTES)
        return self._lent

    def take_back(self) -> None:
        """Forget what was lent, on all ranks alike; nothing is noted now. Tensors there go on living."""
        self._lent = None
        self._gathered = [], []

    def divide(self, divisor: float) -> None:
        """Divide the scales of all that was noted, on all ranks by the same."""
        for noted in self._noted:
            noted.divisor = divisor

    # ---------------------------------------------------------------- how

    def wait(self) -> None:
        """Do all that was noted (Note [Batches]); blocks.

        Raises
        ------
        RuntimeError
            On every rank, if one could not read.
        """
        if not self._noted:
            return
        if not self._is_announced:
            self._announce()
            self._meet()
        self._is_announced = False
        batch, self._noted = self._noted, []
        self._do(batch)

    def announce_by(self, meet: Callable[[], _Result]) -> _Result:
        """Do without the first meeting of a batch, since all ranks of the node meet in ``meet()``; return its result.

        Less than ``MAX_NOTED`` collectives are noted, and no more are before :meth:`wait`. If the meeting fails, as it
        does on all ranks alike, nothing is noted any more.
        """
        self._announce()
        try:
            result = meet()
        except BaseException:
            self._noted.clear()
            raise
        self._is_announced = bool(self._noted)
        return result

    def end_by(self, meet: Callable[[], _Result]) -> _Result:
        """Do without the last meeting of a batch, which ends within ``meet()``; return its result.

        All that was noted is done within, and then all ranks of the node meet there by other means. Until then it
        belongs to this object, but for this rank's sums and what it has gathered, which may be read.

        Raises
        ------
        RuntimeError
            On every rank, if one could not read.
        """
        self._leaves_open = True
        try:
            result = meet()
        finally:
            self._leaves_open = False
        self._close()
        return result

    def _do(self, batch: Sequence[Noted]) -> None:
        summed = [noted for noted in batch if noted.output is not None]
        gathered = [noted for noted in batch if noted.gathers]
        self._learn_places(batch)
        error = self._attempt(self._sum, summed)
        if summed and gathered:
            self._meet()
        self._error = self._attempt(self._gather, gathered) or error
        self._rows[self._rank].failed = self._error is not None
        if not self._leaves_open:
            self._meet()
            self._close()

    def _close(self) -> None:
        """End a batch after which all ranks have met."""
        if self._error is _CLOSED:
            return
        error, self._error = self._error, _CLOSED
        failed = next((rank for rank, row in enumerate(self._rows) if row.failed), None)
        if failed is not None:
            text = f"rank {failed} of the node could not read another's memory" + (f": {error}" if error else "")
            raise raised_on_all_ranks(RuntimeError(text))

    def _attempt(self, do: Callable[[Sequence[Noted]], None], batch: Sequence[Noted]) -> OSError | None:
        try:
            do(batch)
        except OSError as error:
            return error
        return None

    def _announce(self) -> None:
        """Write down where this rank's tensors are."""
        if self._error is not _CLOSED:  # others may still read what the last batch has told them
            self._meet()
            self._close()
        number = len(self._noted)
        self._huge_pages.want(
            (noted.tensor.data_ptr(), noted.tensor.nbytes)
            for noted in self._noted
            if noted.tensor.nbytes >= _LARGE_BYTES and noted.output is None
        )
        own = self._rows[self._rank]
        own.places[:number] = [noted.tensor.data_ptr() for noted in self._noted]
        own.scales[:number] = [noted.scale for noted in self._noted]

    def _learn_places(self, batch: Sequence[Noted]) -> None:
        """Read where the tensors of all ranks are."""
        number = len(batch)
        all_places = zip(*[row.places[:number] for row in self._rows], strict=True)
        all_scales = zip(*[row.scales[:number] for row in self._rows], strict=True)
        for noted, places, scales in zip(batch, all_places, all_scales, strict=True):
            noted.places, noted.scales = places, [scale / noted.divisor for scale in scales]

    def _sum(self, batch: Sequence[Noted]) -> None:
        """Sum this rank's parts over all ranks, window by window (Note [Order of sums] in summing.py)."""
        alike: dict[tuple[torch.dtype, tuple[float, ...]], list[Noted]] = {}
        for noted in batch:
            alike.setdefault((noted.tensor.dtype, tuple(noted.scales)), []).append(noted)
        for (dtype, scales), members in alike.items():
            others = [noted for noted in members if not self._sum_lent(noted, dtype, scales)]
            for window in windows(others, self._rank, _WINDOW_BYTES // dtype.itemsize):
                self._sum_window(window, dtype, scales)

    def _sum_lent(self, noted: Noted, dtype: torch.dtype, scales: Sequence[float]) -> bool:
        """Sum this rank's part of a tensor where all ranks lent it, in its place; return False if they did not."""
        assert noted.output is not None
        if self._lent is None or not dtype.is_floating_point or dtype in SUMMED_IN_FLOAT32 or len(set(scales)) > 1:
            return False
        start, numel = noted.starts[self._rank], noted.counts[self._rank]
        if noted.output.data_ptr() != noted.places[self._rank] + start * dtype.itemsize:
            return False
        return self._lent.sum_part(tuple(noted.places), dtype, start, numel, scales[0])

    def _sum_window(self, window: "Sequence[Cut]", dtype: torch.dtype, scales: Sequence[float]) -> None:
        """Sum what one window holds, of all ranks; the targets, which may be the ranks' own, are written last."""
        # A factor that all have in common is one pass over the sum rather than over what is summed.
        common = scales[0] if len(set(scales)) == 1 else None
        if common is not None:
            scales = (1.0,) * self._size
        numels = [cut.own.numel() for cut in window]
        first, further = (scratch.view(dtype)[: sum(numels)] for scratch in (self._first, self._further))
        total = first
        # a + b is b + a: this rank's own values are never the first, which are copied
        for place, rank in enumerate(range(self._size) if self._rank else (1, 0, *range(2, self._size))):
            values = further if place else first
            if rank != self._rank:
                sources = [cut.source(rank) for cut in window]
                process_memory.read_memory(self._pids[rank], sources, [(values.data_ptr(), values.nbytes)])
            elif scales[rank] == 1.0:
                torch._foreach_add_(total.split(numels), [cut.own for cut in window])
                continue
            else:
                torch._foreach_copy_(values.split(numels), [cut.own for cut in window])
            if scales[rank] != 1.0:
                values.mul_(scales[rank])
            if place:
                total.add_(values)
            else:
                total = accumulator(first)
        sums, targets = total.split(numels), [cut.target for cut in window]
        if common is None or common == 1.0:
            torch._foreach_copy_(targets, sums)
            return
        for target, part in zip(targets, sums, strict=True):
            torch.mul(part, common, out=target)

    def _gather(self, batch: Sequence[Noted]) -> None:
        if not batch:
            return
        readings = self._kept_readings(batch) if all(noted.is_kept for noted in batch) else self._readings(batch)
        for step in range(1, self._size):  # not all from the same rank at once
            owner = (self._rank + step) % self._size
            readings[owner].do(self._pids[owner])

    def _kept_readings(self, batch: Sequence[Noted]) -> Sequence[Reading]:
        """Return what is gathered from each rank, as the last time if everything is where it was."""
        batch_and_places = [(noted, noted.places) for noted in batch]
        if batch_and_places != self._gathered[0]:
            self._gathered = batch_and_places, self._readings(batch)
        return self._gathered[1]

    def _readings(self, batch: Sequence[Noted]) -> Sequence[Reading]:
        return [self._reading_from(owner, batch) for owner in range(self._size)]

    def _reading_from(self, owner: int, batch: Sequence[Noted]) -> Reading:
        """Find out where an owner's parts lie there, and where they belong here."""
        reading = Reading()
        for noted in batch:
            itemsize = noted.tensor.element_size()
            start_bytes, num_bytes = noted.starts[owner] * itemsize, noted.counts[owner] * itemsize
            if not num_bytes:
                continue
            source, target = noted.places[owner] + start_bytes, noted.places[self._rank] + start_bytes
            lent_source = lent_target = None
            if self._lent is not None:
                lent_source = self._lent.view(owner, source, num_bytes)
                lent_target = self._lent.view(self._rank, target, num_bytes)
            if lent_source is None or lent_target is None:
                reading.add((source, num_bytes), (target, num_bytes))
            else:
                reading.add_lent(lent_source, lent_target)
        return reading
