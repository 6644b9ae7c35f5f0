"""The one file that calls MPI: collectives on flat torch tensors of any dtype, size and device.

Note [Wire precision]
---------------------
MPI has no sum for bfloat16 and, portably, none for float16. User-defined reduction operations would run Python
for every message and are wrong in the non-blocking collectives of some MPIs (open-mpi/ompi#1754). Hence tensors
of 16 bits travel as bytes: every rank receives all ranks' values of the part that it owns, sums them in float32
in the order of ranks, rounds once, and sends the result to all. The result is the same bits on every rank.

Note [Large messages]
---------------------
An MPI-3 count is a C int. Messages are cut to ``max_message_bytes``, which also bounds the scratch memory of MPI
and of the 16-bit sums.

Note [Device tensors]
---------------------
Device memory is handed to MPI only where the MPI library itself answers that it can read it. Everywhere else it
is copied through a pinned host buffer. MPI knows nothing of streams: the current stream is synchronised before MPI
reads device memory.
"""

import contextlib
import ctypes
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dpoptim.errors import abort_on_uncaught_exception
from dpoptim.partition import even_counts, start_offsets

__all__ = ["Communicator", "Pending", "Topology", "Work"]

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
_SUMMED_IN_FLOAT32 = (torch.bfloat16, torch.float16)


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Block until the result is there; errors of the collective are raised here."""


class _Done:
    def wait(self) -> None:
        pass


class _Submitted:
    """A collective that runs on the communicator's own thread."""

    def __init__(self, future: "Future[None]") -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()


class Pending:
    """A collective that MPI itself carries on."""

    def __init__(self, request: Any) -> None:
        self._request = request

    def wait(self) -> None:
        """Block until the result is there."""
        self._request.Wait()

    def test(self) -> bool:
        """Whether the result is there."""
        return bool(self._request.Test())


@dataclass(frozen=True)
class Topology:
    """Where the ranks of a communicator live. A node is a set of ranks that can share memory.

    Attributes
    ----------
    nodes : tuple of tuple of int
        The ranks of each node, in the order of each node's lowest rank.
    node : int
        Index of this rank's node.
    local_rank : int
        This rank's place in its node.
    """

    nodes: tuple[tuple[int, ...], ...]
    node: int
    local_rank: int

    @property
    def local_size(self) -> int:
        """How many ranks this rank's node has."""
        return len(self.nodes[self.node])


