"""Divisibility: whether an optimizer may be sharded among ranks by element, by whole parameter, or not. Local.

Note [Probing]
--------------
torch's own classes are known. What any other class does is tried out, on a copy of the optimizer with the user's
hyper-parameters and a few small parameters in place of his: some steps of all together, of each alone, and of flat
halves alone. If parameters end alike alone and together, each may be stepped by another rank. If halves end alike too,
all state is of the parameter's shape or a number, and the optimizer knows no parameter by its identity or attributes,
it may be sharded by element. A class is not sharded that couples parameters, draws random numbers, steps another
optimizer, has a state dict of its own, knows parameters by their address, or can't be tried. The probe errs on the side
of not dividing. It draws from no generator of the user's and writes to nothing of his. What a class begins to do after
its first two dozen steps is not seen; an option that is switched on later is (:func:`are_switched`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from dpoptim.step.classes import has_own_step, is_known, knows, nested_optimizers, parameters_of
from dpoptim.step.facts import FACTS
from dpoptim.step.probe import Divisibility, Probe, described, nothing_disturbed

__all__ = [
    "are_switched",
    "divisibility",
]


def divisibility(optimizer: Optimizer) -> Divisibility:
    """Say how an optimizer may be sharded (Note [Probing]).

    A class says so itself by an attribute of its own, which is not inherited: ``is_elementwise = True`` (by element) or
    ``False`` (by whole parameter), ``is_divisible = False`` (not at all).
    """
    kind = type(optimizer)
    if has_own_step(optimizer):
        return Divisibility("nothing", "has a step of this object's own")
    if is_known(kind):
        facts = FACTS.get(kind.__name__)
        if facts is not None and facts.why_not:
            return Divisibility("nothing", facts.why_not)
        return Divisibility("element" if facts is not None and facts.is_elementwise else "parameter")
    if not vars(kind).get("is_divisible", True):
        return Divisibility("nothing", "says so (is_divisible = False)")
    declared = vars(kind).get("is_elementwise")
    if declared is not None:
        return Divisibility("element" if declared else "parameter")
    obstacle = _obstacle(optimizer)
    if obstacle is not None:
        return Divisibility("nothing", obstacle)
    error = ""
    for is_sharp in (True, False):  # some classes take no float64
        try:
            with nothing_disturbed():
                return Probe(optimizer, is_sharp=is_sharp).verdict()
        except Exception as caught:  # whatever a class does with parameters that it has not seen
            error = error or described(caught)
    return Divisibility("nothing", f"can't be tried out on parameters of its own ({error})", is_tried=False)


def _obstacle(optimizer: Optimizer) -> str | None:
    """Say what of a class rules out that its parameters are swapped for others."""
    kind = type(optimizer)
    nested = next(iter(nested_optimizers(optimizer).values()), None)
    if nested is not None:
        return f"steps another optimizer ({type(nested).__name__})"
    if any(hasattr(kind, name) for name in ("param_groups", "state", "defaults")):
        return "computes its groups or its state"
    if kind.state_dict is not Optimizer.state_dict:
        return "has a state_dict of its own"
    if isinstance(optimizer, torch.optim.LBFGS):
        return "needs a closure"
    if knows(optimizer, {parameter.data_ptr() for parameter in parameters_of(optimizer) if parameter.numel()}):
        return "knows parameters by their address"
    return None


def are_switched(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether one of these options of a group has been switched on or off, so that a class may do something else."""
    return now.keys() != before.keys() or any(_is_switched(before[key], value) for key, value in now.items())


def _is_switched(before: Any, now: Any) -> bool:
    if before is now:
        return False
    if isinstance(now, (bool, str, type(None))) or isinstance(before, (bool, str, type(None))):
        return bool(before != now)
    if isinstance(now, (int, float)) and isinstance(before, (int, float)):
        return bool(before) != bool(now)
    return False
