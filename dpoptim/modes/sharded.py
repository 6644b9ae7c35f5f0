"""Sharded: the mode in which every rank has a copy of the parameters, and the state of those that it owns.

A step of Note [A sharded step] ends with an exchange: each owner gives the others what it has stepped.

Tests: ``tests/behaviour/test_sharded.py``.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from dpoptim.gradients.bucket import Bucket
from dpoptim.gradients.sharding import Sharding
from dpoptim.modes.parameter_exchange import ParameterExchange
from dpoptim.modes.sharded_stepping import ShardedStepping, Stepped, in_words
from dpoptim.step.units import Outputs, ShardedBucket

__all__ = ["Sharded"]


class Sharded(ShardedStepping):
    """The mode of an optimizer whose step and state all ranks share.

    Parameters
    ----------
    stepped : Stepped
        The optimizer, and what belongs to it.
    by_element : bool
        Whether parameters may be cut.
    """

    def __init__(self, stepped: Stepped, *, by_element: bool) -> None:
        world_size, rank = stepped.communicator.world_size, stepped.communicator.rank
        sharding = Sharding(world_size, world_size, rank, by_element=by_element, in_node=False)
        super().__init__(stepped, sharding, range(world_size))
        self._exchange = ParameterExchange(stepped.communicator)

    @property
    def name(self) -> str:
        """``"sharded"``."""
        return "sharded"

    def add(self, buckets: Sequence[Bucket], parameters: Sequence[Tensor], groups: Sequence[int]) -> None:
        """Take over the parameters of new buckets, equal on all ranks; local, they stay where they are."""
        self._add(buckets, parameters, groups, [None] * len(buckets))

    def _act(self, act: Callable[[], frozenset[int]], purpose: str, buckets: Sequence[Bucket]) -> frozenset[int]:
        failure, groups = None, frozenset[int]()
        parts: Sequence[ShardedBucket] = []
        outputs: Sequence[Outputs] = []
        try:
            self._step.check()
            groups = act()
            parts = self._step.parts(buckets)
            outputs = [part.to_gather() for part in parts]
        except Exception as error:  # raised below, when the others have heard of it
            failure = error
        if failure is not None:
            self._meet(f"{purpose} that failed: {in_words(failure)}")
            raise failure
        self._exchange.exchange(parts, outputs, lambda: self._meet(purpose))
        return groups

    def begin_exclusive(self) -> None:
        """Do nothing: parameters are private."""

    def end_exclusive(self) -> bool:
        """Return False: somebody has to broadcast them."""
        return False

    def abandon_exclusive(self) -> None:
        """Do nothing, as above."""

    def _make_private(self) -> None:
        """Do nothing, as above."""
