"""Messages: collectives of flat host tensors by MPI.

Tests: ``tests/comm/test_communicator.py``.

Note [Wire precision]
---------------------
MPI has no sum for bfloat16 and, portably, none for float16. User-defined reduction operations would run Python
for every message and are wrong in the non-blocking collectives of some MPIs (open-mpi/ompi#1754). Hence tensors
of 16 bits travel as bytes: every rank receives all ranks' values of the part that it owns, sums them (Note [Order of
sums] in summing.py), and sends the result to all. The result is the same bits on every rank.

Note [Large messages]
---------------------
An MPI-3 count is a C int. Messages are cut to ``max_message_bytes``, which also bounds the scratch memory of MPI
and of the 16-bit sums.

Note [Pieces in flight]
-----------------------
A blocking all-reduce of one large message leaves the network idle while it sums, and while a computation beside it
has the core. Between nodes large tensors therefore go in pieces, several in flight at a time: each rank receives the
others' values of its share, sums them in the order of ranks, and all gather the sums. No byte more than needed is sent
on any number of hosts, where MPICH's all-reduce is made for powers of two (docs/scaling.md has steps on 3 and 4 hosts).
With many nodes pieces grow, since each rank's share of one is a message. On one node of a power of two ranks a tensor
is one message, as is one in device memory, whose sums Open MPI has in blocking form only.

Note [Patience]
---------------
MPI waits by asking again and again, which takes a whole core. Where ranks share cores, or a thread waits beside a
computation, it takes time from what is waited for. Patient collectives sleep between questions.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dpoptim.comm.mpi.library import checked
from dpoptim.comm.mpi.pieces import InFlight
from dpoptim.comm.summing import SUMMED_IN_FLOAT32, sum_in_order
from dpoptim.comm.transport import Transport
from dpoptim.comm.work import DONE, Work
from dpoptim.partition import even_counts, start_offsets
from dpoptim.tuning import TUNING

__all__ = [
    "NUM_IN_FLIGHT",
    "Messages",
    "PendingSum",
    "Request",
    "has_sum",
]

# Sums of these are done by MPI itself, in this precision. The values are names of mpi4py datatypes.
_MPI_SUM_TYPES = {
    torch.float64: "DOUBLE",
    torch.float32: "FLOAT",
    torch.int64: "INT64_T",
    torch.int32: "INT32_T",
    torch.int16: "INT16_T",
    torch.int8: "INT8_T",
    torch.uint64: "UINT64_T",
    torch.uint32: "UINT32_T",
    torch.uint16: "UINT16_T",
    torch.uint8: "UINT8_T",
}
_IN_PIECES_BYTES = TUNING.in_pieces_bytes
_SHARE_BYTES = TUNING.share_bytes
_PIECE_BYTES = TUNING.piece_bytes
NUM_IN_FLIGHT = TUNING.num_in_flight
_SHORTEST_NAP_S = TUNING.shortest_nap_s
_LONGEST_NAP_S = TUNING.longest_nap_s


class Request:
    """A collective that MPI itself carries on."""

    def __init__(self, request: Any, *, patient: bool) -> None:
        self._request = request
        self._patient = patient

    def wait(self) -> None:
        """Block until the result is there."""
        if not self._patient:
            self._request.Wait()
            return
        nap_s = _SHORTEST_NAP_S
        while not self._request.Test():
            time.sleep(nap_s)
            nap_s = min(1.5 * nap_s, _LONGEST_NAP_S)

    def test(self) -> bool:
        """Whether the result is there."""
        return bool(self._request.Test())


class PendingSum:
    """A sum of numbers that MPI itself carries on."""

    def __init__(self, pending: Request, numbers: Tensor) -> None:
        self._pending, self._numbers = pending, numbers

    def wait(self) -> list[float]:
        """Block until the sums are there, and return them."""
        self._pending.wait()
        return list(self._numbers.tolist())

    def test(self) -> bool:
        """Whether :meth:`wait` does not block."""
        return self._pending.test()


class Messages(Transport):
    """A private duplicate of an MPI communicator, and the collectives on it.

    Every method named after a collective is one, and blocks. Tensors are in memory that MPI reads, on the host or not.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm or heat.core.communication.MPICommunication, optional
        An intracommunicator; ``None`` is ``COMM_WORLD``.
    max_message_bytes : int
        Longer messages are cut.

    Attributes
    ----------
    patience_bytes : int
        Collectives of messages up to so many bytes are waited for asleep (Note [Patience]); 0 by default.
    in_pieces : bool
        Whether large tensors go in pieces (Note [Pieces in flight]); no by default.
    """

    def __init__(self, comm: Any, max_message_bytes: int) -> None:
        from mpi4py import MPI  # importing this initialises MPI, which importing dpoptim must not do

        self._mpi = MPI
        self._comm = checked(comm, MPI).Dup()
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.rank: int = self._comm.Get_rank()
        self.world_size: int = self._comm.Get_size()
        self.max_message_bytes = max_message_bytes
        self.patience_bytes = 0
        self.in_pieces = False

    def duplicate(self) -> "Messages":
        """Return the same ranks with messages of their own; collective."""
        return Messages(self._comm, self.max_message_bytes)

    def split(self, color: int | None, key: int) -> "Messages | None":
        """Return the ranks of the same color, ordered by key; None without a color. Collective."""
        part = self._comm.Split(self._mpi.UNDEFINED if color is None else color, key)
        return None if part == self._mpi.COMM_NULL else self._adopt(part)

    def split_node(self) -> "Messages":
        """Return the ranks that can share memory with this one; collective."""
        return self._adopt(self._comm.Split_type(self._mpi.COMM_TYPE_SHARED, key=self.rank))

    def free(self) -> None:
        """Give back the MPI communicator; collective."""
        if self._comm != self._mpi.COMM_NULL:
            self._comm.Free()

    # ---------------------------------------------------------------- collectives

    def progress(self) -> None:
        """Let MPI go on with what this process has under way on any communicator; local."""
        self._comm.Iprobe()

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self._comm.Barrier()

    def all_gather_object(self, item: Any) -> list[Any]:
        """Return every rank's item, pickled on the way."""
        return list(self._comm.allgather(item))

    def broadcast_object(self, item: Any, root: int) -> Any:
        """Return the root's item, pickled on the way."""
        return self._comm.bcast(item, root=root)

    def all_reduce(self, tensor: Tensor, scale: float = 1.0) -> Work:
        """Sum over all ranks, in place."""
        if scale != 1.0:
            tensor.mul_(scale)
        if self.goes_in_pieces(tensor):
            pieces = torch.split(tensor, self.piece_numel(tensor))
            _keep_in_flight(self.all_reduce_piece(piece, self) for piece in pieces)
        elif tensor.dtype in SUMMED_IN_FLOAT32:
            self._all_reduce_in_float32(tensor)
        else:
            for chunk in self._chunks(tensor):
                self._call("Allreduce", chunk.nbytes, self._mpi.IN_PLACE, self._spec(chunk), op=self._mpi.SUM)
        return DONE

    def start_sum(self, numbers: Sequence[float]) -> "PendingSum":
        """Start to sum numbers over all ranks in float64; does not block."""
        tensor = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        return PendingSum(self.start_all_reduce(tensor), tensor)

    def start_all_reduce(self, tensor: Tensor) -> "Request":
        """Start to sum over all ranks, in place, by MPI itself; does not block."""
        request = self._comm.Iallreduce(self._mpi.IN_PLACE, self._spec(tensor), op=self._mpi.SUM)
        return Request(request, patient=tensor.nbytes <= self.patience_bytes)

    def reduce_scatter(self, output: Tensor, source: Tensor, counts: Sequence[int], scale: float = 1.0) -> Work:
        """Sum ``scale * source`` over all ranks; ``output``, perhaps a part of it, receives this rank's part."""
        if scale != 1.0:
            source = source * scale
        is_small = source.nbytes <= self.max_message_bytes
        if is_small and self.goes_in_pieces(source):
            _keep_in_flight(self.reduce_scatter_pieces(output, source, counts))
            return DONE
        if is_small and source.dtype in SUMMED_IN_FLOAT32:
            self._sum_own_part(output, source, counts)
            return DONE
        if is_small and source.is_cpu:  # for device memory Open MPI has sums to one rank or to all
            received = torch.empty_like(output)  # MPI takes no output within the input
            self._call("Reduce_scatter", source.nbytes, self._spec(source), self._spec(received), list(counts))
            output.copy_(received)
            return DONE
        for owner, part in enumerate(torch.split(source, list(counts))):
            for index, chunk in enumerate(self._chunks(part)):
                self._reduce_to(owner, chunk, self._chunks(output)[index] if owner == self.rank else None)
        return DONE

    def all_gather(self, tensor: Tensor, counts: Sequence[int]) -> Work:
        """Collect every rank's part of ``tensor``, where its own is already in place."""
        if self.goes_in_pieces(tensor) and tensor.nbytes <= self.max_message_bytes:
            _keep_in_flight(self.all_gather_pieces(tensor, counts))
            return DONE
        if tensor.nbytes > self.max_message_bytes:
            for owner, part in enumerate(torch.split(tensor, list(counts))):
                self.broadcast(part, owner)
            return DONE
        self._call("Allgatherv", tensor.nbytes, self._mpi.IN_PLACE, self._parts(tensor, start_offsets(counts), counts))
        return DONE

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """Copy the root's tensor to all, in place."""
        for chunk in self._chunks(tensor):
            self._call("Bcast", chunk.nbytes, [self._buffer(chunk), chunk.nbytes, self._mpi.BYTE], root=root)

    # ---------------------------------------------------------------- pieces of collectives

    def goes_in_pieces(self, tensor: Tensor) -> bool:
        """Whether a tensor had better go in pieces (Note [Pieces in flight])."""
        least_bytes = max(_IN_PIECES_BYTES, _SHARE_BYTES * self.world_size)
        return self.in_pieces and tensor.is_cpu and tensor.nbytes >= least_bytes

    @property
    def piece_bytes(self) -> int:
        """How large pieces are."""
        return max(_PIECE_BYTES, _SHARE_BYTES * self.world_size)

    def piece_numel(self, tensor: Tensor) -> int:
        """Return how many elements of this tensor are a piece."""
        return max(1, self.piece_bytes // tensor.element_size())

    def all_reduce_piece(self, piece: Tensor, gathering: "Messages") -> Iterator[Request]:
        """Sum a piece over all ranks, in place, and gather the sums by other messages of the same ranks, or these."""
        counts = even_counts(piece.numel(), self.world_size)
        starts = start_offsets(counts)
        own = piece.narrow(0, starts[self.rank], counts[self.rank])
        yield from self._reduce_scatter_piece(own, piece, starts, counts)
        yield from gathering._all_gather_piece(piece, starts, counts)

    def reduce_scatter_pieces(
        self, output: Tensor, source: Tensor, counts: Sequence[int]
    ) -> Iterator[Iterator[Request]]:
        """Sum a share of every rank's part, again and again."""
        starts = start_offsets(counts)
        for firsts, sizes in self._shares(source, counts):
            offsets = [start + first for start, first in zip(starts, firsts, strict=True)]
            own = output.narrow(0, firsts[self.rank], sizes[self.rank])
            yield self._reduce_scatter_piece(own, source, offsets, sizes)

    def all_gather_pieces(self, whole: Tensor, counts: Sequence[int]) -> Iterator[Iterator[Request]]:
        """Collect a share of every rank's part of ``whole``, again and again."""
        starts = start_offsets(counts)
        for firsts, sizes in self._shares(whole, counts):
            offsets = [start + first for start, first in zip(starts, firsts, strict=True)]
            yield self._all_gather_piece(whole, offsets, sizes)

    # ---------------------------------------------------------------- how

    def _reduce_scatter_piece(
        self, output: Tensor, source: Tensor, starts: Sequence[int], counts: Sequence[int]
    ) -> Iterator[Request]:
        received, send, receive = self._exchange_of(source, starts, counts)
        yield self._start("Ialltoallv", send, receive)
        sum_in_order(received.unbind(), output)

    def _all_gather_piece(self, whole: Tensor, starts: Sequence[int], counts: Sequence[int]) -> Iterator[Request]:
        yield self._start("Iallgatherv", self._mpi.IN_PLACE, self._parts(whole, starts, counts))

    def _shares(self, whole: Tensor, counts: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Return where in every rank's part each piece begins, and how much it has of it."""
        window = max(1, self.piece_numel(whole) // self.world_size)
        for first in range(0, max(counts), window):
            firsts = [min(first, count) for count in counts]
            yield firsts, [min(window, count - start) for count, start in zip(counts, firsts, strict=True)]

    def _start(self, name: str, *args: Any) -> Request:
        return Request(getattr(self._comm, name)(*args), patient=self.patience_bytes >= _PIECE_BYTES)

    def _call(self, name: str, num_bytes: int, *args: Any, **options: Any) -> None:
        """Call a collective of mpi4py's, and wait for it as told (Note [Patience])."""
        if num_bytes > self.patience_bytes:
            getattr(self._comm, name)(*args, **options)
            return
        Request(getattr(self._comm, f"I{name.lower()}")(*args, **options), patient=True).wait()

    def _adopt(self, part: Any) -> "Messages":
        adopted = Messages(part, self.max_message_bytes)
        part.Free()
        return adopted

    def _buffer(self, tensor: Tensor) -> Any:
        return self._mpi.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes)

    def _spec(self, tensor: Tensor) -> list[Any]:
        """Describe a tensor to MPI as numbers that it can sum."""
        return [self._buffer(tensor), tensor.numel(), getattr(self._mpi, _MPI_SUM_TYPES[tensor.dtype])]

    def _chunks(self, tensor: Tensor) -> Sequence[Tensor]:
        """Cut a flat tensor into messages (Note [Large messages])."""
        if tensor.nbytes <= self.max_message_bytes:
            return (tensor,)
        return torch.split(tensor, max(1, self.max_message_bytes // tensor.element_size()))

    def _parts(self, whole: Tensor, starts: Sequence[int], counts: Sequence[int]) -> list[Any]:
        """Describe the ranks' parts of a tensor to MPI as bytes."""
        size = whole.element_size()
        counts_bytes, starts_bytes = [count * size for count in counts], [start * size for start in starts]
        return [self._buffer(whole), counts_bytes, starts_bytes, self._mpi.BYTE]

    def _all_reduce_in_float32(self, tensor: Tensor) -> None:
        for chunk in self._chunks(tensor):
            counts = even_counts(chunk.numel(), self.world_size)
            part = chunk.narrow(0, start_offsets(counts)[self.rank], counts[self.rank])
            self._sum_own_part(part, chunk, counts)
            self.all_gather(chunk, counts)

    def _sum_own_part(self, output: Tensor, source: Tensor, counts: Sequence[int]) -> None:
        """Sum this rank's part in float32, in the order of ranks (Note [Wire precision])."""
        received, send, receive = self._exchange_of(source, start_offsets(counts), counts)
        self._call("Alltoallv", source.nbytes, send, receive)
        sum_in_order(received.unbind(), output)

    def _exchange_of(
        self, source: Tensor, starts: Sequence[int], counts: Sequence[int]
    ) -> tuple[Tensor, list[Any], list[Any]]:
        """Return memory for all ranks' values of this rank's part, and how to send and receive them."""
        own, size = counts[self.rank], self.world_size
        received = source.new_empty(size, own)
        receive = self._parts(received, [rank * own for rank in range(size)], [own] * size)
        return received, self._parts(source, starts, counts), receive

    def _reduce_to(self, owner: int, chunk: Tensor, output: Tensor | None) -> None:
        """Sum one message of a large reduce_scatter at its owner."""
        if chunk.dtype in SUMMED_IN_FLOAT32:
            counts = [chunk.numel() if rank == owner else 0 for rank in range(self.world_size)]
            self._sum_own_part(chunk.new_empty(0) if output is None else output, chunk, counts)
            return
        received = None if output is None else torch.empty_like(output)
        target = None if received is None else self._spec(received)
        self._call("Reduce", chunk.nbytes, self._spec(chunk), target, op=self._mpi.SUM, root=owner)
        if output is not None and received is not None:
            output.copy_(received)


def has_sum(dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype can be summed over ranks."""
    return dtype in _MPI_SUM_TYPES or dtype in SUMMED_IN_FLOAT32


def _keep_in_flight(pieces: Iterable[Iterator[Request]]) -> None:
    """Advance pieces, some of them at a time; all ranks in the same order."""
    InFlight(NUM_IN_FLIGHT, asks=False).begin(pieces).wait()
