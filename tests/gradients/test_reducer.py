"""The reducer in one process, with an equal rank beside it: when it reduces, and what it asks the other rank."""

import pytest
import torch
from reducing import FakeCommunicator, FakeRollCall, made, twice

from dpoptim.comm.roll_call import DifferentPlacesError
from dpoptim.gradients.reducer import Reducer
from dpoptim.gradients.replicated_gradients import ReplicatedGradients


class _Ranks:
    """A reducer of three parameters, and the other rank."""

    def __init__(self, *, overlap=False, accumulate=1, bucket_bytes=1, comm_hook=twice):
        self.communicator = FakeCommunicator(overlap=overlap)
        self.roll_call = FakeRollCall(self.communicator)
        self.tensors = made((2,), (3,), (4,))
        self.reducer = Reducer(
            ReplicatedGradients,
            self.communicator,
            self.roll_call,
            comm_hook=comm_hook,
            bucket_bytes=bucket_bytes,
            accumulate=accumulate,
        )
        self.reducer.add_parameters(self.tensors, ["a", "b", "c"], [0, 0, 0])

    def backward(self, *numbers):
        sum(self.tensors[number].sum() for number in numbers).backward()

    def gradients(self):
        return [None if p.grad is None else p.grad[0].item() for p in self.tensors]


def test_gradients_are_the_mean_when_backward_returns():
    ranks = _Ranks()
    ranks.backward(0, 1, 2)
    assert ranks.gradients() == [1.0, 1.0, 1.0]
    assert ranks.roll_call.places == ["optimizer 0, step 0, 0 no_sync() blocks"]
    assert [bucket.indices for bucket in ranks.reducer.buckets] == [(2,), (1,), (0,)]
    assert ranks.reducer.all_buckets == ranks.reducer.buckets
    ranks.reducer.batch_weight = 3.0
    ranks.backward(0, 1, 2)
    assert ranks.gradients() == [2.0, 2.0, 2.0], "a second backward adds, and rank 1 has added the same"
    ranks.reducer.count_step()
    ranks.reducer.finish()
    assert ranks.roll_call.places[-1] == "optimizer 0, step 1, 0 no_sync() blocks"


def test_reports_are_exchanged_when_who_had_a_gradient_has_changed():
    ranks = _Ranks()
    exchanges = []
    for numbers in ((0, 1), (0, 1), (0, 2), (0, 2)):
        for tensor in ranks.tensors:
            tensor.grad = None
        ranks.backward(*numbers)
        exchanges.append(ranks.communicator.num_exchanges)
        assert [g is not None for g in ranks.gradients()] == [number in numbers for number in range(3)]
    assert exchanges == [1, 1, 2, 2]
    ranks.communicator.other_numbers = [1.0]
    ranks.backward(0, 2)
    assert ranks.communicator.num_exchanges == 3, "rank 1 sees a change"


def test_gradients_stay_local_within_no_sync():
    ranks = _Ranks()
    with ranks.reducer.no_sync():
        ranks.backward(0, 1, 2)
    assert ranks.reducer.has_local_gradients
    assert ranks.roll_call.places == []
    assert not ranks.reducer.waits_for_gradients
    ranks.reducer.finish()
    assert not ranks.reducer.has_local_gradients
    assert ranks.roll_call.places == ["optimizer 0, step 0, 1 no_sync() blocks"]
    with ranks.reducer.no_sync():
        ranks.backward(0)
    ranks.reducer.note_cleared()
    assert not ranks.reducer.has_local_gradients


def test_a_rank_without_a_backward_says_so():
    ranks = _Ranks()
    assert ranks.reducer.waits_for_gradients
    ranks.reducer.finish()
    assert ranks.roll_call.notes == [", without a backward since the last step"]
    assert not ranks.reducer.waits_for_gradients
    ranks.backward(0)
    assert ranks.roll_call.notes[1:] == [""]
    ranks.reducer.finish()
    assert len(ranks.roll_call.places) == 2, "there is nothing to reduce"
    ranks.tensors[0].grad = None
    ranks.reducer.finish()
    assert len(ranks.roll_call.places) == 3, "what was reduced is gone"


def test_several_batches_make_one_mean():
    ranks = _Ranks(accumulate=2)
    assert ranks.reducer.is_accumulating
    ranks.backward(0, 1, 2)
    ranks.reducer.count_batch()
    assert (ranks.roll_call.places, ranks.reducer.is_accumulating) == ([], False)
    ranks.backward(0, 1, 2)
    assert ranks.gradients() == [1.0, 1.0, 1.0]
    ranks.backward(0, 1)
    assert ranks.gradients() == [1.5, 1.5, 1.0], "what came later is divided as well"


