"""ReplicatedGradients: every rank receives all of the mean.

Note [Means of several batches]
-------------------------------
With ``accumulate=k`` the mean is divided by k. What a second backward of the last batch adds would be divided alone, so
a gradient that was reduced is multiplied by k before more is added to it, and divided with the rest.
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from dpoptim.gradients.autograd_hooks import AddingListener
from dpoptim.gradients.outsiders import reduce_alone
from dpoptim.gradients.parameters import like_gradient, version
from dpoptim.gradients.parts import Parts
from dpoptim.gradients.plan import divide
from dpoptim.gradients.presence import Report
from dpoptim.gradients.reduced_gradients import MARK

__all__ = ["ReplicatedGradients"]

# The mark of gradients that are the result of a reduction, where that is to be known.
_REDUCED = "reduced"


class ReplicatedGradients:
    """Gradients of which every rank receives all.

    Parameters
    ----------
    parts : Parts
        The reducer's.

    Attributes
    ----------
    put_aside : dict
        Empty: gradients that are added to stay whole.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts, self._tensors = parts, parts.parameters.tensors
        self.put_aside: dict[int, Tensor] = {}
        # A gradient of the last reduction, and its version, that show whether gradients were changed since.
        self._sample: tuple[Tensor, int] | None = None
        self._are_changed = False

    # ---------------------------------------------------------------- before autograd adds to gradients

    @property
    def adding_listener(self) -> AddingListener | None:
        """What undoes a division: this object, where means of several batches are made."""
        return self if self._parts.accumulate > 1 else None

    def before_adding(self, index: int) -> None:
        """Undo the division by the number of batches (Note [Means of several batches]); called by autograd."""
        gradient = self._tensors[index].grad
        if gradient is not None and getattr(gradient, MARK, None) == _REDUCED:
            setattr(gradient, MARK, None)
            with torch.no_grad():
                gradient.mul_(self._parts.accumulate)

    def before_making(self, index: int) -> None:
        """Do nothing: there is nothing to forget of a gradient that is gone."""

    # ---------------------------------------------------------------- the plan

    def plan(self) -> None:
        """Plan buckets for all parameters that are trained, in an order that ranks agree on later; collective."""
        self._parts.plan.order = []
        self._plan_for([index for index in self._default_order() if self._tensors[index].requires_grad])

    def _default_order(self) -> list[int]:
        return list(reversed(range(len(self._tensors))))

    def _plan_for(self, order: Sequence[int]) -> None:
        """Divide these parameters among buckets; the same on all ranks, collective (Note [Bucket order] in plan.py)."""
        homes, plan, communicator = self._parts.homes, self._parts.plan, self._parts.sums.communicator
        have_homes = homes.are_wanted(communicator, [self._tensors[index] for index in order])
        gradients = {index: like_gradient(self._tensors[index]) for index in order}
        plan.replace(divide(gradients, plan.bucket_bytes, have_homes=have_homes))
        if have_homes:
            homes.allocate(communicator, plan.buckets, self._tensors)
        else:
            homes.release(communicator)

    def _replan(self, reports: Sequence[Report], dense: set[int]) -> None:
        """Put the parameters that are trainable on any rank into buckets, in the order that is best for all."""
        plan, sparse = self._parts.plan, self._parts.sparse
        is_first = not plan.order
        if is_first:
            seen = reports[0].order
            plan.order = seen + [index for index in self._default_order() if index not in set(seen)]
        sparse.forget_dense(dense, reports)
        wanted = [
            index
            for index in plan.order
            if index not in sparse.dims and any(report.trainable[index] for report in reports)
        ]
        sends_early = self._parts.sums.communicator.overlap
        if (is_first and sends_early) or set(wanted) != set(plan.positions):
            self._plan_for(wanted)

    # ---------------------------------------------------------------- the reduction

    @property
    def remark(self) -> str:
        """Whether gradients were changed before the last step, which all ranks must do alike."""
        return ", gradients changed between the reduction and the last step" if self._are_changed else ""

    def misfits(self) -> dict[int, str]:
        """Return nothing: whatever is done to gradients, more is added to."""
        return {}

    def flags(self) -> list[float]:
        """Return nothing: all ranks see the same gradients."""
        return []

    def finish_reduction(self, reports: Sequence[Report] | None, flags: Sequence[float]) -> None:
        """Reduce what no bucket was planned for, and plan the next reduction; collective."""
        sparse, sums, presence = self._parts.sparse, self._parts.sums, self._parts.presence
        assert sums.scale is not None
        dense = set[int]() if reports is None else sparse.dense_somewhere(reports)
        if reports is not None:
            self._reduce_outsiders(dense, sums.scale)
        sparse.reduce(sums.communicator, presence.had_anywhere, sums.scale, but=dense)
        if reports is not None:
            self._replan(reports, dense)
        if self._parts.accumulate > 1:
            for parameter in self._tensors:
                if parameter.grad is not None:
                    setattr(parameter.grad, MARK, _REDUCED)
        self._take_sample()

    def _reduce_outsiders(self, dense: set[int], scale: float) -> None:
        """Reduce, one by one, gradients that no bucket was planned for; collective.

        Those too that are sparse on some ranks and dense on others, whose sum is dense.
        """
        positions = self._parts.plan.positions
        for index in self._parts.presence.had_anywhere:
            if index in dense or not (index in positions or index in self._parts.sparse.dims):
                summed = None
                if index in positions:  # what was dense has been summed
                    bucket, position = positions[index]
                    summed = bucket.reduced(position)
                reduce_alone(self._parts.sums, index, self._tensors[index], scale, summed)

    def _take_sample(self) -> None:
        """Take note of a gradient, to see whether gradients are changed before the step."""
        had = self._parts.presence.had_anywhere
        gradient = self._tensors[had[0]].grad if had else None
        self._sample = None if gradient is None or gradient.is_sparse else (gradient, version(gradient))

    def end_reduction(self) -> None:
        """Take note that the ranks have compared what was changed before the last step."""
        self._are_changed = False

    def note_cleared(self) -> None:
        """Do nothing: nothing is known of gradients beside themselves."""

    def note_step(self) -> None:
        """Take note whether gradients were changed before the step."""
        if self._sample is not None:
            gradient, then = self._sample
            self._are_changed = gradient._version != then
            self._sample = None

    # ---------------------------------------------------------------- using the gradients

    def checked(self) -> list[Tensor | None]:
        """Return the gradients of all parameters."""
        return self._parts.parameters.gradients()

    def is_partial(self, gradient: Tensor) -> bool:
        """Return False: this rank has all of it."""
        return False

    def without_marks(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: all elements were computed."""
        return contextlib.nullcontext()

    def remove_marks(self) -> None:
        """Do nothing, as above."""
