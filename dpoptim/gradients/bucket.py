"""Bucket: gradients that travel together, as one flat tensor. No communication here."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from dpoptim.gradients.homes import Home, is_large
from dpoptim.partition import pieces_within, start_offsets

__all__ = ["Bucket", "Division", "gradient_dtype"]


@dataclass(frozen=True)
class Division:
    """Who owns which part of a bucket, where ranks share the work of the step.

    Attributes
    ----------
    counts : tuple of int
        Elements of each rank's part, one after another; of each rank of a node if ``in_node``.
    owner : int
        This rank's number among them.
    in_node : bool
        Whether every node shards the whole among its ranks, rather than all ranks one whole.
    """

    counts: tuple[int, ...]
    owner: int
    in_node: bool

    @cached_property
    def start(self) -> int:
        """Where this rank's part begins."""
        return start_offsets(self.counts)[self.owner]

    @cached_property
    def stop(self) -> int:
        """Where this rank's part ends."""
        return self.start + self.counts[self.owner]


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's gradient: its own, unless another one was set (``Tensor.grad_dtype``)."""
    # New in torch 2.10, and leaves have it alone.
    dtype: torch.dtype | None = getattr(parameter, "grad_dtype", None) if parameter.is_leaf else None
    return parameter.dtype if dtype is None else dtype