class Communicator:
    """Collectives of torch tensors over a private duplicate of an MPI communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm or heat.core.communication.MPICommunication, optional
        An intracommunicator; ``None`` is ``COMM_WORLD``. It is duplicated, so that messages of two
        ``Communicator`` objects, or of one and its user, never meet.
    overlap : bool
        Whether collectives started with ``async_op=True`` run on a thread of this object's own while the caller
        goes on. Needs ``MPI_THREAD_MULTIPLE``. Otherwise they are finished when the call returns.

    Attributes
    ----------
    rank, world_size : int
        This rank's number, and how many there are.
    topology : Topology
        Which ranks share a node.

    Notes
    -----
    Construction, ``free`` and every method named after a collective are collective: all ranks of the communicator
    call them, in the same order. Tensors must be contiguous and of equal dtype on all ranks; they belong to the
    communicator until the call returns, or with ``async_op=True`` until ``Work.wait`` returns. Results that go to
    all ranks are the same bits on all.
    """

    max_message_bytes = 1 << 30

    def __init__(self, comm: Any = None, *, overlap: bool = False) -> None:
        from mpi4py import MPI  # importing this initialises MPI, which importing dpoptim must not do

        self._mpi = MPI
        self._comm = _checked(comm, MPI).Dup()
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.rank: int = self._comm.Get_rank()
        self.world_size: int = self._comm.Get_size()
        if overlap and MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            self._comm.Free()
            raise ValueError(
                "overlap=True needs an MPI with MPI_THREAD_MULTIPLE, this one was initialised with less: "
                "use overlap=False"
            )
        self.topology = self._find_topology()
        self._thread = ThreadPoolExecutor(1, "dpoptim-collectives") if overlap else None
        if self.world_size > 1:
            abort_on_uncaught_exception(_abort)

    @classmethod
    def shared(cls, comm: Any = None) -> "Communicator":
        """Return the one duplicate of ``comm`` that all callers share; collective at the first call for ``comm``."""
        from mpi4py import MPI

        comm = _checked(comm, MPI)
        found = comm.Get_attr(_shared_key())
        if found is None:
            found = cls(comm)
            comm.Set_attr(_shared_key(), found)
        assert isinstance(found, cls)
        return found

    @property
    def overlap(self) -> bool:
        """Whether collectives with ``async_op=True`` go on while the caller does."""
        return self._thread is not None

    # ---------------------------------------------------------------- collectives on tensors

    def all_reduce(self, tensor: Tensor, *, async_op: bool = False) -> Work:
        """Sum ``tensor`` over all ranks, in place; collective.

        Parameters
        ----------
        tensor : Tensor
            Contiguous; floating point, complex or integer. bfloat16 and float16 are summed in float32.
        async_op : bool
            Return at once where the communicator overlaps.

        Raises
        ------
        TypeError
            The dtype has no sum (bool, 8-bit floats).
        ValueError
            The tensor is not contiguous.
        """
        flat = _flat(tensor)
        _check_summable(flat.dtype)
        return self._run(self._all_reduce, flat, async_op=async_op)

    def reduce_scatter(
        self, output: Tensor, tensor: Tensor, *, counts: Sequence[int] | None = None, async_op: bool = False
    ) -> Work:
        """Sum ``tensor`` over all ranks and keep this rank's part in ``output``; collective.

        Parameters
        ----------
        output : Tensor, numel ``counts[rank]``
            Receives the sum of this rank's part; may not overlap ``tensor``.
        tensor : Tensor, numel ``sum(counts)``
            The parts of all ranks, one after another. Left unchanged.
        counts : sequence of int, optional
            Elements of each rank's part; by default as equal as possible (:func:`~dpoptim.partition.even_counts`).
        """
        _check_summable(_flat(tensor).dtype)
        counts = self._checked_counts(output, tensor, counts)
        return self._run(self._reduce_scatter, _flat(output), _flat(tensor), counts, async_op=async_op)

    def all_gather(
        self, output: Tensor, tensor: Tensor, *, counts: Sequence[int] | None = None, async_op: bool = False
    ) -> Work:
        """Collect every rank's ``tensor`` in ``output``, one after another; collective. Any dtype.

        Parameters
        ----------
        output : Tensor, numel ``sum(counts)``
            Receives all parts. ``tensor`` may be this rank's part of it.
        tensor : Tensor, numel ``counts[rank]``
            This rank's part.
        counts : sequence of int, optional
            Elements of each rank's part; by default as equal as possible.
        """
        counts = self._checked_counts(tensor, output, counts)
        return self._run(self._all_gather, _flat(output), _flat(tensor), counts, async_op=async_op)

    def broadcast(self, tensor: Tensor, *, root: int = 0, async_op: bool = False) -> Work:
        """Copy rank ``root``'s ``tensor`` to all ranks, in place; collective. Any dtype."""
        if not 0 <= root < self.world_size:
            raise ValueError(f"root must be a rank, 0 to {self.world_size - 1}, got {root}")
        return self._run(self._broadcast, _flat(tensor), root, async_op=async_op)

    def start_all_reduce(self, tensor: Tensor) -> "Pending":
        """Start the sum of a small CPU tensor of a type that MPI sums, in place; collective, does not block.

        MPI does it itself, without this object's thread, and may go on only while some MPI call of this rank runs. It
        pairs with the same call on the other ranks, not with :meth:`all_reduce`. ``tensor`` belongs to the communicator
        until ``Pending.wait`` has returned or ``Pending.test`` has returned True.
        """
        return Pending(self._comm.Iallreduce(self._mpi.IN_PLACE, self._spec(_flat(tensor)), op=self._mpi.SUM))

    def barrier(self) -> None:
        """Wait until all ranks are here; collective."""
        self._comm.Barrier()

    # ---------------------------------------------------------------- small Python objects

    def all_gather_object(self, item: Any) -> list[Any]:
        """Return every rank's ``item``, in the order of ranks; collective. For small things: it is pickled."""
        return list(self._comm.allgather(item))

    def broadcast_object(self, item: Any, *, root: int = 0) -> Any:
        """Return rank ``root``'s ``item``; collective. For small things: it is pickled."""
        return self._comm.bcast(item, root=root)

    # ---------------------------------------------------------------- what this is

    def library(self) -> dict[str, str]:
        """Describe the MPI library: name and version, standard, thread level, reads device memory or not."""
        mpi = self._mpi
        levels = {
            mpi.THREAD_SINGLE: "single",
            mpi.THREAD_FUNNELED: "funneled",
            mpi.THREAD_SERIALIZED: "serialized",
            mpi.THREAD_MULTIPLE: "multiple",
        }
        aware = [device for device in ("cuda", "rocm") if _mpi_reads_device_memory(device)]
        return {
            "library": " ".join(mpi.Get_library_version().replace("\x00", "").splitlines()[0].split(",")[0].split()),
            "standard": ".".join(map(str, mpi.Get_version())),
            "thread level": levels[mpi.Query_thread()],
            "GPU-aware": ", ".join(aware) or "no (device tensors go through pinned host memory)",
        }

    def duplicate(self, *, overlap: bool = False) -> "Communicator":
        """Return a communicator of the same ranks with messages of its own; collective."""
        return Communicator(self._comm, overlap=overlap)

    def split(
        self, color: int | None, key: int = 0, *, overlap: bool = False, patient: bool = False
    ) -> "Communicator | None":
        """Return a communicator of the ranks that give the same color; collective.

        Parameters
        ----------
        color : int or None
            Which of the new communicators this rank belongs to, >= 0; with None it belongs to none.
        key : int
            Ranks are numbered by it, then by their old rank.
        overlap : bool
            As in the constructor.
        patient : bool
            Let the new communicator's thread sleep between looks at a collective rather than wait in MPI, which takes a
            whole core. For long transfers beside a computation; only together with ``overlap``.

        Returns
        -------
        Communicator or None
            None where ``color`` is None.
        """
        part = self._comm.Split(self._mpi.UNDEFINED if color is None else color, key)
        if part == self._mpi.COMM_NULL:
            return None
        communicator = Communicator(part, overlap=overlap)
        part.Free()
        if patient and overlap:
            communicator._comm = _PatientComm(communicator._comm)
        return communicator

    def free(self) -> None:
        """Give back the MPI communicator; collective. The object is unusable afterwards."""
        if self._thread is not None:
            self._thread.shutdown()
        if self._comm != self._mpi.COMM_NULL:
            self._comm.Free()

    # ---------------------------------------------------------------- how

    def _find_topology(self) -> Topology:
        node_comm = self._comm.Split_type(self._mpi.COMM_TYPE_SHARED, key=self.rank)
        mine = tuple(node_comm.allgather(self.rank))
        node_comm.Free()
        nodes = tuple(sorted(set(self._comm.allgather(mine))))
        return Topology(nodes, nodes.index(mine), mine.index(self.rank))

    def _run(self, collective: Callable[..., None], *args: Any, async_op: bool) -> Work:
        if self._thread is None or not async_op:
            collective(*args)
            return _DONE
        return _Submitted(self._thread.submit(_on_same_stream(collective, args[0].device), *args))

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

    def _all_reduce(self, tensor: Tensor) -> None:
        if self.world_size == 1:
            return
        with _mpi_memory(tensor) as (host,):
            if host.dtype in _SUMMED_IN_FLOAT32:
                self._all_reduce_in_float32(host)
                return
            for chunk in self._chunks(host):
                self._comm.Allreduce(self._mpi.IN_PLACE, self._spec(chunk), op=self._mpi.SUM)

    def _all_reduce_in_float32(self, tensor: Tensor) -> None:
        for chunk in self._chunks(tensor):
            counts = even_counts(chunk.numel(), self.world_size)
            part = chunk.narrow(0, start_offsets(counts)[self.rank], counts[self.rank])
            self._sum_own_part(part, chunk, counts)
            self._all_gather(chunk, part, counts)

    def _sum_own_part(self, output: Tensor, source: Tensor, counts: Sequence[int]) -> None:
        """Sum this rank's part in float32, in the order of ranks (Note [Wire precision])."""
        size = source.element_size()
        received = source.new_empty(self.world_size, counts[self.rank])
        send_bytes = [count * size for count in counts]
        own_bytes = counts[self.rank] * size
        self._comm.Alltoallv(
            [self._buffer(source), send_bytes, start_offsets(send_bytes), self._mpi.BYTE],
            [
                self._buffer(received),
                [own_bytes] * self.world_size,
                [rank * own_bytes for rank in range(self.world_size)],
                self._mpi.BYTE,
            ],
        )
        total = received[0].float()
        for values in received[1:]:
            total += values
        output.copy_(total)

    def _reduce_scatter(self, output: Tensor, source: Tensor, counts: list[int]) -> None:
        with _mpi_memory(source, output) as (host_source, host_output):
            if source.nbytes <= self.max_message_bytes:
                if source.dtype in _SUMMED_IN_FLOAT32:
                    self._sum_own_part(host_output, host_source, counts)
                else:
                    self._comm.Reduce_scatter(self._spec(host_source), self._spec(host_output), counts)
                return
            for owner, part in enumerate(torch.split(host_source, counts)):
                for index, chunk in enumerate(self._chunks(part)):
                    self._reduce_to(owner, chunk, self._chunks(host_output)[index] if owner == self.rank else None)

    def _reduce_to(self, owner: int, chunk: Tensor, output: Tensor | None) -> None:
        """Sum one message of a large reduce_scatter at its owner."""
        if chunk.dtype in _SUMMED_IN_FLOAT32:
            counts = [chunk.numel() if rank == owner else 0 for rank in range(self.world_size)]
            self._sum_own_part(chunk.new_empty(0) if output is None else output, chunk, counts)
            return
        receive = None if output is None else self._spec(output)
        self._comm.Reduce(self._spec(chunk), receive, op=self._mpi.SUM, root=owner)

    def _all_gather(self, output: Tensor, tensor: Tensor, counts: list[int]) -> None:
        output.narrow(0, start_offsets(counts)[self.rank], counts[self.rank]).copy_(tensor)
        with _mpi_memory(output) as (host,):
            if host.nbytes > self.max_message_bytes:
                for owner, part in enumerate(torch.split(host, counts)):
                    self._broadcast(part, owner)
                return
            counts_bytes = [count * host.element_size() for count in counts]
            receive = [self._buffer(host), counts_bytes, start_offsets(counts_bytes), self._mpi.BYTE]
            self._comm.Allgatherv(self._mpi.IN_PLACE, receive)

    def _broadcast(self, tensor: Tensor, root: int) -> None:
        if self.world_size == 1:
            return
        with _mpi_memory(tensor) as (host,):
            for chunk in self._chunks(host):
                self._comm.Bcast([self._buffer(chunk), chunk.nbytes, self._mpi.BYTE], root=root)

    def _checked_counts(self, part: Tensor, whole: Tensor, counts: Sequence[int] | None) -> list[int]:
        """Return each rank's share in numbers of the flat view, where a complex element is two."""
        counts = even_counts(whole.numel(), self.world_size) if counts is None else counts
        if len(counts) != self.world_size or sum(counts) != whole.numel() or counts[self.rank] != part.numel():
            raise ValueError(
                f"counts must have one entry a rank ({self.world_size}), sum to the whole tensor ({whole.numel()}) and "
                f"give this rank its part ({part.numel()}), got {list(counts)} on rank {self.rank}"
            )
        if part.dtype != whole.dtype or part.device != whole.device:
            raise ValueError(
                f"the part must have the dtype and device of the whole, {whole.dtype} on {whole.device}, got "
                f"{part.dtype} on {part.device}"
            )
        return [2 * count for count in counts] if whole.is_complex() else list(counts)


