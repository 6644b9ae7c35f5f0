"""Outsiders: gradients that no bucket was planned for, which are reduced one by one.

Tests: ``tests/gradients/test_sums.py``.
"""

from torch import Tensor

from dpoptim.gradients.bucket import Bucket
from dpoptim.gradients.parameters import in_layout_of, like_gradient
from dpoptim.gradients.sums import Sums

__all__ = ["reduce_alone"]


def reduce_alone(sums: Sums, index: int, parameter: Tensor, scale: float, summed: Tensor | None = None) -> None:
    """Make one parameter's gradient the mean over ranks; collective. Under ``no_grad``.

    Parameters
    ----------
    sums : Sums
        Starts the sum.
    index, parameter : int, Tensor
        Its number, and itself. Its gradient may be dense, sparse or None; afterwards it is dense.
    scale : float
        This rank's share of the mean.
    summed : Tensor, optional
        The mean of those that are dense, which have been reduced: those that are sparse are added to it.
    """
    gradient = parameter.grad
    if gradient is not None and gradient.is_sparse:
        gradient = gradient.to_dense()
    elif summed is not None:
        gradient = None
    alone = Bucket([index], [like_gradient(parameter)])
    alone.pack([gradient], scale)
    sums.sum_now(alone)
    mean = in_layout_of(parameter, alone.reduced(0))
    if summed is not None:
        mean += summed
    if parameter.grad is None or parameter.grad.is_sparse:
        parameter.grad = mean
    else:
        parameter.grad.copy_(mean)
