"""A later optimizer of Heat's names takes the parameters of an earlier one, which ends.

Tests: ``tests/heat/test_heat_succession.py``.

Note [Succession]
-----------------
Heat's classes put hooks on parameters and leave them there, so a program may make a second DASO after ``reset()``, or
pass an optimizer to a second DataParallel. Two reducers on one parameter would send its gradient twice. The earlier
optimizer is therefore detached, on all of its ranks, and says so when it is used again.

Whether it still exists may differ between ranks, since each collects its garbage when it likes. Its reducer does not:
hooks hold it as long as the parameters live. So ranks look for reducers and tell each other which optimizers they still
have. One that is gone on any rank only loses its hooks, and its communicators stay. A single rank needs no hooks: there
an optimizer that is gone leaves nothing behind.
"""

import itertools
import weakref
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.gradients.autograd_hooks import listeners_of
from dpoptim.gradients.reducer import Reducer
from dpoptim.optimizer import DataParallelOptimizer
from dpoptim.step.step_hooks import FIRST_HOOK

__all__ = ["Replaceable", "make_way"]


class Replaceable(DataParallelOptimizer):
    """An optimizer that ends when a later one takes one of its parameters.

    Attributes
    ----------
    is_attached : bool
        Whether gradients of its parameters are averaged for it.
    """

    is_attached = False
    _reason = ""

    def detach(self) -> None:
        """End data parallelism and free the communicator; collective, see :meth:`DataParallelOptimizer.detach`."""
        _tenures.pop(self._reducer, None)
        super().detach()

    def end(self, *, together: bool) -> None:
        """Detach, and refuse to be used from now on; collective if ``together``, else local and with less freed."""
        if together:
            self.detach()
        else:
            self._remove_hooks()
        # Otherwise shared with the wrapped optimizer, and so with what wraps it next.
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        for name in _COLLECTIVE_PARTS & vars(self).keys():
            delattr(self, name)
        self.is_attached = False
        self._reason = (
            "a later DataParallel or DASO has taken its parameters: step with the optimizer that was passed there, or "
            "pass this one on again"
        )

    def _begin(self) -> None:
        """Take note that the parameters are this optimizer's; local."""
        communicator = self._communicator
        self.is_attached = True
        number = next(_numbers)
        label = f"{type(self).__name__} of {communicator.world_size} ranks"
        _tenures[self._reducer] = _Tenure(weakref.ref(self), number, label, communicator.world_size, communicator.rank)

    def _remove_hooks(self) -> None:
        """Take this optimizer's hooks off the wrapped one; local."""
        hooks = cast("OrderedDict[int, Any]", self._optimizer_step_pre_hooks)
        if hooks.get(FIRST_HOOK) == self._before_step:
            del hooks[FIRST_HOOK]

    def _check_attached(self) -> None:
        if not self.is_attached:
            raise RuntimeError(f"{type(self).__name__} can make no step: {self._reason}")

    def __getattr__(self, name: str) -> Any:
        """Return what the wrapped optimizer has, or say why there is no such attribute yet, or not any more."""
        if self.is_attached or not self._reason or name.startswith("__"):
            return super().__getattr__(name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}: {self._reason}", name=name, obj=self)

    def __repr__(self) -> str:
        return super().__repr__() if self.is_attached else f"{type(self).__name__} of {self._optimizer!r}"


@dataclass(frozen=True)
class _Tenure:
    """Whose a reducer is; the number tells them apart, in the order in which they began."""

    optimizer: "weakref.ref[Replaceable]"
    number: int
    label: str
    world_size: int
    rank: int


_numbers = itertools.count()
_tenures: "weakref.WeakKeyDictionary[Reducer, _Tenure]" = weakref.WeakKeyDictionary()
# What an optimizer meets the other ranks by.
_COLLECTIVE_PARTS = {"_reducer", "_communicator", "_roll_call", "_exchange", "_answers"}


def make_way(communicator: Communicator, parameters: Sequence[Tensor]) -> None:
    """End all optimizers of Heat's names that have one of these parameters; collective (Note [Succession]).

    Raises
    ------
    ValueError
        On all ranks: they have different ones, or one is also on ranks that are not in ``communicator``.
    """
    found = sorted(_tenures_of(parameters), key=lambda pair: pair[1].number)
    shared = [(reducer, tenure) for reducer, tenure in found if tenure.world_size > 1]
    everybody = communicator.all_gather_object(
        [(tenure.label, tenure.world_size, tenure.rank, tenure.optimizer() is not None) for _, tenure in shared]
    )
    error = _succession_error(everybody)
    if error is not None:
        raise raised_on_all_ranks(error)
    for _, tenure in found:
        optimizer = tenure.optimizer()
        if tenure.world_size == 1 and optimizer is not None:
            optimizer.end(together=True)
    for (reducer, tenure), seen in zip(shared, zip(*everybody, strict=True), strict=True):
        optimizer = tenure.optimizer()
        is_everywhere = all(exists for _, _, _, exists in seen)
        if not is_everywhere:
            reducer.detach()
            _tenures.pop(reducer, None)
        if optimizer is not None:
            optimizer.end(together=is_everywhere)


def _tenures_of(parameters: Sequence[Tensor]) -> list[tuple[Reducer, _Tenure]]:
    reducers = listeners_of(parameters)
    wanted = set(map(id, parameters))
    found = []
    for reducer, tenure in list(_tenures.items()):
        optimizer = tenure.optimizer()
        own = [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]
        if reducer in reducers or not wanted.isdisjoint(map(id, own)):
            found.append((reducer, tenure))
    return found


def _succession_error(everybody: Sequence[list[tuple[str, int, int, bool]]]) -> ValueError | None:
    for rank, other in enumerate(everybody):
        here, there = ([label for label, *_ in labels] for labels in (everybody[0], other))
        if here != there:
            return ValueError(
                f"the parameters must belong to the same optimizers on all ranks, got {here or 'none'} on rank 0 but "
                f"{there or 'none'} on rank {rank}: detach() these first"
            )
    for seen in zip(*everybody, strict=True):
        label, world_size, *_ = seen[0]
        times = Counter(rank for _, _, rank, _ in seen)
        if len(times) != world_size or len(set(times.values())) != 1:
            return ValueError(
                f"the parameters belong to a {label}, which are not all here: detach() it on all of them first"
            )
    return None