class Bucket:
    """Several gradients of one dtype and device, one after another in a flat buffer.

    A bucket of a single contiguous gradient has no buffer: the gradient's own memory is ``flat``, and nothing is
    copied. A gradient in a buffer of several is copied in by :meth:`pack` and back out by :meth:`unpack`, so that
    ``p.grad`` is never a view of memory that the next backward writes to. In memory that was given by
    :meth:`use_memory` large gradients are at home (Note [Homes] in homes.py), and are not copied either.

    Parameters
    ----------
    indices : sequence of int
        Which parameters, in the caller's numbering.
    parameters : sequence of Tensor
        The parameters themselves, of one dtype and device; only shape, dtype and device are taken.
    division : Division, optional
        Who owns which part. Ranks then reduce to the owner, and :meth:`unpack` brings back this rank's part alone; the
        rest of ``flat`` and of the gradients is left with values of no meaning.

    Attributes
    ----------
    shapes : list of torch.Size
        Of the gradients.
    own_pieces : list of Piece
        What of each gradient is in this rank's part.
    flat : Tensor, 1-d
        What to reduce, in place; valid from :meth:`pack` to :meth:`release`, as are the gradients that were packed.
    scale : float
        What ``flat`` is still to be multiplied with.
    num_pending : int
        How many gradients are still to come in this backward.
    """

    def __init__(self, indices: Sequence[int], parameters: Sequence[Tensor], division: Division | None = None) -> None:
        self.indices = tuple(indices)
        self.dtype, self.device = gradient_dtype(parameters[0]), parameters[0].device
        self.num_pending = len(self.indices)
        self.flat = self._nothing = torch.empty(0, dtype=self.dtype, device=self.device)
        self.scale = 1.0
        self.shapes = [parameter.shape for parameter in parameters]
        self._numels = [parameter.numel() for parameter in parameters]
        self._have_homes = [parameter.is_contiguous() and is_large(parameter) for parameter in parameters]
        self._buffer: Tensor | None = None
        self._own_buffer: Tensor | None = None  # this rank's part of it
        self._slots: list[Tensor] = []  # in the buffer
        self._own_slots: list[Tensor] = []
        self._homes: dict[int, Home] = {}  # by position
        self._has_given_memory = False
        # Of what is packed: which gradients were copied, themselves, and where to.
        self._copied: Sequence[int] = ()
        self._gradients: list[Tensor] = []
        self._copies: list[Tensor] = []
        self.division = division
        whole = (0, self.numel) if division is None else (division.start, division.stop)
        self.own_pieces = pieces_within(self._numels, *whole)
        self._own_positions = [piece.position for piece in self.own_pieces]
        self._cut = {piece.position for piece in self.own_pieces if piece.numel != self._numels[piece.position]}

    @property
    def own(self) -> Tensor:
        """The part of ``flat`` that this rank owns; all of it if it is not sharded."""
        if self.flat is self._buffer and self._own_buffer is not None:
            return self._own_buffer
        return self._own_part(self.flat)

    @property
    def numel(self) -> int:
        """Elements of all its gradients together."""
        return sum(self._numels)

    def fits(self, gradient: Tensor) -> bool:
        """Whether a gradient has this bucket's dtype and device, and is dense."""
        return gradient.dtype == self.dtype and gradient.device == self.device and not gradient.is_sparse

    def use_memory(self, tensor_at: Callable[[torch.dtype, Sequence[int], int], Tensor]) -> dict[int, Home]:
        """Have buffer and large gradients lie in given memory; not between :meth:`pack` and :meth:`release`.

        Parameters
        ----------
        tensor_at : callable
            Returns a tensor of a dtype and shape so many bytes behind the start of this memory, with a storage of its
            own.

        Returns
        -------
        dict of int to Home
            The homes of large gradients, by the caller's numbers of their parameters.
        """
        self._use_buffer(tensor_at(self.dtype, [self.numel], 0))
        self._has_given_memory = True
        offsets_bytes = [offset * self.dtype.itemsize for offset in start_offsets(self._numels)]
        self._homes = {
            position: Home(tensor_at(self.dtype, shape, offset_bytes))
            for position, (shape, offset_bytes) in enumerate(zip(self.shapes, offsets_bytes, strict=True))
            if self._have_homes[position]
        }
        return {self.indices[position]: home for position, home in self._homes.items()}

    def pack(self, gradients: Sequence[Tensor | None], scale: float, *, scaled: bool = True) -> bool:
        """Bring the gradients into ``flat``; those that are absent or do not fit count as zero. Under ``no_grad``.

        Parameters
        ----------
        gradients : sequence of Tensor or None
            In the order of ``indices``.
        scale : float
            This rank's share of the mean.
        scaled : bool
            Whether to multiply with it now, or leave that to whom reduces ``flat``.

        Returns
        -------
        bool
            Whether every gradient that is there fits the bucket.
        """
        all_fit = True
        if not self._has_given_memory and len(gradients) == 1 and self._can_be_flat(gradients[0]):
            assert gradients[0] is not None
            self.flat = gradients[0].view(-1)
            self._copied, self._gradients, self._copies = (), [], []
        else:
            all_fit = self._fill(gradients)
        if scaled and scale != 1.0:
            self.flat.mul_(scale)
        self.scale = 1.0 if scaled else scale
        return all_fit

    def unpack(self) -> None:
        """Copy ``flat``, or this rank's part, back into the gradients that were copied. Under ``no_grad``."""
        if not self._copied:
            return
        if self.division is None:  # all of each gradient; short, since there may be hundreds
            torch._foreach_copy_(self._gradients, self._copies)
            return
        copied = dict(zip(self._copied, zip(self._gradients, self._copies, strict=True), strict=True))
        slots = self._own_slots if self.flat is self._buffer else self._own_slots_in(self.own)
        targets, sources = [], []
        for piece, slot in zip(self.own_pieces, slots, strict=True):
            if piece.position not in copied:
                continue
            target, source = copied[piece.position]
            if piece.position in self._cut and target.is_contiguous():
                target, source = target.detach().view(-1)[piece.start : piece.stop], slot
            targets.append(target)
            sources.append(source)
        if targets:
            torch._foreach_copy_(targets, sources)

    def own_gradients(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Return this rank's part of the gradients as they are now, flat; of meaning where there is one.

        It shares memory with those that are not copied, and is valid until the next :meth:`pack`. Under ``no_grad``.
        """
        assert self.division is not None
        if not self._has_given_memory and len(gradients) == 1 and gradients[0] is not None:
            return gradients[0].reshape(-1)[self.division.start : self.division.stop]
        if self._buffer is None:
            self._use_buffer(torch.empty(self.numel, dtype=self.dtype, device=self.device))
        assert self._own_buffer is not None
        own, slots = self._own_buffer, self._own_slots
        at_home = self._find_at_home(gradients)
        positions = self._own_positions
        away = [k for k, i in enumerate(positions) if gradients[i] is not None and i not in at_home]
        if self._homes and not self._are_free({positions[k] for k in away}):  # all is copied to elsewhere
            own = torch.empty_like(own)
            slots = self._own_slots_in(own)
            away = [k for k, i in enumerate(positions) if gradients[i] is not None]
        if not away:
            return own
        targets, sources = [slots[k] for k in away], cast("list[Tensor]", [gradients[positions[k]] for k in away])
        for last in {0, len(away) - 1}:  # no other piece of a part is cut
            piece = self.own_pieces[away[last]]
            if piece.position in self._cut:
                sources[last] = sources[last].reshape(-1)[piece.start : piece.stop]
        torch._foreach_copy_(targets, sources)
        return own

    def release(self) -> None:
        """Let go of the gradient that ``flat`` may be, or the next backward would find its memory taken."""
        self.flat = self._nothing
        self._copied, self._gradients, self._copies = (), [], []

    def reduced(self, position: int) -> Tensor:
        """Return a new tensor with the reduced gradient at this position, for a parameter that had none here."""
        flat = torch.split(self.flat, self._numels)[position]
        return flat.view(self.shapes[position]).clone()

    def _can_be_flat(self, gradient: Tensor | None) -> bool:
        return gradient is not None and self.fits(gradient) and gradient.is_contiguous()

    def _fill(self, gradients: Sequence[Tensor | None]) -> bool:
        """Make ``flat`` of the buffer, and of copies of what does not lie there; return whether all fit."""
        if self._buffer is None:
            self._use_buffer(torch.empty(self.numel, dtype=self.dtype, device=self.device))
        assert self._buffer is not None
        self.flat, slots = self._buffer, self._slots
        positions: Sequence[int] = range(len(gradients))
        if self._homes:
            at_home = self._find_at_home(gradients)
            positions = [i for i in positions if i not in at_home]
            if not self._are_free(positions):
                self.flat = torch.empty_like(self._buffer)
                slots, positions = self._slots_in(self.flat), range(len(gradients))
        # as `fits`, of which hundreds of calls would be felt
        dtype, device = self.dtype, self.device
        copied = [
            i
            for i in positions
            if (g := gradients[i]) is not None and g.dtype == dtype and g.device == device and not g.is_sparse
        ]
        self._copied, self._copies = copied, [slots[i] for i in copied]
        self._gradients = [g for i in copied if (g := gradients[i]) is not None]
        if copied:
            torch._foreach_copy_(self._copies, self._gradients)
        if len(copied) == len(positions):
            return True
        missing = sorted(set(positions).difference(copied))
        torch._foreach_zero_([slots[i] for i in missing])
        return all(gradients[i] is None for i in missing)

    def _use_buffer(self, buffer: Tensor) -> None:
        self._buffer, self._own_buffer, self._slots = buffer, self._own_part(buffer), self._slots_in(buffer)
        if self.division is not None:
            self._own_slots = self._own_slots_in(self._own_buffer)

    def _own_part(self, flat: Tensor) -> Tensor:
        return flat if self.division is None else flat[self.division.start : self.division.stop]

    def _own_slots_in(self, own: Tensor) -> list[Tensor]:
        """Return where the pieces of this rank's part lie in it, in the gradient's shape if that is whole."""
        slots = [own[piece.offset : piece.offset + piece.numel] for piece in self.own_pieces]
        return [
            slot if piece.position in self._cut else slot.view(self.shapes[piece.position])
            for piece, slot in zip(self.own_pieces, slots, strict=True)
        ]

    def _slots_in(self, flat: Tensor) -> list[Tensor]:
        parts = torch.split(flat, self._numels)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def _find_at_home(self, gradients: Sequence[Tensor | None]) -> set[int]:
        """Return the positions of gradients that are at home."""
        return {i for i, home in self._homes.items() if (g := gradients[i]) is not None and home.has(g)}

    def _are_free(self, positions: Container[int]) -> bool:
        """Whether nobody holds what has last lain in these gradients' slots."""
        return all(home.is_free() for position, home in self._homes.items() if position in positions)
