"""Transport: one face for whatever carries collectives of flat tensors among some ranks; and Batch, several together.

A new way to move tensors is a new class with this face, and a row in :mod:`dpoptim.comm.selection`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dpoptim.comm.work import Work

__all__ = ["Batch", "Memory", "NodeTransport", "Transport"]


class Memory(Protocol):
    """Memory of this rank that a transport reads where it lies."""

    def tensor(self, start_bytes: int, dtype: torch.dtype, shape: Sequence[int], offset_bytes: int) -> Tensor:
        """Return a tensor ``start_bytes + offset_bytes`` behind the start of this memory; its own storage."""


class Batch(Protocol):
    """Collectives that start together, between two meetings of all ranks that their caller has anyway.

    A transport whose ranks must meet before and after they move tensors does without meetings of its own then. All
    ranks make the same batch, and call its methods in the same order.

    Attributes
    ----------
    is_deferred : bool
        Whether nothing is done before the first collective is waited for.
    """

    is_deferred: bool

    def open(self, start: Callable[[float], object], meeting: Callable[[], float]) -> None:
        """Start collectives and meet all ranks, in the order that suits the transport; collective, blocks.

        Parameters
        ----------
        start : callable
            Starts the collectives with ``async_op=True``; called with what their scales are to be divided by.
        meeting : callable
            Meets all ranks, and returns what the scales of all sums are divided by, the same on all ranks. If it
            fails, as it does on all ranks alike, no collective begins.
        """

    def close(self, works: Iterable[Work], numbers: Callable[[], Sequence[float]]) -> list[float]:
        """Wait for works, then sum a few numbers over all ranks, in float64; collective, blocks.

        Parameters
        ----------
        works : iterable of Work
            All that are under way, in the order in which they were started.
        numbers : callable
            Returns what to sum; called when the works are done, whose tensors it may read and not write to.
        """


class Transport(Protocol):
    """Carries collectives of flat host tensors among some ranks.

    Tensors are flat, contiguous, not complex, and of one dtype on all ranks; arguments are the caller's to check. Every
    method named after a collective is one. Tensors belong to the transport until ``Work.wait`` returns. What goes to
    all ranks is the same bits on all.
    """

    def all_reduce(self, tensor: Tensor, scale: float = 1.0) -> Work:
        """Sum ``scale`` times the tensor over the ranks, in place; every rank has a scale of its own."""

    def reduce_scatter(self, output: Tensor, source: Tensor, counts: Sequence[int], scale: float = 1.0) -> Work:
        """Sum ``scale * source`` over the ranks; ``output``, perhaps a part of it, receives this rank's part.

        Parameters
        ----------
        output : Tensor, numel ``counts[rank]``
            Receives the sum of this rank's part.
        source : Tensor
            The parts of all ranks, one after another. Left unchanged, but for ``output`` if that is a part of it.
        counts : sequence of int
            Elements of each rank's part; the same on all ranks.
        scale : float
            Of this rank's values.
        """

    def all_gather(self, tensor: Tensor, counts: Sequence[int]) -> Work:
        """Collect every rank's part of the tensor, where its own is already in place. Any dtype."""

    def prepare_all_gathers(self, outputs: Sequence[tuple[Tensor, Sequence[int]]]) -> Callable[[], Sequence[Work]]:
        """Return what starts :meth:`all_gather` of each of these, again and again; local, calling it is collective."""
        return lambda: [self.all_gather(tensor, counts) for tensor, counts in outputs]

    def batch(
        self,
        num_collectives: int,  # noqa: ARG002  others need them
        dtypes: Iterable[torch.dtype],  # noqa: ARG002
        sum_numbers: Callable[[Sequence[float]], list[float]],  # noqa: ARG002
    ) -> Batch | None:
        """Return a batch of so many collectives, with sums of these dtypes; None if it would gain nothing. Local."""
        return None

    @property
    def has_memory(self) -> bool:
        """Whether tensors are summed faster in memory of :meth:`allocate`."""
        return False

    def allocate(self, num_bytes: int) -> Memory | None:  # noqa: ARG002  others need it
        """Return memory for tensors that are summed often, instead of what was allocated before; collective.

        None if there is none. With 0 bytes what was allocated is given back; local then, between the same collectives
        of all ranks. No collective is under way.
        """
        return None

    def drop(self) -> None:
        """Forget what was started and has not begun, and nobody waits for any more; local, on all ranks alike."""
        return

    def poll(self) -> None:
        """Go on with what is under way; local, does not block."""
        return

    def free(self) -> None:
        """Give back what is not Python's; collective."""
        return


class NodeTransport(Transport, Protocol):
    """Carries collectives among the ranks of a node, whose parts may begin anywhere in a tensor."""

    def reduce_scatter(
        self,
        output: Tensor,
        source: Tensor,
        counts: Sequence[int],
        scale: float = 1.0,
        *,
        starts: Sequence[int] | None = None,
    ) -> Work:
        """Sum parts as :meth:`Transport.reduce_scatter`; they begin at ``starts``, by default one after another."""

    def all_gather(self, tensor: Tensor, counts: Sequence[int], *, starts: Sequence[int] | None = None) -> Work:
        """Collect parts as :meth:`Transport.all_gather`; they begin at ``starts``, by default one after another."""
