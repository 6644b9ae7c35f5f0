"""FlatStep: one optimizer's step by the fastest implementation that is right for each of its tensors.

torch's optimizers make a step of a group in two parts: ``_init_group`` puts parameters, gradients and state into lists,
then a function steps the lists. Here the lists of all groups are made first, which skips what a step skips (parameters
without a gradient). Then a plan says what steps what (:mod:`dpoptim.step.step_plan`). It is kept, and compared at each
step with what it was made for: nothing is held that could be out of date.
"""

from weakref import WeakKeyDictionary

import torch

from dpoptim.step.compiled_step import CompiledStep
from dpoptim.step.found import Found
from dpoptim.step.implementations import Implementations
from dpoptim.step.step_plan import Plan

__all__ = ["FlatStep"]

# Where all is left to torch, so many steps are torch's before it is looked at again.
_NUM_RESTED = 15


class FlatStep:
    """Makes the steps of one optimizer object; see the notes of this module. Local.

    Attributes
    ----------
    compiled : CompiledStep or None
        What steps the blocks instead of torch's loop.
    """

    def __init__(self) -> None:
        self.compiled: CompiledStep | None = None
        self._plan: Plan | None = None
        self._num_to_rest = 0

    @staticmethod
    def of(optimizer: torch.optim.Optimizer) -> "FlatStep":
        """Return the object of this optimizer, which lives as long as that one."""
        found = _flat_steps.get(optimizer)
        if found is None:
            found = _flat_steps[optimizer] = FlatStep()
        return found

    def compile(self, torch_class: type[torch.optim.Optimizer]) -> None:
        """Step with the compiled step of this class from now on."""
        self.compiled = CompiledStep(torch_class)
        self._plan = None

    def step(self, optimizer: torch.optim.Optimizer, how: Implementations) -> None:
        """Step all groups with the gradients as they are; gradients must be disabled.

        If the lists of a group can't be made, the groups before it are stepped all the same, as torch does.
        """
        if self._num_to_rest:
            self._num_to_rest -= 1
            how.body(optimizer)
            return
        found = Found(optimizer, how)
        if found.groups:
            plan = self._plan
            if plan is None or not plan.fits(found):
                plan = self._plan = Plan(found, how, optimizer.state, self.compiled)
                fits = plan.take(found)
                assert fits
            plan.step(found, optimizer.state)
            if not plan.calls:
                self._num_to_rest = _NUM_RESTED
        if found.error is not None:
            raise found.error


# Not an attribute of the optimizer: a copy of its __dict__ must not share the blocks.
_flat_steps: WeakKeyDictionary[torch.optim.Optimizer, FlatStep] = WeakKeyDictionary()
