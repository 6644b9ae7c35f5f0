"""Canaries: infinite elements of gradients that this rank has in part, so that whoever reads the rest sees it. Local.

Tests: ``tests/behaviour/test_sharded.py``.

Note [Canaries]
---------------
With a sharded step ``p.grad`` is the global mean in this rank's part alone; the rest holds what is left of its own
batch. A program that computes a norm of it by hand would clip by a wrong one, each rank by another, in silence. One
element of the rest of each bucket, and of each gradient that is cut, is therefore infinite: a norm of it is, what it is
multiplied with becomes zero or NaN, and the next step raises an error that says why. Work by element (``mul_``,
``clip_grad_value_``, adding noise) is right as it stands and disturbs nothing. torch's ``clip_grad_norm_`` and
``GradScaler`` know (:mod:`dpoptim.checks.torch_calls`).
"""

import cmath
import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dpoptim.gradients.bucket import Bucket

__all__ = ["Canaries"]


class Canaries:
    """The canaries of one reducer's gradients (Note [Canaries])."""

    def __init__(self) -> None:
        self._buckets: list[Bucket] = []
        # By the parameter's number: elements that are set to infinity, and one that this rank owns.
        self._outside: list[tuple[int, int]] = []
        self._inside: list[tuple[int, int]] = []
        self._parameters: Sequence[Tensor] = ()

    @torch.no_grad()
    def set(self, parameters: Sequence[Tensor], buckets: Sequence[Bucket]) -> None:
        """Set canaries into the gradients of these sharded buckets, all of which are finite."""
        if self._buckets != list(buckets):
            self._buckets = list(buckets)
            self._plan()
        self._parameters = parameters
        self._fill(float("inf"))

    def remove(self) -> None:
        """Set zeros instead, which are of no meaning either."""
        self._fill(0.0)
        self._parameters = ()

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Have zeros instead within."""
        parameters = self._parameters
        self.remove()
        try:
            yield
        finally:
            self._parameters = parameters
            self._fill(float("inf"))

    def check(self, names: Sequence[str]) -> bool:
        """Raise ``RuntimeError`` if somebody has read all of a gradient, and written what follows from it.

        Returns whether all canaries were set to zero, as by who has taken gradients for infinite.
        """
        outside, inside = ([(index, self._value(index, e)) for index, e in of] for of in (self._outside, self._inside))
        looked_at = [index for index, value in outside if value is not None and cmath.isnan(value)]
        looked_at += [index for index, value in inside if value is not None and not cmath.isfinite(value)]
        if looked_at:
            raise RuntimeError(
                f"the gradient of parameter '{names[looked_at[0]]}' was read as a whole between backward() and step(): "
                "each rank has the mean of its own part alone, and an infinite element stands in the rest, which "
                "makes a norm infinite. Clip with opt.clip_grad_norm_(max_norm), of which max_norm=float('inf') "
                "returns the global norm and changes nothing, or leave out shard and node_shared"
            )
        values = [value for _, value in outside if value is not None]
        all_are_zero = bool(values) and not any(values)
        self._parameters = ()
        return all_are_zero

    def _plan(self) -> None:
        self._outside.clear()
        self._inside.clear()
        for bucket in self._buckets:
            owned = {piece.position for piece in bucket.own_pieces}
            for piece in bucket.own_pieces:
                if not piece.numel:
                    continue
                is_cut = piece.numel != bucket.shapes[piece.position].numel()
                if is_cut:
                    self._outside.append((bucket.indices[piece.position], 0 if piece.start else piece.stop))
                if is_cut or piece is bucket.own_pieces[0]:
                    self._inside.append((bucket.indices[piece.position], piece.start))
            others = (i for i, shape in enumerate(bucket.shapes) if i not in owned and shape.numel())
            other = next(others, None)
            if other is not None:
                self._outside.append((bucket.indices[other], 0))

    @torch.no_grad()
    def _fill(self, value: float) -> None:
        for index, e in self._outside:
            element = self._element(index, e)
            if element is not None:
                element.value = value

    def _value(self, index: int, e: int) -> complex | None:
        element = self._element(index, e)
        return None if element is None else element.value

    def _element(self, index: int, e: int) -> Any:
        """Return an element of a gradient, by its number in the flattened one; its ``value`` can be read and set."""
        gradient = self._parameters[index].grad if self._parameters else None
        if gradient is None or gradient.is_sparse:
            return None
        is_contiguous = gradient.is_contiguous()
        in_memory = _IN_MEMORY.get(gradient.dtype)
        if is_contiguous and in_memory is not None and type(gradient) is Tensor and gradient.is_cpu:
            return in_memory.from_address(gradient.data_ptr() + e * gradient.itemsize)  # in a tenth of a view's time
        if is_contiguous:
            return _Element(gradient.data.view(-1)[e])
        indices = torch.unravel_index(torch.tensor(e, device="cpu"), gradient.shape)
        return _Element(gradient.data[tuple(int(i) for i in indices)])


# What reads and writes an element where it lies. No version of the gradient counts it, nor what is done by ``.data``.
_IN_MEMORY: dict[torch.dtype, Any] = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}


class _Element:
    """One element of a tensor of any kind."""

    def __init__(self, view: Tensor) -> None:
        self._view = view

    @property
    def value(self) -> complex:
        value: complex = self._view.item()
        return value

    @value.setter
    def value(self, value: float) -> None:
        self._view.fill_(value)
