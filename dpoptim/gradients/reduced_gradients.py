"""ReducedGradients: what becomes of the gradients of one reducer, all of each on every rank or a part on each.

A new way is a new class with this face; :class:`~dpoptim.gradients.reducer.Reducer` asks for nothing else.

Tests: ``tests/gradients/test_replicated_gradients.py``.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from dpoptim.gradients.autograd_hooks import AddingListener
from dpoptim.gradients.presence import Report

__all__ = ["MARK", "ReducedGradients"]

# An attribute of gradients that says what they are the result of.
MARK = "_dpoptim_mark"


class ReducedGradients(Protocol):
    """What becomes of the gradients of one reducer."""

    # ---------------------------------------------------------------- asked by the reducer

    @property
    def adding_listener(self) -> AddingListener | None:
        """What hears before autograd adds to a gradient, None if nothing is to be done then."""

    @property
    def remark(self) -> str:
        """What the next meeting is to compare of the gradients of the last reduction."""

    def plan(self) -> None:
        """Plan buckets for parameters that were added, or anew for all; collective."""

    def misfits(self) -> dict[int, str]:
        """Return what else is wrong with this rank's gradients, by parameter; local."""

    def flags(self) -> list[float]:
        """Return numbers whose sums over ranks :meth:`finish_reduction` is to know; local."""

    def finish_reduction(self, reports: Sequence[Report] | None, flags: Sequence[float]) -> None:
        """Do what is left when all buckets are reduced and unpacked; collective.

        Parameters
        ----------
        reports : sequence of Report, optional
            Of all ranks, if anything has changed.
        flags : sequence of float
            The sums of what :meth:`flags` has returned, over all ranks.
        """

    def end_reduction(self) -> None:
        """Take note that a reduction has ended, well or not; local."""

    def note_cleared(self) -> None:
        """Take note that all gradients were cleared; local."""

    def note_step(self) -> None:
        """Take note that the optimizer has made a step; local."""

    # ---------------------------------------------------------------- asked by those who use the gradients

    def checked(self) -> list[Tensor | None]:
        """Return the gradients of all parameters; local.

        Raises
        ------
        RuntimeError
            They are not what they were reduced to, where that can be seen.
        """

    def is_partial(self, gradient: Tensor) -> bool:
        """Whether this rank has the mean of its part of a gradient alone; local."""

    def without_marks(self) -> AbstractContextManager[None]:
        """Let gradients have no element within that was not computed; local."""

    def remove_marks(self) -> None:
        """Let gradients have no such element any more until they are reduced again; local."""
