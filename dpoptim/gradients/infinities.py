"""Gradients that are not finite in the part of one rank, and are to be seen by all. Local.

Note [Shared infinities]
------------------------
``GradScaler`` looks for infinite gradients on each rank by itself, and skips the step where it finds one. If any
rank's part has one, the others get one into the rest, so that all find it.
"""

import cmath
from collections.abc import Sequence

import torch
from torch import Tensor

from dpoptim.gradients.bucket import Bucket

__all__ = ["are_finite", "share_infinity"]


def are_finite(parts: Sequence[Tensor]) -> bool:
    """Whether all elements are; sums that are finite say so in one pass."""
    sums = [part.sum().item() for part in parts]
    return all(map(cmath.isfinite, sums)) or all(bool(torch.isfinite(part).all()) for part in parts)


def share_infinity(buckets: Sequence[Bucket], parameters: Sequence[Tensor]) -> None:
    """Put an infinite number into a gradient where it is seen and not used (Note [Shared infinities])."""
    for bucket in buckets:
        whole = {piece.position for piece in bucket.own_pieces if piece.numel == bucket.shapes[piece.position].numel()}
        for position, index in enumerate(bucket.indices):
            gradient = parameters[index].grad
            if gradient is None or not gradient.numel() or position in whole:
                continue
            owned = next((p for p in bucket.own_pieces if p.position == position), None)
            element = 0 if owned is None or owned.start > 0 else owned.stop
            gradient[torch.unravel_index(torch.tensor(element, device="cpu"), gradient.shape)] = float("inf")
            return
