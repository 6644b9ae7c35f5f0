"""ShardedStep: an optimizer's step on the part of the parameters that this rank owns. Nothing collective.

Note [Units]
------------
The user's optimizer steps *units*: for the time of a step they stand in its groups instead of the parameters, and their
state stands in its ``state``. What the step writes into its groups or keeps in the optimizer itself is thus where the
class expects it. Where parameters are divided by element, a unit is a flat tensor: what
this rank owns of a bucket, or a run of it. Elementwise optimizers give each element the same as if its parameter were
stepped whole, so that one call steps hundreds of small tensors. All parameters of a unit must be alike: of one group,
and of one history of gradients, since torch skips a parameter without one, and ``step`` counts on. A unit of which
only some have a gradient is cut where that changes, with its state, and stays cut. Where parameters are divided whole,
each one that this rank owns is a unit, the user's own object: a class may know it by its identity or its attributes.

Note [What other classes do to units]
-------------------------------------
A class from elsewhere may give a parameter other memory (``p.data = ...``) instead of writing to it: the values are
copied to where they belong. It may keep a gradient: it is given one that nobody writes to later. It may step all
parameters that it has, rather than those in its groups: those that this rank does not own have no gradient meanwhile.

Note [Where units lie]
----------------------
A unit of a large parameter is a view of it, and one in memory that the node shares (:mod:`dpoptim.modes.node_shared`)
is a view of that: nothing is copied. Small parameters are the user's, wherever they are: what this rank owns of them is
copied into a flat buffer before the step, and all of them out of it when the ranks have exchanged it.
"""

import contextlib
import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpoptim.gradients.bucket import Bucket
from dpoptim.gradients.homes import is_large
from dpoptim.partition import Piece, picker, pieces_within, start_offsets
from dpoptim.step.divisibility import is_known
from dpoptim.step.facts import AS_THE_LOOP, FACTS, NUMBERS
from dpoptim.step.implementations import sharing_memory
from dpoptim.step.outer_state import DividedState
from dpoptim.step.step_hooks import bare_step

__all__ = ["Outputs", "Part", "ShardedStep", "State"]

# One parameter's state on this rank: tensors of its shape as the 1-d slice that is owned, all else as it is.
State = dict[str, Any]
# Flat tensors to be gathered, and how many elements of each every owner has.
Outputs = Sequence[tuple[Tensor, Sequence[int]]]


