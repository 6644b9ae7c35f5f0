"""Communicator: collectives on torch tensors of any dtype, size and device, by the fastest way there is.

Note [Ways]
-----------
Ranks of one node read large tensors from each other's memory (:mod:`dpoptim.peer_memory`), or where they may not pass
them through memory that they share (:mod:`dpoptim.staging_area`); all else goes by messages
(:mod:`dpoptim.messages`). With several nodes the ranks of a node first divide the sum among them; each then
all-reduces its part with its counterparts on the other nodes, so that all ranks drive the network together; last they
share the results. Nodes of different sizes use as many ranks a node as the smallest has. The way depends on nothing
but sizes, dtypes and what all ranks agreed on, so that all ranks take the same.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dpoptim import messages
from dpoptim.device_memory import host_memory, on_same_stream
from dpoptim.errors import abort_on_uncaught_exception
from dpoptim.messages import Messages, Pending, PendingSum
from dpoptim.partition import even_counts, start_offsets
from dpoptim.peer_memory import MAX_NOTED, PeerMemory
from dpoptim.shared_memory import SharedMemory, meeting, sums
from dpoptim.sleeping_barrier import SleepingBarrier
from dpoptim.small_sums import SmallSum, SmallSums
from dpoptim.staging_area import ASLEEP_BYTES, AWAKE_BYTES, StagingArea

__all__ = ["Communicator", "Pending", "Topology", "Work", "available_cores"]

logger = logging.getLogger(__name__)

# Below so many bytes a message is faster than two meetings at shared memory (measured; see docs/performance.md).
_SHARED_MEMORY_BYTES = 1 << 18
# Where ranks share cores they wait asleep for messages up to this size. Large ones in a node are never waited for long,
# since a small one (the roll call) goes before them.
_PATIENCE_BYTES = 1024


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Block until the result is there; errors of the collective are raised here.

        Collective: all ranks wait for their works in the order in which they started them.
        """


class _Done:
    def wait(self) -> None:
        pass


class _Submitted:
    """A collective that runs on the communicator's own thread."""

    def __init__(self, future: "Future[None]") -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()


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

    @property
    def num_nodes(self) -> int:
        """How many nodes there are."""
        return len(self.nodes)

    @property
    def is_even(self) -> bool:
        """Whether every node has the same number of ranks."""
        return len({len(node) for node in self.nodes}) == 1


