"""Hierarchical: collectives of ranks on several nodes, first within each node and then across them.

Tests: ``tests/comm/test_transport.py``.

Note [Within nodes, then across]
--------------------------------
The ranks of a node first divide a sum among them. Each then all-reduces its part with its counterparts on the other
nodes, so that all ranks drive the network together. Last they share the results. Nodes of different sizes use as many
ranks a node as the smallest has: the owners.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpoptim.comm.topology import Topology
from dpoptim.comm.transport import NodeTransport, Transport
from dpoptim.comm.work import DONE, Together, Work
from dpoptim.partition import even_counts, start_offsets

__all__ = ["Hierarchical"]


class Hierarchical(Transport):
    """Collectives within each node by one transport, and across nodes by another, for which they block.

    Parameters
    ----------
    node : NodeTransport
        Among the ranks of this rank's node.
    across : Transport, optional
        Among this rank and its counterparts, one on every node, in the order of nodes. None if it is no owner.
    topology : Topology
        Which ranks share a node. ``reduce_scatter`` and ``all_gather`` need nodes of one size.
    """

    def __init__(self, node: NodeTransport, across: Transport | None, topology: Topology) -> None:
        self._node, self._across, self._topology = node, across, topology
        self._num_owners = min(map(len, topology.nodes))

    def all_reduce(self, tensor: Tensor, scale: float = 1.0) -> Work:
        """Sum over all ranks, in place."""
        local_rank, local_size = self._topology.local_rank, self._topology.local_size
        counts = even_counts(len(tensor), self._num_owners) + [0] * (local_size - self._num_owners)
        own = tensor.narrow(0, start_offsets(counts)[local_rank], counts[local_rank])
        self.reduce_scatter_in_node(own, tensor, counts, scale)
        self._node.all_gather(tensor, counts).wait()
        return DONE

    def reduce_scatter_in_node(self, output: Tensor, source: Tensor, counts: Sequence[int], scale: float = 1.0) -> Work:
        """Sum over all ranks of all nodes, each part at one rank of every node; ranks that are no owners have none."""
        # Waited for by ranks without counterparts too: what a node does together is the same on all of its ranks.
        self._node.reduce_scatter(output, source, counts, scale).wait()
        if self._across is not None:
            self._across.all_reduce(output).wait()
        return DONE

    def reduce_scatter(self, output: Tensor, source: Tensor, counts: Sequence[int], scale: float = 1.0) -> Work:
        """Sum over all ranks; each keeps its own part."""
        starts = start_offsets(counts)
        own_counts = [counts[rank] for rank in self._counterparts]
        own_parts = source.new_empty(sum(own_counts))
        works = []
        for node, own in zip(self._topology.nodes, torch.split(own_parts, own_counts), strict=True):
            node_starts, node_counts = [starts[rank] for rank in node], [counts[rank] for rank in node]
            works.append(self._node.reduce_scatter(own, source, node_counts, scale, starts=node_starts))
        for work in works:
            work.wait()
        assert self._across is not None
        self._across.reduce_scatter(output, own_parts, own_counts).wait()
        return DONE

    def all_gather(self, tensor: Tensor, counts: Sequence[int]) -> Work:
        """Collect every rank's part of the tensor."""
        starts = start_offsets(counts)
        own_counts = [counts[rank] for rank in self._counterparts]
        own_parts = [tensor.narrow(0, starts[rank], counts[rank]) for rank in self._counterparts]
        gathered = torch.cat(own_parts)
        assert self._across is not None
        self._across.all_gather(gathered, own_counts).wait()
        for part, values in zip(own_parts, torch.split(gathered, own_counts), strict=True):
            part.copy_(values)
        return Together(
            [
                self._node.all_gather(tensor, [counts[rank] for rank in node], starts=[starts[rank] for rank in node])
                for node in self._topology.nodes
            ]
        )

    def free(self) -> None:
        """Give back what the two hold."""
        if self._across is not None:
            self._across.free()
        self._node.free()

    @property
    def _counterparts(self) -> Sequence[int]:
        """The ranks that this rank exchanges with, and itself, where nodes have one size."""
        return [node[self._topology.local_rank] for node in self._topology.nodes]
