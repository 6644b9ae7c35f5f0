"""How far parameters and gradients may be off, and how far they are. Local.

Tests: ``tests/utils/test_verify.py``.

Note [Tolerance]
----------------
Ranks sum in another order than one process, so that gradients differ by rounding. How much that is follows from the
coarsest dtype that takes part (:data:`ROUNDING`); it is taken relative to the largest gradient of the model, since
terms of that size may cancel. A parameter may differ by as much of its movement, and by the rounding of its own value.
Some steps make much of little: Adam's first is as long for a gradient of 1e-9, which is rounding alone, as for one
of 1. Where a difference is found, one process steps twice more, with gradients that rounding might have given, and
what that changes in parameters, and in the gradients of later steps, is allowed for.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "ROUNDING",
    "Difference",
    "allowed_of_parameter",
    "coarsest",
    "differences",
    "largest_gradient",
    "what_rounding_changes",
]

# What gradients may differ by, relative to the largest, by the coarsest dtype of the computation. float32: 84 units of
# rounding, as sums of thousands of terms make them. The 16 bit types: 4 of theirs. float64: optimizers keep numbers
# such as a step size in float32, so 16 of float32's.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Of a parameter's own value, in units of its rounding: the step's result is rounded, and so is what it is made of.
_ROUNDING_OF_VALUE = 4
_REAL = {torch.complex128: torch.float64, torch.complex64: torch.float32, torch.complex32: torch.float16}
# As which dtype torch may compute with float32; TF32 has float16's 10 bits.
_MATMUL = {"highest": torch.float32, "high": torch.float16, "medium": torch.bfloat16}


@dataclass(frozen=True)
class Difference:
    """How far a parameter or its gradient is off, where that is most against what is allowed."""

    what: str
    name: str
    difference: float
    tolerance: float

    @property
    def ratio(self) -> float:
        """The difference in units of its tolerance."""
        if self.difference == 0:
            return 0.0
        return self.difference / self.tolerance if self.tolerance > 0 else float("inf")

    def severity(self) -> tuple[bool, float]:
        """Return what to order by: a gradient that is off is a reason, a parameter may be its consequence."""
        return self.what == "gradient" and self.ratio > 1, self.ratio


def coarsest(dtypes: Iterable[torch.dtype], *, on_cuda: bool = False) -> torch.dtype:
    """Return the dtype whose rounding tells, of those that take part and those that torch computes in instead."""
    found = [torch.float64]
    for dtype in (_REAL.get(dtype, dtype) for dtype in dtypes):
        if dtype == torch.float32:
            found.append(_MATMUL[torch.get_float32_matmul_precision()])
            if on_cuda and torch.backends.cudnn.allow_tf32:
                found.append(torch.float16)
        elif dtype in ROUNDING:
            found.append(dtype)
    return max(found, key=ROUNDING.__getitem__)


def differences(
    what: str,
    names: Sequence[str],
    ours: Sequence[Tensor | None],
    theirs: Sequence[Tensor | None],
    allowed: Sequence[Tensor],
) -> Iterator[Difference]:
    """Yield how far each tensor is off; what is missing on one side is not compared."""
    for name, one, other, tolerance in zip(names, ours, theirs, allowed, strict=True):
        if one is None or other is None or not one.numel():
            continue
        a, b = _wide(one), _wide(other)
        change = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()).nan_to_num(nan=float("inf"))
        tolerance = tolerance.expand(change.shape)  # noqa: PLW2901
        index = torch.where(change == 0, 0.0, change / tolerance).flatten().argmax()
        yield Difference(what, name, float(change.flatten()[index]), float(tolerance.flatten()[index]))


def allowed_of_parameter(before: Tensor, after: Tensor, rounding: float) -> Tensor:
    """Return what a stepped parameter's elements may be off by."""
    old, new = _wide(before), _wide(after)
    dtype = _REAL.get(after.dtype, after.dtype)
    unit = _ROUNDING_OF_VALUE * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    moved = (new - old).abs().nan_to_num()
    return unit * torch.maximum(old.abs(), new.abs()).nan_to_num() + rounding * (moved.max() if moved.numel() else 0.0)


def what_rounding_changes(
    exact: Sequence[Tensor | None], rounded: Sequence[Sequence[Tensor | None]]
) -> list[Tensor | None]:
    """Return for each tensor how much each element may be off, by what steps with other rounding have made of it.

    That is 4 times what the element itself has changed by, and 8 times what half of its tensor's have.
    """
    spread: list[Tensor | None] = []
    for index, tensor in enumerate(exact):
        allowed: Tensor | None = None
        for others in rounded:
            other = others[index]
            if tensor is not None and other is not None and tensor.numel():
                change = (_wide(other) - _wide(tensor)).abs().nan_to_num()
                change = 4 * change + 8 * change.median()
                allowed = change if allowed is None else torch.maximum(allowed, change)
        spread.append(allowed)
    return spread


def largest_gradient(gradients: Iterable[Tensor | None]) -> float:
    """Return the magnitude of the largest element of all."""
    values = [_values(gradient) for gradient in gradients if gradient is not None]
    return max((float(v.abs().max().nan_to_num()) for v in values if v.numel()), default=0.0)


def _values(gradient: Tensor) -> Tensor:
    """Return the elements of a gradient that are there, sparse or not."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _wide(tensor: Tensor) -> Tensor:
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    return dense.to("cpu", torch.complex128 if dense.is_complex() else torch.float64)
