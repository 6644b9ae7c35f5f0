"""BackwardPasses: what all reducers of one roll call know of the backward under way. No communication here.

Tests: ``tests/gradients/test_backward_errors.py``.

Note [A backward that raised]
-----------------------------
autograd calls what was queued for the end of a backward only if it ends well. If a hook or an operation raised, and the
program caught it, what was queued is gone without having been called. Whoever is asked next finds that out, and ends
the reduction that was begun, since other ranks may wait for it.

Note [Ranks that use other branches]
------------------------------------
One backward may reach the parameters of several optimizers (a trunk's and its heads'), and on each rank those of
others. Then a rank is about to reduce one optimizer while another rank reduces the next. If some optimizer was reached
by all of them they are in the same backward: all reduce all that are to be reduced on any rank, in the order of their
construction. If none was, they are at different places of the program, and that is an error.

Where ranks step together, one may be about to step the trunk when another is still to reduce a head: it takes part.

A reduction that began in the middle of a backward is put off to its end where ranks differ. At the end those that have
begun come first, each with a meeting of its own, since another rank may still be about to begin another.
"""

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dpoptim.comm.roll_call import RollCall

__all__ = ["BackwardPasses", "Reducing", "Whereabouts", "common"]


class Reducing(Protocol):
    """What reduces the gradients of an optimizer."""

    def is_in_backward(self) -> bool:
        """Whether a backward has reached it that has not ended."""

    def has_begun(self) -> bool:
        """Whether a reduction is under way, since the middle of a backward."""

    def settle(self) -> None:
        """End what a backward has begun that raised."""

    def reduce(self) -> None:
        """Reduce its gradients as they are; collective."""


@dataclass(frozen=True)
class Whereabouts:
    """Where a rank is that is about to reduce, or to step together with others.

    Attributes
    ----------
    number, place : int, str
        The optimizer, and where in its program it is.
    is_early : bool
        Whether backward goes on.
    reached, pending : frozenset of int
        Which optimizers this backward has reached, and which of these are to be reduced.
    """

    number: int
    place: str
    is_early: bool
    reached: frozenset[int]
    pending: frozenset[int]


class BackwardPasses:
    """The reducers of one roll call by their optimizers' numbers, and which of them the last backward has reached."""

    def __init__(self) -> None:
        # Weak, by hand: a WeakValueDictionary takes ten times as long, and each step asks several times.
        self._members: dict[int, weakref.ref[Reducing]] = {}
        self._reached: set[int] = set()

    @staticmethod
    def of(roll_call: RollCall) -> "BackwardPasses":
        """Return those of a roll call, which live as long as it does."""
        found = _of_roll_calls.get(roll_call)
        if found is None:
            found = _of_roll_calls[roll_call] = BackwardPasses()
        return found

    def add(self, number: int, member: Reducing) -> None:
        """Take note of a reducer."""
        self._members[number] = weakref.ref(member)

    def remove(self, number: int) -> None:
        """Forget a reducer, on all ranks alike."""
        self._members.pop(number, None)

    def reach(self, number: int) -> None:
        """Take note that a backward has reached a reducer for the first time."""
        self.settle()
        if not any(member.is_in_backward() for _, member in self._living()):
            self._reached.clear()
        self._reached.add(number)

    def settle(self) -> None:
        """End whatever a backward has begun that raised (Note [A backward that raised])."""
        for _, member in self._living():
            member.settle()

    def are_several(self) -> bool:
        """Whether there is more than one optimizer; the same on all ranks, which collect garbage at other times."""
        return len(self._members) > 1

    def finish_others(self, number: int) -> None:
        """End the reductions of other optimizers that began in the backward which has just ended; collective."""
        for other, member in self._living():
            if other != number and member.has_begun():
                member.reduce()

    def whereabouts(self, number: int, place: str, *, reduces: bool, is_early: bool) -> Whereabouts:
        """Return where this rank is, which may be about to reduce this optimizer."""
        own = {number} if reduces else set[int]()
        pending = {other for other, member in self._living() if other in self._reached and member.is_in_backward()}
        return Whereabouts(number, place, is_early, frozenset({number, *self._reached}), frozenset(own | pending))

    def reduce(self, numbers: Iterable[int]) -> None:
        """Reduce these optimizers' gradients, in the order of their construction; collective."""
        living = dict(self._living())
        for number in sorted(numbers):
            living[number].reduce()

    def _living(self) -> list[tuple[int, Reducing]]:
        """Return the numbers of the reducers that are not garbage, in the order of their construction, with them."""
        return [(number, member) for number, ref in self._members.items() if (member := ref()) is not None]


_of_roll_calls: weakref.WeakKeyDictionary[RollCall, BackwardPasses] = weakref.WeakKeyDictionary()


def common(everybody: Sequence[Whereabouts]) -> frozenset[int] | None:
    """Return what all ranks are to reduce together, None if they are at different places of the program."""
    places = {(where.number, where.place) for where in everybody}
    if len({number for number, _ in places}) < len(places):
        return None  # one optimizer at two places
    if not frozenset.intersection(*[where.reached for where in everybody]):
        return None
    return frozenset().union(*[where.pending for where in everybody]) or None
