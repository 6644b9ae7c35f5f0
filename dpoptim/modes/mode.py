"""Mode: how the ranks of an optimizer share the work and the memory of its step; and the mode in which they share none.

A new mode is a new class with this face; :class:`~dpoptim.optimizer.DataParallelOptimizer` asks for nothing else.

Tests: ``tests/behaviour/test_equivalence.py``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from dpoptim.checks.arguments import check_same_parameters, naming_gradients
from dpoptim.gradients.bucket import Bucket
from dpoptim.gradients.reducer import Reducer
from dpoptim.gradients.replicated_gradients import ReplicatedGradients
from dpoptim.step.inner_step import InnerStep
from dpoptim.utils.state_dict import NamedState, Slices, full_slices, load_full_form, to_named, unique_names

__all__ = ["Mode", "Replicated", "Wrapper"]


class Wrapper(Protocol):
    """What a mode knows of the optimizer whose mode it is."""

    def local_state_dict(self) -> NamedState:
        """Return the state that this rank holds, by name."""


class Mode(Protocol):
    """How ranks share the step of one optimizer.

    Attributes
    ----------
    name : str
        ``"replicated"``, ``"sharded"`` or ``"node-shared"``.
    """

    @property
    def name(self) -> str:
        """What users call it."""

    # ---------------------------------------------------------------- parameters and gradients

    def make_reducer(self, *args: Any, **options: Any) -> Reducer:
        """Return what reduces the gradients, with these arguments of :class:`~dpoptim.gradients.reducer.Reducer`."""

    def add(self, buckets: Sequence[Bucket], parameters: Sequence[Tensor], groups: Sequence[int]) -> None:
        """Take over the parameters of new buckets, equal on all ranks; collective.

        ``parameters`` and ``groups`` are all parameters, and the number of each one's group, as the buckets number
        them.
        """

    def new_parameters_error(self, parameters: Sequence[Tensor], names: Sequence[str]) -> ValueError | None:
        """Return what is wrong with all parameters, of which some are new, if anything is; local."""

    def check_new_group(self) -> None:
        """Raise ``ValueError`` on all ranks if a new group does not go with this mode; collective."""

    def clip_grad_norm_(
        self, parameters: Sequence[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> Tensor:
        """Scale all gradients so that their global norm is at most ``max_norm``; return it. As collective as steps."""

    def partial_norm(self, gradients: Sequence[Tensor], norm_type: float) -> Tensor:
        """Return the global norm of gradients of which ranks have parts, in float64; collective."""

    # ---------------------------------------------------------------- the step

    def check_step(self, wrapper: Optimizer, taken_over: Sequence[Sequence[Tensor]]) -> None:
        """Raise ``RuntimeError`` if a step of the wrapper can't be made with the groups as they are; local."""

    def check_inner_step(self, stepped: Optimizer) -> None:
        """Raise ``RuntimeError`` if the wrapped optimizer may not be stepped now by itself; local."""

    def check_step_arguments(self) -> None:
        """Raise ``TypeError`` on all ranks if a step takes no arguments but a closure; called by all of them."""

    def step(self, closure: Callable[[], Any] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Make a step with the reduced gradients, and return what the closure, or the step, returns."""

    def call(self, method: Callable[[], Any], name: str) -> Any:
        """Call a method of the wrapped optimizer, which may read and write parameters and state; return its result."""

    # ---------------------------------------------------------------- writing to parameters

    def begin_exclusive(self) -> None:
        """Let other ranks than 0 write to private parameters; local."""

    def end_exclusive(self) -> bool:
        """Take over rank 0's parameters, or return False if the caller has to; collective."""

    def abandon_exclusive(self) -> None:
        """End what :meth:`begin_exclusive` has begun, with the parameters as they are; local."""

    # ---------------------------------------------------------------- state

    def check_has_whole_state(self) -> None:
        """Raise ``RuntimeError`` if this rank has a part of the state; local."""

    def take_over_state(self) -> None:
        """Keep this rank's part of a whole state that the wrapped optimizer was given; local."""

    def slices(self) -> Slices:
        """Return the elements of each parameter, flattened, whose state this rank holds; by name, local."""

    def named_state(self, whole: Callable[[], Mapping[str, Any]]) -> NamedState:
        """Return the state that this rank holds, by name; local. ``whole`` returns a whole state in torch's form."""

    def load(
        self, wrapper: Optimizer, named_state: NamedState, load_attributes: Callable[[Mapping[str, Any]], object]
    ) -> None:
        """Load this rank's part of a state; local."""

    def gather(self, wrapper: Any, *, rank0_only: bool) -> dict[str, Any] | None:
        """Return the whole state in torch's form, None on ranks that get nothing; collective."""

    def give_up(self, wrapper: Wrapper) -> NamedState | None:
        """Give every rank parameters of its own, and return the whole state, if it was in parts; collective."""


class Replicated:
    """Every rank steps all parameters and has all of the state.

    Parameters
    ----------
    optimizer : Optimizer
        The wrapped one.
    inner_step : InnerStep
        Makes its step.
    names : callable
        Returns what to call each parameter.
    """

    name = "replicated"

    def __init__(self, optimizer: Optimizer, inner_step: InnerStep, names: Callable[[], list[str]]) -> None:
        self._optimizer, self._inner_step, self._names = optimizer, inner_step, names

    def make_reducer(self, *args: Any, **options: Any) -> Reducer:
        """Return a reducer that gives every rank all of the mean."""
        return Reducer(ReplicatedGradients, *args, **options)

    def add(self, buckets: Sequence[Bucket], parameters: Sequence[Tensor], groups: Sequence[int]) -> None:
        """Do nothing: they are every rank's."""

    def new_parameters_error(self, parameters: Sequence[Tensor], names: Sequence[str]) -> ValueError | None:
        """Return None: there is nothing that does not go with this mode."""
        return None

    def check_new_group(self) -> None:
        """Do nothing, as above."""

    def clip_grad_norm_(
        self, parameters: Sequence[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> Tensor:
        """Clip as torch does; local."""
        return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)

    def partial_norm(self, gradients: Sequence[Tensor], norm_type: float) -> Tensor:
        """Return torch's norm: no gradient is in parts; local."""
        return nn.utils.get_total_norm(gradients, norm_type)

    def check_step(self, wrapper: Optimizer, taken_over: Sequence[Sequence[Tensor]]) -> None:
        """Raise ``RuntimeError`` if the groups have other parameters than those that are reduced; local."""
        check_same_parameters(wrapper.param_groups, taken_over, are_sharded=False)

    def check_inner_step(self, stepped: Optimizer) -> None:
        """Do nothing: its gradients and its state are whole."""

    def check_step_arguments(self) -> None:
        """Do nothing: the wrapped step has all that they may be about."""

    def step(self, closure: Callable[[], Any] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Make the wrapped optimizer's step; local."""
        with naming_gradients(self._optimizer, self._names):
            return self._inner_step(closure, *args, **kwargs)

    def call(self, method: Callable[[], Any], name: str) -> Any:
        """Call it, with random numbers that are common to all ranks; local."""
        with self._inner_step.with_common_generators():
            return method()

    def begin_exclusive(self) -> None:
        """Do nothing: parameters are private."""

    def end_exclusive(self) -> bool:
        """Return False: somebody has to broadcast them."""
        return False

    def abandon_exclusive(self) -> None:
        """Do nothing, as above."""

    def check_has_whole_state(self) -> None:
        """Do nothing: it has."""

    def take_over_state(self) -> None:
        """Do nothing: the wrapped optimizer keeps all of it."""

    def slices(self) -> Slices:
        """Return all elements of every parameter."""
        return full_slices({name: parameter.shape for name, parameter in self._named().items()})

    def named_state(self, whole: Callable[[], Mapping[str, Any]]) -> NamedState:
        """Return the whole state by name.

        Raises
        ------
        RuntimeError
            The class has a state dict of another form.
        """
        state_dict = whole()
        if not {"state", "param_groups"} <= state_dict.keys():
            raise RuntimeError(
                f"the state dict of {type(self._optimizer).__name__} is not of torch's form, so that it can't be told "
                "by parameter: save state_dict() itself, on rank 0"
            )
        named = self._named()
        return to_named(state_dict, [parameter.shape for parameter in named.values()], list(named))

    def load(
        self, wrapper: Optimizer, named_state: NamedState, load_attributes: Callable[[Mapping[str, Any]], object]
    ) -> None:
        """Load a whole state by the wrapper's ``load_state_dict``."""
        load_full_form(wrapper, named_state)

    def gather(self, wrapper: Any, *, rank0_only: bool) -> dict[str, Any] | None:
        """Return the state that every rank has."""
        return wrapper.state_dict() if wrapper.communicator.rank == 0 or not rank0_only else None

    def give_up(self, wrapper: Wrapper) -> NamedState | None:
        """Return None: every rank has all that there is."""
        return None

    def _named(self) -> dict[str, Tensor]:
        groups = self._optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]
        return dict(zip(unique_names(groups, self._names()), parameters, strict=True))
