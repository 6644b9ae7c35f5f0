"""PeerMemory: the transport among ranks of a node that read each other's private memory. No MPI here.

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
write down the addresses of their tensors, meet, read, and meet again before anybody writes to them. So one meeting
serves all buckets of a step. The first and the last are left out where ranks are about to meet anyway
(:meth:`PeerMemory.open_with`, :meth:`PeerMemory.close_with`).
"""

import ctypes
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.comm.node.huge_pages import HugePages
from dpoptim.comm.node.lent_memory import LentMemory
from dpoptim.comm.node.peer_batch import MAX_COLLECTIVES, Collective, PeerBatch, Row
from dpoptim.comm.node.peer_gathers import PeerGathers
from dpoptim.comm.node.peer_sums import PeerSums
from dpoptim.comm.node.process_memory import SECRET_BYTES, error_of_reading
from dpoptim.comm.node.shared_memory import Node, SharedMemory
from dpoptim.comm.normal_tensors import normal_tensors
from dpoptim.comm.summing import is_summed_here
from dpoptim.comm.transport import Batch, NodeTransport
from dpoptim.comm.work import Work
from dpoptim.partition import even_counts, start_offsets
from dpoptim.tuning import TUNING

__all__ = ["PeerMemory"]

logger = logging.getLogger(__name__)

# What is summed at once, of one tensor or several: so little that the sum and what was read stay in a cache, so much
# that what a call of the kernel takes beside its bytes hardly counts.
_WINDOW_BYTES = TUNING.window_bytes
# Larger tensors are worth huge pages.
_LARGE_BYTES = TUNING.huge_pages_bytes
_CLOSED = object()

_Result = TypeVar("_Result")


