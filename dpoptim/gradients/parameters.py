"""Parameters: the parameters of one reducer, by their numbers, and what a gradient of each is like. Local."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpoptim.gradients.bucket import gradient_dtype

__all__ = ["Parameters", "can_have_gradient", "in_layout_of", "is_taken_away", "like_gradient", "version"]


@dataclass(frozen=True)
class Parameters:
    """Parameters in the order in which they were added; their numbers count from zero.

    Attributes
    ----------
    tensors : list of Tensor
        The parameters themselves.
    names : list of str
        What to call each.
    groups : list of int
        The number of each one's parameter group.
    """

    tensors: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tensors)

    def add(self, tensors: Sequence[Tensor], names: Sequence[str], groups: Sequence[int]) -> None:
        """Add more of them."""
        self.tensors.extend(tensors)
        self.names.extend(names)
        self.groups.extend(groups)

    def describe(self, index: int) -> str:
        """Return what to call a parameter in an error."""
        return f"parameter '{self.names[index]}'"

    def gradients(self) -> list[Tensor | None]:
        """Return the gradients of all."""
        return [parameter.grad for parameter in self.tensors]

    def gradients_of(self, indices: Iterable[int]) -> list[Tensor | None]:
        """Return the gradients of these."""
        tensors = self.tensors
        return [tensors[index].grad for index in indices]


def can_have_gradient(parameter: Tensor) -> bool:
    """Whether autograd makes gradients for its dtype."""
    return parameter.is_floating_point() or parameter.is_complex()


def like_gradient(parameter: Tensor) -> Tensor:
    """Return a tensor with the shape, dtype and device of a gradient, perhaps without memory of its own."""
    dtype = gradient_dtype(parameter)
    if dtype == parameter.dtype:
        return parameter
    return torch.empty((), dtype=dtype, device=parameter.device).expand(parameter.shape)


@torch.no_grad()
def in_layout_of(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return a gradient in its parameter's memory layout, as autograd makes it: torch's fused steps rely on it."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)


def is_taken_away(parameter: Tensor) -> bool:
    """Whether a gradient that has arrived is gone, by a hook of the user's."""
    return parameter.grad is None and len(parameter._post_accumulate_grad_hooks or ()) > 1


def version(gradient: Tensor | None) -> int:
    """Return a number that changes when a gradient is written to in place; -1 if it has none."""
    return -1 if gradient is None or gradient.is_inference() else gradient._version
