"""BackwardState: what backward passes have left at one reducer since its last reduction. Local."""

import weakref
from collections.abc import Callable

from dpoptim.gradients.parameters import Parameters, version

__all__ = ["BackwardState", "EndOfBackward"]


class EndOfBackward:
    """Called when a backward ends well, and gone when it does not.

    Parameters
    ----------
    on_end : callable
        Is told the number of the graph task that has ended.
    task : int
        That number.
    """

    def __init__(self, on_end: Callable[[int], None], task: int) -> None:
        self._on_end, self._task = on_end, task

    def __call__(self) -> None:
        """Tell it; called by autograd."""
        self._on_end(self._task)


class BackwardState:
    """Backward passes under way, and gradients that wait for their reduction.

    Attributes
    ----------
    tasks : dict of int to EndOfBackward or None
        The graph tasks that have reached the reducer, each with a weak reference; None when one has ended in another.
    arrived : list of int
        The parameters whose gradients have arrived and are to be reduced, in this order.
    local : dict of int to int
        The parameters with a gradient that is to stay local for now, and its version.
    num_no_sync : int
        How many ``no_sync()`` blocks there were.
    num_raised : int
        How many backward passes have raised, of all since the reducer was made.
    was_reduced : bool
        Whether gradients were reduced since the last step.
    rewritten : str or None
        The name of a parameter whose local gradient was changed before a reduction that no backward has begun.
    """

    def __init__(self) -> None:
        self.tasks: dict[int, weakref.ref[EndOfBackward] | None] = {}
        self.arrived: list[int] = []
        self.local: dict[int, int] = {}
        self.num_no_sync = 0
        self.num_raised = 0
        self.was_reduced = False
        self.rewritten: str | None = None

    def has_raised(self) -> bool:
        """Whether one that has reached the reducer has raised (Note [A backward that raised] in backward_passes.py)."""
        return any(end is not None and end() is None for end in self.tasks.values())

    def find_rewritten(self, parameters: Parameters) -> None:
        """Find out which gradient was changed between a backward in ``no_sync`` and a reduction without a backward."""
        self.rewritten = None
        if self.tasks:
            return
        for index, then in self.local.items():
            gradient = parameters.tensors[index].grad
            if gradient is not None and version(gradient) != then:
                self.rewritten = parameters.names[index]
                return

    def forget(self) -> None:
        """Forget a backward whose gradients nobody wants."""
        self.tasks.clear()
        self.arrived.clear()
        self.was_reduced = False

    def end_reduction(self) -> None:
        """Take note that all gradients were reduced."""
        self.tasks.clear()
        self.arrived.clear()
        self.local.clear()
        self.num_no_sync = 0
        self.was_reduced = True
        self.rewritten = None
