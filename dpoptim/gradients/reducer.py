"""Reducer: turns each rank's gradients into their global mean by the time ``backward()`` returns.

Note [Bucket order]
-------------------
Every reduction launches all buckets, in one fixed order, whatever gradients this rank has: no negotiation, no
deadlock. The order is the reverse of registration; with overlap, after the first reduction, it becomes the order in
which rank 0 saw gradients arrive, so that a bucket is full as early as possible.

Note [Who had a gradient]
-------------------------
A parameter without a gradient counts as zero. Whether *any* rank had one matters: if not, ``p.grad`` stays None, and
the optimizer skips it as torch does. Each rank remembers which of its parameters had one the last time. A reduction
ends with the sum of one number: how many ranks see a change. Only if it is not zero do the ranks exchange the
details. The same exchange finds late-unfrozen, frozen, sparse and moved parameters, and rebuilds the buckets.

Note [The end of backward]
--------------------------
The autograd engine runs a queued callback when its graph task ends. Reentrant checkpointing runs graph tasks
inside others: there the callback sees an evaluating node and leaves the work to the outer task's callback. If no
hook fires in the outer task any more, ``step`` finishes the reduction. A rank on which no parameter got a gradient
has no callback at all: it joins the others in ``step``. Of a backward that raises the callback is dropped (Note [A
backward that raised] in backward_passes.py).

Note [Means of several batches]
-------------------------------
With ``accumulate=k`` the mean is divided by k. What a second backward of the last batch adds would be divided alone, so
a gradient that was reduced is multiplied by k before more is added to it, and divided with the rest.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _current_autograd_node, _current_graph_task_id
from torch.autograd import Variable

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.comm.roll_call import Alike, DifferentPlacesError, RollCall
from dpoptim.comm.transport import Batch
from dpoptim.comm.work import Work
from dpoptim.gradients.autograd_hooks import hear_after_adding, hear_before_adding, hear_before_making
from dpoptim.gradients.backward_passes import BackwardPasses, common
from dpoptim.gradients.bucket import Bucket, gradient_dtype
from dpoptim.gradients.comm_hook import CommHook, allreduce
from dpoptim.gradients.homes import Home, is_large
from dpoptim.gradients.sparse import sum_sparse
from dpoptim.partition import aligned, group_by_size, start_offsets
from dpoptim.tuning import TUNING

__all__ = ["MARK", "REDUCED", "STEP", "Reducer", "Report"]

# An attribute of gradients, and its value where they are the result of a reduction.
MARK = "_dpoptim_mark"
REDUCED = "reduced"

# What is sent beside backward is sent early: one bucket of hundreds of small tensors is full when backward ends.
_OVERLAPPED_BYTES = TUNING.overlapped_bucket_bytes
# Where starting to send takes no thread's turn.
_POLLED_BYTES = TUNING.polled_bucket_bytes
# In the description of every place at which gradients are reduced.
_PASSES = "no_sync() blocks"
# And of that at which ranks meet to step together.
STEP = "a step"


@dataclass(frozen=True)
class Report:
    """What one rank tells the others when something has changed (Note [Who had a gradient])."""

    had_gradient: bytes
    trainable: bytes
    sparse_dims: dict[int, int]
    misfits: dict[int, str]
    order: list[int]
    has_raised: bool
    rewritten: str | None


class Reducer:
    """Reduces the gradients of a list of parameters over the ranks of a communicator.

    Parameters
    ----------
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
    hyper_parameters : Alike or None
        As given.
    batch_weight : float
        Weight of this rank's gradients in the mean.
    is_detached : bool
        Whether :meth:`detach` was called.
    has_local_gradients : bool
        Whether gradients of a backward wait for their reduction.
    num_accumulated : int
        How many batches of the next mean are done.
    put_aside : dict of int to Tensor
        Parts of gradients that were reduced before, by their parameters' numbers, where they are divided.
    """

    def __init__(
        self,
        communicator: Communicator,
        roll_call: RollCall,
        *,
        comm_hook: CommHook,
        bucket_bytes: int,
        accumulate: int = 1,
        hyper_parameters: Alike | None = None,
    ) -> None:
        self.communicator = communicator
        self.batch_weight = 1.0
        self.has_local_gradients = False
        self.accumulate = accumulate
        self.num_accumulated = 0
        self.is_detached = False
        self.put_aside: dict[int, Tensor] = {}
        self._is_enabled = True
        self._roll_call = roll_call
        self.hyper_parameters = hyper_parameters
        self._number = roll_call.enroll()
        self._passes = BackwardPasses.of(roll_call)
        self._passes.add(self._number, self)
        self._comm_hook = comm_hook
        self._hook_is_a_sum = comm_hook is allreduce
        self._bucket_bytes = bucket_bytes
        self._sends_early = communicator.overlap
        if self._sends_early:
            self._bucket_bytes = min(bucket_bytes, _POLLED_BYTES if communicator.is_polled else _OVERLAPPED_BYTES)
        self._parameters: list[Tensor] = []
        self._names: list[str] = []
        self._handles: list[Any] = []
        self._hook_ids: dict[int, int] = {}
        # The plan, equal on all ranks.
        self._buckets: list[Bucket] = []
        self._place: dict[int, tuple[Bucket, int]] = {}
        self._sparse_dims: dict[int, int] = {}
        self._is_dense: set[int] = set()  # of these, the parameters that had a dense gradient on some rank
        self._had_anywhere: list[int] = []
        self._order: list[int] = []
        # Where large gradients lie, by the parameters' numbers, and the hooks that they need.
        self._homes: dict[int, Home] = {}
        self._home_handles: list[Any] = []
        # Where this rank is.
        self._num_steps = 0
        self._num_no_sync = 0
        self._reduced_since_step = False
        self._tasks: dict[int, weakref.ref[_EndOfBackward] | None] = {}  # None when it has ended inside another
        self._num_raised = 0
        self._local: dict[int, int] = {}  # parameters with a gradient that is local, and its version
        self._note = ""
        self._rewritten: str | None = None
        self._had_gradient: bytes | None = None
        # A gradient of the last reduction, and its version, that show whether gradients were changed since.
        self._sample: tuple[Tensor, int] | None = None
        self._are_changed = False
        # The reduction under way.
        self._scale: float | None = None
        self._arrived: list[int] = []
        self._launched: list[tuple[Bucket, Work]] = []
        self._misfit = False
        self._has_raised = False
        self._is_early = self._is_put_off = False

    def add_parameters(self, parameters: Sequence[Tensor], names: Sequence[str], groups: Sequence[int]) -> None:
        """Take over more parameters; all ranks with the same, in the same order, outside of backward.

        Parameters
        ----------
        parameters, names, groups : sequence
            The parameters, what to call each, and the number of its parameter group.
        """
        start = len(self._parameters)
        self._parameters += parameters
        self._names += names
        if self._has_work:
            for index, parameter in enumerate(parameters, start):
                if not parameter.is_floating_point() and not parameter.is_complex():
                    continue  # can never have a gradient
                handle = hear_after_adding(self, index, parameter)
                self._handles.append(handle)
                self._hook_ids[index] = handle.id
                if self._looks_before_adding:
                    self._handles.append(hear_before_adding(self, index, parameter))
        self._had_gradient = None
        self._plan_for(start, groups)

    def reduce_over(self, communicator: Communicator, roll_call: RollCall) -> None:
        """Reduce over these ranks from the next backward on; all of them call it, between the same two steps.

        They must have the same parameters. The plan of buckets is made anew, since other ranks may have seen others.
        """
        self._leave_homes()
        self.communicator = communicator
        self._sends_early = communicator.overlap
        self._roll_call, self._passes = roll_call, BackwardPasses.of(roll_call)
        self._sparse_dims = {}
        self._had_anywhere = []
        self._order = []
        self._had_gradient = None
        self._plan([index for index in self._default_order() if self._parameters[index].requires_grad])

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep gradients local within; all ranks enter and leave it at the same places."""
        before = self._is_enabled
        self._is_enabled = False
        self._num_no_sync += 1
        try:
            yield
        finally:
            self._is_enabled = before

    @property
    def buckets(self) -> list[Bucket]:
        """The plan, the same on all ranks, in the order in which buckets are reduced."""
        return self._buckets

    @property
    def all_buckets(self) -> list[Bucket]:
        """The plan with what is not reduced for now."""
        return self._buckets

    def note_cleared(self) -> None:
        """Take note that all gradients were cleared, perhaps in their place."""
        self._passes.settle()
        if self._tasks:  # of a backward whose end could not be seen, on all ranks
            self._forget_backward()
        self._local.clear()
        self.has_local_gradients = False
        self._reduced_since_step = False

    def is_partial(self, gradient: Tensor) -> bool:  # noqa: ARG002  others have them
        """Whether this rank has the mean of its part of a gradient alone."""
        return False

    def without_marks(self) -> contextlib.AbstractContextManager[None]:
        """Let gradients have no element within that was not computed."""
        return contextlib.nullcontext()

    def checked_gradients(self) -> list[Tensor | None]:
        """Return the gradients of all parameters; local.

        Raises
        ------
        RuntimeError
            They are not what they were reduced to, where that can be seen.
        """
        return [parameter.grad for parameter in self._parameters]

    def finish(self) -> None:
        """Reduce now what has not been reduced since the last step; collective in that case.

        That is: no parameter of this rank had a gradient, or gradients are still local after ``no_sync``, or the
        end of backward could not be seen.
        """
        if not self._has_work:
            return
        if self._tasks:
            self._passes.settle()
        if self._tasks or self._num_no_sync or not self._reduced_since_step or self._are_cleared():
            self._rewritten = self._find_rewritten()
            if not (self._tasks or self._num_no_sync):
                self._note = ", without a backward since the last step"
            self.reduce()

    def _are_cleared(self) -> bool:
        """Whether all gradients are gone that the last reduction has left."""
        parameters, had = self._parameters, self._had_anywhere
        if not had or parameters[had[0]].grad is not None:
            return False
        return all(parameter.grad is None for parameter in parameters)

    @property
    def number(self) -> int:
        """Which optimizer on these ranks this is, in the order in which they were made."""
        return self._number

    @property
    def waits_for_gradients(self) -> bool:
        """Whether no gradient was reduced since the last step, and that would happen in the next backward."""
        has_begun = self._reduced_since_step or self._tasks or self._num_no_sync
        return self._has_work and self._is_enabled and not has_begun and not self.is_accumulating

    def meet(self, purpose: str, weight: float) -> float:
        """Meet all ranks for the same purpose and return the sum of their weights; collective (Note [Roll call])."""
        if self.is_detached:
            raise raised_on_all_ranks(
                RuntimeError(f"this DataParallelOptimizer was detached (asked for {purpose}): construct another one")
            )
        self._passes.settle()
        while True:
            try:
                return self._roll_call.check_in(self._place_of(purpose), weight, self.hyper_parameters, self._note)
            except DifferentPlacesError as error:
                self._find_common(purpose, error)

    def _place_of(self, purpose: str) -> str:
        return f"optimizer {self._number}, step {self._num_steps}, {purpose}"

    @property
    def _has_work(self) -> bool:
        """Whether gradients are anything else than the mean as they come."""
        return not self.is_detached and (self.communicator.world_size > 1 or self.accumulate > 1)

    @property
    def _looks_before_adding(self) -> bool:
        """Whether autograd is to say when it adds to a gradient."""
        return self.accumulate > 1

    @property
    def is_accumulating(self) -> bool:
        """Whether the batch under way is not the last one of a mean."""
        return self.num_accumulated < self.accumulate - 1

    def count_batch(self) -> None:
        """Note that a batch of several is done."""
        self.num_accumulated += 1

    def count_step(self) -> None:
        """Note that the optimizer has made a step."""
        if self._sample is not None:
            gradient, version = self._sample
            self._are_changed = gradient._version != version
            self._sample = None
        self.num_accumulated = 0
        self._num_steps += 1
        self._reduced_since_step = False

    def expect_backward(self) -> None:
        """Take gradients as not reduced again: a closure may run several times in one step."""
        self._reduced_since_step = False

    @torch.no_grad()
    def reduce_new(self, start: int) -> None:
        """Make gradients the mean over ranks that the parameters from ``start`` on had already; collective."""
        if self.communicator.world_size == 1:
            return
        own = [parameter.grad is not None for parameter in self._parameters[start:]]
        everybody = self.communicator.all_gather_object((own, self.batch_weight))
        total_weight = sum(weight for _, weight in everybody)
        for index in range(start, len(self._parameters)):
            if any(had[index - start] for had, _ in everybody):
                if self.accumulate > 1:
                    message = (
                        f"{self._describe(index)} has a gradient already: with accumulate add it after zero_grad()"
                    )
                    raise raised_on_all_ranks(RuntimeError(message))
                self._reduce_outsider(index, self.batch_weight / total_weight)

    def detach(self) -> None:
        """Take the hooks off the parameters, which stay as they are; not collective."""
        self.is_detached = True
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._passes.remove(self._number)
        self._leave_homes()

    # ---------------------------------------------------------------- while backward runs

    def on_gradient(self, index: int, parameter: Tensor) -> None:
        """Take note that a parameter's gradient is ready; called by autograd with the parameter."""
        if index in self._homes:
            self._homes[index].adopt(parameter)
        if not self._is_enabled or self.num_accumulated < self.accumulate - 1:
            if self._is_taken_away(index):
                raise RuntimeError(self._why_taken_away(index))
            self.has_local_gradients = True
            self._local[index] = _version(parameter.grad)
            return
        task = _current_graph_task_id()
        if task not in self._tasks:
            self._passes.reach(self._number)
            end = _EndOfBackward(self, task)
            self._tasks[task] = weakref.ref(end)
            Variable._execution_engine.queue_callback(end)
        self._arrived.append(index)
        if self._sends_early and self._order and self._is_last_hook(index):
            self._launch_full_bucket(index)
            self.communicator.poll()

    def _is_taken_away(self, index: int) -> bool:
        """Whether a gradient that has arrived is gone, by a hook of the user's."""
        parameter = self._parameters[index]
        return parameter.grad is None and len(parameter._post_accumulate_grad_hooks or ()) > 1

    def _why_taken_away(self, index: int) -> str:
        return (
            f"the gradient of {self._describe(index)} was taken away before it could be reduced, by a hook of "
            "register_post_accumulate_grad_hook, as optimizers that step within backward() do: each rank would "
            "step with its own gradient. Use an optimizer that steps in step()"
        )

    def before_adding(self, index: int) -> None:
        """Undo the division by the number of batches (Note [Means of several batches]); called by autograd."""
        gradient = self._parameters[index].grad
        if gradient is not None and getattr(gradient, MARK, None) == REDUCED:
            setattr(gradient, MARK, None)
            with torch.no_grad():
                gradient.mul_(self.accumulate)

    def before_making(self, index: int) -> None:
        """Take note that autograd is about to make a gradient."""

    def _is_last_hook(self, index: int) -> bool:
        """Whether no hook of the user's follows, which may change the gradient; else it goes first from now on."""
        hooks = self._parameters[index]._post_accumulate_grad_hooks
        if hooks is None or len(hooks) == 1:
            return True
        own = self._hook_ids[index]
        if next(reversed(hooks)) == own:
            return True
        hooks[own] = hooks.pop(own)
        return False

    def _launch_full_bucket(self, index: int) -> None:
        if self._is_put_off:
            return
        if self._scale is None:
            self._prepare()
            self._is_early = True
            try:
                self._begin()
            except _PutOffError:
                self._is_put_off = True
                return
            finally:
                self._is_early = False
        if index not in self._place:
            return
        bucket, _ = self._place[index]
        bucket.num_pending -= 1
        if bucket.num_pending < 0:
            raise RuntimeError(
                f"{self._describe(index)} received a second gradient in one backward after its bucket was sent "
                "(a parameter shared by reentrant checkpoints): use overlap=False"
            )
        while len(self._launched) < len(self._buckets):
            bucket = self._buckets[len(self._launched)]
            if bucket.num_pending:
                break
            with torch.no_grad():
                self._launch(bucket, self._scale)

    def on_backward_end(self, task: int) -> None:
        """Reduce at the end of a backward, unless it is one inside another."""
        nested = _current_autograd_node() is not None
        if self._tasks and (not nested or len(self._arrived) >= len(self._place)):
            self.reduce()
        if task in self._tasks:
            self._tasks[task] = None

    # ---------------------------------------------------------------- a backward that raised

    def is_in_backward(self) -> bool:
        """Whether a backward has reached it that has not ended."""
        return bool(self._tasks)

    def has_begun(self) -> bool:
        """Whether a reduction is under way, since the middle of a backward."""
        return self._scale is not None

    def settle(self) -> None:
        """End what a backward has begun that raised (Note [A backward that raised]); collective if it had begun."""
        if self._has_raised:
            return  # that is being done
        if self._tasks and any(end is not None and end() is None for end in self._tasks.values()):
            self._num_raised += 1
            self._forget_backward()

    def _forget_backward(self) -> None:
        """End a backward whose gradients nobody wants."""
        if self._scale is None:
            self._tasks.clear()
            self._arrived.clear()
            self._is_put_off = False
            self._reduced_since_step = False
            return
        self._has_raised = True
        self.reduce()

    # ---------------------------------------------------------------- the reduction

    @torch.no_grad()
    def reduce(self) -> None:
        """Make every gradient the weighted mean over ranks; collective."""
        try:
            self._reduce_alone()
        except _TogetherError as together:
            self._release()
            self._passes.reduce(together.numbers)
            return
        except BaseException:
            self._end()
            raise
        self._end()

    def _reduce_alone(self) -> None:
        if self._scale is None:
            self._prepare()
        if self._sends_early:
            self._launch_the_rest()
        else:
            self._batch(self._buckets).open(self._launch_all, self._begin)
        self._take_over()

    def _launch_all(self, divisor: float) -> None:
        for bucket in self._buckets:
            self._launch(bucket, self.batch_weight / divisor)

    def _launch_the_rest(self) -> None:
        """Launch what was not launched while backward ran; collective."""
        if self._scale is None:
            self._begin()
        if self._order and self._passes.are_several():
            self._meet_to_reduce(f"{self._num_no_sync} {_PASSES}, the end of a backward")
        for bucket in self._buckets[len(self._launched) :]:
            self._launch(bucket, self._scale)

    def _batch(self, buckets: Sequence[Bucket]) -> Batch:
        """Return the batch of these buckets' sums: of the communicator's own, or of whatever a hook does."""
        if not self._hook_is_a_sum or any(bucket.device.type != "cpu" for bucket in buckets):
            return self.communicator.batch(None)
        return self.communicator.batch(len(buckets), {bucket.dtype for bucket in buckets})

    def _take_over(self) -> None:
        """Turn buckets into gradients when they are reduced, after asking all ranks whether anything has changed."""
        had_gradient = bytes([parameter.grad is not None for parameter in self._parameters])
        if not all(had_gradient) and any(map(self._is_taken_away, self._arrived)):
            self._misfit = True
        flags = self._finish(self._launched, lambda: self._flags(had_gradient))
        reports = self._exchange_reports(had_gradient) if flags[0] else None
        self._had_gradient = had_gradient
        for bucket in self._buckets:
            bucket.unpack()
        if not all(had_gradient):
            self._give_gradients()
        self._settle(reports, flags)

    def _finish(self, launched: Sequence[tuple[Bucket, Work]], numbers: Callable[[], Sequence[float]]) -> list[float]:
        """Wait until these buckets are reduced, then sum numbers over all ranks; collective."""
        batch = self._batch([bucket for bucket, _ in launched])
        return batch.close([work for _, work in launched], numbers)

    def _flags(self, had_gradient: bytes) -> list[float]:
        """Return numbers whose sum over ranks all are told; the first says that something has changed."""
        changed = self._misfit or self._has_raised or had_gradient != self._had_gradient
        if not changed and self._sparse_dims:
            changed = any((g := self._parameters[i].grad) is not None and not g.is_sparse for i in self._sparse_dims)
        return [float(changed or self._rewritten is not None)]

    def _find_rewritten(self) -> str | None:
        """Say which gradient was changed between a backward in ``no_sync`` and a reduction that no backward began."""
        if self._tasks or not self._local:
            return None
        for index, version in self._local.items():
            gradient = self._parameters[index].grad
            if gradient is not None and _version(gradient) != version:
                return self._names[index]
        return None

    def _settle(self, reports: Sequence[Report] | None, flags: Sequence[float]) -> None:  # noqa: ARG002  others need them
        """Do what is left when all buckets are reduced: what no bucket was planned for, and the next plan."""
        if reports is not None:
            self._reduce_outsiders(reports)
        for index, sparse_dim in self._sparse_dims.items():
            if index in self._had_anywhere and index not in self._is_dense:
                assert self._scale is not None
                parameter = self._parameters[index]
                parameter.grad = sum_sparse(self.communicator, parameter, sparse_dim, self._scale)
        if reports is not None:
            self._replan(reports)
        if self.accumulate > 1:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    setattr(parameter.grad, MARK, REDUCED)
        self._take_sample()

    def _take_sample(self) -> None:
        """Take note of a gradient, to see whether gradients are changed before the step."""
        gradient = self._parameters[self._had_anywhere[0]].grad if self._had_anywhere else None
        self._sample = None if gradient is None or gradient.is_sparse else (gradient, _version(gradient))

    def _prepare(self) -> None:
        """Make gradients ready that this backward has not come to; local."""
        if self._looks_before_adding:
            for index in set(range(len(self._parameters))).difference(self._arrived):
                self.before_adding(index)

    def _begin(self) -> float:
        """Meet all ranks, and return what weights are divided by; collective."""
        purpose = f"{self._num_no_sync} {_PASSES}"
        if self._num_raised:
            purpose += f", {self._num_raised} backward passes that raised"
        if self._are_changed:
            purpose += ", gradients changed between the reduction and the last step"
        total_weight = self._meet_to_reduce(purpose)
        divisor = total_weight * self.accumulate
        self._scale = self.batch_weight / divisor
        return divisor

    def _meet_to_reduce(self, purpose: str) -> float:
        if not self._is_early:
            self._passes.finish_others(self._number)
        return self.meet(purpose, self.batch_weight)

    def _find_common(self, purpose: str, error: DifferentPlacesError) -> None:
        """Find what all ranks can reduce now (Note [Ranks that use other branches]), or raise the error; collective.

        Returns where this rank is to meet the others again.
        """
        if not all(_PASSES in place or place.endswith(f", {STEP}") for place in error.places):
            raise error
        reduces = _PASSES in purpose
        place = self._place_of(purpose)
        own = self._passes.whereabouts(self._number, place, reduces=reduces, is_early=self._is_early)
        everybody = self._roll_call.communicator.all_gather_object(own)
        if any(where.is_early for where in everybody):  # who is in the middle of a backward comes back at its end
            if self._is_early:
                raise _PutOffError
            return
        numbers = common(everybody)
        if numbers is None:
            raise error
        if reduces:
            raise _TogetherError(numbers)
        self._passes.reduce(numbers)

    def _launch(self, bucket: Bucket, scale: float | None) -> None:
        assert scale is not None
        scaled = not (self._hook_is_a_sum and self.communicator.scales_for_free)
        if not bucket.pack(self._gradients(bucket), scale, scaled=scaled):
            self._misfit = True
        self._launched.append((bucket, self._comm_hook(self.communicator, bucket)))

    def _release(self) -> None:
        """Let go of gradients that were not reduced after all."""
        for bucket in self._buckets:
            bucket.num_pending = len(bucket.indices)
            bucket.release()
        self._launched.clear()
        self._misfit = False

    def _end(self) -> None:
        self._release()
        self._tasks.clear()
        self._arrived.clear()
        self._local.clear()
        self._scale = None
        self._has_raised = self._is_put_off = self._are_changed = False
        self._note, self._rewritten = "", None
        self._num_no_sync = 0
        self.has_local_gradients = False
        self._reduced_since_step = True

    def _gradients(self, bucket: Bucket) -> list[Tensor | None]:
        return [self._parameters[index].grad for index in bucket.indices]

    def _give_gradients(self) -> None:
        """Set the gradients of parameters that had one on other ranks only."""
        for index in self._had_anywhere:
            if self._parameters[index].grad is None and index in self._place:
                bucket, position = self._place[index]
                self._parameters[index].grad = _in_layout_of(self._parameters[index], bucket.reduced(position))

    def _reduce_outsiders(self, reports: Sequence[Report]) -> None:
        """Reduce, one by one, gradients that no bucket was planned for; collective.

        Those too that are sparse on some ranks and dense on others, whose sum is dense.
        """
        assert self._scale is not None
        self._is_dense = _dense_somewhere(reports, self._sparse_dims)
        for index in self._had_anywhere:
            if index in self._is_dense or not (index in self._place or index in self._sparse_dims):
                self._reduce_outsider(index, self._scale, is_planned=index in self._place)

    def _reduce_outsider(self, index: int, scale: float, *, is_planned: bool = False) -> None:
        parameter = self._parameters[index]
        gradient, summed = parameter.grad, None
        if is_planned:  # what was dense has been summed
            bucket, position = self._place[index]
            summed = bucket.reduced(position)
            gradient = gradient if gradient is not None and gradient.is_sparse else None
        if gradient is not None and gradient.is_sparse:
            gradient = gradient.to_dense()
        alone = Bucket([index], [_like_gradient(parameter)])
        alone.pack([gradient], scale)
        self._comm_hook(self.communicator, alone).wait()
        mean = _in_layout_of(parameter, alone.reduced(0))
        if summed is not None:
            mean += summed
        if parameter.grad is None or parameter.grad.is_sparse:
            parameter.grad = mean
        else:
            parameter.grad.copy_(mean)

    # ---------------------------------------------------------------- the plan

    def _default_order(self) -> list[int]:
        return list(reversed(range(len(self._parameters))))

    def _plan_for(self, start: int, groups: Sequence[int]) -> None:  # noqa: ARG002  others need them
        """Plan with the new parameters from ``start`` on, of these parameter groups."""
        self._order = []
        self._plan([index for index in self._default_order() if self._parameters[index].requires_grad])

    def _plan(self, order: Sequence[int]) -> None:
        """Divide these parameters among buckets; the same on all ranks (Note [Bucket order])."""
        gradients = {index: _like_gradient(self._parameters[index]) for index in order}
        together: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        groups: list[list[int]] = []
        have_homes = self._have_homes(order)
        for index in order:
            parameter = gradients[index]
            if is_large(parameter) and not (have_homes and parameter.device.type == "cpu"):
                groups.append([index])  # copying it into and out of a bucket is more than one message
            else:
                together.setdefault((gradient_dtype(parameter), parameter.device), []).append(index)
        for indices in together.values():
            sizes_bytes = [gradients[index].nbytes for index in indices]
            groups += [[indices[i] for i in group] for group in group_by_size(sizes_bytes, self._bucket_bytes)]
        when_ready = {index: when for when, index in enumerate(order)}
        groups.sort(key=lambda group: when_ready[group[-1]])
        self._buckets = [Bucket(group, [gradients[index] for index in group]) for group in groups]
        self._place = {
            index: (bucket, position) for bucket in self._buckets for position, index in enumerate(bucket.indices)
        }
        if have_homes:
            self._find_homes()
        else:
            self._leave_homes()

    def _have_homes(self, indices: Iterable[int]) -> bool:
        """Whether the gradients of these parameters are to lie in memory that the ranks share; collective."""
        parameters = [self._parameters[index] for index in indices]
        has_large = any(is_large(p) and p.device.type == "cpu" for p in parameters)
        return has_large and self.communicator.has_memory()

    def _find_homes(self) -> None:
        """Let the gradients of the present plan lie in memory that the ranks share; collective."""
        self._leave_homes()
        buckets = [bucket for bucket in self._buckets if bucket.device.type == "cpu"]
        sizes_bytes = [aligned(bucket.numel * bucket.dtype.itemsize) for bucket in buckets]
        lent = self.communicator.allocate(sum(sizes_bytes))
        if lent is None:
            return
        for bucket, start_bytes in zip(buckets, start_offsets(sizes_bytes), strict=True):
            self._homes |= bucket.use_memory(partial(lent.tensor, start_bytes))
        for index, home in self._homes.items():
            self._home_handles.append(hear_before_making(home, self._parameters[index]))

    def _leave_homes(self) -> None:
        """Let gradients lie where autograd makes them; local, between the same collectives of all ranks."""
        for handle in self._home_handles:
            handle.remove()
        self._home_handles.clear()
        self._homes.clear()
        self.communicator.allocate(0)

    def _exchange_reports(self, had_gradient: bytes) -> list[Report]:
        """Tell all ranks what this one has seen, and raise on all what is an error on one; collective."""
        gradients = {i: p.grad for i, p in enumerate(self._parameters) if p.grad is not None}
        own = Report(
            had_gradient=had_gradient,
            trainable=bytes([parameter.requires_grad for parameter in self._parameters]),
            sparse_dims={i: g.sparse_dim() for i, g in gradients.items() if g.is_sparse},
            misfits=self._misfits(gradients),
            order=list(dict.fromkeys(self._arrived)) if self.communicator.rank == 0 else [],
            has_raised=self._has_raised,
            rewritten=self._rewritten,
        )
        reports: list[Report] = self.communicator.all_gather_object(own)
        raised = [rank for rank, report in enumerate(reports) if report.has_raised]
        if 0 < len(raised) < len(reports):
            raise raised_on_all_ranks(
                RuntimeError(
                    f"a backward raised an error on ranks {', '.join(map(str, raised))} and was caught there, while "
                    "others went on: leave out a batch on all ranks, or end the program"
                )
            )
        for report in reports:
            for misfit in report.misfits.values():
                raise raised_on_all_ranks(RuntimeError(misfit))
        for rank, report in enumerate(reports):
            self._sparse_dims |= report.sparse_dims
            if report.rewritten is not None:
                warnings.warn(
                    f"the gradient of parameter '{report.rewritten}' was changed on rank {rank} between a backward in "
                    "no_sync() and its reduction in step(). Torch's clip_grad_norm_ sees this rank's gradients alone "
                    "there: call opt.clip_grad_norm_, which reduces them first",
                    stacklevel=2,
                )
                break
        self._had_anywhere = [
            index for index in range(len(self._parameters)) if any(report.had_gradient[index] for report in reports)
        ]
        return reports

    def _misfits(self, gradients: Mapping[int, Tensor]) -> dict[int, str]:
        """Return what is wrong with this rank's gradients, by parameter."""
        taken_away = {index: self._why_taken_away(index) for index in self._arrived if self._is_taken_away(index)}
        return taken_away | {
            index: f"{self._describe(index)} is {gradient.dtype} on {gradient.device}, but was {bucket.dtype} on "
            f"{bucket.device} when the optimizer was constructed (on rank {self.communicator.rank}): move or convert "
            "the model first, then construct the optimizer"
            for index, (bucket, _) in sorted(self._place.items(), key=lambda item: item[0])
            if (gradient := gradients.get(index)) is not None and not gradient.is_sparse and not bucket.fits(gradient)
        }

    def _replan(self, reports: Sequence[Report]) -> None:
        """Put the parameters that are trainable on any rank into buckets, in the order that is best for all."""
        is_first = not self._order
        if is_first:
            seen = reports[0].order
            self._order = seen + [index for index in self._default_order() if index not in set(seen)]
        for index in self._is_dense:
            if not any(index in report.sparse_dims for report in reports):
                del self._sparse_dims[index]  # dense on all ranks
        wanted = [
            index
            for index in self._order
            if index not in self._sparse_dims and any(report.trainable[index] for report in reports)
        ]
        if (is_first and self._sends_early) or set(wanted) != set(self._place):
            self._plan(wanted)

    def _describe(self, index: int) -> str:
        return f"parameter '{self._names[index]}'"


