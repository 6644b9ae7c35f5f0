"""Which transport carries which collective: the one place that finds out what there is between the ranks, and chooses.

Note [Ways]
-----------
Ranks of one node read large tensors from each other's memory (:mod:`dpoptim.comm.node.peer_memory`), or where they may
not pass them through memory that they share (:mod:`dpoptim.comm.node.staging`). Ranks of a node that share cores
all-reduce and gather small ones through slots (:mod:`dpoptim.comm.node.small_sums`). All else goes by messages
(:mod:`dpoptim.comm.mpi.messages`). Ranks of several nodes exchange within each node first
(:mod:`dpoptim.comm.hierarchical`). The choice depends on nothing but sizes, dtypes and what all ranks agreed on, so
that all ranks choose the same. What carries a sum does not depend on what came before: MPI has an order of its own, so
that a training that is resumed would have other bits.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dpoptim.comm.hierarchical import Hierarchical
from dpoptim.comm.mpi.messages import Messages
from dpoptim.comm.mpi.polled import PolledMessages
from dpoptim.comm.node.alone import Alone
from dpoptim.comm.node.peer_memory import PeerMemory
from dpoptim.comm.node.shared_memory import meeting
from dpoptim.comm.node.sleeping_barrier import SleepingBarrier
from dpoptim.comm.node.small_sums import SmallSums
from dpoptim.comm.node.staging import ASLEEP_BYTES, AWAKE_BYTES, StagingArea
from dpoptim.comm.summing import is_summed_here
from dpoptim.comm.topology import Topology
from dpoptim.comm.transport import NodeTransport, Transport
from dpoptim.comm.work import Work
from dpoptim.tuning import TUNING

__all__ = ["Found", "Route", "calls_for_memory", "find_number_sums", "messages_alone", "with_memory"]

logger = logging.getLogger(__name__)

# Below so many bytes a message is faster than two meetings at shared memory (measured; see docs/performance.md).
_SHARED_MEMORY_BYTES = TUNING.shared_memory_bytes
_ALL = frozenset({"all_reduce", "reduce_scatter", "all_gather"})
_ALONE = "every rank is alone on its node"


@dataclass(frozen=True)
class Route:
    """A transport, and which collectives it is to carry.

    Attributes
    ----------
    transport : Transport
        What carries them.
    collectives : frozenset of str
        Names of methods of it.
    least_bytes, most_bytes : int
        The sizes of tensors.
    in_memory : bool
        Whether it carries but tensors on the host, and sums but what is summed by torch as it is.
    if_it_may_wait : bool
        Whether it carries but what may be done later, together with others.
    """

    transport: Transport
    collectives: frozenset[str] = _ALL
    least_bytes: int = 0
    most_bytes: int = sys.maxsize
    in_memory: bool = False
    if_it_may_wait: bool = False

    def carries(self, collective: str, tensor: Tensor, *, may_wait: bool) -> bool:
        """Whether it carries this collective of this tensor."""
        return (
            self.least_bytes <= tensor.nbytes <= self.most_bytes
            and collective in self.collectives
            and (may_wait or not self.if_it_may_wait)
            and (not self.in_memory or _is_for_memory(collective, tensor))
        )


@dataclass(frozen=True)
class Found:
    """What there is between the ranks.

    Attributes
    ----------
    routes : sequence of Route
        The first that carries a collective is taken; the last carries all.
    sum_in_node : callable, optional
        As ``reduce_scatter``, of all ranks of all nodes, with each part at one rank of every node.
    batches : Transport, optional
        What all collectives go by that may wait, if it gains by a batch.
    why_no_node_memory, why_no_peer_memory : str, optional
        Why ranks of a node don't exchange through memory that they share; and don't read each other's.
    """

    routes: Sequence[Route]
    sum_in_node: Callable[..., Work] | None = None
    batches: Transport | None = None
    why_no_node_memory: str | None = None
    why_no_peer_memory: str | None = None

    def transport(self, collective: str, tensor: Tensor, *, may_wait: bool) -> Transport:
        """Return what carries this collective of this tensor."""
        return next(route.transport for route in self.routes if route.carries(collective, tensor, may_wait=may_wait))

    def free(self) -> None:
        """Give back what the transports hold; collective."""
        for transport in {id(route.transport): route.transport for route in self.routes}.values():
            transport.free()


def messages_alone(messages: Messages, topology: Topology, *, polled: bool) -> Found:
    """Return what there is without a node's memory; collective with ``polled``.

    Parameters
    ----------
    messages : Messages
        Of all ranks.
    topology : Topology
        Which of them share a node.
    polled : bool
        Whether collectives may go on while their caller polls, if every rank is alone on its node.
    """
    if messages.world_size == 1:
        return Found([Route(Alone())], why_no_node_memory=_ALONE, why_no_peer_memory=_ALONE)
    if topology.num_nodes < messages.world_size:
        return Found([Route(messages)])
    routes = []
    if polled:
        looked_after = PolledMessages(messages)
        routes = [
            Route(looked_after, frozenset({"all_reduce"}), if_it_may_wait=True),
            Route(looked_after, most_bytes=messages.max_message_bytes, if_it_may_wait=True),
        ]
    return Found([*routes, Route(messages)], why_no_node_memory=_ALONE, why_no_peer_memory=_ALONE)


def calls_for_memory(collective: str, tensor: Tensor, *, may_wait: bool, sleeps: bool) -> bool:
    """Whether a collective may go through a node's memory, so that it is to be set up; the same on all ranks.

    Parameters
    ----------
    collective, tensor, may_wait
        As of :meth:`Route.carries`.
    sleeps : bool
        Whether the ranks are of one node and share cores.
    """
    is_worth_it = tensor.nbytes >= _SHARED_MEMORY_BYTES or may_wait or (sleeps and collective == "all_reduce")
    return is_worth_it and _is_for_memory(collective, tensor)


def with_memory(
    messages: Messages, node: Messages, topology: Topology, *, shares_cores: bool, is_patient: bool
) -> Found:
    """Set up a node's memory, and return what there is then; collective among all ranks, the same answer on all.

    Parameters
    ----------
    messages, node : Messages
        Of all ranks, and of those of this rank's node.
    topology : Topology
        Which ranks share a node; not every rank is alone.
    shares_cores : bool
        Whether ranks of this node share cores, so that they sleep while they wait.
    is_patient : bool
        Whether ranks wait asleep for other nodes.
    """
    large: NodeTransport | None = None
    error, why_no_peers = None, None
    if topology.local_size == 1:
        large = Alone()
    else:
        try:
            large, why_no_peers = _large(node, shares_cores=shares_cores)
        except OSError as caught:
            error = str(caught)
    why_not = next((text for text in messages.all_gather_object(error) if text is not None), None)
    if why_not is not None or large is None:
        logger.warning("ranks of a node exchange by messages: %s (rank %d)", why_not, messages.rank)
        return Found([Route(messages)], why_no_node_memory=why_not, why_no_peer_memory=why_not)
    if topology.num_nodes > 1:
        across = _across(messages, topology, is_patient=is_patient)
        hierarchical = Hierarchical(large, across, topology)
        collectives = _ALL if topology.is_even else frozenset({"all_reduce"})
        first = Route(hierarchical, collectives, least_bytes=_SHARED_MEMORY_BYTES, in_memory=True)
        return Found([first, Route(messages)], hierarchical.reduce_scatter_in_node, None, None, why_no_peers)
    routes = [Route(large, least_bytes=_SHARED_MEMORY_BYTES, in_memory=True)]
    if why_no_peers is None:
        routes.append(Route(large, in_memory=True, if_it_may_wait=True))
    if shares_cores and (small := _slots(node, _SHARED_MEMORY_BYTES)) is not None:
        # No small reduce-scatter: it sets up no memory, and before that it goes by messages (Note [Ways]).
        collectives = frozenset({"all_reduce", "all_gather"})
        routes.append(Route(small, collectives, most_bytes=small.slot_bytes, in_memory=True))
    batches = large if why_no_peers is None else None
    return Found([*routes, Route(messages)], large.reduce_scatter, batches, None, why_no_peers)


def find_number_sums(node: Messages, topology: Topology, *, shares_cores: bool) -> SmallSums | None:
    """Return what sums a few numbers, if it is not messages; collective."""
    is_one_node = topology.num_nodes == 1 < topology.local_size
    return _slots(node) if shares_cores and is_one_node else None


def _large(node: Messages, *, shares_cores: bool) -> tuple[NodeTransport, str | None]:
    """Return what carries large tensors in a node, and why not by reading memory; raises OSError in all of the node."""
    meet = meeting(node, sleeping=shares_cores)
    try:
        return PeerMemory(node, meet), None
    except OSError as error:
        logger.info("large tensors pass through a staging area: %s (rank %d)", error, node.rank)
        wanted = ASLEEP_BYTES if shares_cores else AWAKE_BYTES
        return StagingArea(node, meet, max(wanted, node.world_size << 16)), str(error)


def _slots(node: Messages, *slot_bytes: int) -> SmallSums | None:
    """Return slots in memory that the ranks of a node share, None where that can't be; collective in the node."""
    if not SleepingBarrier.is_here():
        return None
    try:
        return SmallSums(node, *slot_bytes)
    except OSError as error:
        logger.info("small tensors and numbers go by messages: %s (rank %d)", error, node.rank)
        return None


def _across(messages: Messages, topology: Topology, *, is_patient: bool) -> Messages | None:
    """Return the messages among this rank and its counterparts on other nodes, if it has any; collective."""
    is_owner = topology.local_rank < min(map(len, topology.nodes))
    across = messages.split(topology.local_rank if is_owner else None, topology.node)
    if across is not None:
        across.in_pieces = True
        if is_patient:  # the network keeps all ranks of a node waiting
            across.patience_bytes = sys.maxsize
    return across


def _is_for_memory(collective: str, tensor: Tensor) -> bool:
    """Whether ranks of a node may exchange this tensor through memory."""
    return tensor.is_cpu and (collective == "all_gather" or is_summed_here(tensor.dtype))
