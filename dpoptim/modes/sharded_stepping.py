"""ShardedStepping: what the modes have in common in which each rank steps the parameters that it owns.

Tests: ``tests/behaviour/test_sharded.py``.

Note [A sharded step]
---------------------
Backward leaves each rank the mean of its part of the gradients. ``step`` steps that part. The modes differ in how all
ranks come to the other parts: owners exchange what they have stepped (:mod:`dpoptim.modes.sharded`), or have written to
the node's one copy (:mod:`dpoptim.modes.node_shared`). A rank that does not come, or whose step fails, is found by a
roll call before anything is waited for.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dpoptim.checks.arguments import check_not_stepped_by_another, check_same_parameters, memory_error
from dpoptim.checks.hyper_parameters import HyperParameters
from dpoptim.comm.communicator import Communicator
from dpoptim.comm.errors import heard_if_left, raised_on_all_ranks
from dpoptim.gradients.bucket import Bucket
from dpoptim.gradients.reducer import Reducer
from dpoptim.gradients.sharded_gradients import ShardedGradients
from dpoptim.gradients.sharding import Sharding
from dpoptim.modes.agreed_division import OptionsWatch, check_new_group
from dpoptim.modes.mode import Wrapper
from dpoptim.modes.norms import GradientNorm
from dpoptim.modes.sharded_state import ShardedState
from dpoptim.modes.step_numbers import agree_on_numbers
from dpoptim.step.classes import is_known
from dpoptim.step.inner_step import InnerStep
from dpoptim.step.sharded_step import ShardedStep
from dpoptim.utils.state_dict import NamedState, Slices

__all__ = ["ShardedStepping", "Stepped", "in_words"]


@dataclass(frozen=True)
class Stepped:
    """What a mode is made for.

    Attributes
    ----------
    optimizer : Optimizer
        The user's. Its state is taken over.
    communicator : Communicator
        Of the wrapper alone.
    inner_step : InnerStep
        Makes the step of the optimizer.
    hyper_parameters : HyperParameters
        What all ranks set alike.
    names : callable
        Returns what to call each parameter.
    """

    optimizer: Optimizer
    communicator: Communicator
    inner_step: InnerStep
    hyper_parameters: HyperParameters
    names: Callable[[], list[str]]


class ShardedStepping(ABC):
    """A mode in which each rank steps what it owns and has the state of that (Note [A sharded step]).

    Parameters
    ----------
    stepped : Stepped
        The optimizer, and what belongs to it.
    sharding : Sharding
        Who owns what.
    owners : sequence of int
        The ranks whose parts are the whole, each element once.

    Attributes
    ----------
    sharding : Sharding
        As given.
    """

    def __init__(self, stepped: Stepped, sharding: Sharding, owners: Sequence[int]) -> None:
        self.sharding = sharding
        self._reducer: Reducer
        self._optimizer = stepped.optimizer
        self._communicator = stepped.communicator
        self._inner_step = stepped.inner_step
        self._hyper_parameters = stepped.hyper_parameters
        self._names = stepped.names
        self._is_known = is_known(type(self._optimizer))
        by_element = sharding.by_element
        self._step = ShardedStep(self._optimizer, by_element=by_element)
        self._options = OptionsWatch(self._optimizer, by_element=by_element)
        self._norm = GradientNorm(self._communicator, owners)
        self._state = ShardedState(
            self._optimizer, self._communicator, self._step, self._options, self._names, by_element=by_element
        )

    # ---------------------------------------------------------------- what the modes differ in

    @property
    @abstractmethod
    def name(self) -> str:
        """What users call it."""

    @abstractmethod
    def add(self, buckets: Sequence[Bucket], parameters: Sequence[Tensor], groups: Sequence[int]) -> None:
        """Take over the parameters of new buckets, equal on all ranks; collective.

        Parameters
        ----------
        buckets : sequence of Bucket
            Cut by :attr:`sharding`.
        parameters, groups : sequence
            All parameters, and the number of each one's group, as the buckets number them.
        """

    @abstractmethod
    def _act(self, act: Callable[[], frozenset[int]], purpose: str, buckets: Sequence[Bucket]) -> frozenset[int]:
        """Let each rank act on what it owns of these buckets, until all ranks have it; collective.

        Returns the numbers of the groups that ``act`` tells that it has acted on.
        """

    @abstractmethod
    def begin_exclusive(self) -> None:
        """Let other ranks than 0 write to private parameters; local."""

    @abstractmethod
    def end_exclusive(self) -> bool:
        """Take over rank 0's parameters, or return False if the caller has to; collective."""

    @abstractmethod
    def abandon_exclusive(self) -> None:
        """End what :meth:`begin_exclusive` has begun, with the parameters as they are; local."""

    @abstractmethod
    def _make_private(self) -> None:
        """Give every rank parameters of its own, with the same values; local."""

    # ---------------------------------------------------------------- parameters and gradients

    def make_reducer(self, *args: Any, **options: Any) -> Reducer:
        """Return a reducer that gives each rank the mean of its own part."""
        self._reducer = Reducer(partial(ShardedGradients, self.sharding), *args, **options)
        return self._reducer

    def new_parameters_error(self, parameters: Sequence[Tensor], names: Sequence[str]) -> ValueError | None:
        """Return an error if parameters share memory, so that two ranks would step it; local."""
        return memory_error(parameters, names)

    def check_new_group(self) -> None:
        """Raise ``ValueError`` on all ranks if a new group can't be sharded as the others are; collective."""
        check_new_group(self._optimizer, self._communicator, by_element=self.sharding.by_element)

    def _add(
        self,
        buckets: Sequence[Bucket],
        parameters: Sequence[Tensor],
        groups: Sequence[int],
        homes: Sequence[Tensor | None],
    ) -> None:
        """Step these buckets' parameters too, of which some lie in one flat home for good; local."""
        for bucket, home in zip(buckets, homes, strict=True):
            members = [parameters[index] for index in bucket.indices]
            self._step.add(bucket, members, groups[bucket.indices[0]], home)

    def partial_norm(self, gradients: Sequence[Tensor], norm_type: float) -> Tensor:
        """Return the global norm of these gradients, in float64; collective."""
        self._meet("clipping gradients")
        self._reducer.gradients.remove_marks()
        return self._norm.total(self._step.all_parts, norm_type, gradients)

    def clip_grad_norm_(
        self, parameters: Sequence[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> Tensor:
        """Scale the gradients so that their global norm is at most ``max_norm``; collective."""
        self._meet("clipping gradients")
        return self._norm.clip(self._step.all_parts, max_norm, norm_type, error_if_nonfinite=error_if_nonfinite)

    # ---------------------------------------------------------------- the step

    def check_step(self, wrapper: Optimizer, taken_over: Sequence[Sequence[Tensor]]) -> None:
        """Raise ``RuntimeError`` if parameters were moved or replaced, or another optimizer makes the step; local."""
        check_same_parameters(wrapper.param_groups, taken_over, are_sharded=True)
        check_not_stepped_by_another(wrapper)

    def check_inner_step(self, stepped: Optimizer) -> None:
        """Raise ``RuntimeError`` unless it is being stepped on units; local."""
        if not self._state.is_new:
            raise RuntimeError(
                f"the step of the wrapped {type(stepped).__name__} was called: each rank has a part of the "
                "gradients and of the state alone, so call step() of the DataParallelOptimizer"
            )

    def check_step_arguments(self) -> None:
        """Raise ``TypeError`` on all ranks: arguments can't be cut as parameters are."""
        message = f"with {self.name} parameters step() takes no arguments but a closure: they can't be sharded"
        raise raised_on_all_ranks(TypeError(message))

    def step(self, closure: Callable[[], Any] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Make a sharded step (Note [A sharded step]); collective. Returns what the closure returns."""
        assert not args
        assert not kwargs
        loss = None if closure is None else closure()
        self.take_over_state()
        with self._hyper_parameters.held(), torch.no_grad():
            buckets = self._reducer.buckets  # that are not frozen, the same on all ranks
            # A gradient that was set by hand, alike on all ranks, of parameters that no rank trains.
            by_hand = self._step.parts_with_gradient_but(buckets)
            names = ", ".join(str(index) for part in by_hand for index in part.bucket.indices)
            purpose = f"a step with gradients set by hand, of parameters {names}" if by_hand else "a step"
            self._act_and_agree(self._step_own, purpose, [*buckets, *(part.bucket for part in by_hand)])
        return loss

    def _step_own(self) -> frozenset[int]:
        """Step what this rank owns, and return the groups of which it has stepped something; local."""
        gradients = self._reducer.gradients.checked()
        self._options.check()
        groups = self._step.step(self._inner_step, gradients)
        self._options.note()
        return groups

    def call(self, method: Callable[[], Any], name: str) -> Any:
        """Call a method of the optimizer, which may read and write parameters and state; collective.

        It acts on what this rank owns; then the others are given that. Returns what the method returns here.
        """
        self.take_over_state()
        returned: list[Any] = []

        def act() -> frozenset[int]:
            with self._inner_step.with_common_generators():
                returned.append(self._step.call(method))
            return frozenset(range(len(self._optimizer.param_groups)))

        with self._hyper_parameters.held(), torch.no_grad():
            self._act_and_agree(act, f"{name}()", self._reducer.all_buckets)
        return returned[0]

    def _act_and_agree(self, act: Callable[[], frozenset[int]], purpose: str, buckets: Sequence[Bucket]) -> None:
        with heard_if_left(purpose):
            groups = self._act(act, purpose, buckets)
        if not self._is_known:
            agree_on_numbers(self._optimizer, self._communicator, groups)

    def _meet(self, purpose: str) -> float:
        """Meet all ranks for a purpose and return how many they are; raise on all if one is there for another."""
        return self._reducer.meet(purpose, 1.0)

    # ---------------------------------------------------------------- state

    def check_has_whole_state(self) -> None:
        """Raise ``RuntimeError``: a rank can't answer for the others."""
        raise RuntimeError(
            f"the optimizer state is sharded among ranks ({self.name}): call full_state_dict() on all of them, or "
            "save it with dpoptim.utils.checkpoint"
        )

    def take_over_state(self) -> None:
        """Keep this rank's part of the whole state that the optimizer has, if that is new; local."""
        if self._state.is_new:
            self._state.take_over()

    def slices(self) -> Slices:
        """Return which elements of each parameter this rank owns, by name; local."""
        return self._state.slices()

    def named_state(self, whole: Callable[[], Mapping[str, Any]]) -> NamedState:
        """Return this rank's part of the state by name; local, shares memory with the optimizer."""
        return self._state.named_state()

    def load(
        self, wrapper: Optimizer, named_state: NamedState, load_attributes: Callable[[Mapping[str, Any]], object]
    ) -> None:
        """Load this rank's part of a state, copied; local."""
        self._state.load(wrapper, named_state, load_attributes)

    def gather(self, wrapper: Any, *, rank0_only: bool) -> dict[str, Any] | None:
        """Collect the whole state in torch's form, one tensor at a time; collective."""
        return self._state.gather(wrapper, rank0_only=rank0_only)

    def give_up(self, wrapper: Wrapper) -> NamedState | None:
        """Give every rank parameters of its own, and the whole state; collective. The optimizer's is empty then."""
        self._meet("detaching the optimizer")
        whole = self._state.give_up(wrapper)
        self._make_private()
        return whole


def in_words(error: Exception) -> str:
    """Return what other ranks are told of an error."""
    return f"{type(error).__name__}: {error}"
