"""GradientNorm: the global norm of gradients of which each rank has a part, and clipping by it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.step.units import ShardedBucket, flat_piece

__all__ = ["GradientNorm"]


class GradientNorm:
    """The norm of all gradients of one optimizer.

    Parameters
    ----------
    communicator : Communicator
        Of the ranks that have parts.
    owners : sequence of int
        The ranks whose parts are the whole, each element once.
    """

    def __init__(self, communicator: Communicator, owners: Sequence[int]) -> None:
        self._communicator = communicator
        self._owners = list(owners)

    @torch.no_grad()
    def total(self, parts: Sequence[ShardedBucket], norm_type: float, among: Sequence[Tensor] | None = None) -> Tensor:
        """Return the norm of all gradients, in float64; collective, blocks, the same bits on all ranks.

        Parameters
        ----------
        parts : sequence of ShardedBucket
            What this rank owns.
        norm_type : float
            The order of the norm.
        among : sequence of Tensor, optional
            Gradients, of which alone the norm is taken.
        """
        by_rank = torch.zeros(self._communicator.world_size, dtype=torch.float64, device="cpu")
        own = _own_gradients(parts, among)
        if own:
            norms = torch.stack([norm.to("cpu", torch.float64) for norm in torch._foreach_norm(own, norm_type)])
            by_rank[self._communicator.rank] = torch.linalg.vector_norm(norms, norm_type)
        self._communicator.all_reduce(by_rank)
        total: Tensor = torch.linalg.vector_norm(by_rank[self._owners], norm_type)
        return total

    @torch.no_grad()
    def clip(
        self, parts: Sequence[ShardedBucket], max_norm: float, norm_type: float, *, error_if_nonfinite: bool
    ) -> Tensor:
        """Scale all gradients so that their norm is at most ``max_norm``; collective, blocks.

        Returns
        -------
        Tensor
            The norm before, in the dtype of the gradients if they have one; the same on all ranks.

        Raises
        ------
        RuntimeError
            On all ranks, if ``error_if_nonfinite`` and the norm is not finite.
        """
        total = self.total(parts, norm_type)
        if error_if_nonfinite and not torch.isfinite(total):
            message = f"the total norm of order {norm_type} of the gradients is {total}, so it can't be clipped"
            raise raised_on_all_ranks(RuntimeError(message))
        factor = float((max_norm / (total + 1e-6)).clamp(max=1.0))
        gradients = _gradients_to_scale(parts)
        if factor != 1.0 and gradients:
            torch._foreach_mul_(gradients, factor)
        return total.to(_norm_dtype(parts))


def _own_gradients(parts: Sequence[ShardedBucket], among: Sequence[Tensor] | None) -> list[Tensor]:
    """Return what this rank owns of every gradient, or of each among these, flat.

    It is a copy where a gradient is not contiguous.
    """
    wanted = None if among is None else set(map(id, among))
    return [
        flat_piece(gradient, piece)
        for part in parts
        for piece in part.bucket.own_pieces
        if (gradient := part.parameters[piece.position].grad) is not None and (wanted is None or id(gradient) in wanted)
    ]


def _gradients_to_scale(parts: Sequence[ShardedBucket]) -> list[Tensor]:
    """Return tensors in place of what this rank owns of every gradient that may be multiplied in place."""
    return [
        flat_piece(gradient, piece) if gradient.is_contiguous() else gradient
        for part in parts
        for piece in part.bucket.own_pieces
        if (gradient := part.parameters[piece.position].grad) is not None
    ]


def _norm_dtype(parts: Sequence[ShardedBucket]) -> torch.dtype:
    """Return the dtype of a norm of all gradients, the same on all ranks."""
    dtypes = [part.bucket.dtype.to_real() for part in parts]
    return dtypes[0] if len(set(dtypes)) == 1 else torch.float32
