"""Sums in the order of ranks: the one place that says in which precision, and in which order, tensors are added.

Note [Order of sums]
--------------------
Sums are taken in the order of ranks, in float32 for 16-bit dtypes, rounded once. Their bits do not depend on how a
tensor is divided among owners, pieces or buckets, nor on what carries it. (MPI's own sums have an order of its own,
the same on all ranks.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["SUMMED_IN_FLOAT32", "accumulator", "add_others_in_order", "is_summed_here", "sum_in_order"]

SUMMED_IN_FLOAT32 = (torch.bfloat16, torch.float16)
_SUMMED = (torch.float64, torch.float32, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# torch does not add these; the bits of a sum are those of signed numbers.
_SUMMED_AS = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def is_summed_here(dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype are summed by this module as they are; unsigned ones are, viewed as signed."""
    return dtype in _SUMMED or dtype in SUMMED_IN_FLOAT32


def accumulator(first: Tensor) -> Tensor:
    """Return what a sum that begins with these values is taken in: themselves, or of 16 bits a copy in float32."""
    return first.float() if first.dtype in SUMMED_IN_FLOAT32 else first


def sum_in_order(values: Sequence[Tensor], out: Tensor) -> Tensor:
    """Sum tensors of one dtype and shape, in their order, into ``out``, which is none of them; return it."""
    if out.dtype in SUMMED_IN_FLOAT32:
        wide = accumulator(values[0])
        for value in values[1:]:
            wide += value
        return out.copy_(wide)
    if out.dtype in _SUMMED_AS:
        dtype = _SUMMED_AS[out.dtype]
        sum_in_order([value.view(dtype) for value in values], out.view(dtype))
        return out
    if len(values) == 1:
        return out.copy_(values[0])
    torch.add(values[0], values[1], out=out)
    for value in values[2:]:
        out += value
    return out


def add_others_in_order(values: Sequence[Tensor], position: int, scratch: Tensor) -> Tensor:
    """Sum two or more tensors, in their order, into the one at ``position``; return it.

    Parameters
    ----------
    values : sequence of Tensor
        Of one dtype, not of 16 bits, and of one shape, flat.
    position : int
        Which of them receives the sum. The others are read alone.
    scratch : Tensor, flat
        At least as long, of the same dtype.
    """
    own = values[position]
    if position < 2:  # a + b is b + a
        own.add_(values[1 - position])
        later = values[2:]
    else:
        total = torch.add(values[0], values[1], out=scratch[: len(own)])
        for value in values[2:position]:
            total.add_(value)
        torch.add(total, own, out=own)
        later = values[position + 1 :]
    for value in later:
        own.add_(value)
    return own
