"""Communication hooks: how a full bucket becomes its sum over ranks.

A hook is called as ``hook(communicator, bucket)`` on all ranks, for the same bucket, in the same order. It starts
the sum of ``bucket.flat`` over all ranks, in place, and returns the :class:`~dpoptim.communicator.Work` that ends it.
The gradients in it are scaled beforehand, so that their sum is the mean; a hook with a true attribute ``scales`` gets
them unscaled and multiplies with ``bucket.scale`` itself. It may block or not; ``bucket.flat`` is its own until
``Work.wait`` returns, and must then hold the same bits on every rank.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dpoptim.bucket import Bucket
from dpoptim.communicator import Communicator, Work

__all__ = ["CommHook", "allreduce", "bf16_compress", "fp16_compress"]

CommHook = Callable[[Communicator, Bucket], Work]


def allreduce(communicator: Communicator, bucket: Bucket) -> Work:
    """Sum gradients as they are (the default); collective."""
    return communicator.all_reduce(bucket.flat, scale=bucket.scale, async_op=True)


allreduce.scales = True  # type: ignore[attr-defined]


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

    def __init__(self, work: Work, compressed: Tensor, flat: Tensor) -> None:
        self._work, self._compressed, self._flat = work, compressed, flat

    def wait(self) -> None:
        self._work.wait()
        self._flat.copy_(self._compressed)


def _compressed(communicator: Communicator, bucket: Bucket, dtype: torch.dtype) -> Work:
    if not bucket.flat.is_floating_point() or bucket.flat.element_size() <= dtype.itemsize:
        return allreduce(communicator, bucket)
    compressed = bucket.flat.to(dtype)
    return _Decompress(communicator.all_reduce(compressed, async_op=True), compressed, bucket.flat)
