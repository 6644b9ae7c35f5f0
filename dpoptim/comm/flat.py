"""Arguments of collectives: the flat view of a tensor, and the parts of ranks in it. Local.

Tests: ``tests/comm/test_communicator.py``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpoptim.comm.mpi.messages import has_sum
from dpoptim.partition import even_counts

__all__ = ["check_summable", "checked_counts", "flat_view"]


def flat_view(tensor: Tensor) -> Tensor:
    """Return a 1-d view on the numbers of a contiguous tensor; complex ones as pairs of reals."""
    if tensor.dim() == 1 and tensor.is_contiguous() and not (tensor.requires_grad or tensor.is_complex()):
        return tensor
    tensor = tensor.detach()
    if not tensor.is_contiguous():
        raise ValueError(
            f"tensor must be contiguous, got strides {tuple(tensor.stride())} for shape {tuple(tensor.shape)}"
        )
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(-1)


def check_summable(dtype: torch.dtype) -> None:
    """Raise ``TypeError`` if tensors of this dtype have no sum."""
    if not has_sum(dtype):
        raise TypeError(f"tensors of {dtype} have no sum over ranks: convert to a wider dtype first")


def checked_counts(
    part: Tensor | None, whole: Tensor, counts: Sequence[int] | None, rank: int, world_size: int
) -> tuple[int, ...]:
    """Return the numbers of each rank's part in the flat view, where a complex element is two.

    Parameters
    ----------
    part : Tensor, optional
        This rank's part, if it is given by itself.
    whole : Tensor
        All parts, one after another.
    counts : sequence of int, optional
        Elements of each rank's part; by default as equal as possible.
    rank, world_size : int
        This rank, and how many there are.

    Raises
    ------
    ValueError
        The counts don't fit the whole, or the part doesn't fit the counts.
    """
    counts = even_counts(whole.numel(), world_size) if counts is None else counts
    is_valid = len(counts) == world_size and sum(counts) == whole.numel()
    if not is_valid or (part is not None and counts[rank] != part.numel()):
        given = "" if part is None else f" and give this rank its part ({part.numel()})"
        raise ValueError(
            f"counts must have one entry a rank ({world_size}), sum to the whole tensor ({whole.numel()})"
            f"{given}, got {list(counts)} on rank {rank}"
        )
    if part is not None and (part.dtype != whole.dtype or part.device != whole.device):
        raise ValueError(
            f"the part must have the dtype and device of the whole, {whole.dtype} on {whole.device}, got "
            f"{part.dtype} on {part.device}"
        )
    return tuple(2 * count for count in counts) if whole.is_complex() else tuple(counts)
