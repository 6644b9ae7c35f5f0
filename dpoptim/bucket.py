"""Bucket: gradients that travel together, as one flat tensor. No communication here."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dpoptim.partition import pieces_within, start_offsets

__all__ = ["Bucket", "Division"]


@dataclass(frozen=True)
class Division:
    """Who owns which part of a bucket, where ranks share the work of the step.

    Attributes
    ----------
    counts : tuple of int
        Elements of each rank's part, one after another; of each rank of a node if ``in_node``.
    number : int
        This rank's number among them.
    in_node : bool
        Whether every node divides the whole among its ranks, rather than all ranks one whole.
    """

    counts: tuple[int, ...]
    number: int
    in_node: bool

    @cached_property
    def start(self) -> int:
        """Where this rank's part begins."""
        return start_offsets(self.counts)[self.number]

    @cached_property
    def stop(self) -> int:
        """Where this rank's part ends."""
        return self.start + self.counts[self.number]


class Bucket:
    """Several gradients of one dtype and device, one after another in a flat buffer.

    A bucket of a single contiguous gradient has no buffer: the gradient's own memory is ``flat``, and nothing is
    copied. A gradient in a buffer of several is copied in by :meth:`pack` and back out by :meth:`unpack`, so that
    ``p.grad`` is never a view of memory that the next backward writes to.

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
        What to reduce, in place; valid from :meth:`pack` to :meth:`release`.
    scale : float
        What ``flat`` is still to be multiplied with.
    num_pending : int
        How many gradients are still to come in this backward.
    """

    def __init__(self, indices: Sequence[int], parameters: Sequence[Tensor], division: Division | None = None) -> None:
        self.indices = tuple(indices)
        self.dtype, self.device = parameters[0].dtype, parameters[0].device
        self.num_pending = len(self.indices)
        self.flat = torch.empty(0, dtype=self.dtype, device=self.device)
        self.scale = 1.0
        self.shapes = [parameter.shape for parameter in parameters]
        self._numels = [parameter.numel() for parameter in parameters]
        self._buffer: Tensor | None = None
        self._views: list[Tensor] = []
        self.division = division
        whole = (0, self.numel) if division is None else (division.start, division.stop)
        self.own_pieces = pieces_within(self._numels, *whole)
        self._cut = {piece.position for piece in self.own_pieces if piece.numel != self._numels[piece.position]}

    @property
    def own(self) -> Tensor:
        """The part of ``flat`` that this rank owns; all of it if it is not divided."""
        return self.flat if self.division is None else self.flat[self.division.start : self.division.stop]

    @property
    def numel(self) -> int:
        """Elements of all its gradients together."""
        return sum(self._numels)

    def fits(self, gradient: Tensor) -> bool:
        """Whether a gradient has this bucket's dtype and device, and is dense."""
        return gradient.dtype == self.dtype and gradient.device == self.device and not gradient.is_sparse

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
        fitting = self._those_that_fit(gradients)
        if len(fitting) == 1 and fitting[0] is not None and fitting[0].is_contiguous():
            self.flat = fitting[0].view(-1)
        else:
            self.flat = self._filled_buffer(fitting)
        if scaled and scale != 1.0:
            self.flat.mul_(scale)
        self.scale = 1.0 if scaled else scale
        return all(a is b for a, b in zip(fitting, gradients, strict=True))

    def unpack(self, gradients: Sequence[Tensor | None]) -> None:
        """Copy ``flat``, or this rank's part, back into those gradients that are there and fit. Under ``no_grad``."""
        if self.flat is not self._buffer:
            return
        fitting = self._those_that_fit(gradients)
        if self.division is None:  # all of each gradient; short, since there may be hundreds
            present = [(g, v) for g, v in zip(fitting, self._views, strict=True) if g is not None]
            if present:
                torch._foreach_copy_([g for g, _ in present], [v for _, v in present])
            return
        targets, sources = [], []
        for piece in self.own_pieces:
            target, source = fitting[piece.position], self._views[piece.position]
            if target is None:
                continue
            if piece.position in self._cut and target.is_contiguous():
                target, source = (tensor.detach().view(-1)[piece.start : piece.stop] for tensor in (target, source))
            targets.append(target)
            sources.append(source)
        if targets:
            torch._foreach_copy_(targets, sources)

    def release(self) -> None:
        """Let go of the gradient that ``flat`` may be, or the next backward would find its memory taken."""
        self.flat = self.flat.new_empty(0)

    def reduced(self, position: int) -> Tensor:
        """Return a new tensor with the reduced gradient at this position, for a parameter that had none here."""
        flat = torch.split(self.flat, self._numels)[position]
        return flat.view(self.shapes[position]).clone()

    def _those_that_fit(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Put None for gradients that do not fit; as :meth:`fits`, of which hundreds of calls would be felt."""
        dtype, device = self.dtype, self.device
        return [
            g if g is not None and g.dtype == dtype and g.device == device and not g.is_sparse else None
            for g in gradients
        ]

    def _filled_buffer(self, gradients: Sequence[Tensor | None]) -> Tensor:
        if self._buffer is None:
            self._buffer = torch.empty(self.numel, dtype=self.dtype, device=self.device)
            parts = torch.split(self._buffer, self._numels)
            self._views = [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        present = [(v, g) for v, g in zip(self._views, gradients, strict=True) if g is not None]
        absent = [v for v, g in zip(self._views, gradients, strict=True) if g is None]
        if present:
            torch._foreach_copy_([v for v, _ in present], [g for _, g in present])
        if absent:
            torch._foreach_zero_(absent)
        return self._buffer
