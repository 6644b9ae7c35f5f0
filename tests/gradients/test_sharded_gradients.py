"""Sharded gradients: which buckets are active, and what a reduction leaves where this rank owns nothing."""

import dataclasses

import pytest
import torch
from reducing import made, parts_of

from dpoptim.gradients.sharded_gradients import ShardedGradients
from dpoptim.gradients.sharding import Sharding


def _gradients(*tensors):
    """Return those of rank 0 of two, and their parts; both own half of each bucket."""
    parts = parts_of(*tensors)
    gradients = ShardedGradients(Sharding(2, 2, 0, by_element=True, in_node=False), parts)
    gradients.plan()
    return gradients, parts


def _reduce(gradients, parts, *, num_not_finite=0.0, trainable=None):
    """Go through a reduction in which rank 1 has the same gradients; ``trainable`` there makes reports."""
    sums = parts.sums
    sums.scale = 0.5
    with torch.no_grad():
        for bucket in parts.plan.buckets:
            sums.launch(bucket, sums.scale)
        (own,) = sums.finish(sums.launched, gradients.flags)
        for bucket in parts.plan.buckets:
            bucket.unpack()
        reports = None
        if trainable is not None:
            now = parts.presence.now()
            report = parts.presence.report(now, [], rank=0, misfits={}, has_raised=False, rewritten=None)
            reports = [report, dataclasses.replace(report, trainable=trainable)]
            parts.sparse.learn(reports)
        gradients.finish_reduction(reports, [own + num_not_finite])
    sums.release(parts.plan.buckets)
    sums.end()
    gradients.end_reduction()


def test_frozen_parameters_have_owners_and_are_activated_by_any_rank():
    tensors = made((4,), (6,), grads=[1.0, None])
    tensors[1].requires_grad_(False)
    gradients, parts = _gradients(*tensors)
    assert [bucket.indices for bucket in parts.plan.buckets] == [(0,)]
    assert [bucket.indices for bucket in parts.plan.frozen_buckets] == [(1,)]
    assert parts.plan.order == [0]
    _reduce(gradients, parts, trainable=b"\1\0")
    assert list(parts.plan.positions) == [0]
    parts.presence.had_anywhere = [0, 1]
    _reduce(gradients, parts, trainable=b"\1\1")
    assert [bucket.indices for bucket in parts.plan.buckets] == [(0,), (1,)]
    assert parts.plan.frozen_buckets == []
    assert tensors[1].grad is not None, "rank 1 had one"


def test_parameters_that_come_later_are_divided_by_themselves():
    gradients, parts = _gradients(*made((4,), (6,)))
    before = list(parts.plan.buckets)
    parts.parameters.add([*made((5,)), torch.zeros(3, dtype=torch.int64)], ["c", "d"], [1, 1])
    gradients.plan()
    assert parts.plan.buckets[: len(before)] == before
    assert [bucket.indices for bucket in parts.plan.buckets[len(before) :]] == [(2,)], "whole numbers have no gradient"
    assert parts.plan.order == [1, 0, 2]


def test_a_sparse_gradient_is_an_error():
    tensors = made((4, 2), grads=[1.0])
    tensors[0].grad = tensors[0].grad.to_sparse(1)
    gradients, parts = _gradients(*tensors)
    with pytest.raises(RuntimeError, match=r"^parameter 'a' has a sparse gradient \(1 sparse dims\), which can't be"):
        _reduce(gradients, parts, trainable=b"\1")


def test_reduced_gradients_are_partial_and_show_who_reads_the_rest():
    tensors = made((8,), grads=[1.0])
    gradients, parts = _gradients(*tensors)
    assert not gradients.is_partial(tensors[0].grad)
    _reduce(gradients, parts)
    assert gradients.is_partial(tensors[0].grad)
    values = tensors[0].grad.tolist()
    assert values[:4] == [1.0] * 4
    assert float("inf") in values[4:]
    with gradients.without_marks():
        assert float("inf") not in tensors[0].grad.tolist()
    assert tensors[0].grad.tolist() == values
    assert gradients.checked() == [tensors[0].grad]
    _reduce(gradients, parts)
    gradients.remove_marks()
    assert float("inf") not in tensors[0].grad.tolist()


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_an_infinity_in_anybodys_part_is_seen_by_all(where):
    tensors = made((8,), grads=[1.0])
    if where == "here":
        tensors[0].grad[1] = float("inf")
    gradients, parts = _gradients(*tensors)
    _reduce(gradients, parts, num_not_finite=float(where == "elsewhere"))
    infinite = [e for e, value in enumerate(tensors[0].grad.tolist()) if value == float("inf")]
    assert infinite == [1 if where == "here" else 4]


def test_several_reductions_before_a_step_add_up():
    tensors = made((8,), grads=[1.0])
    gradients, parts = _gradients(*tensors)
    _reduce(gradients, parts)
    parts.backward.was_reduced = True
    with torch.no_grad():
        gradients.adding_listener.before_adding(0)
        tensors[0].grad.add_(2.0)
    _reduce(gradients, parts)
    assert tensors[0].grad[:4].tolist() == [3.0] * 4
    gradients.adding_listener.before_adding(0)
    gradients.note_cleared()
    assert gradients.adding_listener.put_aside == {}


def test_another_parameters_gradient_is_an_error_of_the_step():
    tensors = made((8,), (8,), grads=[1.0, 1.0])
    gradients, parts = _gradients(*tensors)
    _reduce(gradients, parts)
    tensors[0].grad = tensors[1].grad
    with pytest.raises(
        RuntimeError, match=r"^parameter 'a' was given the gradient of parameter 'b', of which each rank"
    ):
        gradients.checked()


def test_steps_that_are_left_out_are_warned_of():
    tensors = made((8,), grads=[1.0])
    gradients, parts = _gradients(*tensors)
    for number in range(3):
        tensors[0].grad = torch.ones(8)
        _reduce(gradients, parts)
        if number < 2:
            gradients.note_cleared()
    with pytest.warns(UserWarning, match="^no step was made with the gradients of 3 backward passes in turn"):
        gradients.note_cleared()
