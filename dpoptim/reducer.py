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
has no callback at all: it joins the others in ``step``.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._C import _current_autograd_node, _current_graph_task_id
from torch.autograd import Variable

from dpoptim.bucket import Bucket
from dpoptim.comm_hooks import CommHook
from dpoptim.communicator import Communicator, Work
from dpoptim.errors import raised_on_all_ranks
from dpoptim.gradient_home import Home, is_large
from dpoptim.partition import aligned, group_by_size, start_offsets
from dpoptim.roll_call import RollCall

__all__ = ["Reducer", "Report", "add_hook", "is_reduced", "reducers_of"]

# What is sent beside backward is sent early: one bucket of hundreds of small tensors is full when backward ends.
_OVERLAPPED_BYTES = 1 << 19
# Where starting to send takes no thread's turn.
_POLLED_BYTES = 1 << 18


@dataclass(frozen=True)
class Report:
    """What one rank tells the others when something has changed (Note [Who had a gradient])."""

    had_gradient: bytes
    trainable: bytes
    sparse_dims: dict[int, int]
    misfits: dict[int, str]
    order: list[int]


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

    Attributes
    ----------
    batch_weight : float
        Weight of this rank's gradients in the mean.
    has_local_gradients : bool
        Whether gradients of a backward wait for their reduction.
    num_accumulated : int
        How many batches of the next mean are done.
    """

    def __init__(
        self,
        communicator: Communicator,
        roll_call: RollCall,
        *,
        comm_hook: CommHook,
        bucket_bytes: int,
        accumulate: int = 1,
    ) -> None:
        self.communicator = communicator
        self.batch_weight = 1.0
        self.has_local_gradients = False
        self.accumulate = accumulate
        self.num_accumulated = 0
        self._is_enabled = True
        self._roll_call = roll_call
        self._number = roll_call.enroll()
        self._comm_hook = comm_hook
        self._bucket_bytes = bucket_bytes
        self._sends_early = communicator.overlap
        if self._sends_early:
            self._bucket_bytes = min(bucket_bytes, _POLLED_BYTES if communicator.is_polled else _OVERLAPPED_BYTES)
        self._parameters: list[Tensor] = []
        self._names: list[str] = []
        self._handles: list[Any] = []
        # The plan, equal on all ranks.
        self._buckets: list[Bucket] = []
        self._place: dict[int, tuple[Bucket, int]] = {}
        self._sparse_dims: dict[int, int] = {}
        self._had_anywhere: list[int] = []
        self._order: list[int] = []
        # Where large gradients lie, by the parameters' numbers, and the hooks that they need.
        self._homes: dict[int, Home] = {}
        self._home_handles: list[Any] = []
        # Where this rank is.
        self._num_steps = 0
        self._num_no_sync = 0
        self._reduced_since_step = False
        self._tasks: set[int] = set()
        self._had_gradient: bytes | None = None
        # The reduction under way.
        self._scale: float | None = None
        self._arrived: list[int] = []
        self._launched: list[tuple[Bucket, Work]] = []
        self._misfit = False

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
                self._handles.append(add_hook(parameter, partial(_after_adding, self, index)))
        self._had_gradient = None
        self._plan_for(start, groups)

    def reduce_over(self, communicator: Communicator, roll_call: RollCall) -> None:
        """Reduce over these ranks from the next backward on; all of them call it, between the same two steps.

        They must have the same parameters. The plan of buckets is made anew, since other ranks may have seen others.
        """
        self._leave_homes()
        self.communicator = communicator
        self._sends_early = communicator.overlap
        self._roll_call = roll_call
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

    def check_gradients(self) -> None:
        """Raise ``RuntimeError`` if gradients are not what they were reduced to, where that can be seen; local."""

    def finish(self) -> None:
        """Reduce now what has not been reduced since the last step; collective in that case.

        That is: no parameter of this rank had a gradient, or gradients are still local after ``no_sync``, or the
        end of backward could not be seen.
        """
        if self._has_work and (self._tasks or self._num_no_sync or not self._reduced_since_step):
            self._reduce()

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
        return self._roll_call.answer(f"optimizer {self._number}, step {self._num_steps}, {purpose}", weight)

    @property
    def _has_work(self) -> bool:
        """Whether gradients are anything else than the mean as they come."""
        return self.communicator.world_size > 1 or self.accumulate > 1

    @property
    def is_accumulating(self) -> bool:
        """Whether the batch under way is not the last one of a mean."""
        return self.num_accumulated < self.accumulate - 1

    def count_batch(self) -> None:
        """Note that a batch of several is done."""
        self.num_accumulated += 1

    def count_step(self) -> None:
        """Note that the optimizer has made a step."""
        self.num_accumulated = 0
        self._num_steps += 1
        self._reduced_since_step = False

    def expect_backward(self) -> None:
        """Take gradients as not reduced again: a closure may run several times in one step."""
        self._reduced_since_step = False

    def detach(self) -> None:
        """Take the hooks off the parameters, which stay as they are; not collective."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._leave_homes()

    # ---------------------------------------------------------------- while backward runs

    def on_gradient(self, index: int, _: Tensor) -> None:
        """Take note that a parameter's gradient is ready; called by autograd with the parameter."""
        if index in self._homes:
            self._homes[index].take_in(self._parameters[index])
        if not self._is_enabled or self.num_accumulated < self.accumulate - 1:
            self.has_local_gradients = True
            return
        task = _current_graph_task_id()
        if task not in self._tasks:
            self._tasks.add(task)
            Variable._execution_engine.queue_callback(self._on_backward_end)
        self._arrived.append(index)
        if self._sends_early and self._order:
            self._launch_full_bucket(index)
            self.communicator.poll()

    def _launch_full_bucket(self, index: int) -> None:
        if self._scale is None:
            self._prepare()
            self._begin()
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

    def _on_backward_end(self) -> None:
        nested = _current_autograd_node() is not None
        if self._tasks and (not nested or len(self._arrived) >= len(self._place)):
            self._reduce()

    # ---------------------------------------------------------------- the reduction

    @torch.no_grad()
    def _reduce(self) -> None:
        """Make every gradient the weighted mean over ranks; collective."""
        try:
            if self._scale is None and self._can_announce():
                self._prepare()
                for bucket in self._buckets:
                    self._launch(bucket, self.batch_weight)
                self.communicator.divide_deferred(self.communicator.announce_by(self._begin))
            elif self._scale is None:
                self._prepare()
                self._begin()
            for bucket in self._buckets[len(self._launched) :]:
                self._launch(bucket, self._scale)
            self._take_over()
        finally:
            self._end()

    def _take_over(self) -> None:
        """Turn buckets into gradients when they are reduced, after asking all ranks whether anything has changed."""
        had_gradient = bytes([parameter.grad is not None for parameter in self._parameters])
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
        works = [work for _, work in launched]
        if not self._hook_defers:  # it may write to what others still read, so that it ends with meetings of its own
            for work in works:
                work.wait()
            works = []
        return self.communicator.finish(works, numbers)

    @property
    def _hook_defers(self) -> bool:
        """Whether the hook does nothing but start sums of the communicator's."""
        return getattr(self._comm_hook, "scales", False) and getattr(self._comm_hook, "defers", False)

    def _flags(self, had_gradient: bytes) -> list[float]:
        """Return numbers whose sum over ranks all are told; the first says that something has changed."""
        return [float(self._misfit or had_gradient != self._had_gradient)]

    def _settle(self, reports: Sequence[Report] | None, flags: Sequence[float]) -> None:  # noqa: ARG002  others need them
        """Do what is left when all buckets are reduced: what no bucket was planned for, and the next plan."""
        if reports is not None:
            self._reduce_outsiders()
        for index, sparse_dim in self._sparse_dims.items():
            if index in self._had_anywhere:
                self._reduce_sparse(index, sparse_dim)
        if reports is not None:
            self._replan(reports)

    def _can_announce(self) -> bool:
        """Whether the roll call can serve as the meeting at which the ranks of a node tell where gradients are."""
        buckets = self._buckets
        return (
            self._hook_defers
            and all(bucket.device.type == "cpu" for bucket in buckets)
            and self.communicator.defers(len(buckets), {bucket.dtype for bucket in buckets})
        )

    def _prepare(self) -> None:
        """Make gradients ready that this backward has not come to; local."""

    def _begin(self) -> float:
        """Meet all ranks, and return what weights are divided by; collective."""
        total_weight = self.meet(f"{self._num_no_sync} no_sync() blocks", self.batch_weight)
        divisor = total_weight * self.accumulate
        self._scale = self.batch_weight / divisor
        return divisor

    def _launch(self, bucket: Bucket, scale: float | None) -> None:
        assert scale is not None
        scaled = not getattr(self._comm_hook, "scales", False) or not self.communicator.scales_for_free
        if not bucket.pack(self._gradients(bucket), scale, scaled=scaled):
            self._misfit = True
        self._launched.append((bucket, self._comm_hook(self.communicator, bucket)))

    def _end(self) -> None:
        for bucket in self._buckets:
            bucket.num_pending = len(bucket.indices)
            bucket.release()
        self._tasks.clear()
        self._arrived.clear()
        self._launched.clear()
        self._scale = None
        self._misfit = False
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

    def _reduce_outsiders(self) -> None:
        """Reduce, one by one, gradients that no bucket was planned for; collective."""
        assert self._scale is not None
        for index in self._had_anywhere:
            if index in self._place or index in self._sparse_dims:
                continue
            parameter = self._parameters[index]
            bucket = Bucket([index], [parameter])
            bucket.pack([parameter.grad], self._scale)
            self._comm_hook(self.communicator, bucket).wait()
            bucket.unpack()
            if parameter.grad is None:
                parameter.grad = _in_layout_of(parameter, bucket.reduced(0))

    @torch.no_grad()
    def _reduce_sparse(self, index: int, sparse_dim: int) -> None:
        """Sum one sparse gradient: gather all ranks' indices and values; collective."""
        assert self._scale is not None
        parameter = self._parameters[index]
        gradient = parameter.grad
        if gradient is None:
            gradient = torch.zeros_like(parameter).to_sparse(sparse_dim)
        if not gradient.is_sparse or gradient.sparse_dim() != sparse_dim:
            gradient = gradient.to_dense().to_sparse(sparse_dim)
        gradient = gradient.coalesce()
        indices, values = gradient.indices(), gradient.values() * self._scale
        num_entries = self.communicator.all_gather_object(indices.shape[1])
        all_indices = self._gather_rows(indices.t(), num_entries).t()
        all_values = self._gather_rows(values, num_entries)
        with torch.sparse.check_sparse_tensor_invariants():  # said explicitly, or some versions of torch warn
            gathered = torch.sparse_coo_tensor(all_indices, all_values, parameter.shape)
        parameter.grad = gathered.coalesce()

    def _gather_rows(self, rows: Tensor, num_rows: Sequence[int]) -> Tensor:
        """Put every rank's rows below one another; collective."""
        gathered = rows.new_empty(sum(num_rows), *rows.shape[1:])
        row_numel = rows.shape[1:].numel()
        self.communicator.all_gather(gathered, rows.contiguous(), counts=[count * row_numel for count in num_rows])
        return gathered

    # ---------------------------------------------------------------- the plan

    def _default_order(self) -> list[int]:
        return list(reversed(range(len(self._parameters))))

    def _plan_for(self, start: int, groups: Sequence[int]) -> None:  # noqa: ARG002  others need them
        """Plan with the new parameters from ``start`` on, of these parameter groups."""
        self._order = []
        self._plan([index for index in self._default_order() if self._parameters[index].requires_grad])

    def _plan(self, order: Sequence[int]) -> None:
        """Divide these parameters among buckets; the same on all ranks (Note [Bucket order])."""
        together: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        groups: list[list[int]] = []
        have_homes = self._have_homes(order)
        for index in order:
            parameter = self._parameters[index]
            if is_large(parameter) and not (have_homes and parameter.device.type == "cpu"):
                groups.append([index])  # copying it into and out of a bucket is more than one message
            else:
                together.setdefault((parameter.dtype, parameter.device), []).append(index)
        for indices in together.values():
            sizes_bytes = [self._parameters[index].nbytes for index in indices]
            groups += [[indices[i] for i in group] for group in group_by_size(sizes_bytes, self._bucket_bytes)]
        when_ready = {index: when for when, index in enumerate(order)}
        groups.sort(key=lambda group: when_ready[group[-1]])
        self._buckets = [Bucket(group, [self._parameters[index] for index in group]) for group in groups]
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
        return has_large and self.communicator.lends()

    def _find_homes(self) -> None:
        """Let the gradients of the present plan lie in memory that the ranks share; collective."""
        self._leave_homes()
        buckets = [bucket for bucket in self._buckets if bucket.device.type == "cpu"]
        sizes_bytes = [aligned(bucket.numel * bucket.dtype.itemsize) for bucket in buckets]
        lent = self.communicator.lend(sum(sizes_bytes))
        if lent is None:
            return
        for bucket, start_bytes in zip(buckets, start_offsets(sizes_bytes), strict=True):
            self._homes |= bucket.lie_in(partial(lent.tensor, start_bytes))
        for index, home in self._homes.items():
            self._home_handles.append(add_hook(self._parameters[index], partial(_before_making, home)))

    def _leave_homes(self) -> None:
        """Let gradients lie where autograd makes them; local, between the same collectives of all ranks."""
        for handle in self._home_handles:
            handle.remove()
        self._home_handles.clear()
        self._homes.clear()
        self.communicator.lend(0)

    def _exchange_reports(self, had_gradient: bytes) -> list[Report]:
        """Tell all ranks what this one has seen, and raise on all what is an error on one; collective."""
        gradients = {i: p.grad for i, p in enumerate(self._parameters) if p.grad is not None}
        own = Report(
            had_gradient=had_gradient,
            trainable=bytes([parameter.requires_grad for parameter in self._parameters]),
            sparse_dims={i: g.sparse_dim() for i, g in gradients.items() if g.is_sparse},
            misfits=self._misfits(gradients),
            order=list(dict.fromkeys(self._arrived)) if self.communicator.rank == 0 else [],
        )
        reports: list[Report] = self.communicator.all_gather_object(own)
        for report in reports:
            for misfit in report.misfits.values():
                raise raised_on_all_ranks(RuntimeError(misfit))
        for report in reports:
            self._sparse_dims |= report.sparse_dims
        self._had_anywhere = [
            index for index in range(len(self._parameters)) if any(report.had_gradient[index] for report in reports)
        ]
        return reports

    def _misfits(self, gradients: Mapping[int, Tensor]) -> dict[int, str]:
        """Return what is wrong with this rank's gradients, by parameter."""
        return {
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
        wanted = [
            index
            for index in self._order
            if index not in self._sparse_dims and any(report.trainable[index] for report in reports)
        ]
        if (is_first and self._sends_early) or set(wanted) != set(self._place):
            self._plan(wanted)

    def _describe(self, index: int) -> str:
        return f"parameter '{self._names[index]}'"


class _GradientHook(partial[None]):
    """Tells a reducer that autograd has accumulated a parameter's gradient; without a call of its own."""


@torch.no_grad()
def _in_layout_of(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return a gradient in its parameter's memory layout, as autograd makes it: torch's fused steps rely on it."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def is_reduced(parameter: Tensor) -> bool:
    """Whether some reducer has its hook on this parameter."""
    return bool(reducers_of([parameter]))


def reducers_of(parameters: Iterable[Tensor]) -> set[Reducer]:
    """Return the reducers that have a hook on one of these parameters; local."""
    hooks = chain.from_iterable((parameter._post_accumulate_grad_hooks or {}).values() for parameter in parameters)
    return {hook.func.__self__ for hook in hooks if isinstance(hook, _GradientHook)}  # type: ignore[attr-defined]


def _before_making(home: Home, parameter: Tensor) -> Any:
    return parameter.register_hook(partial(home.before_adding, parameter))


def _after_adding(reducer: Reducer, index: int, parameter: Tensor) -> Any:
    return parameter.register_post_accumulate_grad_hook(_GradientHook(reducer.on_gradient, index))


def add_hook(parameter: Tensor, register: Callable[[Tensor], Any]) -> Any:
    """Register a hook, on a frozen parameter too: it may be unfrozen later."""
    frozen = not parameter.requires_grad
    parameter.requires_grad_(True)
    handle = register(parameter)
    if frozen:
        parameter.requires_grad_(False)
    return handle
