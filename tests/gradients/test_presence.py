"""Presence: what a rank tells of its gradients, and what all take from that."""

import dataclasses

import pytest
import torch
from reducing import FakeCommunicator, made, parameters_of

from dpoptim.gradients.bucket import Bucket
from dpoptim.gradients.plan import Plan, divide
from dpoptim.gradients.presence import Presence


def _presence(*tensors):
    plan = Plan(1 << 20)
    plan.replace(divide(dict(reversed(list(enumerate(tensors)))), 1 << 20, have_homes=False))
    return Presence(parameters_of(*tensors), plan)


def _report(presence, arrived=(), rank=0, misfits=None, has_raised=False, rewritten=None):
    return presence.report(
        presence.now(), arrived, rank=rank, misfits=misfits or {}, has_raised=has_raised, rewritten=rewritten
    )


def test_a_report_says_what_is_there():
    tensors = made((2,), (3,), (4,), grads=[1.0, None, 1.0])
    tensors[1].requires_grad_(False)
    tensors[2].grad = tensors[2].grad.to_sparse()
    presence = _presence(*tensors)
    report = _report(presence, [2, 0, 2], rewritten="a")
    assert report.had_gradient == bytes([1, 0, 1])
    assert report.trainable == bytes([1, 0, 1])
    assert report.sparse_dims == {2: 1}
    assert report.misfits == {}
    assert report.order == [2, 0], "once each"
    assert report.rewritten == "a"
    assert _report(presence, [2, 0], rank=1).order == [], "rank 0's counts"


def test_what_any_rank_had_counts():
    presence = _presence(*made((2,), (3,), (4,), grads=[1.0, None, None]))
    communicator = FakeCommunicator(lambda own: dataclasses.replace(own, had_gradient=bytes([0, 0, 1])))
    reports = presence.exchange(communicator, _report(presence))
    assert len(reports) == 2
    assert presence.had_anywhere == [0, 2]
    presence.had_gradient = presence.now()
    presence.forget()
    assert presence.had_anywhere == []
    assert presence.had_gradient is None


def test_gradients_that_others_had_are_given_in_the_parameters_layout():
    tensors = made((2, 3), (3, 2), grads=[1.0, None])
    tensors[1].data = tensors[1].data.t().contiguous().t()
    presence = _presence(*tensors)
    presence.had_anywhere = [0, 1]
    (bucket,) = presence._plan.buckets
    bucket.pack([tensors[index].grad for index in bucket.indices], 1.0)
    bucket.flat[:] = torch.arange(12.0)
    presence.give_gradients()
    assert torch.equal(tensors[1].grad, torch.arange(6.0).view(3, 2))
    assert tensors[1].grad.stride() == tensors[1].stride()
    assert torch.equal(tensors[0].grad, torch.ones(2, 3)), "it had its own"


def test_whether_all_gradients_are_cleared():
    tensors = made((2,), (3,), grads=[1.0, 1.0])
    presence = _presence(*tensors)
    tensors[0].grad = None
    assert not presence.are_cleared(), "nothing is known to have been there"
    presence.had_anywhere = [0, 1]
    assert not presence.are_cleared()
    tensors[1].grad = None
    assert presence.are_cleared()


def test_a_model_that_was_moved_is_an_error_on_all_ranks():
    tensor = torch.zeros(3)
    presence = _presence(tensor)
    tensor.grad = torch.zeros(3)
    presence._plan.replace([Bucket([0], [torch.zeros(3, dtype=torch.float64)])])
    with pytest.raises(
        RuntimeError, match=r"^parameter 'a' is torch.float32 on cpu, but was torch.float64 on cpu when"
    ):
        presence.exchange(FakeCommunicator(), _report(presence))
    others = FakeCommunicator(lambda own: dataclasses.replace(own, misfits={0: "that of rank 1"}))
    presence._plan.replace([])
    with pytest.raises(RuntimeError, match=r"^that of rank 1$"):
        presence.exchange(others, _report(presence))


def test_a_gradient_that_a_hook_takes_away_is_a_misfit():
    (tensor,) = made((3,))
    for _ in range(2):
        tensor.register_post_accumulate_grad_hook(lambda _: None)
    presence = _presence(tensor)
    assert _report(presence).misfits == {}, "it has not arrived"
    misfits = _report(presence, [0], misfits={5: "another"}).misfits
    assert misfits[0].startswith("the gradient of parameter 'a' was taken away before it could be reduced")
    assert misfits[5] == "another"


@pytest.mark.parametrize("own_raised", [False, True])
def test_a_backward_that_raised_on_one_rank_alone(own_raised):
    presence = _presence(*made((3,), grads=[1.0]))
    others = FakeCommunicator(lambda own: dataclasses.replace(own, has_raised=not own_raised))
    with pytest.raises(RuntimeError, match=f"^a backward raised an error on ranks {int(not own_raised)} and was"):
        presence.exchange(others, _report(presence, has_raised=own_raised))
    presence.exchange(FakeCommunicator(), _report(presence, has_raised=own_raised))  # on all ranks alike


def test_a_gradient_that_was_rewritten_is_warned_of():
    presence = _presence(*made((3,), grads=[1.0]))
    others = FakeCommunicator(lambda own: dataclasses.replace(own, rewritten="x.weight"))
    with pytest.warns(UserWarning, match="^the gradient of parameter 'x.weight' was changed on rank 1 between"):
        presence.exchange(others, _report(presence))
    assert presence.had_anywhere == [0]