class ShardedStep:
    """Steps what this rank owns of the parameters.

    Parameters
    ----------
    optimizer : Optimizer
        The user's; its hyper-parameters are read at each step, its state is taken over.
    by_element : bool
        Whether parameters are divided by element (Note [Units]).
    """

    def __init__(self, optimizer: Optimizer, *, by_element: bool) -> None:
        self._optimizer = optimizer
        self._by_element = by_element
        self._parts: list[Part] = []
        self._state: defaultdict[Any, Any] = defaultdict(dict)  # of units
        self._is_known = is_known(type(optimizer))
        self._fused_step = _fused_step(optimizer) if by_element else None
        self._parameters: list[Tensor] = []
        self._addresses: list[int] = []
        self.outer_state = DividedState(self._forget)

    def add(self, bucket: Bucket, parameters: Sequence[Tensor], group: int, home: Tensor | None) -> None:
        """Take over the parameters of a divided bucket.

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
            Part(bucket, parameters, group, home, by_element=self._by_element, are_parameters=not self._is_known)
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
            shapes = ", ".join(str(tuple(parameters[place].shape)) for place in sorted(shared))
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

    def _are_momenta_alike(self, active: Sequence[Sequence["_Unit"]]) -> bool:
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
    def _in_place_of_parameters(self, active: Sequence[Sequence["_Unit"]]) -> Iterator[None]:
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
                        "it can't be divided among ranks: leave out shard and node_shared"
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

    def _hide_gradients(self, active: Sequence[Sequence["_Unit"]]) -> list[tuple[Tensor, Tensor]]:
        """Take their gradients from parameters that are not stepped here, and return both."""
        stepped = {id(unit.tensor) for units in active for unit in units}
        hidden = []
        for part in self._parts:
            for parameter in part.parameters:
                if parameter.grad is not None and id(parameter) not in stepped:
                    hidden.append((parameter, parameter.grad))
                    parameter.grad = None
        return hidden

    def parts(self, buckets: Sequence[Bucket]) -> "list[Part]":
        """Return what stands for the parameters of these buckets when owners exchange them."""
        wanted = {id(bucket) for bucket in buckets}
        return [part for part in self._parts if id(part.bucket) in wanted]

    def parts_with_gradient_but(self, buckets: Sequence[Bucket]) -> "list[Part]":
        """Return what stands for parameters with a gradient of other buckets than these."""
        known = {id(bucket) for bucket in buckets}
        return [
            part
            for part in self._parts
            if id(part.bucket) not in known and any(parameter.grad is not None for parameter in part.parameters)
        ]

    @torch.no_grad()
    def own_gradients(self, among: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return what this rank owns of every gradient, or of each among these, flat.

        It is a copy where a gradient is not contiguous.
        """
        wanted = None if among is None else set(map(id, among))
        return [
            _flat_piece(gradient, piece)
            for part in self._parts
            for piece in part.bucket.own_pieces
            if (gradient := part.parameters[piece.position].grad) is not None
            and (wanted is None or id(gradient) in wanted)
        ]

    def gradients_to_scale(self) -> list[Tensor]:
        """Return tensors in place of :meth:`own_gradients` that may be multiplied in place."""
        return [
            _flat_piece(gradient, piece) if gradient.is_contiguous() else gradient
            for part in self._parts
            for piece in part.bucket.own_pieces
            if (gradient := part.parameters[piece.position].grad) is not None
        ]

    def norm_dtype(self) -> torch.dtype:
        """Return the dtype of a norm of all gradients, the same on all ranks."""
        dtypes = [part.bucket.dtype.to_real() for part in self._parts]
        return dtypes[0] if len(set(dtypes)) == 1 else torch.float32

    def _units_with_gradient(self, part: "Part", gradients: Sequence[Tensor | None]) -> list["_Unit"]:
        """Return the units to step, with their gradients; cut those of which only some parameters have one."""
        has_gradient = [gradient is not None for gradient in gradients]
        if not any(has_gradient):
            return []
        units: list[_Unit] = []
        for unit in part.units:
            flags = [has_gradient[piece.position] for piece in unit.pieces]
            units += [unit] if all(flags) or not any(flags) else self._cut_unit(unit, flags)
        part.units = units
        active = [unit for unit in units if has_gradient[unit.pieces[0].position]]
        part.load(active, gradients)
        return active

    def _cut_unit(self, unit: "_Unit", flags: Sequence[bool]) -> list["_Unit"]:
        """Cut a unit where the flags of its pieces change, with its state."""
        state = self._state.pop(unit.tensor, None)
        units = []
        for pieces in _runs(unit.pieces, flags):
            first, numel = pieces[0].offset - unit.start, sum(piece.numel for piece in pieces)
            cut = _Unit(pieces, _like(unit.tensor, unit.tensor.detach()[first : first + numel]))
            if state is not None:
                self._state[cut.tensor] = {
                    key: value[first : first + numel].clone() if _is_flat(value) else copy.deepcopy(value)
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
            units: list[_Unit] = []
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
                        key: _part_of(value, first, piece.numel) if self._by_element else value
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
            part.units = part.new_units([_kind(entry) for entry in entries] if self._by_element else [])
            by_piece = dict(zip(part.bucket.own_pieces, entries, strict=True))
            for unit in part.units:
                members = [by_piece[piece] for piece in unit.pieces]
                if members[0]:
                    self._state[unit.tensor] = {
                        key: torch.cat([entry[key] for entry in members])
                        if self._by_element and _is_flat(value)
                        else copy.deepcopy(value)
                        for key, value in members[0].items()
                    }
        with self._in_place_of_parameters([part.units for part in self._parts]):
            # What the class itself adjusts in a state, such as the device of `step` or options that were added later.
            if type(self._optimizer).load_state_dict is Optimizer.load_state_dict:
                self._optimizer.__setstate__({"state": self._state, "param_groups": self._optimizer.param_groups})
            else:
                _load_as_the_class_does(self._optimizer)


class _Unit:
    """What the optimizer steps at once (Note [Units])."""

    def __init__(self, pieces: Sequence[Piece], tensor: Tensor) -> None:
        self.pieces = list(pieces)
        self.tensor = tensor
        self.memory = tensor.detach()  # where its values belong
        self.start = self.pieces[0].offset


class Part:
    """A bucket's parameters, and what of them this rank steps (Note [Where units lie])."""

    def __init__(
        self,
        bucket: Bucket,
        parameters: Sequence[Tensor],
        group: int,
        home: Tensor | None,
        *,
        by_element: bool,
        are_parameters: bool,
    ) -> None:
        assert bucket.division is not None
        self.bucket = bucket
        self.division = bucket.division
        self.parameters = list(parameters)
        self.pick = picker(bucket.indices)  # the entries of its parameters, out of those of all
        self.group = group
        self._by_element = by_element
        self._are_parameters = are_parameters
        self._home = home
        self._buffer: Tensor | None = None
        self._mirror: _Mirror | None = None
        self._is_loaded = False  # what this rank owns is in the buffer, as it is to be sent
        # Parameters that are stepped and gathered where they lie, each by itself.
        self._lies_apart = home is None and (
            all(parameter.is_contiguous() for parameter in parameters)
            and (len(parameters) == 1 or (by_element and all(map(is_large, parameters))))
        )
        self._to_gather: list[tuple[Tensor, Sequence[int]]] = []
        self._addresses: list[int] = []  # of the parameters
        self._are_units_in_place = False
        if self._lies_apart:
            self._counts = _counts_of_each([parameter.numel() for parameter in parameters], self.division.counts)
        elif home is None:
            self._buffer = torch.empty(bucket.numel, dtype=bucket.dtype, device=bucket.device)
            own = self._buffer[self.division.start : self.division.stop]
            self._mirror = _Mirror(own, bucket.own_pieces, bucket.shapes)
            parts = self._buffer.split([parameter.numel() for parameter in parameters])
            self._views = [part.view(shape) for part, shape in zip(parts, bucket.shapes, strict=True)]
            self._to_gather = [(self._buffer, self.division.counts)]
        self.units = self.new_units([None] * len(bucket.own_pieces))

    def new_units(self, kinds: Sequence[Any]) -> list[_Unit]:
        """Return one unit for each run of pieces of one kind, or for each parameter if they are not cut."""
        pieces = self.bucket.own_pieces
        if not self._by_element:
            return [_Unit([piece], self.parameters[piece.position]) for piece in pieces]
        if self._lies_apart:
            return [
                self._unit([piece], _flat_piece(self.parameters[piece.position].detach(), piece)) for piece in pieces
            ]
        flat = self._home if self._home is not None else self._buffer
        assert flat is not None
        own = flat[self.division.start : self.division.stop]
        return [self._unit(run, own[run[0].offset : run[-1].offset + run[-1].numel]) for run in _runs(pieces, kinds)]

    def _unit(self, pieces: Sequence[Piece], tensor: Tensor) -> _Unit:
        """Return a unit of this memory; a parameter, if the class of the optimizer may look."""
        if self._are_parameters:
            tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point() or tensor.is_complex())
        return _Unit(pieces, tensor)

    def load(self, units: Sequence[_Unit], gradients: Sequence[Tensor | None]) -> None:
        """Give the units what the parameters and these gradients are now."""
        self.load_values()
        if not self._by_element:
            return
        own = self.bucket.own_gradients(gradients)
        if self._are_parameters:
            own = own.clone()
            self._check_attributes()
        for unit in units:
            unit.tensor.grad = own[unit.start : unit.start + unit.tensor.numel()]

    def load_values(self) -> None:
        """Give the units what the parameters are now."""
        if self._by_element and self._mirror is not None:
            self._mirror.copy_in(self.parameters)
            self._is_loaded = True

    @torch.no_grad()
    def take_back(self, units: Sequence[_Unit]) -> None:
        """Copy the values of units that were given other memory to where they belong, and let them lie there again."""
        if not self._by_element and self._home is None:
            return  # the user's own parameters, which may lie anywhere
        for unit in units:
            if unit.tensor.data_ptr() != unit.memory.data_ptr():
                unit.memory.copy_(unit.tensor.detach())
                unit.tensor.data = unit.memory

    def _check_attributes(self) -> None:
        """Raise if a parameter has got an attribute since it was cut: its units have none."""
        found = next((vars(parameter) for parameter in self.parameters if vars(parameter)), None)
        if found:
            raise RuntimeError(
                f"a parameter has got the attribute {next(iter(found))!r} since the optimizer was constructed, which "
                "divides parameters by element, so that its class can't see it: set it before, and parameters stay "
                "whole, or leave out shard and node_shared"
            )

    def to_gather(self) -> Outputs:
        """Return flat tensors of which each owner has its part ready, and the elements of every owner's part.

        The same object as long as they are the same.
        """
        if self._lies_apart:
            if self._are_parameters:  # its step may have given them other memory
                self._note_moves()
        elif not self._is_loaded:
            assert self._mirror is not None
            self._mirror.copy_in(self.parameters)
        return self._to_gather

    def gathered(self) -> None:
        """Bring what the owners have sent to the parameters."""
        self._is_loaded = False
        if self._buffer is not None:
            torch._foreach_copy_(self.parameters, self._views)

    def _note_moves(self) -> None:
        """Take note of parameters that lie elsewhere than before, such as by ``p.data = ...``."""
        addresses = [parameter.data_ptr() for parameter in self.parameters]
        if addresses == self._addresses:
            return
        for parameter in self.parameters:
            if self._lies_apart and not parameter.is_contiguous():
                raise RuntimeError(
                    f"a parameter of shape {tuple(parameter.shape)} has another memory layout (strides "
                    f"{parameter.stride()}) than when the optimizer was constructed: convert the model first, such as "
                    "to channels_last, then construct the optimizer"
                )
        self._addresses = addresses
        self._are_units_in_place = False
        if self._lies_apart:
            flat = [parameter.detach().view(-1) for parameter in self.parameters]
            self._to_gather = list(zip(flat, self._counts, strict=True))

    def follow_moves(self, state: Any) -> None:
        """Let units that are views of parameters follow them to other memory, with their state."""
        if not self._lies_apart:
            return  # they are parameters, or views of memory of this object's
        self._note_moves()
        if self._are_units_in_place or not self._by_element:
            return
        self._are_units_in_place = True
        for unit in self.units:
            piece = unit.pieces[0]
            now = _flat_piece(self.parameters[piece.position].detach(), piece)
            if now.data_ptr() != unit.tensor.data_ptr():
                entry = state.pop(unit.tensor, None)
                unit.tensor, unit.memory = self._unit(unit.pieces, now).tensor, now
                if entry is not None:
                    state[unit.tensor] = entry


