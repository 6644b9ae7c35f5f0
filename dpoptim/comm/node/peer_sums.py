"""Sums of a batch: this rank's parts over all ranks, read from their memory a window at a time. Local.

Tests: ``tests/comm/node/test_peer_memory.py``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpoptim.comm.node import process_memory
from dpoptim.comm.node.lent_memory import LentMemory
from dpoptim.comm.node.peer_batch import Collective
from dpoptim.comm.node.process_memory import Span
from dpoptim.comm.summing import SUMMED_IN_FLOAT32, accumulator

__all__ = ["PeerSums"]


@dataclass(frozen=True, slots=True)
class _Operand:
    """Elements that are summed at once: this rank's, where the sum goes, and their addresses on each rank."""

    own: Tensor
    target: Tensor
    addresses: Sequence[int]
    offset_bytes: int

    def source(self, rank: int) -> Span:
        """Return where they lie on a rank."""
        return self.addresses[rank] + self.offset_bytes, self.own.nbytes


class PeerSums:
    """Sums this rank's parts of tensors over all ranks of the node.

    Parameters
    ----------
    rank : int
        This rank's, in the node.
    pids : sequence of int
        The process of each rank.
    window_bytes : int
        What is summed at once, of one tensor or several.
    """

    def __init__(self, rank: int, pids: Sequence[int], window_bytes: int) -> None:
        self._rank, self._pids, self._window_bytes = rank, pids, window_bytes
        self._first, self._further = (torch.empty(window_bytes, dtype=torch.uint8, device="cpu") for _ in range(2))

    def sum(self, batch: Sequence[Collective], lent: LentMemory | None) -> None:
        """Sum this rank's parts, window by window (Note [Order of sums] in summing.py); raises OSError."""
        alike: dict[tuple[torch.dtype, tuple[float, ...]], list[Collective]] = {}
        for collective in batch:
            alike.setdefault((collective.tensor.dtype, tuple(collective.scales)), []).append(collective)
        for (dtype, scales), members in alike.items():
            others = [member for member in members if not self._sum_lent(member, dtype, scales, lent)]
            for window in _windows(others, self._rank, self._window_bytes // dtype.itemsize):
                self._sum_window(window, dtype, scales)

    def _sum_lent(
        self, collective: Collective, dtype: torch.dtype, scales: Sequence[float], lent: LentMemory | None
    ) -> bool:
        """Sum this rank's part of a tensor where all ranks lent it, in its place; return False if they did not."""
        assert collective.output is not None
        if lent is None or not dtype.is_floating_point or dtype in SUMMED_IN_FLOAT32 or len(set(scales)) > 1:
            return False
        start, numel = collective.starts[self._rank], collective.counts[self._rank]
        if collective.output.data_ptr() != collective.addresses[self._rank] + start * dtype.itemsize:
            return False
        return lent.sum_part(tuple(collective.addresses), dtype, start, numel, scales[0])

    def _sum_window(self, window: Sequence[_Operand], dtype: torch.dtype, scales: Sequence[float]) -> None:
        """Sum what one window holds, of all ranks; the targets, which may be the ranks' own, are written last."""
        size = len(self._pids)
        # A factor that all have in common is one pass over the sum rather than over what is summed.
        common = scales[0] if len(set(scales)) == 1 else None
        if common is not None:
            scales = (1.0,) * size
        numels = [operand.own.numel() for operand in window]
        first, further = (scratch.view(dtype)[: sum(numels)] for scratch in (self._first, self._further))
        total = first
        # a + b is b + a: this rank's own values are never the first, which are copied
        for turn, rank in enumerate(range(size) if self._rank else (1, 0, *range(2, size))):
            values = further if turn else first
            if rank != self._rank:
                sources = [operand.source(rank) for operand in window]
                process_memory.read_memory(self._pids[rank], sources, [(values.data_ptr(), values.nbytes)])
            elif scales[rank] == 1.0:
                torch._foreach_add_(total.split(numels), [operand.own for operand in window])
                continue
            else:
                torch._foreach_copy_(values.split(numels), [operand.own for operand in window])
            if scales[rank] != 1.0:
                values.mul_(scales[rank])
            if turn:
                total.add_(values)
            else:
                total = accumulator(first)
        sums, targets = total.split(numels), [operand.target for operand in window]
        if common is None or common == 1.0:
            torch._foreach_copy_(targets, sums)
            return
        for target, part in zip(targets, sums, strict=True):
            torch.mul(part, common, out=target)


def _windows(batch: Sequence[Collective], rank: int, numel: int) -> Iterator[list[_Operand]]:
    """Cut this rank's parts of tensors of one dtype into windows of so many elements; only the last may have less."""
    window: list[_Operand] = []
    room = numel
    for collective in batch:
        assert collective.output is not None
        start, count, done = collective.starts[rank], collective.counts[rank], 0
        while done < count:
            size = min(room, count - done)
            own, target = collective.tensor.narrow(0, start + done, size), collective.output.narrow(0, done, size)
            window.append(_Operand(own, target, collective.addresses, (start + done) * own.itemsize))
            done += size
            room -= size
            if not room:
                yield window
                window, room = [], numel
    if window:
        yield window
