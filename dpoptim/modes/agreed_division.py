"""By what an optimizer may be sharded, as all ranks see it, and whether that still holds."""

from typing import Any

from torch.optim import Optimizer

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.step.classes import is_known
from dpoptim.step.divisibility import are_switched, divisibility
from dpoptim.step.inner_step import needs_closure

__all__ = ["OptionsWatch", "agreed_division", "check_new_group"]

# What a scheduler sets in a group, or the wrapper.
_NO_OPTIONS = ("params", "param_names", "lr", "initial_lr")


def agreed_division(optimizer: Optimizer, communicator: Communicator) -> tuple[str, str]:
    """Return by what an optimizer may be sharded, and why not at all, as rank 0 has found; collective for some.

    Returns
    -------
    by : str
        ``"element"``, ``"parameter"`` or ``"nothing"``.
    why_not : str
        What stands in the way, if something does.
    """
    if needs_closure(optimizer):
        return "nothing", "needs a closure"
    if is_known(type(optimizer)):
        found = divisibility(optimizer)
    else:
        found = communicator.broadcast_object(divisibility(optimizer) if communicator.rank == 0 else None)
    return found.by, found.why_not


def check_new_group(optimizer: Optimizer, communicator: Communicator, *, by_element: bool) -> None:
    """Raise ``ValueError`` on all ranks if a new group can't be sharded as the others are; collective."""
    by, why_not = agreed_division(optimizer, communicator)
    name = type(optimizer).__name__
    if by == "nothing":
        raise raised_on_all_ranks(ValueError(f"with the new group {name} can't be sharded, since it {why_not}"))
    if by == "parameter" and by_element:
        message = f"with the new group {name} can be sharded by whole parameter alone: wrap all groups at once"
        raise raised_on_all_ranks(ValueError(message))


class OptionsWatch:
    """Whether an option in a group has been switched, so that a class which is not torch's couples parameters.

    Parameters
    ----------
    optimizer : Optimizer
        Whose options are noted now.
    by_element : bool
        Whether its parameters are cut.
    """

    def __init__(self, optimizer: Optimizer, *, by_element: bool) -> None:
        self._optimizer = optimizer
        self._by_element = by_element
        self._noted: list[dict[str, Any]] = []
        self.note()

    def note(self) -> None:
        """Take the options as they are for those to compare with; local."""
        self._noted = self._options()

    def check(self) -> None:
        """Raise ``ValueError`` if an option was switched since, with which parameters can't be sharded so; local."""
        now = self._options()
        if len(now) == len(self._noted) and not any(map(are_switched, self._noted, now)):
            return
        found = divisibility(self._optimizer)
        if (found.by == "nothing" and found.is_tried) or (found.by == "parameter" and self._by_element):
            what = found.why_not or "is no longer by element"
            raise ValueError(
                f"an option of a parameter group was switched, and {type(self._optimizer).__name__} {what}: set it "
                "before the optimizer is wrapped, which shards it accordingly"
            )

    def _options(self) -> list[dict[str, Any]]:
        """Return the options of each group but its rate; of torch's own classes, which are known, nothing."""
        if is_known(type(self._optimizer)):
            return []
        groups = self._optimizer.param_groups
        return [{key: value for key, value in group.items() if key not in _NO_OPTIONS} for group in groups]