class _PutOffError(Exception):
    """Sending has to wait for the end of backward."""


class _TogetherError(Exception):
    """All ranks reduce these optimizers now."""

    def __init__(self, numbers: frozenset[int]) -> None:
        super().__init__(numbers)
        self.numbers = numbers


class _EndOfBackward:
    """Called when a backward ends well, and gone when it does not."""

    def __init__(self, reducer: Reducer, task: int) -> None:
        self._reducer, self._task = reducer, task

    def __call__(self) -> None:
        self._reducer.on_backward_end(self._task)


@torch.no_grad()
def _in_layout_of(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return a gradient in its parameter's memory layout, as autograd makes it: torch's fused steps rely on it."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)


def _like_gradient(parameter: Tensor) -> Tensor:
    """Return a tensor with the shape, dtype and device of a gradient, perhaps without memory of its own."""
    dtype = gradient_dtype(parameter)
    if dtype == parameter.dtype:
        return parameter
    return torch.empty((), dtype=dtype, device=parameter.device).expand(parameter.shape)


def _version(gradient: Tensor | None) -> int:
    """Return a number that changes when a gradient is written to in place; -1 if it has none."""
    return -1 if gradient is None or gradient.is_inference() else gradient._version


def _dense_somewhere(reports: Sequence[Report], indices: Iterable[int]) -> set[int]:
    """Return which of these parameters have a dense gradient on some rank."""
    return {i for i in indices if any(report.had_gradient[i] and i not in report.sparse_dims for report in reports)}