def test_full_buckets_are_launched_while_backward_runs():
    launched = []

    def hook(communicator, bucket):
        launched.append((bucket.indices, len(arrived)))
        return twice(communicator, bucket)

    ranks = _Ranks(overlap=True, comm_hook=hook)
    arrived = []
    for tensor in ranks.tensors:
        tensor.register_hook(arrived.append)
    ranks.backward(0, 1, 2)
    assert [count for _, count in launched] == [3, 3, 3], "at the end of the first backward"
    order = [bucket.indices[0] for bucket in ranks.reducer.buckets]
    launched.clear()
    arrived.clear()
    ranks.backward(0, 1, 2)
    assert [indices[0] for indices, _ in launched] == order
    assert [count for _, count in launched] == [1, 2, 3]
    assert ranks.communicator.num_polls == 3
    assert ranks.gradients() == [2.0, 2.0, 2.0]


def test_a_gradient_that_comes_twice_after_its_bucket_was_sent_is_an_error():
    ranks = _Ranks(overlap=True)
    ranks.backward(0, 1, 2)

    def twice_the_same(_):
        for _ in range(2):
            ranks.reducer.on_gradient(0, ranks.tensors[0])

    ranks.tensors[1].register_hook(twice_the_same)
    with pytest.raises(
        RuntimeError, match=r"^parameter 'a' received a second gradient in one backward after its bucket"
    ):
        ranks.backward(1, 2)


def test_a_backward_that_raised_is_counted_and_its_gradients_are_not_reduced():
    ranks = _Ranks()

    def fail(_):
        raise ArithmeticError

    handle = ranks.tensors[2].register_hook(fail)
    with pytest.raises(ArithmeticError):
        ranks.backward(2, 1, 0)
    handle.remove()
    assert ranks.gradients() == [1.0, 1.0, None]
    assert ranks.reducer.is_in_backward()
    ranks.reducer.settle()
    assert not ranks.reducer.is_in_backward()
    for tensor in ranks.tensors:
        tensor.grad = None
    ranks.backward(0, 1, 2)
    assert ranks.roll_call.places == ["optimizer 0, step 0, 0 no_sync() blocks, 1 backward passes that raised"]
    assert ranks.gradients() == [1.0, 1.0, 1.0]


def test_a_failed_meeting_ends_the_reduction():
    ranks = _Ranks()
    ranks.roll_call.errors = [DifferentPlacesError(["somewhere", "elsewhere"], ["somewhere", "elsewhere"])]
    with pytest.raises(DifferentPlacesError):
        ranks.backward(0)
    assert not ranks.reducer.has_begun()
    assert not ranks.reducer.is_in_backward()
    ranks.backward(0)
    assert ranks.communicator.num_exchanges == 1


def test_a_hook_that_takes_gradients_away_is_an_error():
    ranks = _Ranks()
    ranks.tensors[0].register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with pytest.raises(RuntimeError, match=r"^the gradient of parameter 'a' was taken away before it could be reduced"):
        ranks.backward(0)


def test_gradients_of_new_parameters_are_reduced_at_once():
    ranks = _Ranks()
    new = made((5,), (6,), grads=[4.0, None])
    ranks.reducer.add_parameters(new, ["d", "e"], [1, 1])
    ranks.reducer.reduce_new(3)
    assert new[0].grad.tolist() == [4.0] * 5
    assert new[1].grad is None
    accumulating = _Ranks(accumulate=2)
    accumulating.tensors[2].grad = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"^parameter 'c' has a gradient already: with accumulate add it after"):
        accumulating.reducer.reduce_new(1)


def test_other_ranks_may_take_over():
    ranks = _Ranks()
    ranks.backward(0, 1, 2)
    others = FakeCommunicator()
    roll_call = FakeRollCall(others)
    ranks.reducer.reduce_over(others, roll_call, twice)
    ranks.reducer.count_step()
    ranks.backward(0, 1, 2)
    assert (len(ranks.roll_call.places), len(roll_call.places)) == (1, 1)
    assert (ranks.communicator.num_exchanges, others.num_exchanges) == (1, 1), "they have to be told anew"


def test_who_is_detached_reduces_nothing():
    ranks = _Ranks()
    assert ranks.roll_call.num_enrolled == 1
    ranks.reducer.detach()
    assert (ranks.reducer.is_detached, ranks.roll_call.num_enrolled) == (True, 0)
    ranks.backward(0, 1, 2)
    ranks.reducer.finish()
    assert ranks.roll_call.places == []
    with pytest.raises(RuntimeError, match="was detached"):
        ranks.reducer.meet("anything", 1.0)