class _Mirror:
    """Flat memory that stands for pieces of tensors, which are copied into it."""

    def __init__(self, flat: Tensor, pieces: Sequence[Piece], shapes: Sequence[torch.Size]) -> None:
        self._positions = [piece.position for piece in pieces]
        cut = [piece.numel != shapes[piece.position].numel() for piece in pieces]
        self._cut = [(number, piece) for number, piece in enumerate(pieces) if cut[number]]
        self._views = [
            flat[piece.offset : piece.offset + piece.numel].view(-1 if is_cut else shapes[piece.position])
            for piece, is_cut in zip(pieces, cut, strict=True)
        ]

    def copy_in(self, tensors: Sequence[Tensor]) -> None:
        sources = [tensors[position] for position in self._positions]
        for number, piece in self._cut:
            sources[number] = _flat_piece(sources[number], piece)
        if sources:
            torch._foreach_copy_(self._views, sources)


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


def _counts_of_each(numels: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    """Return what each owner has of each tensor, when they lie one after another and are divided by these counts."""
    of_each = [[0] * len(counts) for _ in numels]
    for owner, (start, count) in enumerate(zip(start_offsets(counts), counts, strict=True)):
        for piece in pieces_within(numels, start, start + count):
            of_each[piece.position][owner] = piece.numel
    return of_each


def _like(unit: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor as what a unit is: a parameter or not."""
    return nn.Parameter(tensor, requires_grad=unit.requires_grad) if isinstance(unit, nn.Parameter) else tensor


def _flat_piece(tensor: Tensor, piece: Piece) -> Tensor:
    """Return a piece of a tensor as a flat view; a copy if the tensor is not contiguous."""
    return tensor.reshape(-1)[piece.start : piece.stop]


def _runs(pieces: Sequence[Piece], kinds: Sequence[Any]) -> list[list[Piece]]:
    """Divide pieces into runs of one kind."""
    runs: list[list[Piece]] = []
    previous: Any = None
    for piece, kind in zip(pieces, kinds, strict=True):
        if runs and kind == previous:
            runs[-1].append(piece)
        else:
            runs.append([piece])
        previous = kind
    return runs


def _is_flat(value: Any) -> bool:
    """Whether a value in the state of a flat unit is one of its elements, rather than a number."""
    return isinstance(value, Tensor) and value.dim() == 1


def _part_of(value: Any, first: int, numel: int) -> Any:
    """Return what one parameter has of a flat unit's state; a number is a tensor of its own."""
    if _is_flat(value):
        return value[first : first + numel]
    return copy.deepcopy(value)


def _kind(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what the states of parameters that are stepped as one must have in common."""
    return tuple(
        (key, value.dtype if _is_flat(value) else value.item() if isinstance(value, Tensor) else value)
        for key, value in sorted(entry.items())
    )
