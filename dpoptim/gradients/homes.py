"""Home: where a large gradient lies that other ranks of the node sum; and Homes, those of one reducer's gradients.

Note [Homes]
------------
autograd makes a gradient wherever there is memory. As soon as a large one is made, while it is in the caches, it moves
to its home in memory that the node shares (:mod:`dpoptim.comm.node.lent_memory`), from where the others sum it without
a copy of their own. Its own memory serves the next gradient of this backward.

Only a gradient that this backward has made is moved. One that was there before, such as a buffer of the user's, is
where the user wants it. And nothing moves to a home whose last gradient somebody still holds: what was once ``p.grad``
is never overwritten by the next backward.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from dpoptim.comm.communicator import Communicator
from dpoptim.gradients.autograd_hooks import hear_before_making
from dpoptim.partition import aligned, start_offsets
from dpoptim.tuning import TUNING

__all__ = ["Home", "Homes", "is_large"]

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
        self._address, self._dtype = memory.data_ptr(), memory.dtype
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
        return not gradient.is_sparse and gradient.data_ptr() == self._address and gradient.is_contiguous()

    def is_free(self) -> bool:
        """Whether nobody holds what has last lain here."""
        return self._num_users() <= self._num_users_if_free


class _Bucket(Protocol):
    """A bucket, as far as homes are concerned."""

    dtype: torch.dtype
    device: torch.device

    @property
    def numel(self) -> int:
        """Elements of all its gradients together."""

    def use_memory(self, tensor_at: Callable[[torch.dtype, Sequence[int], int], Tensor]) -> dict[int, Home]:
        """Have large gradients lie in given memory."""


class Homes(dict[int, Home]):
    """The homes of one reducer's gradients, by the numbers of their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self._handles: list[Any] = []

    @staticmethod
    def are_wanted(communicator: Communicator, parameters: Iterable[Tensor]) -> bool:
        """Whether the gradients of these parameters are to lie in memory that the ranks share; collective."""
        has_large = any(is_large(p) and p.device.type == "cpu" for p in parameters)
        return has_large and communicator.has_memory()

    def allocate(self, communicator: Communicator, buckets: Iterable[_Bucket], parameters: Sequence[Tensor]) -> None:
        """Let the gradients of these buckets lie in memory that the ranks share, if there is some; collective.

        Parameters
        ----------
        communicator : Communicator
            Allocates the memory.
        buckets : iterable of Bucket
            All that is reduced; what lay elsewhere in shared memory leaves it.
        parameters : sequence of Tensor
            All parameters, as the buckets number them.
        """
        self.release(communicator)
        on_host = [bucket for bucket in buckets if bucket.device.type == "cpu"]
        sizes_bytes = [aligned(bucket.numel * bucket.dtype.itemsize) for bucket in on_host]
        memory = communicator.allocate(sum(sizes_bytes))
        if memory is None:
            return
        for bucket, start_bytes in zip(on_host, start_offsets(sizes_bytes), strict=True):
            self.update(bucket.use_memory(partial(memory.tensor, start_bytes)))
        for index, home in self.items():
            self._handles.append(hear_before_making(home.before_adding, parameters[index]))

    def release(self, communicator: Communicator) -> None:
        """Let gradients lie where autograd makes them; local, between the same collectives of all ranks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()
        communicator.allocate(0)


def is_large(tensor: Tensor) -> bool:
    """Whether a gradient of this size is better reduced from where it lies than copied into a bucket and back."""
    return tensor.nbytes >= _LARGE_BYTES
