"""Reduction: leads the buckets of one reducer through a reduction, from the meeting to the gradients.

Tests: ``tests/gradients/test_reducer.py``.
"""

import torch

from dpoptim.comm.errors import heard_if_left, note_under_way, raised_on_all_ranks
from dpoptim.gradients.meetings import PASSES, Meetings, PutOffError, TogetherError
from dpoptim.gradients.outsiders import reduce_alone
from dpoptim.gradients.parameters import is_taken_away
from dpoptim.gradients.parts import Parts
from dpoptim.gradients.presence import Report
from dpoptim.gradients.reduced_gradients import ReducedGradients

__all__ = ["Reduction"]


class Reduction:
    """The reductions of one reducer, one after another.

    Parameters
    ----------
    parts : Parts
        The reducer's.
    meetings : Meetings
        Where it meets the other ranks.
    gradients : ReducedGradients
        What becomes of the gradients.

    Attributes
    ----------
    batch_weight : float
        Weight of this rank's gradients in the mean.
    is_put_off : bool
        Whether sending has to wait for the end of the backward under way.
    """

    def __init__(self, parts: Parts, meetings: Meetings, gradients: ReducedGradients) -> None:
        self._parts, self._meetings, self._gradients = parts, meetings, gradients
        self._plan, self._sums = parts.plan, parts.sums
        self.batch_weight = 1.0
        self.is_put_off = False

    @property
    def has_begun(self) -> bool:
        """Whether one is under way: ranks have met for it."""
        return self._sums.scale is not None

    def launch_full_buckets(self, index: int) -> None:
        """Launch what is full with this parameter's gradient while backward goes on; collective with the other ranks'.

        Raises
        ------
        RuntimeError
            The gradient's bucket was sent before.
        """
        if self.is_put_off:
            return
        sums, plan = self._sums, self._plan
        if sums.scale is None:
            self._prepare()
            self._meetings.is_early = True
            try:
                self._begin()
            except PutOffError:
                self.is_put_off = True
                return
            finally:
                self._meetings.is_early = False
            note_under_way(self, self._meetings.place_of("a reduction"))
        if index not in plan.positions:
            return
        bucket, _ = plan.positions[index]
        bucket.num_pending -= 1
        if bucket.num_pending < 0:
            raise RuntimeError(
                f"{self._parts.parameters.describe(index)} received a second gradient in one backward after its bucket "
                "was sent (a parameter shared by reentrant checkpoints): use overlap=False"
            )
        launched, buckets = sums.launched, plan.buckets
        while len(launched) < len(buckets):
            bucket = buckets[len(launched)]
            if bucket.num_pending:
                break
            with torch.no_grad():
                sums.launch(bucket, sums.scale)

    @torch.no_grad()
    def run(self) -> None:
        """Make every gradient the weighted mean over ranks, after what was launched before; collective."""
        try:
            with heard_if_left(self._meetings.place_of("a reduction")):
                self._launch_rest()
                self._unpack()
        except TogetherError as together:
            self._sums.release(self._plan.buckets)
            self._meetings.passes.reduce(together.numbers)
            return
        except BaseException:
            self._sums.drop()
            self._end()
            raise
        self._end()

    @torch.no_grad()
    def reduce_new(self, start: int) -> None:
        """Make gradients the mean over ranks that the parameters from ``start`` on had already; collective."""
        communicator = self._sums.communicator
        if communicator.world_size == 1:
            return
        parameters = self._parts.parameters
        own = [parameter.grad is not None for parameter in parameters.tensors[start:]]
        everybody = communicator.all_gather_object((own, self.batch_weight))
        total_weight = sum(weight for _, weight in everybody)
        for index in range(start, len(parameters)):
            if any(had[index - start] for had, _ in everybody):
                if self._parts.accumulate > 1:
                    name = parameters.describe(index)
                    message = f"{name} has a gradient already: with accumulate add it after zero_grad()"
                    raise raised_on_all_ranks(RuntimeError(message))
                reduce_alone(self._sums, index, parameters.tensors[index], self.batch_weight / total_weight)

    def _launch_rest(self) -> None:
        """Meet the other ranks, if that was not done, and launch all buckets that are left; collective."""
        sums, buckets = self._sums, self._plan.buckets
        if sums.scale is None:
            self._prepare()
        if not sums.communicator.overlap:
            sums.batch(buckets).open(self._launch_all, self._begin)
            return
        if sums.scale is None:
            self._begin()
        if self._plan.order and self._meetings.passes.are_several():
            purpose = f"{self._parts.backward.num_no_sync} {PASSES}, the end of a backward"
            self._meetings.meet_to_reduce(purpose, self.batch_weight)
        for bucket in buckets[len(sums.launched) :]:
            sums.launch(bucket, sums.scale)

    def _launch_all(self, divisor: float) -> None:
        """Launch all buckets, with scales that are still to be divided by what this is not divided by; collective."""
        scale = self.batch_weight / divisor
        for bucket in self._plan.buckets:
            self._sums.launch(bucket, scale)

    def _prepare(self) -> None:
        """Make gradients ready that this backward has not come to; local."""
        listener = self._gradients.adding_listener
        if listener is not None:
            for index in set(range(len(self._parts.parameters))).difference(self._parts.backward.arrived):
                listener.before_adding(index)

    def _begin(self) -> float:
        """Meet all ranks, and return what weights are divided by; collective."""
        backward = self._parts.backward
        purpose = f"{backward.num_no_sync} {PASSES}"
        if backward.num_raised:
            purpose += f", {backward.num_raised} backward passes that raised"
        purpose += self._gradients.remark
        divisor = self._meetings.meet_to_reduce(purpose, self.batch_weight) * self._parts.accumulate
        self._sums.scale = self.batch_weight / divisor
        return divisor

    def _unpack(self) -> None:
        """Turn buckets into gradients when they are reduced, after asking all ranks whether anything has changed."""
        presence, tensors = self._parts.presence, self._parts.parameters.tensors
        had_gradient = presence.now()
        has_all = all(had_gradient)
        if not has_all and any(is_taken_away(tensors[index]) for index in self._parts.backward.arrived):
            self._sums.has_misfit = True
        num_changed, *flags = self._sums.finish(self._sums.launched, lambda: self._flags(had_gradient))
        reports = self._exchange_reports(had_gradient) if num_changed else None
        presence.had_gradient = had_gradient
        for bucket in self._plan.buckets:
            bucket.unpack()
        if not has_all:
            presence.give_gradients()
        self._gradients.finish_reduction(reports, flags)

    def _flags(self, had_gradient: bytes) -> list[float]:
        """Return numbers whose sum over ranks all are told; the first says that something has changed."""
        has_changed = (
            self._sums.has_misfit
            or self._sums.has_raised
            or self._parts.backward.rewritten is not None
            or had_gradient != self._parts.presence.had_gradient
            or self._parts.sparse.have_changed()
        )
        return [float(has_changed), *self._gradients.flags()]

    def _exchange_reports(self, had_gradient: bytes) -> list[Report]:
        """Tell all ranks what this one has seen, and raise on all what is an error on one; collective."""
        communicator, presence = self._sums.communicator, self._parts.presence
        own = presence.report(
            had_gradient,
            self._parts.backward.arrived,
            rank=communicator.rank,
            misfits=self._gradients.misfits(),
            has_raised=self._sums.has_raised,
            rewritten=self._parts.backward.rewritten,
        )
        reports = presence.exchange(communicator, own)
        self._parts.sparse.learn(reports)
        return reports

    def _end(self) -> None:
        self._sums.release(self._plan.buckets)
        self._sums.end()
        note_under_way(self, None)
        self._parts.backward.end_reduction()
        self._meetings.note = ""
        self._gradients.end_reduction()
        self.is_put_off = False