class _PatientComm:
    """An mpi4py communicator whose blocking collectives on buffers sleep between looks, instead of spinning in MPI."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm

    def __getattr__(self, name: str) -> Any:
        if name not in ("Allreduce", "Alltoallv", "Allgatherv", "Bcast", "Reduce_scatter"):
            return getattr(self._comm, name)
        start = getattr(self._comm, f"I{name.lower()}")

        def call(*args: Any, **kwargs: Any) -> None:
            request = start(*args, **kwargs)
            while not request.Test():
                time.sleep(_PATIENCE_S)

        return call


# At 10 Gbit/s 250 KB arrive in so long, which the network's own buffers hold.
_PATIENCE_S = 2e-4

_DONE = _Done()


def _checked(comm: Any, mpi: Any) -> Any:
    """Return the mpi4py intracommunicator that ``comm`` is or holds."""
    if comm is None:
        return mpi.COMM_WORLD
    if not isinstance(comm, mpi.Comm):
        comm = getattr(comm, "handle", comm)  # Heat's MPICommunication holds mpi4py's
    if not isinstance(comm, mpi.Comm):
        raise TypeError(f"comm must be an mpi4py communicator, a Heat communicator or None, got {type(comm).__name__}")
    if comm == mpi.COMM_NULL:
        raise ValueError("comm must be a live communicator, got MPI.COMM_NULL (never made, or already freed)")
    if comm.Is_inter():
        raise ValueError("comm must be an intracommunicator, got an intercommunicator: Merge() it first")
    return comm


@functools.cache
def _shared_key() -> int:
    """Return the MPI attribute under which a communicator carries its shared duplicate."""
    from mpi4py import MPI

    return int(MPI.Comm.Create_keyval())


def _on_same_stream(collective: Callable[..., None], device: torch.device) -> Callable[..., None]:
    """Let a collective on another thread wait for, and continue, the caller's current stream."""
    if device.type == "cpu":
        return collective
    stream = torch.accelerator.current_stream(device)

    def run(*args: Any) -> None:
        torch.accelerator.set_stream(stream)
        collective(*args)

    return run


