"""ShardedReducer: turns gradients into their global mean, each rank its own part of it.

Note [Sharded gradients]
------------------------
Where ranks share the work of the step, each receives the mean of its own part of the gradients alone; the rest of
``p.grad`` keeps values of no meaning. Two things follow.

A later backward adds to gradients that were reduced in part. So reduced gradients are marked, and before autograd
adds to a marked one its own part is put aside and the whole set to zero; when the sum of what was added has been
reduced, the part is added to it. Several backward passes before a step are exact in this way, as they are where
everybody receives everything.

``GradScaler`` looks for infinite gradients on each rank by itself, and skips the step where it finds one. If any
rank's part has one, the others get one into the rest, so that all find it.

Buckets and their order are fixed (Note [Who owns what] in sharding.py); they are not planned anew but woken.
"""

import cmath
import contextlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.gradients.bucket import Bucket
from dpoptim.gradients.canaries import Canaries
from dpoptim.gradients.reducer import MARK, Reducer, Report
from dpoptim.gradients.sharding import Entry, Sharding
from dpoptim.partition import Piece

__all__ = ["ShardedReducer"]

# The mark of gradients that were the result of a reduction, and are what has come since. That of the result itself is
# the number of the parameter.
_PUT_ASIDE = "put aside"
# Gradients that are thrown away now and then, as those of the other network of a GAN, are nothing to warn of.
_MAX_LEFT_OUT = 3


