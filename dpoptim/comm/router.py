"""Router: collectives of flat host tensors, each by the transport that :mod:`dpoptim.comm.selection` has chosen.

Tests: ``tests/comm/test_communicator.py``.
"""

import sys
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from dpoptim.comm.batch import MeetingFirst
from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.comm.mpi.messages import Messages
from dpoptim.comm.node.shared_memory import SharedMemory
from dpoptim.comm.normal_tensors import normal_tensors
from dpoptim.comm.selection import Found, calls_for_memory, find_number_sums, messages_alone, with_memory
from dpoptim.comm.topology import Topology, available_cores
from dpoptim.comm.transport import Batch, Memory
from dpoptim.comm.work import DONE, Pending, Work
from dpoptim.tuning import TUNING

__all__ = ["Router"]

# Where ranks share cores they wait asleep for messages up to this size. Large ones in a node are never waited for long,
# since a small one (the roll call) goes before them.
_PATIENCE_BYTES = TUNING.patience_bytes


class Router:
    """The transports between the ranks of some messages; construction is collective.

    Every method but :meth:`batch`, :meth:`drop` and :meth:`poll` is collective. Tensors are flat, contiguous and not
    complex; arguments are the caller's to check. A collective that ``may_wait`` may be done together with others, when
    the first is waited for, or go on until then. A node's memory is set up at its first use.

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
    is_polled : bool
        Whether what may wait goes on meanwhile.
    """

    @normal_tensors()
    def __init__(self, own_messages: Messages, *, patient: bool, polled: bool) -> None:
        self._messages, self._node = own_messages, own_messages.split_node()
        self.topology = _find_topology(own_messages, self._node)
        cores = set[int]().union(*self._node.all_gather_object(available_cores()))
        self._shares_cores = len(cores) < self.topology.local_size
        # The same on all ranks: MPI does not pair a patient, non-blocking collective with a blocking one.
        self._is_patient = patient or self._any_shares_cores()
        own_messages.patience_bytes = sys.maxsize if patient else _PATIENCE_BYTES if self._is_patient else 0
        size = own_messages.world_size
        is_power_of_two = size & (size - 1) == 0
        own_messages.in_pieces = self.topology.num_nodes > 1 or not is_power_of_two
        self._number_sums = find_number_sums(self._node, self.topology, shares_cores=self._shares_cores)
        self._found = messages_alone(own_messages, self.topology, polled=polled)
        self._is_complete = size == self.topology.num_nodes  # else a node's memory is still to be set up
        self.is_polled = polled and 1 < size == self.topology.num_nodes

    @property
    def sums_in_node(self) -> bool:
        """Whether ranks of a node sum there, where the factor of a sum costs nothing, as far as is known."""
        return self._found.why_no_node_memory is None

    # ---------------------------------------------------------------- collectives

    def all_reduce(self, tensor: Tensor, scale: float, *, may_wait: bool = False) -> Work:
        """Sum ``scale`` times the tensor over all ranks, in place."""
        self._complete_for("all_reduce", tensor, may_wait=may_wait)
        return self._found.transport("all_reduce", tensor, may_wait=may_wait).all_reduce(tensor, scale)

    def reduce_scatter(
        self, output: Tensor, source: Tensor, counts: Sequence[int], scale: float, *, may_wait: bool = False
    ) -> Work:
        """Sum ``scale * source`` over all ranks; ``output``, perhaps a part of it, receives this rank's part."""
        self._complete_for("reduce_scatter", source, may_wait=may_wait)
        transport = self._found.transport("reduce_scatter", source, may_wait=may_wait)
        return transport.reduce_scatter(output, source, counts, scale)

    def reduce_scatter_in_node(self, output: Tensor, source: Tensor, counts: Sequence[int], scale: float) -> Work:
        """Sum over all ranks of all nodes, each part at one rank of every node, through the memory of nodes."""
        sum_in_node = self._complete().sum_in_node
        if sum_in_node is None:
            raise RuntimeError(f"node_shared=True needs shared memory on every node: {self._found.why_no_node_memory}")
        return sum_in_node(output, source, counts, scale)

    def all_gather(self, tensor: Tensor, counts: Sequence[int], *, may_wait: bool = False) -> Work:
        """Collect every rank's part of the tensor, where its own is already in place. Any dtype."""
        self._complete_for("all_gather", tensor, may_wait=may_wait)
        return self._found.transport("all_gather", tensor, may_wait=may_wait).all_gather(tensor, counts)

    def prepare_all_gathers(self, outputs: Sequence[tuple[Tensor, Sequence[int]]]) -> Callable[[], Sequence[Work]]:
        """Return what starts :meth:`all_gather` of each of these, which may wait, again and again; local."""
        batches = self._found.batches
        if batches is not None and all(tensor.is_cpu for tensor, _ in outputs):
            return batches.prepare_all_gathers(outputs)
        return lambda: [self.all_gather(tensor, counts, may_wait=True) for tensor, counts in outputs]

    def broadcast(self, tensor: Tensor, root: int) -> Work:
        """Copy the root's tensor to all, in place, by messages. Any dtype."""
        if self._messages.world_size > 1:
            self._messages.broadcast(tensor, root)
        return DONE

    def start_sum(self, numbers: Sequence[float]) -> Pending[list[float]]:
        """Start the sums of a few numbers, in float64; does not block, and one ends before the next starts."""
        if self._number_sums is not None and len(numbers) <= self._number_sums.max_numbers:
            return self._number_sums.start(numbers)
        return self._messages.start_sum(numbers)

    def sum_numbers(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums of a few numbers, in float64; blocks."""
        return self.start_sum(numbers).wait()

    def batch(self, num_collectives: int, dtypes: Iterable[torch.dtype]) -> Batch:
        """Return a batch of so many collectives that may wait, with sums of these dtypes; local."""
        batches = self._found.batches
        found = None if batches is None else batches.batch(num_collectives, dtypes, self.sum_numbers)
        return MeetingFirst(self.sum_numbers) if found is None else found

    def drop(self) -> None:
        """Forget what may wait and has not begun; local, on all ranks alike."""
        if self._found.batches is not None:
            self._found.batches.drop()

    def poll(self) -> None:
        """Go on with what is under way; local, does not block."""
        if self.is_polled:
            self._found.routes[0].transport.poll()

    # ---------------------------------------------------------------- memory

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
        return self._complete().why_no_node_memory

    def why_no_peer_memory(self) -> str | None:
        """Return why ranks of this node don't read each other's memory, None if they do; collective at first."""
        return self._complete().why_no_peer_memory

    def has_memory(self) -> bool:
        """Whether tensors are summed faster in memory of :meth:`allocate`; collective at first."""
        if self.topology.num_nodes > 1 or self._messages.world_size == 1:
            return False
        batches = self._complete().batches
        return batches is not None and batches.has_memory

    def allocate(self, num_bytes: int) -> Memory | None:
        """Return memory for tensors that are summed often, instead of what was allocated before; collective.

        None if there is none. With 0 bytes what was allocated is given back; local then. No collective is under way.
        """
        batches = self._found.batches
        return None if batches is None else batches.allocate(num_bytes)

    def free(self) -> None:
        """Give back MPI's communicators and the shared memory."""
        self._number_sums = None
        found, self._found = self._found, Found([])
        self.is_polled = False
        found.free()
        self._node.free()
        self._messages.free()

    # ---------------------------------------------------------------- how

    def _any_shares_cores(self) -> bool:
        """Whether ranks of any node share cores; raises ``ValueError`` on all if they set different ``TUNING``."""
        everybody = self._messages.all_gather_object((self._shares_cores, TUNING))
        for rank, (_, tuning) in enumerate(everybody):
            if tuning != everybody[0][1]:
                self._node.free()
                self._messages.free()
                message = f"DPOPTIM_TUNING must be the same on all ranks, not so on ranks 0 and {rank}"
                raise raised_on_all_ranks(ValueError(message))
        return any(shares for shares, _ in everybody)

    def _complete_for(self, collective: str, tensor: Tensor, *, may_wait: bool) -> None:
        """Set up a node's memory if this collective may go through it; collective then."""
        if not self._is_complete:
            sleeps = self._shares_cores and self.topology.num_nodes == 1
            if calls_for_memory(collective, tensor, may_wait=may_wait, sleeps=sleeps):
                self._complete()

    def _complete(self) -> Found:
        """Set up a node's memory at its first use; collective then, with the same answer on all ranks."""
        if not self._is_complete:
            with normal_tensors():
                self._found = with_memory(
                    self._messages,
                    self._node,
                    self.topology,
                    shares_cores=self._shares_cores,
                    is_patient=self._is_patient,
                )
            self._is_complete = True
        return self._found


def _find_topology(messages: Messages, node: Messages) -> Topology:
    """Return which ranks share a node; collective."""
    mine = tuple(node.all_gather_object(messages.rank))
    nodes = tuple(sorted(set(messages.all_gather_object(mine))))
    return Topology(nodes, nodes.index(mine), mine.index(messages.rank))
