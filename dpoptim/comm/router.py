"""Router: collectives of flat host tensors, each by the fastest way there is.

Note [Ways]
-----------
Ranks of one node read large tensors from each other's memory (:mod:`dpoptim.comm.node.peer_memory`), or where they may
not pass them through memory that they share (:mod:`dpoptim.comm.node.staging`); all else goes by messages
(:mod:`dpoptim.comm.mpi.messages`). With several nodes the ranks of a node first divide the sum among them; each then
all-reduces its part with its counterparts on the other nodes, so that all ranks drive the network together; last they
share the results. Nodes of different sizes use as many ranks a node as the smallest has. The way depends on nothing but
sizes, dtypes and what all ranks agreed on, so that all ranks take the same.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.comm.mpi.messages import Messages
from dpoptim.comm.mpi.polled import PolledMessages
from dpoptim.comm.node.lent_memory import LentMemory
from dpoptim.comm.node.peer_memory import PeerMemory
from dpoptim.comm.node.shared_memory import SharedMemory, meeting
from dpoptim.comm.node.sleeping_barrier import SleepingBarrier
from dpoptim.comm.node.small_sums import SmallSums
from dpoptim.comm.node.staging import ASLEEP_BYTES, AWAKE_BYTES, StagingArea
from dpoptim.comm.normal_tensors import normal_tensors
from dpoptim.comm.summing import is_summed_here
from dpoptim.comm.topology import Topology, available_cores
from dpoptim.comm.work import DONE, Pending, Work
from dpoptim.partition import even_counts, start_offsets
from dpoptim.tuning import TUNING

__all__ = ["Router"]

logger = logging.getLogger(__name__)

# Below so many bytes a message is faster than two meetings at shared memory (measured; see docs/performance.md).
_SHARED_MEMORY_BYTES = TUNING.shared_memory_bytes
# Where ranks share cores they wait asleep for messages up to this size. Large ones in a node are never waited for long,
# since a small one (the roll call) goes before them.
_PATIENCE_BYTES = TUNING.patience_bytes


class Router:
    """The ways between the ranks of some messages (Note [Ways]); construction is collective.

    Every method but :meth:`deferring` and :meth:`poll` is collective. Tensors are flat, contiguous and not complex;
    arguments are the caller's to check.

    Parameters
    ----------
    own_messages : Messages
        This object's alone; freed with it.
    patient : bool
        Whether ranks wait asleep for whatever comes from other nodes, even where none share a core.
    polled : bool
        Whether sums and gathers may go on while their caller computes and calls :meth:`poll`, if every rank is alone
        on its node.

    Attributes
    ----------
    topology : Topology
        Which ranks share a node.
    may_wait : bool
        Whether the collective that is being started may be done together with others, when the first is waited for, or
        go on until then.
    """

    @normal_tensors()
    def __init__(self, own_messages: Messages, *, patient: bool, polled: bool) -> None:
        self._messages = own_messages
        self._rank, self._world_size = own_messages.rank, own_messages.world_size
        self._node = own_messages.split_node()
        self.topology = self._find_topology()
        cores = set[int]().union(*self._node.all_gather_object(available_cores()))
        self._shares_cores = len(cores) < self.topology.local_size
        # The same on all ranks: MPI does not pair a patient, non-blocking collective with a blocking one.
        everybody = own_messages.all_gather_object((self._shares_cores, TUNING))
        for rank, (_, tuning) in enumerate(everybody):
            if tuning != everybody[0][1]:
                self._node.free()
                own_messages.free()
                message = f"DPOPTIM_TUNING must be the same on all ranks, not so on ranks 0 and {rank}"
                raise raised_on_all_ranks(ValueError(message))
        self._is_patient = patient or any(shares for shares, _ in everybody)
        own_messages.patience_bytes = sys.maxsize if patient else _PATIENCE_BYTES if self._is_patient else 0
        is_power_of_two = self._world_size & (self._world_size - 1) == 0
        own_messages.in_pieces = self.topology.num_nodes > 1 or not is_power_of_two
        self._small_sums = self._find_small_sums()
        self._ways: _NodeWays | None = None
        self._why_no_ways: str | None = None
        self._why_no_peers: str | None = None
        self.may_wait = False
        self._polled: PolledMessages | None = None
        if self._world_size == self.topology.num_nodes:
            self._why_no_ways = "every rank is alone on its node"
            self._polled = PolledMessages(own_messages) if polled and self._world_size > 1 else None

    @property
    def sums_in_node(self) -> bool:
        """Whether ranks of a node sum there, where the factor of a sum costs nothing, as far as is known."""
        return self._why_no_ways is None

    # ---------------------------------------------------------------- collectives

    def all_reduce(self, tensor: Tensor, scale: float) -> Work:
        """Sum ``scale`` times the tensor over all ranks, in place."""
        if self._world_size == 1:
            _scale(tensor, scale)
            return DONE
        ways = self._ways_for(tensor) if is_summed_here(tensor.dtype) else None
        if ways is None and self._meets_asleep(tensor):
            assert self._ways is not None
            self._ways.staging_area.all_reduce_small(tensor, scale)
        elif ways is None:
            _scale(tensor, scale)
            if self._polled is not None and self.may_wait:
                return self._polled.all_reduce(tensor)
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
        return DONE

    def reduce_scatter_in_node(self, output: Tensor, source: Tensor, counts: Sequence[int], scale: float) -> Work:
        """Sum over all ranks of all nodes, each part at one rank of every node."""
        ways = self._find_ways()
        if ways is None:
            raise RuntimeError(f"node_shared=True needs shared memory on every node: {self._why_no_ways}")
        return self._sum_parts(ways, output, source, start_offsets(counts), counts, scale)

    def reduce_scatter(self, output: Tensor, source: Tensor, counts: Sequence[int], scale: float) -> Work:
        """Sum ``scale * source`` over all ranks; ``output``, perhaps a part of it, receives this rank's part."""
        ways = self._ways_for(source) if is_summed_here(source.dtype) else None
        if ways is None or not self.topology.is_even:
            if self._polled is not None and self.may_wait and source.nbytes <= self._messages.max_message_bytes:
                return self._polled.reduce_scatter(output, source, counts, scale)
            self._messages.reduce_scatter(output, source, counts, scale)
            return DONE
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
        return DONE

    def all_gather(self, tensor: Tensor, counts: Sequence[int]) -> Work:
        """Collect every rank's part of the tensor, where its own is already in place. Any dtype."""
        ways = self._ways_for(tensor)
        if ways is None or not self.topology.is_even:
            if self._polled is not None and self.may_wait and tensor.nbytes <= self._messages.max_message_bytes:
                return self._polled.all_gather(tensor, counts)
            self._messages.all_gather(tensor, counts)
            return DONE
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

    def broadcast(self, tensor: Tensor, root: int) -> Work:
        """Copy the root's tensor to all, in place. Any dtype."""
        if self._world_size > 1:
            self._messages.broadcast(tensor, root)
        return DONE

    def start_sum(self, numbers: Sequence[float]) -> Pending[list[float]]:
        """Start the sums of a few numbers, in float64; does not block, and one ends before the next starts."""
        if self._small_sums is not None and len(numbers) <= self._small_sums.max_numbers:
            return self._small_sums.start(numbers)
        return self._messages.start_sum(numbers)

    @property
    def is_polled(self) -> bool:
        """Whether what may wait goes on meanwhile."""
        return self._polled is not None

    def poll(self) -> None:
        """Go on with what is under way; local, does not block."""
        if self._polled is not None:
            self._polled.poll()

    def deferring(self) -> PeerMemory | None:
        """Return what defers collectives that may wait, if all do and it was used before; local."""
        return self._ways.peers if self._ways is not None and self.topology.num_nodes == 1 else None

    # ---------------------------------------------------------------- in a node

    def node_barrier(self) -> None:
        """Wait until all ranks of this node are here; collective in the node."""
        self._node.barrier()

    @normal_tensors()
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
        reason = next((text for text in self._messages.all_gather_object(error) if text is not None), None)
        if memory is None or reason is not None:
            raise OSError(reason)
        return memory

    def why_no_node_memory(self) -> str | None:
        """Return why ranks of a node don't exchange through shared memory, None if they do; collective at first."""
        self._find_ways()
        return self._why_no_ways

    def why_no_peer_memory(self) -> str | None:
        """Return why ranks of this node don't read each other's memory, None if they do; collective at first."""
        self._find_ways()
        return self._why_no_ways or self._why_no_peers

    def lends(self) -> bool:
        """Whether all ranks are of one node and read each other's memory; collective at first."""
        if self.topology.num_nodes > 1 or self._world_size == 1:
            return False
        ways = self._find_ways()
        return ways is not None and ways.peers is not None

    @normal_tensors()
    def lend(self, num_bytes: int) -> LentMemory | None:
        """Return memory for what is to be summed, if there is any, instead of what was lent before; collective.

        With 0 bytes nothing is lent any more; local then. No collective is under way.
        """
        peers = None if self._ways is None else self._ways.peers
        if peers is None:
            return None
        peers.take_back()
        if not num_bytes:
            return None
        try:
            return peers.lend(num_bytes)
        except OSError as error:
            logger.info("gradients lie in private memory: %s (rank %d)", error, self._rank)
            return None

    def free(self) -> None:
        """Give back MPI's communicators and the shared memory."""
        if self._ways is not None and self._ways.counterparts is not None:
            self._ways.counterparts.free()
        self._ways = self._small_sums = None
        if self._polled is not None:
            self._polled.free()
        self._node.free()
        self._messages.free()

    # ---------------------------------------------------------------- how

    def _find_topology(self) -> Topology:
        mine = tuple(self._node.all_gather_object(self._rank))
        nodes = tuple(sorted(set(self._messages.all_gather_object(mine))))
        return Topology(nodes, nodes.index(mine), mine.index(self._rank))

    def _find_small_sums(self) -> SmallSums | None:
        """Set up memory for a few numbers, for ranks of one node that share cores; collective."""
        if not (self._shares_cores and self.topology.num_nodes == 1 < self._world_size and SleepingBarrier.is_here()):
            return None
        try:
            return SmallSums(self._node)
        except OSError as error:
            logger.info("few numbers go by messages: %s (rank %d)", error, self._rank)
            return None

    def _find_ways(self) -> "_NodeWays | None":
        """Set up shared memory at its first use; collective then, with the same answer on all ranks."""
        if self._ways is None and self._why_no_ways is None:
            with normal_tensors():
                self._set_up_ways()
        return self._ways

    def _set_up_ways(self) -> None:
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
        self._why_no_ways = next((text for text in self._messages.all_gather_object(error) if text is not None), None)
        if self._why_no_ways is not None:
            logger.warning("ranks of a node exchange by messages: %s (rank %d)", self._why_no_ways, self._rank)
            return
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

    def _find_peers(self, meet: Callable[[], None]) -> PeerMemory | None:
        """Try whether the ranks of this node may read each other's memory; collective in the node."""
        try:
            return PeerMemory(self._node, meet)
        except OSError as error:
            logger.info("large tensors pass through a staging area: %s (rank %d)", error, self._rank)
            self._why_no_peers = str(error)
            return None

    def _ways_for(self, tensor: Tensor) -> "_NodeWays | None":
        """Return the node's shared memory if this tensor is to go through it (Note [Ways])."""
        if tensor.device.type != "cpu" or (tensor.nbytes < _SHARED_MEMORY_BYTES and not self.may_wait):
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
            and is_summed_here(tensor.dtype)
            and self._find_ways() is not None
            and self._ways is not None
            and tensor.nbytes <= self._ways.staging_area.small_bytes
        )

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
        return DONE


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


def _scale(tensor: Tensor, scale: float) -> None:
    if scale != 1.0:
        tensor.mul_(scale)