def _abort() -> None:
    """End every rank of the job."""
    from mpi4py import MPI

    if not MPI.Is_finalized():
        MPI.COMM_WORLD.Abort(1)


def _flat(tensor: Tensor) -> Tensor:
    """Return a 1-d view on the numbers of a contiguous tensor; complex ones as pairs of reals."""
    tensor = tensor.detach()
    if not tensor.is_contiguous():
        raise ValueError(
            f"tensor must be contiguous, got strides {tuple(tensor.stride())} for shape {tuple(tensor.shape)}"
        )
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(-1)


def _check_summable(dtype: torch.dtype) -> None:
    if dtype not in _MPI_SUM_TYPES and dtype not in _SUMMED_IN_FLOAT32:
        raise TypeError(f"tensors of {dtype} have no sum over ranks: convert to a wider dtype first")


# ------------------------------------------------------------------------------------------ device memory


@functools.cache
def _mpi_reads_device_memory(device_type: str) -> bool:
    """Ask the loaded MPI library whether it takes pointers to this kind of device memory."""
    from mpi4py import MPI

    name = {"cuda": "MPIX_Query_cuda_support", "rocm": "MPIX_Query_rocm_support"}.get(device_type)
    query = getattr(ctypes.CDLL(MPI.__file__), name, None) if name else None
    return bool(query()) if query is not None else False


@contextlib.contextmanager
def _mpi_memory(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield tensors that MPI may read and write in place of these (Note [Device tensors])."""
    device = tensors[0].device
    if device.type == "cpu":
        yield tensors
        return
    stream = torch.accelerator.current_stream(device)
    device_type = "rocm" if torch.version.hip else device.type
    if _mpi_reads_device_memory(device_type):
        stream.synchronize()
        yield tensors
        return
    hosts = tuple(torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors)
    for host, tensor in zip(hosts, tensors, strict=True):
        host.copy_(tensor, non_blocking=True)
    stream.synchronize()
    yield hosts
    for host, tensor in zip(hosts, tensors, strict=True):
        tensor.copy_(host, non_blocking=True)
    stream.synchronize()  # torch's pinned allocator would keep the buffer alive, MPI's next call would not