class Communicator:
    """Collectives of torch tensors over a private duplicate of an MPI communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm or heat.core.communication.MPICommunication, optional
        An intracommunicator; ``None`` is ``COMM_WORLD``. It is duplicated, so that messages of two
        ``Communicator`` objects, or of one and its user, never meet.
    overlap : bool
        Whether collectives started with ``async_op=True`` run on a thread of this object's own while the caller
        goes on. Needs ``MPI_THREAD_MULTIPLE``. Otherwise they are finished when the call returns, or in a node when
        the first of several is waited for (Note [Batches] in peer_memory.py).

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
        self._begin(Messages(comm, self.max_message_bytes), overlap)

    def _begin(self, own_messages: Messages, overlap: bool, *, patient: bool = False) -> None:
        self._messages = own_messages
        self.rank, self.world_size = own_messages.rank, own_messages.world_size
        if overlap and not messages.takes_threads():
            own_messages.free()
            raise ValueError(
                "overlap=True needs an MPI with MPI_THREAD_MULTIPLE, this one was initialised with less: "
                "use overlap=False"
            )
        self._node = own_messages.split_node()
        self.topology = self._find_topology()
        cores = set[int]().union(*self._node.all_gather_object(available_cores()))
        self._shares_cores = len(cores) < self.topology.local_size
        # The same on all ranks: MPI does not pair a patient, non-blocking collective with a blocking one.
        self._is_patient = any(own_messages.all_gather_object(self._shares_cores))
        own_messages.patience_bytes = _PATIENCE_BYTES if self._is_patient else 0
        if patient and overlap:
            self._is_patient = True
            own_messages.patience_bytes = sys.maxsize
        own_messages.in_pieces = self.topology.num_nodes > 1
        self._small_sums = self._find_small_sums()
        self._thread = ThreadPoolExecutor(1, "dpoptim-collectives") if overlap else None
        self._ways: _NodeWays | None = None
        self._why_no_ways: str | None = None
        self._why_no_peers: str | None = None
        self._may_wait = False  # whether the collective that is being started may be done together with others
        if self.world_size == self.topology.num_nodes:
            self._why_no_ways = "every rank is alone on its node"
        if self.world_size > 1:
            abort_on_uncaught_exception(messages.abort)

    @classmethod
    def shared(cls, comm: Any = None) -> "Communicator":
        """Return the one duplicate of ``comm`` that all callers share; collective at the first call for ``comm``."""
        found = messages.attached(comm)
        if found is None:
            found = cls(comm)
            messages.attach(comm, found)
        assert isinstance(found, cls)
        return found

    @property
    def overlap(self) -> bool:
        """Whether collectives with ``async_op=True`` go on while the caller does."""
        return self._thread is not None

    @property
    def scales_for_free(self) -> bool:
        """Whether the factor of a sum costs nothing, as where ranks of a node sum it.

        By messages it is a pass over the tensor, which the caller had better make itself: the thread sends meanwhile.
        """
        return self._why_no_ways is None

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
        flat = _flat(tensor)
        _check_summable(flat.dtype)
        return self._run(self._all_reduce, (flat,), scale, async_op=async_op)

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
        flat = _flat(tensor)
        _check_summable(flat.dtype)
        counts = self._checked_counts(output, tensor, counts)
        return self._run(self._reduce_scatter, (_flat(output), flat), counts, scale, async_op=async_op)

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
        flat = _flat(output)
        own = flat.narrow(0, start_offsets(counts)[self.rank], counts[self.rank])
        if own.data_ptr() != tensor.data_ptr():
            own.copy_(_flat(tensor))
        return self._run(self._all_gather, (flat,), counts, async_op=async_op)

    def broadcast(self, tensor: Tensor, *, root: int = 0, async_op: bool = False) -> Work:
        """Copy rank ``root``'s ``tensor`` to all ranks, in place; collective. Any dtype."""
        if not 0 <= root < self.world_size:
            raise ValueError(f"root must be a rank, 0 to {self.world_size - 1}, got {root}")
        return self._run(self._broadcast, (_flat(tensor),), root, async_op=async_op)

    def start_sum(self, numbers: Sequence[float]) -> "PendingSum | SmallSum":
        """Start the sums of a few numbers over all ranks, in float64; collective, does not block.

        This object's thread has no part in it. It goes on only while this rank calls ``test`` of what is returned, or
        ``wait``, which returns the sums; one ends before the next starts.
        """
        if self._small_sums is not None and len(numbers) <= self._small_sums.max_numbers:
            return self._small_sums.start(numbers)
        return self._messages.start_sum(numbers)

    def defers(self, count: int, dtypes: Iterable[torch.dtype]) -> bool:
        """Whether that many sums of CPU tensors with ``async_op=True`` do nothing before the first is waited for.

        Then a meeting of all ranks can serve them (:meth:`announced`). Not before the node's memory was first used.
        """
        peers = self._deferring_peers()
        return peers is not None and 0 < count < MAX_NOTED and all(sums(dtype.to_real()) for dtype in dtypes)

    @contextlib.contextmanager
    def announced(self) -> Iterator[None]:
        """Meet all ranks within, by a roll call: what was deferred needs no such meeting of its own; collective.

        All that was started with ``async_op=True`` was deferred (:meth:`defers`), was more than empty tensors, and is
        waited for before more is started. If the meeting fails, as it does on all ranks alike, it never begins.
        """
        peers = self._deferring_peers()
        assert peers is not None
        with peers.announced():
            yield

    def divide_deferred(self, divisor: float) -> None:
        """Divide the scales of all sums that are deferred, by the same on all ranks; local."""
        peers = self._deferring_peers()
        assert peers is not None
        peers.divide(divisor)

    def _deferring_peers(self) -> PeerMemory | None:
        is_one_node = self._thread is None and self.topology.num_nodes == 1
        return self._ways.peers if is_one_node and self._ways is not None else None

    def finish(self, works: Iterable[Work], numbers: Callable[[], Sequence[float]]) -> list[float]:
        """Wait for works, then sum a few numbers over all ranks, in float64; collective, blocks.

        Ranks that read each other's memory meet once less than for both by themselves.

        Parameters
        ----------
        works : iterable of Work
            All that are under way, in the order in which they were started.
        numbers : callable
            Returns what to sum; called when the works are done, in place of which it must not write.
        """
        with contextlib.ExitStack() as stack:
            peers = self._deferring_peers()
            if peers is not None:
                stack.enter_context(peers.left_open())
            for work in works:
                work.wait()
            return self.start_sum(numbers()).wait()

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        """Start the sum of a small CPU tensor of a type that MPI sums, in place; collective, does not block.

        MPI does it itself, without this object's thread, and may go on only while some MPI call of this rank runs. It
        pairs with the same call on the other ranks, not with :meth:`all_reduce`. ``tensor`` belongs to the communicator
        until ``Pending.wait`` has returned or ``Pending.test`` has returned True.
        """
        return self._messages.start_all_reduce(_flat(tensor))

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
        flat = _flat(tensor)
        counts = [2 * count for count in counts] if tensor.is_complex() else list(counts)
        return self._run(self._reduce_scatter_in_node, (_flat(output), flat), counts, scale, async_op=async_op)

    def node_barrier(self) -> None:
        """Wait until all ranks of this node are here; collective in the node."""
        self._node.barrier()

    def share_in_node(self, num_bytes: int) -> SharedMemory:
        """Return memory that all ranks of this rank's node map; collective among all ranks, blocks.

        Raises
        ------
        OSError
            On every rank, if a node has none.
        """
        error, memory = None, None
        try:
            memory = SharedMemory(self._node, num_bytes)
        except OSError as caught:
            error = str(caught)
        reason = next((text for text in self.all_gather_object(error) if text is not None), None)
        if memory is None or reason is not None:
            raise OSError(reason)
        return memory

    def node_memory(self) -> str:
        """Say whether ranks of a node exchange through shared memory, and if not, why; collective at first."""
        self._find_ways()
        return "yes" if self._why_no_ways is None else f"no ({self._why_no_ways})"

    def peer_memory(self) -> str:
        """Say whether ranks of this node read each other's memory, and if not, why; collective at first."""
        self._find_ways()
        why_not = self._why_no_ways or self._why_no_peers
        return "yes" if why_not is None else f"no ({why_not})"

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
        return messages.library()

    def duplicate(self, *, overlap: bool = False, patient: bool = False) -> "Communicator":
        """Return a communicator of the same ranks with messages of its own; collective.

        Parameters
        ----------
        overlap : bool
            As in the constructor.
        patient : bool
            Let the new communicator's thread sleep between looks at a collective rather than wait in MPI, which takes a
            whole core. For long transfers beside a computation; only together with ``overlap``.
        """
        made = object.__new__(Communicator)
        made._begin(self._messages.duplicate(), overlap, patient=patient)
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
            As in :meth:`duplicate`.

        Returns
        -------
        Communicator or None
            None where ``color`` is None.
        """
        part = self._messages.split(color, key)
        if part is None:
            return None
        made = object.__new__(Communicator)
        made._begin(part, overlap, patient=patient)
        return made

    def free(self) -> None:
        """Give back MPI's communicators and the shared memory; collective. The object is unusable afterwards."""
        if self._thread is not None:
            self._thread.shutdown()
        if self._ways is not None and self._ways.counterparts is not None:
            self._ways.counterparts.free()
        self._ways = self._small_sums = None
        self._node.free()
        self._messages.free()

    # ---------------------------------------------------------------- how

    def _find_topology(self) -> Topology:
        mine = tuple(self._node.all_gather_object(self.rank))
        nodes = tuple(sorted(set(self._messages.all_gather_object(mine))))
        return Topology(nodes, nodes.index(mine), mine.index(self.rank))

    def _find_small_sums(self) -> SmallSums | None:
        """Set up memory for a few numbers, for ranks of one node that share cores; collective."""
        if not (self._shares_cores and self.topology.num_nodes == 1 < self.world_size and SleepingBarrier.is_here()):
            return None
        try:
            return SmallSums(self._node)
        except OSError as error:
            logger.info("few numbers go by messages: %s (rank %d)", error, self.rank)
            return None

    def _find_ways(self) -> "_NodeWays | None":
        """Set up shared memory at its first use; collective then, with the same answer on all ranks."""
        if self._ways is not None or self._why_no_ways is not None:
            return self._ways
        staging, peers, error = None, None, None
        if self.topology.local_size > 1:
            try:
                meet = meeting(self._node, sleeping=self._shares_cores)
                peers = self._find_peers(meet)
                chunk_bytes = _SHARED_MEMORY_BYTES  # for small sums alone
                if peers is None:
                    wanted = ASLEEP_BYTES if self._shares_cores else AWAKE_BYTES
                    chunk_bytes = max(wanted, self.topology.local_size << 16)
                staging = StagingArea(self._node, meet, chunk_bytes)
            except OSError as caught:
                error = str(caught)
        self._why_no_ways = next((text for text in self.all_gather_object(error) if text is not None), None)
        if self._why_no_ways is not None:
            logger.warning("ranks of a node exchange by messages: %s (rank %d)", self._why_no_ways, self.rank)
            return None
        counterparts = None
        num_owners = min(len(node) for node in self.topology.nodes)
        if self.topology.num_nodes > 1:
            is_owner = self.topology.local_rank < num_owners
            counterparts = self._messages.split(self.topology.local_rank if is_owner else None, self.topology.node)
            if counterparts is not None:
                counterparts.in_pieces = True
                if self._is_patient:  # the network keeps all ranks of a node waiting
                    counterparts.patience_bytes = sys.maxsize
        self._ways = _NodeWays(staging, peers, counterparts, num_owners)
        return self._ways

    def _find_peers(self, meet: Callable[[], None]) -> PeerMemory | None:
        """Try whether the ranks of this node may read each other's memory; collective in the node."""
        try:
            return PeerMemory(self._node, meet)
        except OSError as error:
            logger.info("large tensors pass through a staging area: %s (rank %d)", error, self.rank)
            self._why_no_peers = str(error)
            return None

    def _ways_for(self, tensor: Tensor) -> "_NodeWays | None":
        """Return the node's shared memory if this tensor is to go through it (Note [Ways])."""
        if tensor.device.type != "cpu" or (tensor.nbytes < _SHARED_MEMORY_BYTES and not self._may_wait):
            return None
        ways = self._find_ways()
        if ways is None or tensor.nbytes >= _SHARED_MEMORY_BYTES:
            return ways
        return ways if ways.peers is not None and self.topology.num_nodes == 1 else None

    def _meets_asleep(self, tensor: Tensor) -> bool:
        """Whether one meeting in shared memory, asleep, is less than a message: ranks of one node that share cores."""
        return (
            self._shares_cores
            and self.topology.num_nodes == 1
            and tensor.device.type == "cpu"
            and sums(tensor.dtype)
            and self._find_ways() is not None
            and self._ways is not None
            and tensor.nbytes <= self._ways.staging_area.small_bytes
        )

    def _run(self, collective: Callable[..., Work], tensors: tuple[Tensor, ...], *args: Any, async_op: bool) -> Work:
        """Run a collective of these tensors: here, on the thread, or with others as far as it can wait."""
        if self._thread is not None and async_op:
            on_stream = on_same_stream(self._run_on_host, tensors[0].device)
            return _Submitted(self._thread.submit(lambda: on_stream(collective, tensors, *args).wait()))
        self._may_wait = async_op
        try:
            work = self._run_on_host(collective, tensors, *args)
        finally:
            self._may_wait = False
        if async_op:
            return work
        work.wait()
        return _DONE

    def _run_on_host(self, collective: Callable[..., Work], tensors: tuple[Tensor, ...], *args: Any) -> Work:
        if tensors[0].device.type == "cpu":
            return collective(*tensors, *args)
        with host_memory(*tensors, direct=messages.reads_device_memory) as hosts:
            collective(*hosts, *args).wait()
        return _DONE

    def _all_reduce(self, tensor: Tensor, scale: float) -> Work:
        if self.world_size == 1:
            _scale(tensor, scale)
            return _DONE
        ways = self._ways_for(tensor) if sums(tensor.dtype) else None
        if ways is None and self._meets_asleep(tensor):
            assert self._ways is not None
            self._ways.staging_area.all_reduce_small(tensor, scale)
        elif ways is None:
            _scale(tensor, scale)
            self._messages.all_reduce(tensor)
        elif self.topology.num_nodes == 1:
            ways.memory.all_reduce(tensor, scale)
            return ways.memory
        else:
            counts = even_counts(len(tensor), ways.num_owners) + [0] * (self.topology.local_size - ways.num_owners)
            starts = start_offsets(counts)
            own = tensor.narrow(0, starts[self.topology.local_rank], counts[self.topology.local_rank])
            self._sum_parts(ways, own, tensor, starts, counts, scale).wait()
            if ways.staging is not None:
                ways.memory.all_gather(tensor, starts, counts)
                ways.memory.wait()
        return _DONE

    def _sum_parts(
        self,
        ways: "_NodeWays",
        output: Tensor,
        tensor: Tensor,
        starts: Sequence[int],
        counts: Sequence[int],
        scale: float,
    ) -> Work:
        """Sum over the node, then over the counterparts on other nodes."""
        if ways.staging is not None:
            ways.memory.reduce_scatter(output, tensor, starts, counts, scale)
            if self.topology.num_nodes == 1:
                return ways.memory
            ways.memory.wait()  # also of ranks without counterparts: a batch is the same on all ranks of a node
        else:
            if output.data_ptr() != tensor.data_ptr():
                output.copy_(tensor[: counts[0]])
            _scale(output, scale)
        if ways.counterparts is not None:
            ways.counterparts.all_reduce(output)
        return _DONE

    def _reduce_scatter_in_node(self, output: Tensor, source: Tensor, counts: list[int], scale: float) -> Work:
        ways = self._find_ways()
        if ways is None:
            raise RuntimeError(f"node_shared=True needs shared memory on every node: {self._why_no_ways}")
        return self._sum_parts(ways, output, source, start_offsets(counts), counts, scale)

    def _reduce_scatter(self, output: Tensor, source: Tensor, counts: list[int], scale: float) -> Work:
        ways = self._ways_for(source) if sums(source.dtype) else None
        if ways is None or not self.topology.is_even:
            self._messages.reduce_scatter(output, source, counts, scale)
            return _DONE
        starts = start_offsets(counts)
        if self.topology.num_nodes == 1:
            ways.memory.reduce_scatter(output, source, starts, counts, scale)
            return ways.memory
        own_counts = [counts[node[self.topology.local_rank]] for node in self.topology.nodes]
        own_parts = source.new_empty(sum(own_counts))
        for node, own in zip(self.topology.nodes, torch.split(own_parts, own_counts), strict=True):
            node_starts, node_counts = [starts[rank] for rank in node], [counts[rank] for rank in node]
            ways.memory.reduce_scatter(own, source, node_starts, node_counts, scale)
        ways.memory.wait()
        assert ways.counterparts is not None
        ways.counterparts.reduce_scatter(output, own_parts, own_counts)
        return _DONE

    def _all_gather(self, tensor: Tensor, counts: list[int]) -> Work:
        ways = self._ways_for(tensor)
        if ways is None or not self.topology.is_even:
            self._messages.all_gather(tensor, counts)
            return _DONE
        starts = start_offsets(counts)
        if ways.counterparts is not None:
            own_ranks = [node[self.topology.local_rank] for node in self.topology.nodes]
            own_counts = [counts[rank] for rank in own_ranks]
            own_parts = [tensor.narrow(0, starts[rank], counts[rank]) for rank in own_ranks]
            gathered = torch.cat(own_parts)
            ways.counterparts.all_gather(gathered, own_counts)
            for part, values in zip(own_parts, torch.split(gathered, own_counts), strict=True):
                part.copy_(values)
        for node in self.topology.nodes:
            ways.memory.all_gather(tensor, [starts[rank] for rank in node], [counts[rank] for rank in node])
        return ways.memory

    def _broadcast(self, tensor: Tensor, root: int) -> Work:
        if self.world_size > 1:
            self._messages.broadcast(tensor, root)
        return _DONE

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