class PeerMemory(NodeTransport):
    """The collectives of one node by reading each other's memory; construction is collective in the node.

    A collective only notes what is to be done; its work does it, with all that was noted (Note [Batches]).

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

    has_memory = True

    def __init__(self, node: Node, meet: Callable[[], None]) -> None:
        self._node, self._rank, self._size, self._meet = node, node.rank, node.world_size, meet
        pids = _pids_of_peers(node)
        num_bytes = ctypes.sizeof(Row)
        self._memory = SharedMemory(node, num_bytes * self._size).tensor(torch.uint8, [num_bytes * self._size])
        start = self._memory.data_ptr()
        self._rows = [Row.from_address(start + num_bytes * rank) for rank in range(self._size)]
        self._noted: list[Collective] = []
        self._is_open = False
        self._leaves_open = False
        self._error: object = _CLOSED  # what went wrong in a batch that is done and not closed, or None
        self._sums, self._gathers = PeerSums(self._rank, pids, _WINDOW_BYTES), PeerGathers(self._rank, pids)
        self._huge_pages = HugePages()
        self._lent: LentMemory | None = None

    # ---------------------------------------------------------------- what to do

    def all_reduce(self, tensor: Tensor, scale: float = 1.0) -> Work:
        """Sum over the ranks, in place."""
        counts = even_counts(len(tensor), self._size)
        starts = start_offsets(counts)
        own = tensor[starts[self._rank] : starts[self._rank] + counts[self._rank]]
        return self._add(Collective(tensor, starts, counts, own, scale, gathers=True))

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
        starts = start_offsets(counts) if starts is None else starts
        return self._add(Collective(source, starts, counts, output, scale, gathers=False))

    def all_gather(self, tensor: Tensor, counts: Sequence[int], *, starts: Sequence[int] | None = None) -> Work:
        """Collect every rank's part."""
        starts = start_offsets(counts) if starts is None else starts
        return self._add(Collective(tensor, starts, counts, None, 1.0, gathers=True))

    def prepare_all_gathers(self, outputs: Sequence[tuple[Tensor, Sequence[int]]]) -> Callable[[], Sequence[Work]]:
        """Return what notes :meth:`all_gather` of each of these, again and again; local."""
        prepared = [
            Collective(tensor, start_offsets(counts), counts, None, 1.0, gathers=True, is_kept=True)
            for tensor, counts in outputs
        ]

        def start() -> Sequence[Work]:
            for collective in prepared:
                self._add(collective)
            return [self]

        return start

    def batch(
        self,
        num_collectives: int,
        dtypes: Iterable[torch.dtype],
        sum_numbers: Callable[[Sequence[float]], list[float]],
    ) -> Batch | None:
        """Return a batch whose meetings are its caller's, if it is not too large."""
        is_possible = 0 < num_collectives < MAX_COLLECTIVES
        if not (is_possible and all(is_summed_here(dtype.to_real()) for dtype in dtypes)):
            return None
        return PeerBatch(self, sum_numbers)

    @normal_tensors()
    def allocate(self, num_bytes: int) -> LentMemory | None:
        """Return memory from which others sum what lies there (Note [Lent memory] in lent_memory.py)."""
        self._lent = None  # tensors there go on living
        self._gathers.forget()
        if not num_bytes:
            return None
        assert not self._noted
        try:
            self._lent = LentMemory(self._node, num_bytes, _WINDOW_BYTES)
        except OSError as error:
            logger.info("gradients lie in private memory: %s (rank %d)", error, self._rank)
        return self._lent

    def drop(self) -> None:
        """Forget what was noted, which would otherwise be done with what is noted next."""
        self._noted.clear()
        self._is_open = False

    # ---------------------------------------------------------------- a batch

    def wait(self) -> None:
        """Do all that was noted (Note [Batches]); blocks.

        Raises
        ------
        RuntimeError
            On every rank, if one could not read.
        """
        if not self._noted:
            return
        if not self._is_open:
            self._announce()
            self._meet()
        self._is_open = False
        batch, self._noted = self._noted, []
        self._do(batch)

    def open_with(self, meet: Callable[[], _Result]) -> _Result:
        """Do without the first meeting of a batch, since all ranks of the node meet in ``meet()``; return its result.

        Less than ``MAX_COLLECTIVES`` are noted, and no more are before :meth:`wait`. If the meeting fails, as it does
        on all ranks alike, nothing is noted any more.
        """
        self._announce()
        try:
            result = meet()
        except BaseException:
            self.drop()
            raise
        self._is_open = bool(self._noted)
        return result

    def divide(self, divisor: float) -> None:
        """Divide the scales of all that was noted, on all ranks by the same."""
        for collective in self._noted:
            collective.divisor = divisor

    def close_with(self, meet: Callable[[], _Result]) -> _Result:
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

    # ---------------------------------------------------------------- how

    def _add(self, collective: Collective) -> Work:
        if any(collective.counts):
            self._noted.append(collective)
            if len(self._noted) == MAX_COLLECTIVES:
                self.wait()
        return self

    def _announce(self) -> None:
        """Write down where this rank's tensors are."""
        if self._error is not _CLOSED:  # others may still read what the last batch has told them
            self._meet()
            self._close()
        number = len(self._noted)
        self._huge_pages.want(
            (collective.tensor.data_ptr(), collective.tensor.nbytes)
            for collective in self._noted
            if collective.tensor.nbytes >= _LARGE_BYTES and collective.output is None
        )
        own = self._rows[self._rank]
        own.addresses[:number] = [collective.tensor.data_ptr() for collective in self._noted]
        own.scales[:number] = [collective.scale for collective in self._noted]

    def _do(self, batch: Sequence[Collective]) -> None:
        summed = [collective for collective in batch if collective.output is not None]
        gathered = [collective for collective in batch if collective.gathers]
        self._learn_addresses(batch)
        error = _attempt(self._sums.sum, summed, self._lent)
        if summed and gathered:
            self._meet()
        self._error = _attempt(self._gathers.gather, gathered, self._lent) or error
        self._rows[self._rank].failed = self._error is not None
        if not self._leaves_open:
            self._meet()
            self._close()

    def _learn_addresses(self, batch: Sequence[Collective]) -> None:
        """Read where the tensors of all ranks are."""
        number = len(batch)
        all_addresses = zip(*[row.addresses[:number] for row in self._rows], strict=True)
        all_scales = zip(*[row.scales[:number] for row in self._rows], strict=True)
        for collective, addresses, scales in zip(batch, all_addresses, all_scales, strict=True):
            collective.addresses = addresses
            collective.scales = [scale / collective.divisor for scale in scales]

    def _close(self) -> None:
        """End a batch after which all ranks have met."""
        if self._error is _CLOSED:
            return
        error, self._error = self._error, _CLOSED
        failed = next((rank for rank, row in enumerate(self._rows) if row.failed), None)
        if failed is not None:
            text = f"rank {failed} of the node could not read another's memory" + (f": {error}" if error else "")
            raise raised_on_all_ranks(RuntimeError(text))


def _pids_of_peers(node: Node) -> list[int]:
    """Return the process of each rank, when all have read a secret of each other; collective in the node."""
    secret = torch.frombuffer(bytearray(secrets.token_bytes(SECRET_BYTES)), dtype=torch.uint8)
    secrets_of_all = node.all_gather_object((os.getpid(), secret.data_ptr(), bytes(secret.tolist())))
    error = error_of_reading(secrets_of_all)
    # Also keeps every secret in its place until all have read it.
    errors = node.all_gather_object(None if error is None else f"rank {node.rank} of the node: {error}")
    reason = next((text for text in errors if text is not None), None)
    if reason is not None:
        raise OSError(reason)
    return [pid for pid, _, _ in secrets_of_all]


def _attempt(
    do: Callable[[Sequence[Collective], LentMemory | None], None],
    batch: Sequence[Collective],
    lent: LentMemory | None,
) -> OSError | None:
    try:
        do(batch, lent)
    except OSError as error:
        return error
    return None
