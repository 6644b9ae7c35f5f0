"""Meetings: what is compared with other ranks, and what becomes of ranks at different places."""

import pytest
from reducing import FakeCommunicator, FakeRollCall

from dpoptim.comm.roll_call import DifferentPlacesError
from dpoptim.gradients.backward_passes import Whereabouts
from dpoptim.gradients.meetings import PASSES, STEP, Meetings, PutOffError, TogetherError

_REDUCING = f"0 {PASSES}"


class _Member:
    def __init__(self, *, in_backward=True):
        self.in_backward, self.reduced, self.settled = in_backward, 0, 0

    def is_in_backward(self):
        return self.in_backward

    def has_begun(self):
        return False

    def settle(self):
        self.settled += 1

    def reduce(self):
        self.reduced += 1


def _meetings(there=None, **member):
    """Return meetings with a rank that is there, the member, and the roll call."""
    communicator = FakeCommunicator((lambda _: there) if there is not None else lambda own: own)
    roll_call, member = FakeRollCall(communicator), _Member(**member)
    return Meetings(roll_call, member, None), member, roll_call


def _elsewhere(*purposes):
    return DifferentPlacesError([f"optimizer 0, step 0, {purpose}" for purpose in purposes], list(purposes))


def _there(number, *, is_early=False, reached=(0, 1), pending=(1,)):
    return Whereabouts(
        number, f"optimizer {number}, step 0, {_REDUCING}", is_early, frozenset(reached), frozenset(pending)
    )


def test_ranks_meet_at_a_place_and_sum_their_weights():
    meetings, member, roll_call = _meetings()
    meetings.num_steps, meetings.note = 3, ", a note"
    assert meetings.meet("a purpose", 2.0) == 4.0
    assert roll_call.places == ["optimizer 0, step 3, a purpose"]
    assert roll_call.notes == [", a note"]
    assert member.settled == 1, "a backward that raised has ended before"


def test_who_is_detached_meets_nobody():
    meetings, _, roll_call = _meetings()
    meetings.leave()
    with pytest.raises(
        RuntimeError, match=r"^this DataParallelOptimizer was detached \(asked for a purpose\): construct"
    ):
        meetings.meet("a purpose", 1.0)
    assert roll_call.places == []
    assert not meetings.passes.are_several()


def test_ranks_at_different_places_of_the_program_are_an_error():
    meetings, _, roll_call = _meetings()
    roll_call.errors = [_elsewhere(_REDUCING, "averaging a number")]
    with pytest.raises(DifferentPlacesError):
        meetings.meet_to_reduce(_REDUCING, 1.0)
    assert roll_call.communicator.num_exchanges == 0


def test_ranks_that_reduce_other_optimizers_of_one_backward_reduce_together():
    meetings, _, roll_call = _meetings(_there(1))
    meetings.passes.reach(meetings.number)
    roll_call.errors = [_elsewhere(_REDUCING, _REDUCING)]
    with pytest.raises(TogetherError) as caught:
        meetings.meet_to_reduce(_REDUCING, 1.0)
    assert caught.value.numbers == {0, 1}


def test_a_rank_that_steps_helps_one_that_reduces_first():
    meetings, member, roll_call = _meetings(_there(1, pending=(0,)), in_backward=False)
    roll_call.errors = [_elsewhere(STEP, _REDUCING)]
    assert meetings.meet(STEP, 1.0) == 2.0
    assert member.reduced == 1
    assert len(roll_call.places) == 2, "it came back"
    meetings, member, roll_call = _meetings(_there(0, pending=(0,)), in_backward=False)
    roll_call.errors = [_elsewhere(STEP, _REDUCING)]
    with pytest.raises(DifferentPlacesError):  # one optimizer at two places
        meetings.meet(STEP, 1.0)
    assert member.reduced == 0


@pytest.mark.parametrize("is_early", [True, False])
def test_sending_in_the_middle_of_a_backward_is_put_off(is_early):
    meetings, _, roll_call = _meetings(_there(1, is_early=True))
    meetings.is_early = is_early
    roll_call.errors = [_elsewhere(_REDUCING, _REDUCING)]
    if is_early:
        with pytest.raises(PutOffError):
            meetings.meet_to_reduce(_REDUCING, 1.0)
    else:  # at the end of its backward: the others come back
        assert meetings.meet_to_reduce(_REDUCING, 1.0) == 2.0
    assert len(roll_call.places) == (1 if is_early else 2)


def test_other_ranks_may_be_met():
    meetings, _, roll_call = _meetings()
    others = FakeRollCall(FakeCommunicator())
    meetings.move_to(others)
    meetings.meet("a purpose", 1.0)
    assert (roll_call.places, len(others.places)) == ([], 1)
