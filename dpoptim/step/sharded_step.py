"""ShardedStep: an optimizer's step on the part of the parameters that this rank owns. Nothing collective.

See Note [Units] and Note [What other classes do to units] in units.py.

Tests: ``tests/behaviour/test_sharded.py``.
"""

import contextlib
import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from dpoptim.gradients.bucket import Bucket
from dpoptim.step.classes import is_known
from dpoptim.step.facts import AS_THE_LOOP, FACTS, NUMBERS
from dpoptim.step.implementations import sharing_memory
from dpoptim.step.outer_state import OuterState
from dpoptim.step.step_hooks import bare_step
from dpoptim.step.units import ShardedBucket, State, StepUnit, is_flat, kind_of, like_unit, part_of, runs_of

__all__ = ["ShardedStep"]


class ShardedStep:
    """Steps what this rank owns of the parameters.

    Parameters
    ----------
    optimizer : Optimizer
        The user's; its hyper-parameters are read at each step, its state is taken over.
    by_element : bool
        Whether parameters are sharded by element (Note [Units]).
    """

    def __init__(self, optimizer: Optimizer, *, by_element: bool) -> None:
        self._optimizer = optimizer
        self._by_element = by_element
        self._parts: list[ShardedBucket] = []
        self._state: defaultdict[Any, Any] = defaultdict(dict)  # of units
        self._is_known = is_known(type(optimizer))
        self._fused_step = _fused_step(optimizer) if by_element else None
        self._parameters: list[Tensor] = []
        self._addresses: list[int] = []
        self.outer_state = OuterState(self._forget)

    def add(self, bucket: Bucket, parameters: Sequence[Tensor], group: int, home: Tensor | None) -> None:
        """Take over the parameters of a sharded bucket.

        Parameters
        ----------
        bucket : Bucket
            Which elements this rank owns.
        parameters : sequence of Tensor
            Those of the bucket, in its order.
        group : int
            The number of their parameter group.
        home : Tensor, optional
            The flat memory in which they all lie for good, if they do.
        """
        self._parameters += parameters
        if bucket.device.type != "cpu" or bucket.dtype not in AS_THE_LOOP:
            self._fused_step = None
        self._parts.append(
            ShardedBucket(
                bucket, parameters, group, home, by_element=self._by_element, are_parameters=not self._is_known
            )
        )

    # ---------------------------------------------------------------- the step

    def check(self) -> None:
        """Follow parameters that lie elsewhere than before, such as by ``p.data = ...``; called before each step.

        Raises
        ------
        RuntimeError
            They share memory now, so that two parts would step it, or have another memory layout.
        """
        parameters = self._parameters
        addresses = list(map(Tensor.data_ptr, parameters))
        if addresses == self._addresses:
            return
        if shared := sharing_memory([parameters]):
            shapes = ", ".join(str(tuple(parameters[index].shape)) for index in sorted(shared))
            raise RuntimeError(
                f"parameters of shapes {shapes} were given memory that they share: with shard=True the owner of each "
                "would step it. Make them one parameter before the optimizer is constructed"
            )
        for part in self._parts:
            part.follow_moves(self._state)
        self._addresses = addresses

    def step(self, step: Callable[[], object], gradients: Sequence[Tensor | None]) -> frozenset[int]:
        """Step what this rank owns; under ``no_grad``.

        Parameters
        ----------
        step : callable
            Makes the step of the optimizer.
        gradients : sequence
            What is in ``p.grad`` of all parameters, as the buckets number them.

        Returns
        -------
        frozenset of int
            The groups, by number, of which this rank has stepped something.
        """
        active = [self._units_with_gradient(part, part.pick(gradients)) for part in self._parts]
        groups = frozenset(part.group for part, units in zip(self._parts, active, strict=True) if units)
        if not groups:
            return groups
        with self._in_place_of_parameters(active):
            if (
                self._fused_step is not None
                and cast("Any", self._optimizer)._steps_fused()
                and self._are_momenta_alike(active)
            ):
                self._step_fused(self._fused_step)
            else:
                step()
            if not self._is_known:
                for part, units in zip(self._parts, active, strict=True):
                    part.take_back(units)
        return groups

    def _step_fused(self, step: Callable[[], object]) -> None:
        """Step all groups by the fused kernel."""
        before = [group["fused"] for group in self._optimizer.param_groups]
        for group in self._optimizer.param_groups:
            group["fused"] = True
        try:
            step()
        finally:
            for group, fused in zip(self._optimizer.param_groups, before, strict=True):
                group["fused"] = fused

    def _are_momenta_alike(self, active: Sequence[Sequence[StepUnit]]) -> bool:
        """Whether all units have a momentum or none has, as torch's fused kernel of SGD takes for granted."""
        if not isinstance(self._optimizer, torch.optim.SGD):
            return True
        entries = [self._state.get(unit.tensor) for units in active for unit in units]
        return len({entry is not None and entry.get("momentum_buffer") is not None for entry in entries}) <= 1

    def call(self, method: Callable[[], Any]) -> Any:
        """Return what a method of the optimizer returns that acts on what this rank owns; under ``no_grad``."""
        for part in self._parts:
            part.load_values()
        with self._in_place_of_parameters([part.units for part in self._parts]):
            return method()

    @contextlib.contextmanager
    def _in_place_of_parameters(self, active: Sequence[Sequence[StepUnit]]) -> Iterator[None]:
        """Let units of each part stand in the optimizer instead of parameters, with their state (Note [Units])."""
        optimizer, outer_state = self._optimizer, self.outer_state
        groups = optimizer.param_groups
        parameters = [group["params"] for group in groups]
        stand_ins: list[list[Tensor]] = [[] for _ in groups]
        for part, units in zip(self._parts, active, strict=True):
            stand_ins[part.group] += [unit.tensor for unit in units]
        for group, tensors in zip(groups, stand_ins, strict=True):
            group["params"] = list(tensors)
        self._state.update(outer_state)
        optimizer.state = self._state
        hidden = [] if self._is_known or self._by_element else self._hide_gradients(active)
        try:
            yield
            for group, tensors in zip(optimizer.param_groups, stand_ins, strict=True):
                if not self._is_known and list(map(id, group["params"])) != list(map(id, tensors)):
                    raise RuntimeError(
                        f"{type(optimizer).__name__} puts other tensors into its groups instead of parameters, so that "
                        "it can't be sharded among ranks: leave out shard and node_shared"
                    )
        finally:
            for parameter, gradient in hidden:
                parameter.grad = gradient
            for group, own in zip(optimizer.param_groups, parameters, strict=True):
                group["params"] = own
            self._state, optimizer.state = optimizer.state, outer_state
            if not self._is_known:
                outer_state.update({key: value for key, value in self._state.items() if not isinstance(key, Tensor)})
            for key in outer_state:
                self._state.pop(key, None)
            if self._by_element:
                for units in active:
                    for unit in units:
                        unit.tensor.grad = None

    def _hide_gradients(self, active: Sequence[Sequence[StepUnit]]) -> list[tuple[Tensor, Tensor]]:
        """Take their gradients from parameters that are not stepped here, and return both."""
        stepped = {id(unit.tensor) for units in active for unit in units}
        hidden = []
        for part in self._parts:
            for parameter in part.parameters:
                if parameter.grad is not None and id(parameter) not in stepped:
                    hidden.append((parameter, parameter.grad))
                    parameter.grad = None
        return hidden

    @property
    def all_parts(self) -> list[ShardedBucket]:
        """What stands for the parameters of all buckets."""
        return self._parts

    def parts(self, buckets: Sequence[Bucket]) -> list[ShardedBucket]:
        """Return what stands for the parameters of these buckets when owners exchange them."""
        wanted = {id(bucket) for bucket in buckets}
        return [part for part in self._parts if id(part.bucket) in wanted]

    def parts_with_gradient_but(self, buckets: Sequence[Bucket]) -> list[ShardedBucket]:
        """Return what stands for parameters with a gradient of other buckets than these."""
        known = {id(bucket) for bucket in buckets}
        return [
            part
            for part in self._parts
            if id(part.bucket) not in known and any(parameter.grad is not None for parameter in part.parameters)
        ]

    def _units_with_gradient(self, part: ShardedBucket, gradients: Sequence[Tensor | None]) -> list[StepUnit]:
        """Return the units to step, with their gradients; cut those of which only some parameters have one."""
        has_gradient = [gradient is not None for gradient in gradients]
        if not any(has_gradient):
            return []
        units: list[StepUnit] = []
        for unit in part.units:
            flags = [has_gradient[piece.position] for piece in unit.pieces]
            units += [unit] if all(flags) or not any(flags) else self._cut_unit(unit, flags)
        part.units = units
        active = [unit for unit in units if has_gradient[unit.pieces[0].position]]
        part.load(active, gradients)
        return active

    def _cut_unit(self, unit: StepUnit, flags: Sequence[bool]) -> list[StepUnit]:
        """Cut a unit where the flags of its pieces change, with its state."""
        state = self._state.pop(unit.tensor, None)
        units = []
        for pieces in runs_of(unit.pieces, flags):
            first, numel = pieces[0].offset - unit.start, sum(piece.numel for piece in pieces)
            cut = StepUnit(pieces, like_unit(unit.tensor, unit.tensor.detach()[first : first + numel]))
            if state is not None:
                self._state[cut.tensor] = {
                    key: value[first : first + numel].clone() if is_flat(value) else copy.deepcopy(value)
                    for key, value in state.items()
                }
            units.append(cut)
        return units

    def _forget(self, parameter: Tensor | None) -> None:
        """Forget the state of one parameter, or of all; local, every rank what it has of it."""
        if parameter is None:
            self._state.clear()
            return
        for part in self._parts:
            flags_of_all = [other is parameter for other in part.parameters]
            if not any(flags_of_all):
                continue
            units: list[StepUnit] = []
            for unit in part.units:
                flags = [flags_of_all[piece.position] for piece in unit.pieces]
                units += [unit] if all(flags) or not any(flags) else self._cut_unit(unit, flags)
            part.units = units
            for unit in units:
                if flags_of_all[unit.pieces[0].position]:
                    self._state.pop(unit.tensor, None)

    # ---------------------------------------------------------------- state

    def slices(self) -> dict[int, tuple[int, int]]:
        """Return which elements of each parameter this rank owns, by the parameter's number."""
        found = {index: (0, 0) for part in self._parts for index in part.bucket.indices}
        for part in self._parts:
            for piece in part.bucket.own_pieces:
                found[part.bucket.indices[piece.position]] = (piece.start, piece.stop)
        return found

    def state(self) -> dict[int, State]:
        """Return the state of what this rank owns, by the parameter's number; arrays are the optimizer's own."""
        found: dict[int, State] = {}
        for part in self._parts:
            for unit in part.units:
                entry = self._state.get(unit.tensor)
                if not entry:
                    continue
                for piece in unit.pieces:
                    first = piece.offset - unit.start
                    found[part.bucket.indices[piece.position]] = {
                        key: part_of(value, first, piece.numel) if self._by_element else value
                        for key, value in entry.items()
                    }
        return found

    @torch.no_grad()
    def load(self, state: Mapping[int, State]) -> None:
        """Take over copies of the state of what this rank owns, in the form of :meth:`state`."""
        self._state.clear()
        for part in self._parts:
            entries = [state.get(part.bucket.indices[piece.position]) or {} for piece in part.bucket.own_pieces]
            if self._by_element:  # the elements of a parameter without dimensions look like a number
                entries = [
                    {k: v.view(-1) if isinstance(v, Tensor) and k not in NUMBERS else v for k, v in entry.items()}
                    if part.bucket.shapes[piece.position] == torch.Size([])
                    else entry
                    for piece, entry in zip(part.bucket.own_pieces, entries, strict=True)
                ]
            part.units = part.new_units([kind_of(entry) for entry in entries] if self._by_element else [])
            by_piece = dict(zip(part.bucket.own_pieces, entries, strict=True))
            for unit in part.units:
                members = [by_piece[piece] for piece in unit.pieces]
                if members[0]:
                    self._state[unit.tensor] = {
                        key: torch.cat([entry[key] for entry in members])
                        if self._by_element and is_flat(value)
                        else copy.deepcopy(value)
                        for key, value in members[0].items()
                    }
        with self._in_place_of_parameters([part.units for part in self._parts]):
            # What the class itself adjusts in a state, such as the device of `step` or options that were added later.
            if type(self._optimizer).load_state_dict is Optimizer.load_state_dict:
                self._optimizer.__setstate__({"state": self._state, "param_groups": self._optimizer.param_groups})
            else:
                _load_as_the_class_does(self._optimizer)


def _load_as_the_class_does(optimizer: Optimizer) -> None:
    """Let a class that loads states in its own way load the state that it has; hooks have run on the whole state."""
    hooks = [name for name in vars(optimizer) if name.startswith("_optimizer_") and "state_dict" in name]
    kept = {name: vars(optimizer)[name] for name in hooks}
    vars(optimizer).update({name: OrderedDict() for name in hooks})
    try:
        optimizer.load_state_dict(optimizer.state_dict())
    finally:
        vars(optimizer).update(kept)


def _fused_step(optimizer: Optimizer) -> Callable[[], object] | None:
    """Return torch's own step of this object, if flat tensors need no more than that where it is fused."""
    kind = type(optimizer)
    facts = FACTS.get(kind.__name__)
    if not is_known(kind) or facts is None or not facts.is_fused_bare or not hasattr(kind, "_steps_fused"):
        return None
    torch_class = getattr(torch.optim, kind.__name__)
    as_torchs = object.__new__(torch_class)
    as_torchs.__dict__ = optimizer.__dict__  # the same object, of another class
    return partial(bare_step(torch_class), as_torchs)
