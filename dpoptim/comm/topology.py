"""Which ranks share a node, and the cores that a rank may run on.

Tests: ``tests/comm/test_nodes.py``.
"""

import os
from dataclasses import dataclass
from functools import cached_property

__all__ = ["Topology", "available_cores"]


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
        This rank's index in its node.
    """

    nodes: tuple[tuple[int, ...], ...]
    node: int
    local_rank: int

    @cached_property
    def local_size(self) -> int:
        """How many ranks this rank's node has."""
        return len(self.nodes[self.node])

    @cached_property
    def num_nodes(self) -> int:
        """How many nodes there are."""
        return len(self.nodes)

    @cached_property
    def is_even(self) -> bool:
        """Whether every node has the same number of ranks."""
        return len({len(node) for node in self.nodes}) == 1


def available_cores() -> set[int]:
    """Return the numbers of the cores that this rank may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
