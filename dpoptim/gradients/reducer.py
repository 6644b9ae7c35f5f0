"""Reducer: turns each rank's gradients into their global mean by the time ``backward()`` returns.

It hears of gradients, and leads through a reduction. What it is made of has a file each (:mod:`.parts`), and what
becomes of the gradients is one of two (:mod:`.replicated_gradients`, :mod:`.sharded_gradients`).

Note [The end of backward]
--------------------------
The autograd engine runs a queued callback when its graph task ends. Reentrant checkpointing runs graph tasks
inside others: there the callback sees an evaluating node and leaves the work to the outer task's callback. If no
hook fires in the outer task any more, ``step`` finishes the reduction. A rank on which no parameter got a gradient
has no callback at all: it joins the others in ``step``. Of a backward that raises the callback is dropped (Note [A
backward that raised] in backward_passes.py).
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor
from torch._C import _current_autograd_node, _current_graph_task_id
from torch.autograd import Variable

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.roll_call import Alike, RollCall
from dpoptim.gradients.autograd_hooks import ParameterHooks
from dpoptim.gradients.backward_state import BackwardState, EndOfBackward
from dpoptim.gradients.bucket import Bucket
from dpoptim.gradients.comm_hook import CommHook
from dpoptim.gradients.homes import Homes
from dpoptim.gradients.meetings import Meetings
from dpoptim.gradients.parameters import Parameters, can_have_gradient, is_taken_away, version
from dpoptim.gradients.parts import Parts
from dpoptim.gradients.plan import Plan, largest_bucket_bytes
from dpoptim.gradients.presence import Presence, why_taken_away
from dpoptim.gradients.reduced_gradients import ReducedGradients
from dpoptim.gradients.reduction import Reduction
from dpoptim.gradients.sparse import SparseGradients
from dpoptim.gradients.sums import Sums

__all__ = ["Reducer"]


class Reducer:
    """Reduces the gradients of a list of parameters over the ranks of a communicator.

    Parameters
    ----------
    make_gradients : callable
        Returns what becomes of the gradients, of the reducer's parts.
    communicator : Communicator
        Used by this object alone. If it overlaps, full buckets are launched while backward runs; otherwise all are
        reduced when backward ends.
    roll_call : RollCall
        Of the same ranks.
    comm_hook : callable
        See :mod:`dpoptim.comm_hooks`.
    bucket_bytes : int
        A bucket of several gradients has at most so many bytes, and at most 512 KiB if the communicator
        overlaps, 256 KiB if it is polled.
    accumulate : int
        How many batches make one mean.
    hyper_parameters : Alike, optional
        What all ranks must set alike.

    Attributes
    ----------
    gradients : ReducedGradients
        What becomes of the gradients.
    num_accumulated : int
        How many batches of the next mean are done.
    """

    def __init__(
        self,
        make_gradients: Callable[[Parts], ReducedGradients],
        communicator: Communicator,
        roll_call: RollCall,
        *,
        comm_hook: CommHook,
        bucket_bytes: int,
        accumulate: int = 1,
        hyper_parameters: Alike | None = None,
    ) -> None:
        self.communicator = communicator
        self.accumulate = accumulate
        self.num_accumulated = 0
        self._parameters = Parameters()
        self._plan = Plan(largest_bucket_bytes(communicator, bucket_bytes))
        self._presence = Presence(self._parameters, self._plan)
        self._homes = Homes()
        self._backward = BackwardState()
        self._parts = Parts(
            parameters=self._parameters,
            plan=self._plan,
            presence=self._presence,
            sparse=SparseGradients(self._parameters),
            homes=self._homes,
            backward=self._backward,
            sums=Sums(communicator, comm_hook, self._parameters),
            accumulate=accumulate,
        )
        self.gradients = make_gradients(self._parts)
        self._meetings = Meetings(roll_call, self, hyper_parameters)
        self._reduction = Reduction(self._parts, self._meetings, self.gradients)
        self._hooks = ParameterHooks()
        # What `on_gradient` asks, of which every call counts.
        self._is_enabled = True
        self._tasks, self._arrived = self._backward.tasks, self._backward.arrived
        self._sends_early = False  # not before the order of buckets is known

    # ---------------------------------------------------------------- parameters and ranks

    def add_parameters(self, parameters: Sequence[Tensor], names: Sequence[str], groups: Sequence[int]) -> None:
        """Take over more parameters; all ranks with the same, in the same order, outside of backward.

        Parameters
        ----------
        parameters, names, groups : sequence
            The parameters, what to call each, and the number of its parameter group.
        """
        start = len(self._parameters)
        self._parameters.add(parameters, names, groups)
        if self._has_work:
            for index, parameter in enumerate(parameters, start):
                if can_have_gradient(parameter):
                    self._hooks.add(index, parameter, self, self.gradients.adding_listener)
        self._presence.had_gradient = None
        self.gradients.plan()
        self._decide_when_to_send()

    def reduce_new(self, start: int) -> None:
        """Make gradients the mean over ranks that the parameters from ``start`` on had already; collective."""
        self._reduction.reduce_new(start)

    def reduce_over(self, communicator: Communicator, roll_call: RollCall, comm_hook: CommHook) -> None:
        """Reduce over these ranks, by this hook, from the next backward on; all call it, between the same two steps.

        For :class:`~.replicated_gradients.ReplicatedGradients` alone: sharded ones keep their owners. All ranks must
        have the same parameters. The plan of buckets is made anew, since other ranks may have seen others.
        """
        self._homes.release(self.communicator)
        self.communicator = communicator
        self._parts.sums.move_to(communicator, comm_hook)
        self._meetings.move_to(roll_call)
        self._parts.sparse.dims.clear()
        self._presence.forget()
        self.gradients.plan()
        self._decide_when_to_send()

    def detach(self) -> None:
        """Take the hooks off the parameters, which stay as they are; not collective."""
        self._hooks.remove()
        self._meetings.leave()
        self._homes.release(self.communicator)

    @property
    def is_detached(self) -> bool:
        """Whether :meth:`detach` was called."""
        return self._meetings.is_detached

    @property
    def buckets(self) -> list[Bucket]:
        """The plan, the same on all ranks, in the order in which buckets are reduced."""
        return self._plan.buckets

    @property
    def all_buckets(self) -> list[Bucket]:
        """The plan with what is not reduced for now."""
        return self._plan.all_buckets

    @property
    def number(self) -> int:
        """Which optimizer on these ranks this is, in the order in which they were made."""
        return self._meetings.number

    @property
    def hyper_parameters(self) -> Alike | None:
        """What all ranks must set alike."""
        return self._meetings.hyper_parameters

    def meet(self, purpose: str, weight: float) -> float:
        """Meet all ranks for the same purpose and return the sum of their weights; collective (Note [Roll call])."""
        return self._meetings.meet(purpose, weight)

    # ---------------------------------------------------------------- between backward passes

    @property
    def batch_weight(self) -> float:
        """Weight of this rank's gradients in the mean."""
        return self._reduction.batch_weight

    @batch_weight.setter
    def batch_weight(self, value: float) -> None:
        self._reduction.batch_weight = value

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep gradients local within; all ranks enter and leave it at the same places."""
        before = self._is_enabled
        self._is_enabled = False
        self._backward.num_no_sync += 1
        try:
            yield
        finally:
            self._is_enabled = before

    @property
    def has_local_gradients(self) -> bool:
        """Whether gradients of a backward wait for their reduction."""
        return bool(self._backward.local)

    @property
    def waits_for_gradients(self) -> bool:
        """Whether no gradient was reduced since the last step, and that would happen in the next backward."""
        has_begun = self._backward.was_reduced or self._tasks or self._backward.num_no_sync
        return self._has_work and self._is_enabled and not has_begun and not self.is_accumulating

    @property
    def is_accumulating(self) -> bool:
        """Whether the batch under way is not the last one of a mean."""
        return self.num_accumulated < self.accumulate - 1

    def count_batch(self) -> None:
        """Note that a batch of several is done."""
        self.num_accumulated += 1

    def count_step(self) -> None:
        """Note that the optimizer has made a step."""
        self.gradients.note_step()
        self.num_accumulated = 0
        self._meetings.num_steps += 1
        self._backward.was_reduced = False

    def expect_backward(self) -> None:
        """Take gradients as not reduced again: a closure may run several times in one step."""
        self._backward.was_reduced = False

    def note_cleared(self) -> None:
        """Take note that all gradients were cleared, perhaps in their place."""
        self._meetings.passes.settle()
        if self._tasks:  # of a backward whose end could not be seen, on all ranks
            self._forget_backward()
        self._backward.local.clear()
        self._backward.was_reduced = False
        self.gradients.note_cleared()

    def finish(self) -> None:
        """Reduce now what has not been reduced since the last step; collective in that case.

        That is: no parameter of this rank had a gradient, or gradients are still local after ``no_sync``, or the
        end of backward could not be seen.
        """
        if not self._has_work:
            return
        backward = self._backward
        if self._tasks:
            self._meetings.passes.settle()
        if self._tasks or backward.num_no_sync or not backward.was_reduced or self._presence.are_cleared():
            backward.find_rewritten(self._parameters)
            if not (self._tasks or backward.num_no_sync):
                self._meetings.note = ", without a backward since the last step"
            self.reduce()

    @property
    def _has_work(self) -> bool:
        """Whether gradients are anything else than the mean as they come."""
        return not self._meetings.is_detached and (self.communicator.world_size > 1 or self.accumulate > 1)

    # ---------------------------------------------------------------- while backward runs

    def on_gradient(self, index: int, parameter: Tensor) -> None:
        """Take note that a parameter's gradient is ready; called by autograd with the parameter."""
        if index in self._homes:
            self._homes[index].adopt(parameter)
        if not self._is_enabled or self.num_accumulated < self.accumulate - 1:
            if is_taken_away(parameter):
                raise RuntimeError(why_taken_away(self._parameters.describe(index)))
            self._backward.local[index] = version(parameter.grad)
            return
        task = _current_graph_task_id()
        if task not in self._tasks:
            self._meetings.passes.reach(self._meetings.number)
            end = EndOfBackward(self.on_backward_end, task)
            self._tasks[task] = weakref.ref(end)
            Variable._execution_engine.queue_callback(end)
        self._arrived.append(index)
        if self._sends_early and self._hooks.is_last(index, parameter):
            self._reduction.launch_full_buckets(index)
            self.communicator.poll()

    def on_backward_end(self, task: int) -> None:
        """Reduce at the end of a backward, unless it is one inside another."""
        nested = _current_autograd_node() is not None
        if self._tasks and (not nested or len(self._arrived) >= len(self._plan.positions)):
            self.reduce()
        if task in self._tasks:
            self._tasks[task] = None

    # ---------------------------------------------------------------- a backward that raised

    def is_in_backward(self) -> bool:
        """Whether a backward has reached it that has not ended."""
        return bool(self._tasks)

    def has_begun(self) -> bool:
        """Whether a reduction is under way, since the middle of a backward."""
        return self._reduction.has_begun

    def settle(self) -> None:
        """End what a backward has begun that raised (Note [A backward that raised]); collective if it had begun."""
        if self._parts.sums.has_raised:
            return  # that is being done
        if self._tasks and self._backward.has_raised():
            self._backward.num_raised += 1
            self._forget_backward()

    def _forget_backward(self) -> None:
        """End a backward whose gradients nobody wants."""
        if self._reduction.has_begun:
            self._parts.sums.has_raised = True
            self.reduce()
        else:
            self._backward.forget()
            self._reduction.is_put_off = False

    # ---------------------------------------------------------------- the reduction

    def reduce(self) -> None:
        """Make every gradient the weighted mean over ranks; collective."""
        try:
            self._reduction.run()
        finally:
            self._decide_when_to_send()

    def _decide_when_to_send(self) -> None:
        self._sends_early = self.communicator.overlap and bool(self._plan.order)
