"""Home: where a large gradient lies that other ranks of the node sum. No communication here.

Note [Homes]
------------
autograd makes a gradient wherever there is memory. As soon as a large one is made, while it is in the caches, it moves
to its home in memory that the node shares (:mod:`dpoptim.comm.node.lent_memory`), from where the others sum it without
a copy of their own. Its own memory serves the next gradient of this backward.

Only a gradient that this backward has made is moved. One that was there before, such as a buffer of the user's, is
where the user wants it. And nothing moves to a home whose last gradient somebody still holds: what was once ``p.grad``
is never overwritten by the next backward.
"""

from functools import partial

import torch
from torch import Tensor

from dpoptim.tuning import TUNING

__all__ = ["Home", "is_large"]

_LARGE_BYTES = TUNING.large_gradient_bytes


class Home:
    """The home of one parameter's gradient.

    Parameters
    ----------
    memory : Tensor
        Contiguous, of the parameter's shape and dtype, with a storage of its own that nobody else has.
    """

    def __init__(self, memory: Tensor) -> None:
        self._memory, self._storage = memory, memory.untyped_storage()
        self._place, self._dtype = memory.data_ptr(), memory.dtype
        self._is_about_to_be_made = False
        self._num_users = partial(torch._C._storage_Use_Count, self._storage._cdata)
        self._num_users_if_free = self._num_users()

    def before_adding(self, parameter: Tensor, _: Tensor) -> None:
        """Take note whether autograd is about to make a gradient, or to add to one; called by autograd."""
        self._is_about_to_be_made = parameter.grad is None

    def adopt(self, parameter: Tensor) -> None:
        """Move a gradient here that autograd has just made (Note [Homes]); called by autograd."""
        if not self._is_about_to_be_made:
            return
        self._is_about_to_be_made = False
        gradient = parameter.grad
        # autograd has seen to its shape and device
        if (
            type(gradient) is Tensor
            and gradient.dtype is self._dtype
            and gradient.layout is torch.strided
            and gradient.is_contiguous()
            and not gradient.requires_grad
            and self.is_free()
        ):
            parameter.grad = self._memory.detach().copy_(gradient)

    def has(self, gradient: Tensor) -> bool:
        """Whether this gradient lies here."""
        return not gradient.is_sparse and gradient.data_ptr() == self._place and gradient.is_contiguous()

    def is_free(self) -> bool:
        """Whether nobody holds what has last lain here."""
        return self._num_users() <= self._num_users_if_free


def is_large(tensor: Tensor) -> bool:
    """Whether a gradient of this size is better reduced from where it lies than copied into a bucket and back."""
    return tensor.nbytes >= _LARGE_BYTES
