"""CarryOver: parts of gradients that were reduced, put aside while more is added to the gradients. Local.

Note [Adding to reduced parts]
------------------------------
A backward may add to gradients of which this rank has the mean of its own part alone (Note [Sharded gradients] in
sharded_gradients.py). So reduced gradients are marked, and before autograd adds to a marked one its own part is put
aside and the whole set to zero; when the sum of what was added has been reduced, the part is added to it. Several
backward passes before a step are exact in this way, as they are where everybody receives everything.
"""

import torch
from torch import Tensor

from dpoptim.gradients.parts import Parts
from dpoptim.gradients.reduced_gradients import MARK

__all__ = ["CarryOver"]

# The mark of gradients that were the result of a reduction, and are what has come since.
_PUT_ASIDE = "put aside"


class CarryOver:
    """What is put aside of the gradients of one reducer (Note [Adding to reduced parts]).

    A gradient whose mark is the number of a parameter is the result of a reduction.

    Parameters
    ----------
    parts : Parts
        The reducer's.

    Attributes
    ----------
    put_aside : dict of int to Tensor
        Parts of gradients that were reduced before, by their parameters' numbers.
    adds_to_reduced : bool
        Whether something was added to gradients since the last reduction that are its result.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts, self._tensors = parts, parts.parameters.tensors
        self.put_aside: dict[int, Tensor] = {}
        self.adds_to_reduced = False
        self._without_mark: set[int] = set()
        self._changed: set[int] = set()

    def before_adding(self, index: int) -> None:
        """Put a gradient's own part aside, if it was reduced in part; called before autograd adds to it."""
        gradient = self._tensors[index].grad
        if gradient is None:
            return
        mark = getattr(gradient, MARK, None)
        if mark == _PUT_ASIDE or index in self.put_aside:
            self._follow_changes(index, gradient)
            return
        backward = self._parts.backward
        if not isinstance(mark, int) and (
            not backward.was_reduced or index in backward.local or index in backward.arrived or gradient.is_sparse
        ):
            return  # autograd's own, or there before the first reduction
        setattr(gradient, MARK, _PUT_ASIDE)
        self.adds_to_reduced = True
        if torch.is_grad_enabled():  # autograd is asked for a graph of the gradient, and adds into a new tensor
            self._without_mark.add(index)
        piece = self._parts.plan.own_piece(index)
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

    def before_making(self, index: int) -> None:
        """Forget what was put aside of a gradient that is gone; called before autograd makes another."""
        self.put_aside.pop(index, None)
        self._without_mark.discard(index)

    def misfits(self) -> dict[int, str]:
        """Return what is wrong with gradients that were changed in between, by parameter."""
        parameters, rank = self._parts.parameters, self._parts.sums.communicator.rank
        return {
            index: f"the gradient of {parameters.describe(index)} was changed in place (on rank {rank}) "
            "between two backward passes of a step, the first of which was reduced: with shard and node_shared change "
            "it after the last one, or keep all but the last in no_sync()"
            for index in self._changed
        }

    def add_back(self) -> None:
        """Add what was put aside to the mean of what has come since."""
        for index, part in self.put_aside.items():
            gradient, piece = self._tensors[index].grad, self._parts.plan.own_piece(index)
            is_sum = index in self._without_mark or getattr(gradient, MARK, None) == _PUT_ASIDE
            if gradient is None or piece is None or not is_sum:
                continue  # it was set to None in between
            whole = part.shape == gradient.shape
            (gradient if whole else gradient.view(-1)[piece.start : piece.stop]).add_(part)
        self.forget()

    def forget(self) -> None:
        """Forget all that was put aside."""
        self.put_aside.clear()
        self._without_mark.clear()

    def end_reduction(self) -> None:
        """Take note that gradients were reduced, and nothing was added to them yet."""
        self._changed.clear()
        self.adds_to_reduced = False

    def _follow_changes(self, index: int, gradient: Tensor) -> None:
        """Forget what was put aside of a gradient that was set to zero; what else is done to it can't be followed."""
        local = self._parts.backward.local
        if index not in self.put_aside or index not in local or gradient._version == local[index]:
            return
        if not gradient.any():
            del self.put_aside[index]
            return
        self._parts.sums.has_misfit = True
        self._changed.add(index)
