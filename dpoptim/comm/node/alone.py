"""Alone: the collectives of a rank that has nobody to exchange with. No MPI here.

Tests: ``tests/comm/test_transport.py``.
"""

from collections.abc import Sequence

from torch import Tensor

from dpoptim.comm.transport import NodeTransport
from dpoptim.comm.work import DONE, Work

__all__ = ["Alone"]


class Alone(NodeTransport):
    """Collectives of one rank, which are local."""

    def all_reduce(self, tensor: Tensor, scale: float = 1.0) -> Work:
        """Multiply the tensor with ``scale``."""
        if scale != 1.0:
            tensor.mul_(scale)
        return DONE

    def reduce_scatter(
        self,
        output: Tensor,
        source: Tensor,
        counts: Sequence[int],
        scale: float = 1.0,
        *,
        starts: Sequence[int] | None = None,
    ) -> Work:
        """Copy the only part, times ``scale``."""
        start = 0 if starts is None else starts[0]
        if output.data_ptr() != source.data_ptr() + start * source.element_size():
            output.copy_(source.narrow(0, start, counts[0]))
        return self.all_reduce(output, scale)

    def all_gather(
        self,
        tensor: Tensor,  # noqa: ARG002  others need them
        counts: Sequence[int],  # noqa: ARG002
        *,
        starts: Sequence[int] | None = None,  # noqa: ARG002
    ) -> Work:
        """Do nothing: the only part is in its place."""
        return DONE
