"""Bucket: gradients that travel together, as one flat tensor. No communication here."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Bucket"]


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

    Attributes
    ----------
    flat : Tensor, 1-d
        What to reduce, in place; valid from :meth:`pack` to :meth:`unpack`.
    scale : float
        What ``flat`` is still to be multiplied with.
    num_pending : int
        How many gradients are still to come in this backward.
    """

    def __init__(self, indices: Sequence[int], parameters: Sequence[Tensor]) -> None:
        self.indices = tuple(indices)
        self.dtype, self.device = parameters[0].dtype, parameters[0].device
        self.num_pending = len(self.indices)
        self.flat = torch.empty(0, dtype=self.dtype, device=self.device)
        self.scale = 1.0
        self._shapes = [parameter.shape for parameter in parameters]
        self._numels = [parameter.numel() for parameter in parameters]
        self._buffer: Tensor | None = None
        self._views: list[Tensor] = []

    @property
    def numel(self) -> int:
        """Elements of all its gradients together."""
        return sum(self._numels)

    def fits(self, gradient: Tensor) -> bool:
        """Whether a gradient has this bucket's dtype and device, and is dense."""
        return gradient.dtype == self.dtype and gradient.device == self.device and not gradient.is_sparse

    @torch.no_grad()
    def pack(self, gradients: Sequence[Tensor | None], scale: float, *, scaled: bool = True) -> bool:
        """Bring the gradients into ``flat``; those that are absent or do not fit count as zero.

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
        fitting = [gradient if gradient is not None and self.fits(gradient) else None for gradient in gradients]
        if len(fitting) == 1 and fitting[0] is not None and fitting[0].is_contiguous():
            self.flat = fitting[0].detach().view(-1)
        else:
            self.flat = self._filled_buffer(fitting)
        if scaled and scale != 1.0:
            self.flat.mul_(scale)
        self.scale = 1.0 if scaled else scale
        return all(a is b for a, b in zip(fitting, gradients, strict=True))

    @torch.no_grad()
    def unpack(self, gradients: Sequence[Tensor | None]) -> None:
        """Copy ``flat`` back into those gradients that are there and fit."""
        if self.flat is not self._buffer:
            return
        pairs = [(g, v) for g, v in zip(gradients, self._views, strict=True) if g is not None and self.fits(g)]
        if pairs:
            torch._foreach_copy_([g.detach() for g, _ in pairs], [v for _, v in pairs])

    def reduced(self, position: int) -> Tensor:
        """Return a new tensor with the reduced gradient at this position, for a parameter that had none here."""
        flat = torch.split(self.flat, self._numels)[position]
        return flat.view(self._shapes[position]).clone()

    def _filled_buffer(self, gradients: Sequence[Tensor | None]) -> Tensor:
        if self._buffer is None:
            self._buffer = torch.empty(self.numel, dtype=self.dtype, device=self.device)
            parts = torch.split(self._buffer, self._numels)
            self._views = [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
        present = [(v, g) for v, g in zip(self._views, gradients, strict=True) if g is not None]
        absent = [v for v, g in zip(self._views, gradients, strict=True) if g is None]
        if present:
            torch._foreach_copy_([v for v, _ in present], [g for _, g in present])
        if absent:
            torch._foreach_zero_(absent)
        return self._buffer
