"""Units: the tensors that an optimizer steps instead of the parameters of a bucket. Nothing collective.

Tests: ``tests/behaviour/test_other_classes.py``.

Note [Units]
------------
The user's optimizer steps *units*: for the time of a step they stand in its groups instead of the parameters, and their
state stands in its ``state``. What the step writes into its groups or keeps in the optimizer itself is thus where the
class expects it.

Where parameters are sharded by element, a unit is a flat tensor: what this rank owns of a bucket, or a run of it.
Elementwise optimizers give each element the same as if its parameter were stepped whole, so that one call steps
hundreds of small tensors. All parameters of a unit must be alike: of one group, and of one history of gradients, since
torch skips a parameter without one, and ``step`` counts on. A unit of which only some have a gradient is cut where that
changes, with its state, and stays cut.

Where parameters are sharded whole, each one that this rank owns is a unit, the user's own object: a class may know it
by its identity or its attributes.

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

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpoptim.gradients.bucket import Bucket
from dpoptim.gradients.homes import is_large
from dpoptim.partition import Piece, picker, pieces_within, start_offsets

__all__ = [
    "Outputs",
    "ShardedBucket",
    "State",
    "StepUnit",
    "flat_piece",
    "is_flat",
    "kind_of",
    "like_unit",
    "part_of",
    "runs_of",
]

# One parameter's state on this rank: tensors of its shape as the 1-d slice that is owned, all else as it is.
State = dict[str, Any]
# Flat tensors to be gathered, and how many elements of each every owner has.
Outputs = Sequence[tuple[Tensor, Sequence[int]]]


class StepUnit:
    """What the optimizer steps at once (Note [Units])."""

    def __init__(self, pieces: Sequence[Piece], tensor: Tensor) -> None:
        self.pieces = list(pieces)
        self.tensor = tensor
        self.memory = tensor.detach()  # where its values belong
        self.start = self.pieces[0].offset


class ShardedBucket:
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
        self._flat_copy: FlatCopy | None = None
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
            self._flat_copy = FlatCopy(own, bucket.own_pieces, bucket.shapes)
            parts = self._buffer.split([parameter.numel() for parameter in parameters])
            self._views = [part.view(shape) for part, shape in zip(parts, bucket.shapes, strict=True)]
            self._to_gather = [(self._buffer, self.division.counts)]
        self.units = self.new_units([None] * len(bucket.own_pieces))

    def new_units(self, kinds: Sequence[Any]) -> list[StepUnit]:
        """Return one unit for each run of pieces of one kind, or for each parameter if they are not cut."""
        pieces = self.bucket.own_pieces
        if not self._by_element:
            return [StepUnit([piece], self.parameters[piece.position]) for piece in pieces]
        if self._lies_apart:
            return [
                self._unit([piece], flat_piece(self.parameters[piece.position].detach(), piece)) for piece in pieces
            ]
        flat = self._home if self._home is not None else self._buffer
        assert flat is not None
        own = flat[self.division.start : self.division.stop]
        return [self._unit(run, own[run[0].offset : run[-1].offset + run[-1].numel]) for run in runs_of(pieces, kinds)]

    def _unit(self, pieces: Sequence[Piece], tensor: Tensor) -> StepUnit:
        """Return a unit of this memory; a parameter, if the class of the optimizer may look."""
        if self._are_parameters:
            tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point() or tensor.is_complex())
        return StepUnit(pieces, tensor)

    def load(self, units: Sequence[StepUnit], gradients: Sequence[Tensor | None]) -> None:
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
        if self._by_element and self._flat_copy is not None:
            self._flat_copy.copy_in(self.parameters)
            self._is_loaded = True

    @torch.no_grad()
    def take_back(self, units: Sequence[StepUnit]) -> None:
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
                "shards parameters by element, so that its class can't see it: set it before, and parameters stay "
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
            assert self._flat_copy is not None
            self._flat_copy.copy_in(self.parameters)
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
            now = flat_piece(self.parameters[piece.position].detach(), piece)
            if now.data_ptr() != unit.tensor.data_ptr():
                entry = state.pop(unit.tensor, None)
                unit.tensor, unit.memory = self._unit(unit.pieces, now).tensor, now
                if entry is not None:
                    state[unit.tensor] = entry


class FlatCopy:
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
            sources[number] = flat_piece(sources[number], piece)
        if sources:
            torch._foreach_copy_(self._views, sources)


def _counts_of_each(numels: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    """Return what each owner has of each tensor, when they lie one after another and are divided by these counts."""
    of_each = [[0] * len(counts) for _ in numels]
    for owner, (start, count) in enumerate(zip(start_offsets(counts), counts, strict=True)):
        for piece in pieces_within(numels, start, start + count):
            of_each[piece.position][owner] = piece.numel
    return of_each


def like_unit(unit: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor as what a unit is: a parameter or not."""
    return nn.Parameter(tensor, requires_grad=unit.requires_grad) if isinstance(unit, nn.Parameter) else tensor


def flat_piece(tensor: Tensor, piece: Piece) -> Tensor:
    """Return a piece of a tensor as a flat view; a copy if the tensor is not contiguous."""
    return tensor.reshape(-1)[piece.start : piece.stop]


def runs_of(pieces: Sequence[Piece], kinds: Sequence[Any]) -> list[list[Piece]]:
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


def is_flat(value: Any) -> bool:
    """Whether a value in the state of a flat unit is one of its elements, rather than a number."""
    return isinstance(value, Tensor) and value.dim() == 1


def part_of(value: Any, first: int, numel: int) -> Any:
    """Return what one parameter has of a flat unit's state; a number is a tensor of its own."""
    if is_flat(value):
        return value[first : first + numel]
    return copy.deepcopy(value)


def kind_of(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what the states of parameters that are stepped as one must have in common."""
    return tuple(
        (key, value.dtype if is_flat(value) else value.item() if isinstance(value, Tensor) else value)
        for key, value in sorted(entry.items())
    )
