"""ShardedGradients: each rank receives the mean of its own part.

Note [Sharded gradients]
------------------------
Where ranks share the work of the step, each receives the mean of its own part of the gradients alone; the rest of
``p.grad`` keeps values of no meaning. Two things follow: what a later backward adds to it must not be summed twice
(Note [Adding to reduced parts] in carry_over.py), and what one rank finds in its part all have to know (Note [Shared
infinities] in infinities.py).

Buckets and their order are fixed (Note [Who owns what] in sharding.py): they are not planned anew. Those of parameters
that no rank trains are frozen, and activated when one does.
"""

import contextlib
from collections.abc import Sequence

from torch import Tensor

from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.gradients.bucket import Bucket
from dpoptim.gradients.canaries import Canaries
from dpoptim.gradients.carry_over import CarryOver
from dpoptim.gradients.infinities import are_finite, share_infinity
from dpoptim.gradients.left_out_steps import LeftOutSteps
from dpoptim.gradients.parameters import can_have_gradient
from dpoptim.gradients.parts import Parts
from dpoptim.gradients.presence import Report
from dpoptim.gradients.reduced_gradients import MARK
from dpoptim.gradients.sharding import Entry, Sharding

__all__ = ["ShardedGradients"]


class ShardedGradients:
    """Gradients of which each rank receives what it owns (Note [Sharded gradients]).

    Parameters
    ----------
    sharding : Sharding
        Who owns what.
    parts : Parts
        The reducer's.
    """

    def __init__(self, sharding: Sharding, parts: Parts) -> None:
        self._sharding, self._parts = sharding, parts
        self._carry_over = CarryOver(parts)
        self._canaries = Canaries()
        self._left_out = LeftOutSteps()
        self._num_planned = 0
        self._is_finite = True
        self._identities: list[int] = []  # of all gradients, as they were reduced

    # ---------------------------------------------------------------- the plan

    def plan(self) -> None:
        """Shard the parameters that are new; buckets of those that are frozen are not reduced; collective."""
        parameters, plan = self._parts.parameters, self._parts.plan
        entries = [
            Entry(index, parameters.tensors[index], parameters.groups[index])
            for index in reversed(range(self._num_planned, len(parameters)))
            if can_have_gradient(parameters.tensors[index])
        ]
        self._num_planned = len(parameters)
        trained = [entry for entry in entries if entry.parameter.requires_grad]
        frozen = [entry for entry in entries if not entry.parameter.requires_grad]
        have_homes = self._have_homes([entry.index for entry in entries])
        for bucket in self._sharding.divide(trained, plan.bucket_bytes, have_homes=have_homes):
            plan.activate(bucket)
        plan.frozen_buckets += self._sharding.divide(frozen, plan.bucket_bytes, have_homes=have_homes)
        if have_homes:
            self._allocate_homes()
        plan.order = [index for bucket in plan.buckets for index in bucket.indices]

    def _have_homes(self, indices: Sequence[int]) -> bool:
        """Whether gradients of these parameters are to lie in memory that the ranks share; collective."""
        tensors = self._parts.parameters.tensors
        return self._parts.homes.are_wanted(self._parts.sums.communicator, [tensors[index] for index in indices])

    def _allocate_homes(self) -> None:
        """Let the gradients of the present plan lie in memory that the ranks share; collective."""
        parts = self._parts
        parts.homes.allocate(parts.sums.communicator, parts.plan.buckets, parts.parameters.tensors)

    def _activate_trained(self, reports: Sequence[Report]) -> list[Bucket]:
        """Activate buckets of which a parameter is trained now; return them, the same on all ranks."""
        plan = self._parts.plan
        for index, dims in self._parts.sparse.dims.items():
            message = (
                f"{self._parts.parameters.describe(index)} has a sparse gradient ({dims} sparse dims), which can't be "
                "sharded among ranks: give it to an optimizer of its own, without shard and node_shared"
            )
            raise raised_on_all_ranks(RuntimeError(message))
        wanted = {index for report in reports for index, trained in enumerate(report.trainable) if trained}
        wanted |= set(self._parts.presence.had_anywhere)
        activated = [bucket for bucket in plan.frozen_buckets if not wanted.isdisjoint(bucket.indices)]
        for bucket in activated:
            plan.frozen_buckets.remove(bucket)
            plan.activate(bucket)
        return activated

    # ---------------------------------------------------------------- the reduction

    @property
    def adding_listener(self) -> CarryOver:
        """What puts aside parts of gradients."""
        return self._carry_over

    @property
    def remark(self) -> str:
        """Nothing: each rank changes its own part."""
        return ""

    def misfits(self) -> dict[int, str]:
        """Return what is wrong with gradients that were changed while a part was put aside."""
        return self._carry_over.misfits()

    def flags(self) -> list[float]:
        """Return whether an element of this rank's part is not finite."""
        self._is_finite = are_finite([bucket.own for bucket in self._parts.plan.buckets])
        return [float(not self._is_finite)]

    def finish_reduction(self, reports: Sequence[Report] | None, flags: Sequence[float]) -> None:
        """Activate what is trained now, add what was put aside, and mark gradients as reduced; collective."""
        (num_not_finite,) = flags
        parameters, plan = self._parts.parameters, self._parts.plan
        activated = [] if reports is None else self._activate_trained(reports)
        if activated:
            num_not_finite += self._reduce_activated(activated)
        if not self._carry_over.adds_to_reduced:
            self._left_out.note_gone()
        self._carry_over.add_back()
        if num_not_finite and self._is_finite:
            share_infinity(plan.buckets, parameters.tensors)
        gradients = parameters.gradients()
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                setattr(gradient, MARK, index)
        self._identities = list(map(id, gradients))
        if activated and self._have_homes(list(plan.positions)):
            self._allocate_homes()
        if not num_not_finite:
            self._canaries.set(parameters.tensors, plan.buckets)
        self._left_out.note_reduction(is_step_due=not (num_not_finite or self._parts.sums.has_raised))

    def _reduce_activated(self, activated: Sequence[Bucket]) -> float:
        """Reduce buckets that were frozen when this reduction began; collective.

        Returns
        -------
        float
            How many ranks have an element that is not finite in their part of these.
        """
        sums = self._parts.sums
        num_reduced = len(sums.launched)
        for bucket in activated:
            sums.launch(bucket, sums.scale)

        def are_not_finite() -> list[float]:
            return [not are_finite([bucket.own for bucket in activated])]

        (num_not_finite,) = sums.finish(sums.launched[num_reduced:], are_not_finite)
        for bucket in activated:
            bucket.unpack()
        self._parts.presence.give_gradients()
        self._is_finite = self._is_finite and are_finite([bucket.own for bucket in activated])
        return num_not_finite

    def end_reduction(self) -> None:
        """Take note that nothing was added to the gradients yet."""
        self._carry_over.end_reduction()

    def note_cleared(self) -> None:
        """Forget what was put aside."""
        self._left_out.note_gone()
        self._carry_over.forget()

    def note_step(self) -> None:
        """Do nothing: the step has asked for the gradients."""

    # ---------------------------------------------------------------- using the gradients

    def checked(self) -> list[Tensor | None]:
        """Return all gradients, for a step; raise ``RuntimeError`` if somebody took them for whole ones; local."""
        self._left_out.note_step()
        parameters = self._parts.parameters
        gradients = parameters.gradients()
        are_others = list(map(id, gradients)) != self._identities
        for index, gradient in enumerate(gradients if are_others else ()):
            mark = getattr(gradient, MARK, index)
            if mark != index and isinstance(mark, int):
                raise RuntimeError(
                    f"{parameters.describe(index)} was given the gradient of {parameters.describe(mark)}, of which "
                    "each rank has another part: leave out shard and node_shared, or exchange the values before they "
                    "are reduced (in no_sync())"
                )
        if self._canaries.check(parameters.names):
            self._left_out.warn("gradients were set to zero")
        return gradients

    def is_partial(self, gradient: Tensor) -> bool:
        """Whether this rank has the mean of its part of a gradient alone."""
        return isinstance(getattr(gradient, MARK, None), int)

    def without_marks(self) -> contextlib.AbstractContextManager[None]:
        """Let gradients have no infinite element within that was not computed."""
        return self._canaries.hidden()

    def remove_marks(self) -> None:
        """Let gradients have no such element any more until they are reduced again."""
        self._canaries.remove()
