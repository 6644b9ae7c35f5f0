"""What an optimizer is and has: its class, its parameters, other optimizers in it. Local.

Tests: ``tests/behaviour/test_other_classes.py``.
"""

from collections import OrderedDict, deque
from collections.abc import Mapping

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["has_own_step", "is_known", "knows", "nested_optimizers", "parameters_of", "slots_of"]


def is_known(kind: type[Optimizer]) -> bool:
    """Whether a class of optimizers is torch's or of this package."""
    return kind.__module__.split(".")[0] in ("torch", "dpoptim")


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return all parameters, in the order of the groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def has_own_step(optimizer: Optimizer) -> bool:
    """Whether somebody has given this object another step than its class has; a scheduler's only counts calls."""
    own = vars(optimizer).get("step")
    return own is not None and not hasattr(own, "_wrapped_by_lr_sched")


def slots_of(holder: object) -> list[str]:
    """Return the names of the ``__slots__`` of an object's classes that it has set."""
    names: list[str] = []
    for kind in type(holder).__mro__:
        slots = vars(kind).get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    return [name for name in names if not name.startswith("__") and hasattr(holder, name)]


def nested_optimizers(optimizer: Optimizer) -> dict[str, Optimizer]:
    """Return the optimizers that an optimizer has as attributes, as those that wrap another one do."""
    return {name: value for name, value in vars(optimizer).items() if isinstance(value, Optimizer)}


# Of what an optimizer keeps, when it is looked for its parameters.
_MAX_LOOKED_AT = 100_000


def knows(optimizer: Optimizer, values: set[int]) -> bool:
    """Whether what an optimizer keeps, outside of its state, has one of these integers, or a tensor with such an id."""
    kept = [value for key, value in vars(optimizer).items() if key not in ("state", "param_groups", "defaults")]
    kept = [value for value in kept if not (isinstance(value, OrderedDict) and not value)]
    kept += [v for group in optimizer.param_groups for k, v in group.items() if k not in ("params", "param_names")]
    seen: set[int] = set()
    while kept and len(seen) < _MAX_LOOKED_AT:
        value = kept.pop()
        if id(value) in values or (isinstance(value, int) and value in values):
            return True
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            kept += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            kept += value
        elif type(value).__module__.split(".")[0] not in ("torch", "builtins") and hasattr(value, "__dict__"):
            kept += vars(value).values()
    return False
