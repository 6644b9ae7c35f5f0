"""Meetings: where in its program one reducer meets the other ranks, and what becomes of ranks at different places."""

from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.comm.roll_call import Alike, DifferentPlacesError, RollCall
from dpoptim.gradients.backward_passes import BackwardPasses, Reducing, common

__all__ = ["PASSES", "STEP", "Meetings", "PutOffError", "TogetherError"]

# In the description of every place at which gradients are reduced.
PASSES = "no_sync() blocks"
# And of that at which ranks meet to step together.
STEP = "a step"


class PutOffError(Exception):
    """Sending has to wait for the end of backward."""


class TogetherError(Exception):
    """All ranks reduce these optimizers now."""

    def __init__(self, numbers: frozenset[int]) -> None:
        super().__init__(numbers)
        self.numbers = numbers


class Meetings:
    """The meetings of one reducer with those of other ranks (Note [Roll call] in roll_call.py).

    Parameters
    ----------
    roll_call : RollCall
        Of these ranks.
    member : Reducing
        The reducer.
    hyper_parameters : Alike, optional
        What all ranks must set alike.

    Attributes
    ----------
    passes : BackwardPasses
        All reducers of the roll call.
    number : int
        Which optimizer on these ranks it is, in the order in which they were made.
    num_steps : int
        How many steps it has made.
    is_detached : bool
        Whether it meets nobody any more.
    is_early : bool
        Whether it meets the others in the middle of a backward.
    note : str
        What else to tell if the ranks turn out to be at different places.
    """

    def __init__(self, roll_call: RollCall, member: Reducing, hyper_parameters: Alike | None) -> None:
        self.hyper_parameters = hyper_parameters
        self.number = roll_call.enroll()
        self.num_steps = 0
        self.is_detached = self.is_early = False
        self.note = ""
        self._roll_call = self._enrolled_with = roll_call
        self.passes = BackwardPasses.of(roll_call)
        self.passes.add(self.number, member)

    def move_to(self, roll_call: RollCall) -> None:
        """Meet the ranks of another roll call from now on; local."""
        self._roll_call, self.passes = roll_call, BackwardPasses.of(roll_call)

    def leave(self) -> None:
        """Meet nobody any more; on all ranks alike."""
        self.is_detached = True
        self.passes.remove(self.number)
        self._enrolled_with.dismiss()

    def meet(self, purpose: str, weight: float) -> float:
        """Meet all ranks for the same purpose and return the sum of their weights; collective."""
        if self.is_detached:
            raise raised_on_all_ranks(
                RuntimeError(f"this DataParallelOptimizer was detached (asked for {purpose}): construct another one")
            )
        self.passes.settle()
        while True:
            try:
                return self._roll_call.check_in(self.place_of(purpose), weight, self.hyper_parameters, self.note)
            except DifferentPlacesError as error:
                self._find_common(purpose, error)

    def meet_to_reduce(self, purpose: str, weight: float) -> float:
        """Meet all ranks to reduce gradients, the purpose of which has :data:`PASSES` in it; collective.

        Raises
        ------
        PutOffError
            In the middle of a backward, on all ranks that are there, if some are elsewhere.
        TogetherError
            On all ranks, if they are about to reduce different optimizers after one backward.
        """
        if not self.is_early:
            self.passes.finish_others(self.number)
        return self.meet(purpose, weight)

    def place_of(self, purpose: str) -> str:
        """Say where in its program this rank is, with what it is there for; local."""
        return f"optimizer {self.number}, step {self.num_steps}, {purpose}"

    def _find_common(self, purpose: str, error: DifferentPlacesError) -> None:
        """Find what all ranks can reduce now, or raise the error; collective.

        Returns where this rank is to meet the others again (Note [Ranks that use other branches] in
        backward_passes.py).
        """
        if not all(PASSES in place or place.endswith(f", {STEP}") for place in error.places):
            raise error
        reduces = PASSES in purpose
        place = self.place_of(purpose)
        own = self.passes.whereabouts(self.number, place, reduces=reduces, is_early=self.is_early)
        everybody = self._roll_call.communicator.all_gather_object(own)
        if any(where.is_early for where in everybody):  # who is in the middle of a backward comes back at its end
            if self.is_early:
                raise PutOffError
            return
        numbers = common(everybody)
        if numbers is None:
            raise error
        if reduces:
            raise TogetherError(numbers)
        self.passes.reduce(numbers)
