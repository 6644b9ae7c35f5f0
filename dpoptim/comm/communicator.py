"""Communicator: collectives on torch tensors of any dtype, size and device, beside the computation if asked for."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpoptim.comm.batch import MeetingFirst
from dpoptim.comm.device_memory import host_memory, on_same_stream
from dpoptim.comm.errors import abort_on_uncaught_exception
from dpoptim.comm.flat import check_summable, checked_counts, flat_view
from dpoptim.comm.mpi import library
from dpoptim.comm.mpi.messages import Messages
from dpoptim.comm.node.shared_memory import SharedMemory
from dpoptim.comm.router import Router
from dpoptim.comm.topology import Topology
from dpoptim.comm.transport import Batch, Memory
from dpoptim.comm.users import Users
from dpoptim.comm.work import DONE, Pending, Submitted, Work
from dpoptim.partition import start_offsets

__all__ = ["Communicator", "Work"]


class Communicator:
    """Collectives of torch tensors over a private duplicate of an MPI communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm or heat.core.communication.MPICommunication, optional
        An intracommunicator; ``None`` is ``COMM_WORLD``. It is duplicated, so that messages of two
        ``Communicator`` objects, or of one and its user, never meet. (:class:`~dpoptim.comm.mpi.messages.Messages`,
        which are a duplicate, are taken over.)
    overlap : bool
        Whether collectives started with ``async_op=True`` run on a thread of this object's own while the caller
        goes on. Needs ``MPI_THREAD_MULTIPLE``. Otherwise they are finished when the call returns, or in a node when
        the first of several is waited for (Note [Batches] in peer_memory.py).
    patient : bool
        Let the thread sleep between looks at a collective rather than wait in MPI, which takes a whole core. For long
        transfers beside a computation; only together with ``overlap``.
    polled : bool
        Have no thread: sums and gathers with ``async_op=True`` go on while the caller calls :meth:`poll`. Only together
        with ``overlap``, and where every rank is alone on its node; elsewhere nothing overlaps then.

    Attributes
    ----------
    rank, world_size : int
        This rank's number, and how many there are.
    origin : Communicator or None
        The one that this is a duplicate of (:meth:`duplicate`).

    Notes
    -----
    Construction, ``free`` and every method named after a collective are collective: all ranks of the communicator
    call them, in the same order. Tensors must be contiguous and of equal dtype on all ranks; they belong to the
    communicator until the call returns, or with ``async_op=True`` until ``Work.wait`` returns. Results that go to
    all ranks are the same bits on all.
    """

    max_message_bytes = 1 << 30

    def __init__(self, comm: Any = None, *, overlap: bool = False, patient: bool = False, polled: bool = False) -> None:
        own_messages = comm if isinstance(comm, Messages) else Messages(comm, self.max_message_bytes)
        has_thread = overlap and not polled
        if has_thread and not library.takes_threads():
            own_messages.free()
            raise ValueError(
                "overlap=True needs an MPI with MPI_THREAD_MULTIPLE, this one was initialised with less: "
                "use overlap=False"
            )
        self._messages = own_messages
        self.rank, self.world_size = own_messages.rank, own_messages.world_size
        self._router = Router(own_messages, patient=patient and overlap, polled=polled and overlap)
        self._thread = ThreadPoolExecutor(1, "dpoptim-collectives") if has_thread else None
        self._users = Users()
        self.origin: Communicator | None = None
        if self.world_size > 1:
            abort_on_uncaught_exception(library.abort)

    @classmethod
    def shared(cls, comm: Any = None) -> "Communicator":
        """Return the one duplicate of ``comm`` that all callers share; collective at the first call for ``comm``.

        It is freed with ``comm``, or when the last optimizer on it is detached.
        """
        found = library.attached(comm)
        if found is None:
            found = cls(comm)
            library.attach(comm, found)
        assert isinstance(found, cls)
        return found

    @property
    def users(self) -> Users:
        """Who needs a communicator that is shared."""
        return self._users

    def orphan(self) -> None:
        """Take note that the communicator is freed whose ranks these are; collective."""
        self._users.orphan(self.free)

    @property
    def topology(self) -> Topology:
        """Which ranks share a node."""
        return self._router.topology

    @property
    def overlap(self) -> bool:
        """Whether collectives with ``async_op=True`` go on while the caller does."""
        return self._thread is not None or self.is_polled

    @property
    def is_polled(self) -> bool:
        """Whether they go on as far as the caller calls :meth:`poll`, rather than by a thread."""
        return self._router.is_polled

    def poll(self) -> None:
        """Go on with what was started with ``async_op=True``; local, does not block.

        To be called often while they are under way; more often than every 0.1 ms costs little and does nothing.
        """
        self._router.poll()

    @property
    def scales_for_free(self) -> bool:
        """Whether the factor of a sum costs nothing, as where ranks of a node sum it.

        By messages it is a pass over the tensor, which the caller had better make itself: the thread sends meanwhile.
        """
        return self._router.sums_in_node

    # ---------------------------------------------------------------- collectives on tensors

    def all_reduce(self, tensor: Tensor, *, scale: float = 1.0, async_op: bool = False) -> Work:
        """Sum ``scale * tensor`` over all ranks, in place; collective.

        Parameters
        ----------
        tensor : Tensor
            Contiguous; floating point, complex or integer. bfloat16 and float16 are summed in float32.
        scale : float
            This rank's factor, such as its weight in a mean. Costs nothing in shared memory, one pass elsewhere.
        async_op : bool
            Let the communicator do it beside the computation, or together with others.

        Raises
        ------
        TypeError
            The dtype has no sum (bool, 8-bit floats).
        ValueError
            The tensor is not contiguous.
        """
        flat = flat_view(tensor)
        check_summable(flat.dtype)
        return self._run(self._waiting(self._router.all_reduce, async_op=async_op), (flat,), scale, async_op=async_op)

    def reduce_scatter(
        self,
        output: Tensor,
        tensor: Tensor,
        *,
        counts: Sequence[int] | None = None,
        scale: float = 1.0,
        async_op: bool = False,
    ) -> Work:
        """Sum ``scale * tensor`` over all ranks and keep this rank's part in ``output``; collective.

        Parameters
        ----------
        output : Tensor, numel ``counts[rank]``
            Receives the sum of this rank's part; may be that part of ``tensor``.
        tensor : Tensor, numel ``sum(counts)``
            The parts of all ranks, one after another. Left unchanged, but for ``output`` if that is a part of it.
        counts : sequence of int, optional
            Elements of each rank's part; by default as equal as possible (:func:`~dpoptim.partition.even_counts`).
        scale : float
            This rank's factor.
        """
        flat = flat_view(tensor)
        check_summable(flat.dtype)
        counts = self._counts(output, tensor, counts)
        return self._run(
            self._waiting(self._router.reduce_scatter, async_op=async_op),
            (flat_view(output), flat),
            counts,
            scale,
            async_op=async_op,
        )

    def all_gather(
        self,
        output: Tensor,
        tensor: Tensor | None = None,
        *,
        counts: Sequence[int] | None = None,
        async_op: bool = False,
    ) -> Work:
        """Collect every rank's ``tensor`` in ``output``, one after another; collective. Any dtype.

        Parameters
        ----------
        output : Tensor, numel ``sum(counts)``
            Receives all parts. ``tensor`` may be this rank's part of it.
        tensor : Tensor, numel ``counts[rank]``, optional
            This rank's part; by default it is in its place already.
        counts : sequence of int, optional
            Elements of each rank's part; by default as equal as possible.
        """
        counts = self._counts(tensor, output, counts)
        flat = flat_view(output)
        if tensor is not None:
            own = flat.narrow(0, start_offsets(counts)[self.rank], counts[self.rank])
            if own.data_ptr() != tensor.data_ptr():
                own.copy_(flat_view(tensor))
        return self._run(self._waiting(self._router.all_gather, async_op=async_op), (flat,), counts, async_op=async_op)

    def prepare_all_gathers(self, outputs: Sequence[tuple[Tensor, Sequence[int]]]) -> Callable[[], Sequence[Work]]:
        """Return what starts :meth:`all_gather` of each of these outputs; local, calling it is collective.

        What can be found out beforehand is, so that it may be called at every step for little. This rank's parts are in
        their places.

        Parameters
        ----------
        outputs : sequence of (Tensor, sequence of int)
            Tensors and the elements of each rank's part.
        """
        prepared = [(flat_view(output), self._counts(None, output, counts)) for output, counts in outputs]
        if self._thread is None and all(tensor.device.type == "cpu" for tensor, _ in prepared):
            return self._router.prepare_all_gathers(prepared)
        gather = self._waiting(self._router.all_gather, async_op=True)
        return lambda: [self._run(gather, (tensor,), counts, async_op=True) for tensor, counts in prepared]

    def broadcast(self, tensor: Tensor, *, root: int = 0, async_op: bool = False) -> Work:
        """Copy rank ``root``'s ``tensor`` to all ranks, in place; collective. Any dtype."""
        if not 0 <= root < self.world_size:
            raise ValueError(f"root must be a rank, 0 to {self.world_size - 1}, got {root}")
        return self._run(self._router.broadcast, (flat_view(tensor),), root, async_op=async_op)

    def start_sum(self, numbers: Sequence[float]) -> Pending[list[float]]:
        """Start the sums of a few numbers over all ranks, in float64; collective, does not block.

        This object's thread has no part in it. It goes on only while this rank calls ``test`` of what is returned, or
        ``wait``, which returns the sums; one ends before the next starts.
        """
        return self._router.start_sum(numbers)

    def batch(self, num_collectives: int | None, dtypes: Iterable[torch.dtype] = ()) -> Batch:
        """Return a batch of collectives that start together; local, the same kind of batch on all ranks.

        Parameters
        ----------
        num_collectives : int or None
            How many there will be, all of CPU tensors and with ``async_op=True``; nothing else of this object is under
            way. None if there may be others among them: they start when all ranks have met.
        dtypes : iterable of torch.dtype
            Of all sums among them.
        """
        if num_collectives is None or self._thread is not None:
            return MeetingFirst(self._router.sum_numbers)
        return self._router.batch(num_collectives, dtypes)

    def drop(self) -> None:
        """Forget works that have not begun, and that nobody waits for after an error; local, on all ranks alike."""
        self._router.drop()

    def start_all_reduce(self, tensor: Tensor) -> Pending[None]:
        """Start the sum of a small CPU tensor of a type that MPI sums, in place; collective, does not block.

        MPI does it itself, without this object's thread, and may go on only while some MPI call of this rank runs. It
        pairs with the same call on the other ranks, not with :meth:`all_reduce`. ``tensor`` belongs to the communicator
        until ``Pending.wait`` has returned or ``Pending.test`` has returned True.
        """
        return self._messages.start_all_reduce(flat_view(tensor))

    def barrier(self) -> None:
        """Wait until all ranks are here; collective."""
        self._messages.barrier()

    # ---------------------------------------------------------------- in a node

    def reduce_scatter_in_node(
        self, output: Tensor, tensor: Tensor, *, counts: Sequence[int], scale: float = 1.0, async_op: bool = False
    ) -> Work:
        """Sum ``scale * tensor`` over all ranks of all nodes, each part at one rank of every node; collective.

        Parameters
        ----------
        output : Tensor, numel ``counts[local_rank]``
            Receives the sum of this rank's part; may be that part of ``tensor``.
        tensor : Tensor, numel ``sum(counts)``
            The parts of all ranks of a node, one after another; the same division on every node.
        counts : sequence of int
            Elements of each local rank's part.
        scale : float
            This rank's factor.

        Raises
        ------
        RuntimeError
            On every rank, if there is no shared memory.
        """
        flat = flat_view(tensor)
        counts = [2 * count for count in counts] if tensor.is_complex() else list(counts)
        return self._run(
            self._router.reduce_scatter_in_node, (flat_view(output), flat), counts, scale, async_op=async_op
        )

    def share_in_node(self, num_bytes: int) -> SharedMemory:
        """Return memory that all ranks of this rank's node map; collective among all ranks, blocks.

        Raises
        ------
        OSError
            On every rank, if a node has none.
        """
        return self._router.share_in_node(num_bytes)

    def has_memory(self) -> bool:
        """Whether tensors are summed faster in memory of :meth:`allocate`; collective at first."""
        return self._thread is None and self._router.has_memory()

    def allocate(self, num_bytes: int) -> Memory | None:
        """Return memory that all ranks map, if there is any, instead of what was allocated before; collective, blocks.

        Tensors that are summed often had better lie there, at the same offset on all ranks. With 0 bytes what was
        allocated is given back; local then, between the same collectives of all ranks. No collective is under way.
        """
        return self._router.allocate(num_bytes)

    def why_no_node_memory(self) -> str | None:
        """Return why ranks of a node don't exchange through shared memory, None if they do; collective at first."""
        return self._router.why_no_node_memory()

    def why_no_peer_memory(self) -> str | None:
        """Return why ranks of this node don't read each other's memory, None if they do; collective at first."""
        return self._router.why_no_peer_memory()

    # ---------------------------------------------------------------- small Python objects

    def all_gather_object(self, item: Any) -> list[Any]:
        """Return every rank's ``item``, in the order of ranks; collective. For small things: it is pickled."""
        return self._messages.all_gather_object(item)

    def broadcast_object(self, item: Any, *, root: int = 0) -> Any:
        """Return rank ``root``'s ``item``; collective. For small things: it is pickled."""
        return self._messages.broadcast_object(item, root)

    # ---------------------------------------------------------------- what this is

    def library(self) -> dict[str, str]:
        """Describe the MPI library: name and version, standard, thread level, reads device memory or not."""
        return library.library()

    def duplicate(self, *, overlap: bool = False, patient: bool = False, polled: bool = False) -> "Communicator":
        """Return a communicator of the same ranks with messages of its own; collective.

        Parameters
        ----------
        overlap, patient, polled : bool
            As in the constructor.
        """
        made = Communicator(self._messages.duplicate(), overlap=overlap, patient=patient, polled=polled)
        made.origin = self
        return made

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
        overlap, patient : bool
            As in the constructor.

        Returns
        -------
        Communicator or None
            None where ``color`` is None.
        """
        own_messages = self._messages.split(color, key)
        return None if own_messages is None else Communicator(own_messages, overlap=overlap, patient=patient)

    def free(self) -> None:
        """Give back MPI's communicators and the shared memory; collective. The object is unusable afterwards."""
        self._users.tell_freed()
        if self._thread is not None:
            self._thread.shutdown()
        self._router.free()

    # ---------------------------------------------------------------- how

    def _waiting(self, collective: Callable[..., Work], *, async_op: bool) -> Callable[..., Work]:
        """Return a collective of the router's, told whether it may be done later; the thread makes it at once."""
        return partial(collective, may_wait=async_op and self._thread is None)

    def _run(self, collective: Callable[..., Work], tensors: tuple[Tensor, ...], *args: Any, async_op: bool) -> Work:
        """Run a collective of these tensors: here, on the thread, or with others as far as it can wait."""
        if self._thread is not None and async_op:
            on_stream = on_same_stream(self._run_on_host, tensors[0].device)
            return Submitted(self._thread.submit(lambda: on_stream(collective, tensors, *args).wait()))
        work = self._run_on_host(collective, tensors, *args)
        if async_op:
            return work
        work.wait()
        return DONE

    def _run_on_host(self, collective: Callable[..., Work], tensors: tuple[Tensor, ...], *args: Any) -> Work:
        if tensors[0].device.type == "cpu":
            return collective(*tensors, *args)
        with host_memory(*tensors, direct=library.reads_device_memory) as hosts:
            collective(*hosts, *args).wait()
        return DONE

    def _counts(self, part: Tensor | None, whole: Tensor, counts: Sequence[int] | None) -> tuple[int, ...]:
        return checked_counts(part, whole, counts, self.rank, self.world_size)