class ShardedReducer(Reducer):
    """Reduces gradients to the ranks that own them (Note [Sharded gradients]).

    Parameters
    ----------
    sharding : Sharding
        Who owns what.
    communicator, roll_call, comm_hook, bucket_bytes, accumulate
        As of :class:`~dpoptim.gradients.reducer.Reducer`.

    Attributes
    ----------
    sleeping_buckets : list of Bucket
        Those that are not reduced, since no rank trains their parameters.
    canaries : Canaries
        Of gradients that are reduced in part.
    """

    def __init__(self, sharding: Sharding, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sleeping_buckets: list[Bucket] = []
        self._sharding = sharding
        self._without_mark: set[int] = set()
        self.canaries = Canaries()
        self._adds_to_reduced = self._has_step_left_out = self._has_warned = False
        self._num_left_out = 0
        self._changed: set[int] = set()
        self._identities: list[int] = []  # of all gradients, as they were reduced

    @property
    def all_buckets(self) -> list[Bucket]:
        """The plan with what is not reduced for now."""
        return [*self._buckets, *self.sleeping_buckets]

    @property
    def _looks_before_adding(self) -> bool:
        return True

    def note_cleared(self) -> None:
        """Take note that all gradients were cleared, perhaps in their place."""
        super().note_cleared()
        self._note_step_left_out()
        self._forget_what_was_put_aside()

    def _forget_what_was_put_aside(self) -> None:
        self.put_aside.clear()
        self._without_mark.clear()

    def before_adding(self, index: int) -> None:
        """Put a gradient's own part aside, if it was reduced in part; called before autograd adds to it."""
        gradient = self._parameters[index].grad
        if gradient is None:
            return
        mark = getattr(gradient, MARK, None)
        if mark == _PUT_ASIDE or index in self.put_aside:
            self._follow_changes(index, gradient)
            return
        if not isinstance(mark, int) and (
            not self._reduced_since_step or index in self._local or index in self._arrived or gradient.is_sparse
        ):
            return  # autograd's own, or there before the first reduction
        setattr(gradient, MARK, _PUT_ASIDE)
        self._adds_to_reduced = True
        if torch.is_grad_enabled():  # autograd is asked for a graph of the gradient, and adds into a new tensor
            self._without_mark.add(index)
        piece = self._own_piece(index)
        with torch.no_grad():
            if piece is not None:
                flat = gradient.reshape(-1)[piece.start : piece.stop]
                if gradient.is_contiguous():
                    self.put_aside[index] = flat.clone()
                else:
                    whole = torch.zeros_like(gradient, memory_format=torch.contiguous_format)
                    whole.view(-1)[piece.start : piece.stop] = flat
                    self.put_aside[index] = whole
            gradient.zero_()

    def _follow_changes(self, index: int, gradient: Tensor) -> None:
        """Forget what was put aside of a gradient that was set to zero; what else is done to it can't be followed."""
        if index not in self.put_aside or index not in self._local or gradient._version == self._local[index]:
            return
        if not gradient.any():
            del self.put_aside[index]
            return
        self._misfit = True
        self._changed.add(index)

    def _misfits(self, gradients: Mapping[int, Tensor]) -> dict[int, str]:
        changed = {
            index: f"the gradient of {self._describe(index)} was changed in place (on rank {self.communicator.rank}) "
            "between two backward passes of a step, the first of which was reduced: with shard and node_shared change "
            "it after the last one, or keep all but the last in no_sync()"
            for index in self._changed
        }
        return super()._misfits(gradients) | changed

    def before_making(self, index: int) -> None:
        """Forget what was put aside of a gradient that is gone; called before autograd makes another."""
        self.put_aside.pop(index, None)
        self._without_mark.discard(index)

    def _prepare(self) -> None:
        for index in set(range(len(self._parameters))).difference(self._arrived):
            self.before_adding(index)  # this backward has not come to it

    def _add_what_was_put_aside(self) -> None:
        for index, part in self.put_aside.items():
            gradient, piece = self._parameters[index].grad, self._own_piece(index)
            is_sum = index in self._without_mark or getattr(gradient, MARK, None) == _PUT_ASIDE
            if gradient is None or piece is None or not is_sum:
                continue  # it was set to None in between
            whole = part.shape == gradient.shape
            (gradient if whole else gradient.view(-1)[piece.start : piece.stop]).add_(part)
        self._forget_what_was_put_aside()

    def _end(self) -> None:
        super()._end()
        self._changed.clear()
        self._adds_to_reduced = False

    def _plan_for(self, start: int, groups: Sequence[int]) -> None:
        """Divide the new parameters; those that are frozen sleep."""
        entries = [
            Entry(index, self._parameters[index], groups[index - start])
            for index in reversed(range(start, len(self._parameters)))
            if self._parameters[index].is_floating_point() or self._parameters[index].is_complex()
        ]
        trained = [entry for entry in entries if entry.parameter.requires_grad]
        frozen = [entry for entry in entries if not entry.parameter.requires_grad]
        have_homes = self._have_homes(entry.index for entry in entries)
        for bucket in self._sharding.divide(trained, self._bucket_bytes, have_homes=have_homes):
            self._rouse(bucket)
        self.sleeping_buckets += self._sharding.divide(frozen, self._bucket_bytes, have_homes=have_homes)
        if have_homes:
            self._find_homes()
        self._order = [index for bucket in self._buckets for index in bucket.indices]

    def _flags(self, had_gradient: bytes) -> list[float]:
        (changed,) = super()._flags(had_gradient)
        self._is_finite = _are_finite([bucket.own for bucket in self._buckets])
        return [changed, float(not self._is_finite)]

    def _settle(self, reports: Sequence[Report] | None, flags: Sequence[float]) -> None:
        num_not_finite = flags[1]
        has_woken = reports is not None and self._wake(reports)
        if has_woken:
            num_not_finite += self._take_over_woken()
        if not self._adds_to_reduced:
            self._note_step_left_out()
        self._add_what_was_put_aside()
        if num_not_finite and self._is_finite:
            self._spoil()
        gradients = [parameter.grad for parameter in self._parameters]
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                setattr(gradient, MARK, index)
        self._identities = list(map(id, gradients))
        if has_woken and self._have_homes(self._place):
            self._find_homes()
        if not num_not_finite:
            self.canaries.set(self._parameters, self._buckets)
        self._has_step_left_out = not (num_not_finite or self._has_raised)

    def is_partial(self, gradient: Tensor) -> bool:
        """Whether this rank has the mean of its part of a gradient alone."""
        return isinstance(getattr(gradient, MARK, None), int)

    def without_marks(self) -> contextlib.AbstractContextManager[None]:
        """Let gradients have no infinite element within that was not computed."""
        return self.canaries.hidden()

    def checked_gradients(self) -> list[Tensor | None]:
        """Return all gradients; raise ``RuntimeError`` if somebody took them for whole ones; local."""
        self._has_step_left_out, self._num_left_out = False, 0
        gradients = super().checked_gradients()
        are_others = list(map(id, gradients)) != self._identities
        for index, gradient in enumerate(gradients if are_others else ()):
            mark = getattr(gradient, MARK, index)
            if mark != index and isinstance(mark, int):
                raise RuntimeError(
                    f"{self._describe(index)} was given the gradient of parameter '{self._names[mark]}', of which each "
                    "rank has another part: leave out shard and node_shared, or exchange the values before they are "
                    "reduced (in no_sync())"
                )
        if self.canaries.check(self._names):
            self._warn_of_looking("gradients were set to zero")
        return gradients

    def _note_step_left_out(self) -> None:
        """Take note that gradients are gone with which no step was made."""
        if self._has_step_left_out:
            self._has_step_left_out = False
            self._num_left_out += 1
            if self._num_left_out == _MAX_LEFT_OUT:
                self._warn_of_looking(f"no step was made with the gradients of {_MAX_LEFT_OUT} backward passes in turn")

    def _warn_of_looking(self, what: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{what}. If the program has looked at them first: each rank has the mean of its own part alone, and "
                "an infinite element stands in the rest, so that no gradient seems finite. Ask opt.clip_grad_norm_("
                "float('inf')), which is the global norm, or leave out shard and node_shared",
                stacklevel=2,
            )

    def _own_piece(self, index: int) -> Piece | None:
        """Return what this rank owns of a parameter."""
        if index not in self._place:
            return None
        bucket, position = self._place[index]
        return next((piece for piece in bucket.own_pieces if piece.position == position), None)

    def _rouse(self, bucket: Bucket) -> None:
        self._buckets.append(bucket)
        self._place |= {index: (bucket, position) for position, index in enumerate(bucket.indices)}

    def _wake(self, reports: Sequence[Report]) -> bool:
        """Rouse buckets of which a parameter is trained now; the same on all ranks."""
        for index, dims in self._sparse_dims.items():
            message = (
                f"{self._describe(index)} has a sparse gradient ({dims} sparse dims), which can't be divided among "
                "ranks: give it to an optimizer of its own, without shard and node_shared"
            )
            raise raised_on_all_ranks(RuntimeError(message))
        wanted = {index for report in reports for index, trained in enumerate(report.trainable) if trained}
        wanted |= set(self._had_anywhere)
        woken = [bucket for bucket in self.sleeping_buckets if not wanted.isdisjoint(bucket.indices)]
        for bucket in woken:
            self.sleeping_buckets.remove(bucket)
            self._rouse(bucket)
        return bool(woken)

    def _take_over_woken(self) -> float:
        """Reduce the buckets that were asleep when this reduction began; collective.

        Returns
        -------
        float
            How many ranks have an element that is not finite in their part of these.
        """
        num_reduced = len(self._launched)
        for bucket in self._buckets[num_reduced:]:
            self._launch(bucket, self._scale)
        launched = self._launched[num_reduced:]
        woken = [bucket for bucket, _ in launched]

        def are_not_finite() -> list[float]:
            return [not _are_finite([bucket.own for bucket in woken])]

        (num_not_finite,) = self._finish(launched, are_not_finite)
        for bucket in woken:
            bucket.unpack()
        self._give_gradients()
        self._is_finite = self._is_finite and _are_finite([bucket.own for bucket in woken])
        return num_not_finite

    def _spoil(self) -> None:
        """Put an infinite number where it is seen and not used: another rank's part has one."""
        for bucket in self._buckets:
            whole = {
                piece.position for piece in bucket.own_pieces if piece.numel == bucket.shapes[piece.position].numel()
            }
            for position, index in enumerate(bucket.indices):
                gradient = self._parameters[index].grad
                if gradient is None or not gradient.numel() or position in whole:
                    continue
                owned = next((p for p in bucket.own_pieces if p.position == position), None)
                element = 0 if owned is None or owned.start > 0 else owned.stop
                gradient[torch.unravel_index(torch.tensor(element, device="cpu"), gradient.shape)] = float("inf")
                return


def _are_finite(parts: Sequence[Tensor]) -> bool:
    """Whether all elements are; sums that are finite say so in one pass."""
    sums = [part.sum().item() for part in parts]
    return all(map(cmath.isfinite, sums)) or all(bool(torch.isfinite(part).all()) for part in parts)
