"""Communication hooks: how a full bucket becomes its sum over ranks.

A hook is called as ``hook(communicator, bucket)`` on all ranks, for the same bucket, in the same order. It starts the
sum of ``bucket.flat`` over all ranks, in place, and returns the :class:`~dpoptim.comm.work.Work` that ends it.
The gradients in it are scaled beforehand, so that their sum is the mean. A hook may block or not; ``bucket.flat``
belongs to it until ``Work.wait`` returns, and must then hold the same bits on every rank.

Where ranks share the work of the step (``shard``, ``node_shared``), ``bucket.division`` says who owns which part, and
only ``bucket.own`` must hold the sum. A hook may all-reduce nevertheless; :func:`sum_over_ranks` does what is needed.

Tests: ``tests/gradients/test_comm_hooks.py``.
"""

import torch
from torch import Tensor

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.work import Work
from dpoptim.gradients.bucket import Bucket
from dpoptim.gradients.comm_hook import CommHook, allreduce, sum_over_ranks

__all__ = ["CommHook", "allreduce", "bf16_compress", "fp16_compress", "sum_over_ranks"]


def bf16_compress(communicator: Communicator, bucket: Bucket) -> Work:
    """Send gradients as bfloat16, half the bytes of float32, and sum them in float32; collective.

    Gradients keep 8 significant bits and the range of float32.
    """
    return _compressed(communicator, bucket, torch.bfloat16)


def fp16_compress(communicator: Communicator, bucket: Bucket) -> Work:
    """Send gradients as float16, half the bytes of float32, and sum them in float32; collective.

    Gradients keep 11 significant bits; magnitudes above 65504 overflow to infinity, those below 6e-8 vanish. Scale
    the loss (``torch.amp.GradScaler``) where that matters.
    """
    return _compressed(communicator, bucket, torch.float16)


class _Decompress:
    """Waits for the compressed sum, then widens it into the bucket."""

    def __init__(self, work: Work, compressed: Tensor, bucket: Bucket) -> None:
        self._work, self._compressed, self._bucket = work, compressed, bucket

    def wait(self) -> None:
        self._work.wait()
        division = self._bucket.division
        own = self._compressed if division is None else self._compressed[division.start : division.stop]
        self._bucket.own.copy_(own)


def _compressed(communicator: Communicator, bucket: Bucket, dtype: torch.dtype) -> Work:
    if not bucket.flat.is_floating_point() or bucket.flat.element_size() <= dtype.itemsize:
        return allreduce(communicator, bucket)
    compressed = bucket.flat.to(dtype)
    return _Decompress(sum_over_ranks(communicator, bucket, compressed), compressed, bucket)
