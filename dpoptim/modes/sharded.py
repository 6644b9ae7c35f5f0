"""Sharded: the mode of an optimizer whose ranks share the work, and the memory, of the step.

Note [A sharded step]
---------------------
Backward leaves each rank the mean of its part of the gradients. ``step`` steps that part and lets the owners exchange
what they have stepped, in ``shard`` mode; in ``node_shared`` mode each has written to the node's one copy. A rank
that does not come, or whose step fails, is found by a roll call before anything is waited for. With ``node_shared``
there is one before the step as well: nobody writes to parameters that another rank still reads.
"""

import copy
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dpoptim.checks.alike import parameter_names
from dpoptim.checks.arguments import check_not_stepped_by_another, check_same_parameters, memory_error
from dpoptim.checks.hyper_parameters import HyperParameters
from dpoptim.comm.communicator import Communicator
from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.comm.work import Work
from dpoptim.gradients.bucket import Bucket
from dpoptim.gradients.reducer import Reducer
from dpoptim.gradients.sharded_gradients import ShardedGradients
from dpoptim.gradients.sharding import Sharding
from dpoptim.modes.mode import Mode, Replicated, Wrapper
from dpoptim.modes.node_shared import NodeShared
from dpoptim.modes.step_numbers import agree_on_numbers
from dpoptim.modes.whole_state import gather_state
from dpoptim.step.classes import is_known
from dpoptim.step.divisibility import are_switched, divisibility
from dpoptim.step.inner_step import InnerStep, needs_closure
from dpoptim.step.kept_attributes import aliases_kept
from dpoptim.step.sharded_step import ShardedStep
from dpoptim.step.units import Outputs, ShardedBucket, State
from dpoptim.utils.state_dict import NamedState, Slices, from_named, groups_of, is_slice, shard, to_named, unique_names

__all__ = ["Sharded", "choose_mode"]

logger = logging.getLogger(__name__)


def choose_mode(
    optimizer: Optimizer,
    communicator: Communicator,
    inner_step: InnerStep,
    hyper_parameters: HyperParameters,
    names: Callable[[], list[str]],
    *,
    shard: bool,
    node_shared: bool,
) -> Mode:
    """Return the mode that was asked for, or the replicated one where it can't be; collective.

    Warns where the optimizer can't be divided, and logs where a node has no memory to share.

    Parameters
    ----------
    optimizer, communicator, inner_step, hyper_parameters
        As of :class:`Sharded`.
    names : callable
        Returns what to call each parameter.
    shard, node_shared : bool
        What was asked for.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    replicated = Replicated(optimizer, inner_step, names)
    topology = communicator.topology
    if not (shard or (node_shared and topology.num_nodes < communicator.world_size)) or communicator.world_size == 1:
        return replicated
    name = type(optimizer).__name__
    by, why_not = _found_divisibility(optimizer, communicator)
    if by == "nothing":
        warnings.warn(f"{name} can't be divided among ranks, since it {why_not}: it stays replicated", stacklevel=3)
        return replicated
    mine = memory_error(parameters, parameter_names(optimizer.param_groups, None))
    errors = communicator.all_gather_object(None if mine is None else str(mine))
    if any(errors):
        why = next(error for error in errors if error)
        warnings.warn(f"{name} can't be divided among ranks, since {why}: it stays replicated", stacklevel=3)
        return replicated
    memory = None
    if node_shared:
        try:
            (num_with_views,) = communicator.start_sum([any(map(_is_view_of_more, parameters))]).wait()
            if num_with_views:
                raise OSError("a parameter is a part of a larger tensor, which would keep the old memory")
            memory = NodeShared(communicator, parameters)
        except OSError as error:
            logger.warning(
                "node_shared=True has one copy of the parameters a rank, as shard=True: %s (rank %d)",
                error,
                communicator.rank,
            )
    return Sharded(optimizer, communicator, memory, inner_step, hyper_parameters, names, by_element=by == "element")


def _found_divisibility(optimizer: Optimizer, communicator: Communicator) -> tuple[str, str]:
    """Return by what an optimizer may be divided, and why not at all, as rank 0 has found; collective for some."""
    if needs_closure(optimizer):
        return "nothing", "needs a closure"
    if is_known(type(optimizer)):
        found = divisibility(optimizer)
    else:
        found = communicator.broadcast_object(divisibility(optimizer) if communicator.rank == 0 else None)
    return found.by, found.why_not


def _is_view_of_more(parameter: Tensor) -> bool:
    """Whether a parameter's memory holds elements of other tensors too."""
    return parameter.untyped_storage().nbytes() > parameter.nbytes


