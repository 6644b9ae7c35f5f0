"""NodeShared: the mode in which every node has one copy of the parameters and of the state (Note [One copy a node]).

A step of Note [A sharded step] begins with a meeting, so that nobody writes to parameters that another rank still
reads, and ends when all ranks have written.

Tests: ``tests/behaviour/test_sharded.py``.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.gradients.bucket import Bucket
from dpoptim.gradients.sharding import Sharding
from dpoptim.modes.node_memory import NodeMemory
from dpoptim.modes.sharded_stepping import ShardedStepping, Stepped, in_words

__all__ = ["NodeShared"]


class NodeShared(ShardedStepping):
    """The mode of an optimizer whose step, parameters and state the ranks of each node share.

    Parameters
    ----------
    stepped : Stepped
        The optimizer, and what belongs to it.
    memory : NodeMemory
        Where the parameters are to lie.
    by_element : bool
        Whether parameters may be cut.
    """

    def __init__(self, stepped: Stepped, memory: NodeMemory, *, by_element: bool) -> None:
        topology = stepped.communicator.topology
        sharding = Sharding(
            num_owners=min(map(len, topology.nodes)),
            num_ranks=topology.local_size,
            owner=topology.local_rank,
            by_element=by_element,
            in_node=True,
        )
        super().__init__(stepped, sharding, topology.nodes[0])
        self._memory = memory

    @property
    def name(self) -> str:
        """``"node-shared"``."""
        return "node-shared"

    def add(self, buckets: Sequence[Bucket], parameters: Sequence[Tensor], groups: Sequence[int]) -> None:
        """Move the parameters of new buckets, equal on all ranks, to the node's memory; collective."""
        self._add(buckets, parameters, groups, self._memory.add(buckets, parameters, self._names()))

    def _act(self, act: Callable[[], frozenset[int]], purpose: str, buckets: Sequence[Bucket]) -> frozenset[int]:
        self._meet(purpose)
        failure, groups = None, frozenset[int]()
        try:
            self._memory.check()
            groups = act()
        except Exception as error:  # raised below, when all ranks know
            failure = error
        self._check_all(failure)
        return groups

    def _check_all(self, failure: Exception | None) -> None:
        """Wait until all ranks have stepped, and raise on all if one has failed; collective."""
        (num_failed,) = self._communicator.start_sum([failure is not None]).wait()
        if not num_failed:
            return
        failures = self._communicator.all_gather_object(None if failure is None else in_words(failure))
        if failure is not None:
            raise raised_on_all_ranks(failure)
        rank, text = next((rank, text) for rank, text in enumerate(failures) if text is not None)
        raise raised_on_all_ranks(RuntimeError(f"rank {rank} had a step that failed: {text}"))

    def begin_exclusive(self) -> None:
        """Give all ranks but rank 0 private parameters; local."""
        if self._communicator.rank != 0:
            self._memory.make_private()

    def end_exclusive(self) -> bool:
        """Take over rank 0's parameters; collective. Return True: nobody else has to."""
        self._memory.adopt()
        return True

    def abandon_exclusive(self) -> None:
        """Share parameters again as they are; local."""
        self._memory.make_shared()

    def _make_private(self) -> None:
        self._memory.make_private()
