"""Collectives by messages that go on while their caller computes (Note [Looking after transfers] in pieces.py)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dpoptim.comm.mpi.messages import NUM_IN_FLIGHT, Messages, Request
from dpoptim.comm.mpi.pieces import InFlight, Transfer
from dpoptim.comm.summing import SUMMED_IN_FLOAT32
from dpoptim.comm.transport import Transport
from dpoptim.tuning import TUNING

__all__ = ["PolledMessages"]

# The network must have enough to do between two looks: with 4.5 MiB large tensors took longer over 1 Gbit/s.
_IN_FLIGHT_BYTES = TUNING.polled_in_flight_bytes


class PolledMessages(Transport):
    """Collectives of the ranks of some messages, in messages of their own; construction is collective.

    They go on while their caller calls :meth:`poll`.

    Parameters
    ----------
    messages : Messages
        The ranks, and how large tensors are cut.
    """

    def __init__(self, messages: Messages) -> None:
        self._sizes = messages  # how large pieces are
        self._first, self._second = messages.duplicate(), messages.duplicate()
        self._first.patience_bytes = self._second.patience_bytes = messages.patience_bytes
        self._in_flight = InFlight(max(NUM_IN_FLIGHT, _IN_FLIGHT_BYTES // messages.piece_bytes))

    def all_reduce(self, tensor: Tensor, scale: float = 1.0) -> Transfer:
        """Start to sum over all ranks, in place; does not block."""
        if scale != 1.0:
            tensor.mul_(scale)
        if self._sizes.goes_in_pieces(tensor) or tensor.dtype in SUMMED_IN_FLOAT32:
            pieces = torch.split(tensor, self._sizes.piece_numel(tensor))
            return self._in_flight.begin(self._first.all_reduce_piece(piece, self._second) for piece in pieces)
        return self._in_flight.begin([self._whole(tensor)])

    def reduce_scatter(self, output: Tensor, source: Tensor, counts: Sequence[int], scale: float = 1.0) -> Transfer:
        """Start to sum ``scale * source``; ``output``, perhaps a part of it, receives this rank's part."""
        if scale != 1.0:
            source = source * scale
        return self._in_flight.begin(self._first.reduce_scatter_pieces(output, source, counts))

    def all_gather(self, tensor: Tensor, counts: Sequence[int]) -> Transfer:
        """Start to collect every rank's part of ``tensor``, where its own is already in place."""
        return self._in_flight.begin(self._first.all_gather_pieces(tensor, counts))

    def poll(self) -> None:
        """Go on with what is under way; local, does not block."""
        self._in_flight.poll()

    def free(self) -> None:
        """End what is under way, and give back MPI's communicators."""
        self._in_flight.wait_for_all()
        self._first.free()
        self._second.free()

    def _whole(self, tensor: Tensor) -> Iterator[Request]:
        yield self._first.start_all_reduce(tensor)  # when its turn has come (Note [Phases] in pieces.py)