@dataclass(frozen=True)
class _Prepared:
    """How the parameters are gathered that these outputs are of."""

    outputs: Sequence[Outputs]
    defers: bool
    start: Callable[[], Sequence[Work]]

    def is_for(self, outputs: Sequence[Outputs], *, defers: bool) -> bool:
        """Whether nothing has changed."""
        is_same = len(outputs) == len(self.outputs) and all(map(is_, outputs, self.outputs))
        return is_same and defers == self.defers


class Sharded:
    """The sharded step of one optimizer, its memory and its state.

    Parameters
    ----------
    optimizer : Optimizer
        The user's. Its state is taken over.
    communicator : Communicator
        Of the wrapper alone.
    memory : NodeShared, optional
        Where parameters are to lie once a node.
    inner_step : InnerStep
        Makes the step of the optimizer.
    hyper_parameters : HyperParameters
        What all ranks set alike.
    names : callable
        Returns what to call each parameter.
    by_element : bool
        Whether parameters may be cut.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        communicator: Communicator,
        memory: NodeShared | None,
        inner_step: InnerStep,
        hyper_parameters: HyperParameters,
        names: Callable[[], list[str]],
        *,
        by_element: bool,
    ) -> None:
        self._optimizer = optimizer
        self._hyper_parameters = hyper_parameters
        self._names = names
        self._reducer: Reducer
        self._communicator = communicator
        self._inner_step = inner_step
        self._is_known = is_known(type(optimizer))
        self._by_element = by_element
        self._step = ShardedStep(optimizer, by_element=by_element)
        self._memory = memory
        self._prepared: _Prepared | None = None
        self._options = _options_of(optimizer)  # as the last step has left them
        topology, node_shared = communicator.topology, memory is not None
        self.sharding = Sharding(
            num_owners=min(map(len, topology.nodes)) if node_shared else communicator.world_size,
            num_ranks=topology.local_size if node_shared else communicator.world_size,
            owner=topology.local_rank if node_shared else communicator.rank,
            by_element=self._by_element,
            in_node=node_shared,
        )

    @property
    def name(self) -> str:
        """``"sharded"`` or ``"node-shared"``."""
        return "sharded" if self._memory is None else "node-shared"

    def make_reducer(self, *args: Any, **options: Any) -> Reducer:
        """Return a reducer that gives each rank the mean of its own part."""
        self._reducer = Reducer(partial(ShardedGradients, self.sharding), *args, **options)
        return self._reducer

    def new_parameters_error(self, parameters: Sequence[Tensor], names: Sequence[str]) -> ValueError | None:
        """Return an error if parameters share memory, so that two ranks would step it; local."""
        return memory_error(parameters, names)

    def check_new_group(self) -> None:
        """Raise ``ValueError`` on all ranks if a new group can't be divided as the others are; collective."""
        by, why_not = _found_divisibility(self._optimizer, self._communicator)
        name = type(self._optimizer).__name__
        if by == "nothing":
            raise raised_on_all_ranks(ValueError(f"with the new group {name} can't be divided, since it {why_not}"))
        if by == "parameter" and self._by_element:
            message = f"with the new group {name} can be divided by whole parameter alone: wrap all groups at once"
            raise raised_on_all_ranks(ValueError(message))

    def add(self, buckets: Sequence[Bucket], parameters: Sequence[Tensor], groups: Sequence[int]) -> None:
        """Take over the parameters of new buckets, equal on all ranks; collective.

        Parameters
        ----------
        buckets : sequence of Bucket
            Divided by :attr:`sharding`.
        parameters, groups : sequence
            All parameters, and the number of each one's group, as the buckets number them.
        """
        homes: Sequence[Tensor | None] = [None] * len(buckets)
        if self._memory is not None:
            homes = self._memory.add(buckets, parameters, self._names())
        for bucket, home in zip(buckets, homes, strict=True):
            members = [parameters[index] for index in bucket.indices]
            self._step.add(bucket, members, groups[bucket.indices[0]], home)

    # ---------------------------------------------------------------- the step

    def check_step(self, wrapper: Optimizer, taken_over: Sequence[Sequence[Tensor]]) -> None:
        """Raise ``RuntimeError`` if parameters were moved or replaced, or another optimizer makes the step; local."""
        check_same_parameters(wrapper.param_groups, taken_over, are_divided=True)
        check_not_stepped_by_another(wrapper)

    def check_inner_step(self, stepped: Optimizer) -> None:
        """Raise ``RuntimeError`` unless it is being stepped on units; local."""
        if not self._has_new_state:
            raise RuntimeError(
                f"the step of the wrapped {type(stepped).__name__} was called: each rank has a part of the "
                "gradients and of the state alone, so call step() of the DataParallelOptimizer"
            )

    def check_step_arguments(self) -> None:
        """Raise ``TypeError`` on all ranks: arguments can't be divided."""
        message = f"with {self.name} parameters step() takes no arguments but a closure: they can't be divided"
        raise raised_on_all_ranks(TypeError(message))

    def step(self, closure: Callable[[], Any] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Step and exchange (Note [A sharded step]); collective. Returns what the closure returns."""
        assert not args
        assert not kwargs
        loss = None if closure is None else closure()
        self.take_over_state()
        with self._hyper_parameters.held():
            self._step_and_exchange()
        return loss

    @torch.no_grad()
    def _step_and_exchange(self) -> None:
        def act() -> frozenset[int]:
            gradients = self._reducer.gradients.checked()
            self._check_options()
            groups = self._step.step(self._inner_step, gradients)
            self._options = _options_of(self._optimizer)
            return groups

        buckets = self._reducer.buckets  # that are not frozen, the same on all ranks
        # A gradient that was set by hand, alike on all ranks, of parameters that no rank trains.
        by_hand = self._step.parts_with_gradient_but(buckets)
        names = ", ".join(str(index) for part in by_hand for index in part.bucket.indices)
        purpose = f"a step with gradients set by hand, of parameters {names}" if by_hand else "a step"
        self._act(act, purpose, [*buckets, *(part.bucket for part in by_hand)])

    def _check_options(self) -> None:
        """Raise ``ValueError`` if an option was switched since the last step and makes the class couple parameters."""
        if self._is_known:
            return
        now = _options_of(self._optimizer)
        if len(now) == len(self._options) and not any(map(are_switched, self._options, now)):
            return
        found = divisibility(self._optimizer)
        if (found.by == "nothing" and found.is_tried) or (found.by == "parameter" and self._by_element):
            what = found.why_not or "is no longer by element"
            raise ValueError(
                f"an option of a parameter group was switched, and {type(self._optimizer).__name__} {what}: set it "
                "before the optimizer is wrapped, which divides it accordingly"
            )

    def call(self, method: Callable[[], Any], name: str) -> Any:
        """Call a method of the optimizer, which may read and write parameters and state; collective.

        It acts on what this rank owns; then parameters are exchanged. Returns what the method returns here.
        """
        self.take_over_state()
        returned: list[Any] = []

        def act() -> frozenset[int]:
            with self._inner_step.with_common_generators():
                returned.append(self._step.call(method))
            return frozenset(range(len(self._optimizer.param_groups)))

        with self._hyper_parameters.held(), torch.no_grad():
            self._act(act, f"{name}()", self._reducer.all_buckets)
        return returned[0]

    def _act(self, act: Callable[[], frozenset[int]], purpose: str, buckets: Sequence[Bucket]) -> None:
        """Let each rank act on what it owns, by which the groups are told that it has acted on; collective."""
        if self._memory is not None:
            self._meet(purpose)
        failure, groups = None, frozenset[int]()
        parts: Sequence[ShardedBucket] = []
        outputs: Sequence[Outputs] = []
        try:
            (self._step if self._memory is None else self._memory).check()
            groups = act()
            if self._memory is None:
                parts = self._step.parts(buckets)
                outputs = [part.to_gather() for part in parts]
        except Exception as error:  # raised below, when all ranks know
            failure = error
        if self._memory is not None:
            self._check_all(failure)
        elif failure is not None:
            self._meet(f"{purpose} that failed: {_described(failure)}")
            raise failure
        else:
            self._exchange(parts, outputs, lambda: self._meet(purpose))
        if not self._is_known:
            agree_on_numbers(self._optimizer, self._communicator, groups)

    def _meet(self, purpose: str) -> None:
        """Meet all ranks for a purpose; raise on all if one is there for another."""
        self._reducer.meet(purpose, 1.0)

    def _exchange(self, parts: Sequence[ShardedBucket], outputs: Sequence[Outputs], meet: Callable[[], object]) -> None:
        """Gather the parameters of these parts; collective."""
        on_host = all(part.bucket.device.type == "cpu" for part in parts)
        if on_host and self._communicator.defers(sum(map(len, outputs)), ()):
            works = self._start_gathers(outputs, defers=True)
            self._communicator.announce_by(meet)
        else:
            meet()
            works = self._start_gathers(outputs, defers=False)
        for work in works:
            work.wait()
        for part in parts:
            part.gathered()

    def _check_all(self, failure: Exception | None) -> None:
        """Wait until all ranks have stepped, and raise on all if one has failed; collective."""
        (num_failed,) = self._communicator.start_sum([failure is not None]).wait()
        if not num_failed:
            return
        failures = self._communicator.all_gather_object(None if failure is None else _described(failure))
        if failure is not None:
            raise raised_on_all_ranks(failure)
        rank, text = next((rank, text) for rank, text in enumerate(failures) if text is not None)
        raise raised_on_all_ranks(RuntimeError(f"rank {rank} had a step that failed: {text}"))

    def _start_gathers(self, outputs: Sequence[Outputs], *, defers: bool) -> Sequence[Work]:
        prepared = self._prepared
        if prepared is None or not prepared.is_for(outputs, defers=defers):
            start = self._communicator.prepare_all_gathers([output for some in outputs for output in some])
            prepared = self._prepared = _Prepared(outputs, defers, start)
        return prepared.start()

    # ---------------------------------------------------------------- gradients

    def partial_norm(self, gradients: Sequence[Tensor], norm_type: float) -> Tensor:
        """Return the global norm of these gradients, in float64; collective."""
        self._meet("clipping gradients")
        self._reducer.gradients.remove_marks()
        return self.total_norm(norm_type, gradients)

    @torch.no_grad()
    def total_norm(self, norm_type: float, gradients: Sequence[Tensor] | None = None) -> Tensor:
        """Return the norm of all gradients, or of these of them, in float64; collective, the same on all ranks."""
        by_rank = torch.zeros(self._communicator.world_size, dtype=torch.float64, device="cpu")
        own = self._step.own_gradients(gradients)
        if own:
            norms = torch.stack([norm.to("cpu", torch.float64) for norm in torch._foreach_norm(own, norm_type)])
            by_rank[self._communicator.rank] = torch.linalg.vector_norm(norms, norm_type)
        self._communicator.all_reduce(by_rank)
        owners = self._communicator.topology.nodes[0] if self.sharding.in_node else range(len(by_rank))
        total: Tensor = torch.linalg.vector_norm(by_rank[list(owners)], norm_type)
        return total

    @torch.no_grad()
    def clip_grad_norm_(
        self, parameters: Sequence[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> Tensor:
        """Scale the gradients so that their global norm is at most ``max_norm``; collective."""
        self._meet("clipping gradients")
        total = self.total_norm(norm_type)
        if error_if_nonfinite and not torch.isfinite(total):
            message = f"the total norm of order {norm_type} of the gradients is {total}, so it can't be clipped"
            raise raised_on_all_ranks(RuntimeError(message))
        factor = float((max_norm / (total + 1e-6)).clamp(max=1.0))
        gradients = self._step.gradients_to_scale()
        if factor != 1.0 and gradients:
            torch._foreach_mul_(gradients, factor)
        return total.to(self._step.norm_dtype())

    # ---------------------------------------------------------------- memory

    def begin_exclusive(self) -> None:
        """Give all ranks but rank 0 private parameters; local."""
        if self._memory is not None and self._communicator.rank != 0:
            self._memory.make_private()

    def end_exclusive(self) -> bool:
        """Take over rank 0's parameters if they are shared, and say whether they are; collective then."""
        if self._memory is not None:
            self._memory.adopt()
        return self._memory is not None

    def abandon_exclusive(self) -> None:
        """Share parameters again as they are; local."""
        if self._memory is not None:
            self._memory.make_shared()

    # ---------------------------------------------------------------- state

    def check_has_whole_state(self) -> None:
        """Raise ``RuntimeError``: a rank can't answer for the others."""
        raise RuntimeError(
            f"the optimizer state is divided among ranks ({self.name}): call full_state_dict() on all of them, or "
            "save it with dpoptim.utils.checkpoint"
        )

    @property
    def _has_new_state(self) -> bool:
        """Whether the optimizer was given another ``state`` than the one that stands for the divided one."""
        return self._optimizer.state is not self._step.outer_state

    def take_over_state(self) -> None:
        """Keep this rank's part of the whole state that the optimizer has, if that is new; local."""
        if not self._has_new_state:
            return
        held, names = self._optimizer.state, self._unique_names()
        param_groups = self._optimizer.param_groups
        parameters = [parameter for group in param_groups for parameter in group["params"]]
        state = {number: held[p] for number, p in enumerate(parameters) if p in held}
        others = {key: value for key, value in held.items() if not isinstance(key, Tensor)}
        groups = groups_of({"param_groups": param_groups}, param_groups)
        whole = to_named({"state": state, "param_groups": groups}, [p.shape for p in parameters], names)
        self._load_form(shard({**whole, **({"unnamed": others} if others else {})}, self.slices()))

    def slices(self) -> Slices:
        """Return which elements of each parameter this rank owns, by name; local."""
        owned = self._step.slices()
        return {name: owned.get(index, (0, 0)) for index, name in enumerate(self._unique_names())}

    def form(self, whole: Callable[[], Mapping[str, Any]]) -> NamedState:
        """Return this rank's part of the state by name; local, shares memory with the optimizer."""
        param_groups, names = self._optimizer.param_groups, self._unique_names()
        shapes = _shapes(param_groups, names)
        form: NamedState = {
            "param_groups": _named_groups(param_groups, names),
            "slices": self.slices(),
            "shapes": shapes,
            "state": {},
            **({"unnamed": dict(self._step.outer_state)} if self._step.outer_state else {}),
        }
        for index, entry in sorted(self._step.state().items()):
            name = names[index]
            values = form["state"][name] = dict(entry)
            if self._by_element:
                continue
            for key, value in values.items():
                if isinstance(value, Tensor) and tuple(value.shape) == shapes[name] != ():
                    values[key] = value.reshape(-1)
                elif is_slice(form, name, key):
                    form.setdefault("whole", {}).setdefault(name, []).append(key)
        return form

    def load(
        self, wrapper: Optimizer, form: NamedState, load_attributes: Callable[[Mapping[str, Any]], object]
    ) -> None:
        """Load this rank's part of a state, copied; local."""
        groups = groups_of(form, wrapper.param_groups)
        with aliases_kept(self._optimizer):
            Optimizer.load_state_dict(wrapper, {"state": {}, "param_groups": groups})
        load_attributes(form.get("attributes", {}))
        self._load_form(form)

    def gather(self, wrapper: Any, *, rank0_only: bool) -> dict[str, Any] | None:
        """Collect the whole state, one tensor at a time, as ``state_dict()`` of one process would give it; collective.

        Hooks of ``state_dict`` run on the ranks that get it.
        """
        for pre_hook in list(wrapper._optimizer_state_dict_pre_hooks.values()):
            pre_hook(wrapper)
        form = gather_state(self._communicator, wrapper.local_state_dict(), self._devices(), rank0_only=rank0_only)
        if form is None:
            return None
        state_dict = from_named(form)
        for post_hook in list(wrapper._optimizer_state_dict_post_hooks.values()):
            state_dict = post_hook(wrapper, state_dict) or state_dict
        return state_dict

    def give_up(self, wrapper: Wrapper) -> NamedState | None:
        """Give every rank parameters of its own, and the whole state; collective. The optimizer's is empty then."""
        self._meet("detaching the optimizer")
        own = wrapper.local_state_dict()
        form = gather_state(self._communicator, own, self._devices(), rank0_only=False, drops_torn=True)
        self._optimizer.state = defaultdict(dict)
        if self._memory is not None:
            self._memory.make_private()
        return form

    def _unique_names(self) -> list[str]:
        return unique_names(self._optimizer.param_groups, self._names())

    def _devices(self) -> dict[str, torch.device]:
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        return {name: p.device for name, p in zip(self._unique_names(), parameters, strict=True)}

    def _load_form(self, form: NamedState) -> None:
        """Take over the state of a form with this rank's slices; local."""
        state: dict[int, State] = {}
        for index, name in enumerate(self._unique_names()):
            entry = form["state"].get(name)
            if entry:
                state[index] = {
                    key: value.view(tuple(form["shapes"][name]))
                    if not self._by_element and is_slice(form, name, key)
                    else value
                    for key, value in entry.items()
                }
        self._options = _options_of(self._optimizer)
        self._step.outer_state.clear()
        self._step.outer_state.update(copy.deepcopy(form.get("unnamed", {})))
        self._step.load(state)


def _options_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the options of each group but its rate, if the class is not torch's."""
    if is_known(type(optimizer)):
        return []
    left_out = ("params", "param_names", "lr", "initial_lr")
    return [{key: value for key, value in group.items() if key not in left_out} for group in optimizer.param_groups]


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _shapes(param_groups: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    parameters = [parameter for group in param_groups for parameter in group["params"]]
    return {name: tuple(parameter.shape) for name, parameter in zip(names, parameters, strict=True)}


def _named_groups(param_groups: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    rest = iter(names)
    return [{**group, "params": [next(rest) for _ in group["params"]]} for group in param_groups]
