"""CommHook: what a communication hook is, and the sum that is made without one (:mod:`dpoptim.comm_hooks`).

Tests: ``tests/gradients/test_comm_hooks.py``.
"""

from collections.abc import Callable

from torch import Tensor

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.work import Work
from dpoptim.gradients.bucket import Bucket

__all__ = ["CommHook", "allreduce", "sum_over_ranks"]

CommHook = Callable[[Communicator, Bucket], Work]


def allreduce(communicator: Communicator, bucket: Bucket) -> Work:
    """Sum gradients as they are (the default); collective."""
    return sum_over_ranks(communicator, bucket, bucket.flat, scale=bucket.scale)


def sum_over_ranks(communicator: Communicator, bucket: Bucket, flat: Tensor, *, scale: float = 1.0) -> Work:
    """Start the sum of ``scale * flat`` in place: all of it, or where gradients are sharded each owner's part.

    Collective. ``flat`` belongs to the communicator until ``Work.wait`` returns.

    Parameters
    ----------
    flat : Tensor, numel of the bucket
        ``bucket.flat``, or what stands for it on the wire.
    scale : float
        This rank's factor.
    """
    division = bucket.division
    if division is None:
        return communicator.all_reduce(flat, scale=scale, async_op=True)
    own = bucket.own if flat is bucket.flat else flat[division.start : division.stop]
    reduce_scatter = communicator.reduce_scatter_in_node if division.in_node else communicator.reduce_scatter
    return reduce_scatter(own, flat, counts=division.counts, scale=scale, async_op=True)
