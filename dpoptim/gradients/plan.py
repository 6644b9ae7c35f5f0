"""Plan: the buckets of one reducer, which parameter is where in them, and their order. Nothing collective.

Note [Bucket order]
-------------------
Every reduction launches all buckets, in one fixed order, whatever gradients this rank has: no negotiation, no
deadlock. The order is the reverse of registration; with overlap, after the first reduction, it becomes the order in
which rank 0 saw gradients arrive, so that a bucket is full as early as possible.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dpoptim.comm.communicator import Communicator
from dpoptim.gradients.bucket import Bucket
from dpoptim.gradients.homes import is_large
from dpoptim.partition import Piece, group_by_size
from dpoptim.tuning import TUNING

__all__ = ["Plan", "divide", "largest_bucket_bytes"]

# What is sent beside backward is sent early: one bucket of hundreds of small tensors is full when backward ends.
_OVERLAPPED_BYTES = TUNING.overlapped_bucket_bytes
# Where starting to send takes no thread's turn.
_POLLED_BYTES = TUNING.polled_bucket_bytes


class Plan:
    """The buckets of one reducer, equal on all ranks (Note [Bucket order]).

    Parameters
    ----------
    bucket_bytes : int
        A bucket of several gradients has at most so many bytes.

    Attributes
    ----------
    bucket_bytes : int
        As given.
    buckets : list of Bucket
        What is reduced, in this order.
    frozen_buckets : list of Bucket
        What is not reduced, since no rank trains their parameters.
    positions : dict of int to (Bucket, int)
        By the numbers of the parameters that are reduced: the bucket of each, and its position there.
    order : list of int
        The parameters in the order in which their gradients are expected; empty until all ranks have one.
    """

    def __init__(self, bucket_bytes: int) -> None:
        self.bucket_bytes = bucket_bytes
        self.buckets: list[Bucket] = []
        self.frozen_buckets: list[Bucket] = []
        self.positions: dict[int, tuple[Bucket, int]] = {}
        self.order: list[int] = []

    @property
    def all_buckets(self) -> list[Bucket]:
        """All buckets, also those that are not reduced for now."""
        return [*self.buckets, *self.frozen_buckets]

    def replace(self, buckets: Sequence[Bucket]) -> None:
        """Reduce these buckets instead of those before, in this order."""
        self.buckets, self.positions = [], {}
        for bucket in buckets:
            self.activate(bucket)

    def activate(self, bucket: Bucket) -> None:
        """Reduce this bucket too, behind the others."""
        self.buckets.append(bucket)
        self.positions.update((index, (bucket, position)) for position, index in enumerate(bucket.indices))

    def own_piece(self, index: int) -> Piece | None:
        """Return what this rank owns of a parameter, None if that is nothing."""
        if index not in self.positions:
            return None
        bucket, position = self.positions[index]
        return next((piece for piece in bucket.own_pieces if piece.position == position), None)


def divide(gradients: Mapping[int, Tensor], bucket_bytes: int, *, have_homes: bool) -> list[Bucket]:
    """Divide gradients among buckets of which every rank receives all; each of one dtype and device.

    Parameters
    ----------
    gradients : mapping of int to Tensor
        What a gradient is like, by its parameter's number, in the order in which they are expected.
    bucket_bytes : int
        A bucket of several gradients has at most so many bytes.
    have_homes : bool
        Whether large gradients on the host are to lie in one memory (:meth:`Bucket.use_memory`).

    Returns
    -------
    list of Bucket
        In the order in which they are full.
    """
    together: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    groups: list[list[int]] = []
    for index, gradient in gradients.items():
        if is_large(gradient) and not (have_homes and gradient.device.type == "cpu"):
            groups.append([index])  # copying it into and out of a bucket is more than one message
        else:
            together.setdefault((gradient.dtype, gradient.device), []).append(index)
    for indices in together.values():
        sizes_bytes = [gradients[index].nbytes for index in indices]
        groups += [[indices[i] for i in group] for group in group_by_size(sizes_bytes, bucket_bytes)]
    when_ready = {index: when for when, index in enumerate(gradients)}
    groups.sort(key=lambda group: when_ready[group[-1]])
    return [Bucket(group, [gradients[index] for index in group]) for group in groups]


def largest_bucket_bytes(communicator: Communicator, bucket_bytes: int) -> int:
    """Return the size of a bucket that is sent by this communicator, and has at most ``bucket_bytes``."""
    if not communicator.overlap:
        return bucket_bytes
    return min(bucket_bytes, _POLLED_BYTES if communicator.is_polled else _OVERLAPPED_BYTES)
