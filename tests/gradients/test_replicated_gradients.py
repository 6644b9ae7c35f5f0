"""Replicated gradients: plans, and what a reduction leaves."""

import dataclasses

import torch
from reducing import FakeCommunicator, made, parts_of

from dpoptim.gradients.replicated_gradients import ReplicatedGradients


def _reports(parts, *changes, order=()):
    own = parts.presence.report(parts.presence.now(), order, rank=0, misfits={}, has_raised=False, rewritten=None)
    return [dataclasses.replace(own, **change) for change in (changes or ({},))]


def _finish(gradients, parts, reports=None):
    parts.sums.scale = 0.5
    with torch.no_grad():
        gradients.finish_reduction(reports, gradients.flags())


def test_the_first_plan_is_in_the_reverse_order_of_registration():
    tensors = made((2,), (3,), (4,))
    tensors[1].requires_grad_(False)
    parts = parts_of(*tensors)
    gradients = ReplicatedGradients(parts)
    gradients.plan()
    assert [bucket.indices for bucket in parts.plan.buckets] == [(2, 0)]
    assert parts.plan.order == []
    assert parts.plan.frozen_buckets == []


def test_the_next_plan_has_what_is_trained_anywhere_in_the_order_of_rank_0():
    tensors = made((2,), (3,), (4,), grads=[1.0, None, 1.0])
    tensors[1].requires_grad_(False)
    parts = parts_of(*tensors, communicator=FakeCommunicator(overlap=True))
    gradients = ReplicatedGradients(parts)
    gradients.plan()
    _finish(gradients, parts, _reports(parts, {}, {"trainable": b"\1\1\1"}, order=[0, 2]))
    assert parts.plan.order == [0, 2, 1]
    assert [bucket.indices for bucket in parts.plan.buckets] == [(0, 2, 1)]
    _finish(gradients, parts, _reports(parts, order=[2, 0]))
    assert [bucket.indices for bucket in parts.plan.buckets] == [(0, 2)], "the order stays"


def test_without_overlap_the_order_alone_is_no_reason_to_plan_anew():
    parts = parts_of(*made((2,), (3,), grads=[1.0, 1.0]))
    gradients = ReplicatedGradients(parts)
    gradients.plan()
    (bucket,) = parts.plan.buckets
    _finish(gradients, parts, _reports(parts, order=[0, 1]))
    assert parts.plan.order == [0, 1]
    assert parts.plan.buckets == [bucket]


def test_a_gradient_without_a_bucket_is_reduced_and_then_has_one():
    tensors = made((2,), (3,), grads=[1.0, None])
    tensors[1].requires_grad_(False)
    parts = parts_of(*tensors)
    gradients = ReplicatedGradients(parts)
    gradients.plan()
    tensors[1].requires_grad_(True)
    tensors[1].grad = torch.ones(3)
    parts.presence.had_anywhere = [0, 1]
    _finish(gradients, parts, _reports(parts))
    assert torch.equal(tensors[1].grad, torch.ones(3)), "the mean of equal ones"
    assert [bucket.indices for bucket in parts.plan.buckets] == [(1, 0)]


def test_sparse_gradients_leave_the_buckets():
    tensors = made((4, 2), (3,), grads=[1.0, 1.0])
    tensors[0].grad = tensors[0].grad.to_sparse(1)
    parts = parts_of(*tensors)
    gradients = ReplicatedGradients(parts)
    gradients.plan()
    reports = _reports(parts)
    parts.sparse.learn(reports)
    _finish(gradients, parts, reports)
    assert list(parts.plan.positions) == [1]


def test_the_division_by_the_number_of_batches_is_undone_once():
    (tensor,) = made((2,), grads=[1.0])
    parts = parts_of(tensor, accumulate=3)
    gradients = ReplicatedGradients(parts)
    assert gradients.adding_listener is gradients
    gradients.before_adding(0)
    assert tensor.grad.tolist() == [1.0, 1.0], "it was not reduced"
    gradients.plan()
    _finish(gradients, parts)
    for _ in range(2):
        gradients.before_adding(0)
        assert tensor.grad.tolist() == [3.0, 3.0]
    assert ReplicatedGradients(parts_of(tensor)).adding_listener is None


def test_gradients_that_are_changed_before_a_step_are_remarked_in_the_next_reduction():
    tensors = made((2,), grads=[1.0])
    parts = parts_of(*tensors)
    gradients = ReplicatedGradients(parts)
    gradients.plan()
    parts.presence.had_anywhere = [0]
    _finish(gradients, parts)
    gradients.note_step()
    assert gradients.remark == ""
    _finish(gradients, parts)
    tensors[0].grad.mul_(2)
    gradients.note_step()
    assert gradients.remark == ", gradients changed between the reduction and the last step"
    gradients.end_reduction()
    assert gradients.remark == ""


def test_every_rank_has_all():
    tensors = made((2,), (3,), grads=[1.0, None])
    gradients = ReplicatedGradients(parts_of(*tensors))
    assert gradients.checked() == [tensors[0].grad, None]
    assert not gradients.is_partial(tensors[0].grad)
    with gradients.without_marks():
        gradients.remove_marks()
    assert tensors[0].grad.tolist() == [1.0, 1.0]
    assert (gradients.flags(), gradients.misfits()) == ([], {})
