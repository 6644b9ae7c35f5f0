"""Found: what a step of an optimizer has to step, in the lists that torch's ``_init_group`` gives.

Tests: ``tests/step/test_implementations.py``.
"""

from collections.abc import Callable, Sequence
from typing import Any

from dpoptim.step.implementations import Implementations

__all__ = ["Found"]


class Found:
    """What ``_init_group`` has found: the lists of all groups one after another, and what belongs to each group.

    Attributes
    ----------
    groups : list of dict
        The groups that have gradients.
    lists : list of list
        Parameters, gradients and state; None where a group does not use a list.
    counts : list of int
        How many parameters of each group.
    uses : list of tuple of bool
        Which of the lists each group uses.
    results : list
        What ``_init_group`` has returned.
    """

    def __init__(self, optimizer: Any, how: Implementations) -> None:
        self.groups: list[dict[str, Any]] = []
        self.lists: list[list[Any]] = [[] for _ in range(how.num_lists)]
        self.counts: list[int] = []
        self.uses: list[tuple[bool, ...]] = []
        self.results: list[Any] = []
        self.error: Exception | None = None
        for group in optimizer.param_groups:
            lists: list[list[Any]] = [[] for _ in range(how.num_lists)]
            try:
                result = optimizer._init_group(group, *lists)
            except Exception as error:  # raised when the groups before are stepped
                self.error = error
                return
            if not lists[0]:
                continue
            self.groups.append(group)
            self.counts.append(len(lists[0]))
            self.uses.append(tuple(map(bool, lists)))
            self.results.append(result)
            for entries, more in zip(self.lists, lists, strict=True):
                entries.extend(more or [None] * len(lists[0]))

    def select(self, pick: Callable[[list[Any]], Sequence[Any]], uses: Sequence[bool]) -> list[list[Any]]:
        """Return lists of the entries that are picked, empty where a list is not used."""
        return [list(pick(entries)) if used else [] for entries, used in zip(self.lists, uses, strict=True)]