@dataclass(frozen=True)
class _NodeWays:
    """What ranks of a node have beside messages (Note [Ways])."""

    staging: StagingArea | None
    peers: PeerMemory | None
    counterparts: Messages | None
    num_owners: int

    @property
    def memory(self) -> PeerMemory | StagingArea:
        """What large tensors pass through, where every node has several ranks."""
        return self.peers or self.staging_area

    @property
    def staging_area(self) -> StagingArea:
        """The staging area, where every node has several ranks."""
        assert self.staging is not None
        return self.staging


def available_cores() -> set[int]:
    """Return the numbers of the cores that this rank may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


_DONE = _Done()


def _flat(tensor: Tensor) -> Tensor:
    """Return a 1-d view on the numbers of a contiguous tensor; complex ones as pairs of reals."""
    if tensor.dim() == 1 and tensor.is_contiguous() and not (tensor.requires_grad or tensor.is_complex()):
        return tensor
    tensor = tensor.detach()
    if not tensor.is_contiguous():
        raise ValueError(
            f"tensor must be contiguous, got strides {tuple(tensor.stride())} for shape {tuple(tensor.shape)}"
        )
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(-1)


def _scale(tensor: Tensor, scale: float) -> None:
    if scale != 1.0:
        tensor.mul_(scale)


def _check_summable(dtype: torch.dtype) -> None:
    if not messages.has_sum(dtype):
        raise TypeError(f"tensors of {dtype} have no sum over ranks: convert to a wider dtype first")
