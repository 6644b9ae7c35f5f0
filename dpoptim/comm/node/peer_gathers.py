"""Gathers of a batch of collectives: the parts that other ranks own, read from their memory. Local.

Tests: ``tests/comm/node/test_peer_memory.py``.
"""

from collections.abc import Sequence

from dpoptim.comm.node.lent_memory import LentMemory
from dpoptim.comm.node.peer_batch import Collective
from dpoptim.comm.node.process_memory import Reading

__all__ = ["PeerGathers"]


class PeerGathers:
    """Reads the parts of tensors that the other ranks of the node own.

    Parameters
    ----------
    rank : int
        This rank's, in the node.
    pids : sequence of int
        The process of each rank.
    """

    def __init__(self, rank: int, pids: Sequence[int]) -> None:
        self._rank, self._pids = rank, pids
        # What was gathered last of what is started again and again, where that was, and how.
        self._last: tuple[list[tuple[Collective, Sequence[int]]], Sequence[Reading]] = [], []

    def gather(self, batch: Sequence[Collective], lent: LentMemory | None) -> None:
        """Read the others' parts to where they belong; raises OSError."""
        if not batch:
            return
        is_kept = all(collective.is_kept for collective in batch)
        readings = self._kept_readings(batch, lent) if is_kept else self._readings(batch, lent)
        size = len(self._pids)
        for step in range(1, size):  # not all from the same rank at once
            owner = (self._rank + step) % size
            readings[owner].do(self._pids[owner])

    def forget(self) -> None:
        """Forget where the last batch was."""
        self._last = [], []

    def _kept_readings(self, batch: Sequence[Collective], lent: LentMemory | None) -> Sequence[Reading]:
        """Return what is gathered from each rank, as the last time if everything is where it was."""
        batch_and_addresses = [(collective, collective.addresses) for collective in batch]
        if batch_and_addresses != self._last[0]:
            self._last = batch_and_addresses, self._readings(batch, lent)
        return self._last[1]

    def _readings(self, batch: Sequence[Collective], lent: LentMemory | None) -> Sequence[Reading]:
        return [self._reading_from(owner, batch, lent) for owner in range(len(self._pids))]

    def _reading_from(self, owner: int, batch: Sequence[Collective], lent: LentMemory | None) -> Reading:
        """Find out where an owner's parts lie there, and where they belong here."""
        reading = Reading()
        for collective in batch:
            itemsize = collective.tensor.element_size()
            start_bytes, num_bytes = collective.starts[owner] * itemsize, collective.counts[owner] * itemsize
            if not num_bytes:
                continue
            source = collective.addresses[owner] + start_bytes
            target = collective.addresses[self._rank] + start_bytes
            lent_source = lent_target = None
            if lent is not None:
                lent_source = lent.view(owner, source, num_bytes)
                lent_target = lent.view(self._rank, target, num_bytes)
            if lent_source is None or lent_target is None:
                reading.add((source, num_bytes), (target, num_bytes))
            else:
                reading.add_lent(lent_source, lent_target)
        return reading
