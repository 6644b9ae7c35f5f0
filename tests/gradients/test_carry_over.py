"""What is put aside of gradients that were reduced in part, and comes back when more is."""

import pytest
import torch
from reducing import made, parts_of

from dpoptim.gradients.bucket import Bucket, Division
from dpoptim.gradients.carry_over import CarryOver
from dpoptim.gradients.reduced_gradients import MARK


@pytest.fixture(autouse=True)
def _as_within_backward():
    with torch.no_grad():
        yield


def _carry_over(*tensors):
    """Return what carries over, after a reduction in which this rank got elements 2 to 5."""
    parts = parts_of(*tensors)
    parts.plan.activate(Bucket(range(len(tensors)), tensors, Division((2, 3, 1), 1, in_node=False)))
    for index, tensor in enumerate(tensors):
        if tensor.grad is not None:
            setattr(tensor.grad, MARK, index)
    parts.backward.was_reduced = True
    return CarryOver(parts), parts


def _add(tensor, values):
    """Add to a gradient as autograd does."""
    tensor.grad.add_(torch.tensor(values))


@pytest.mark.parametrize("is_contiguous", [True, False])
def test_the_own_part_comes_back_and_the_rest_is_new(is_contiguous):
    (tensor,) = made((2, 3))
    reduced = torch.arange(1.0, 7.0).view(2, 3)
    tensor.grad = reduced if is_contiguous else reduced.t().contiguous().t()
    carry_over, _ = _carry_over(tensor)
    carry_over.before_adding(0)
    assert torch.equal(tensor.grad, torch.zeros(2, 3))
    assert carry_over.adds_to_reduced
    assert list(carry_over.put_aside) == [0]
    _add(tensor, [[10.0] * 3] * 2)
    carry_over.add_back()
    assert tensor.grad.reshape(-1).tolist() == [10, 10, 13, 14, 15, 10]
    assert carry_over.put_aside == {}


def test_nothing_is_put_aside_twice():
    (tensor,) = made((6,), grads=[1.0])
    carry_over, parts = _carry_over(tensor)
    carry_over.before_adding(0)
    _add(tensor, [5.0] * 6)
    parts.backward.local[0] = tensor.grad._version
    carry_over.before_adding(0)
    assert tensor.grad.tolist() == [5.0] * 6
    assert carry_over.put_aside[0].tolist() == [1.0] * 3
    assert carry_over.misfits() == {}


def test_a_gradient_that_was_never_reduced_is_left_alone():
    tensors = made((3,), (3,), grads=[1.0, 1.0])
    carry_over, parts = _carry_over(*tensors)
    for tensor in tensors:
        delattr(tensor.grad, MARK)
    parts.backward.was_reduced = False
    carry_over.before_adding(0)
    parts.backward.was_reduced = True
    parts.backward.local[0] = 0
    parts.backward.arrived.append(1)
    carry_over.before_adding(0)
    carry_over.before_adding(1)
    assert [tensor.grad.tolist() for tensor in tensors] == [[1.0] * 3] * 2
    assert not carry_over.adds_to_reduced
    parts.backward.arrived.clear()
    carry_over.before_adding(1)  # which the user has set, or autograd with a graph of it
    assert tensors[1].grad.tolist() == [0.0] * 3


def test_what_is_put_aside_of_a_gradient_that_is_gone_is_forgotten():
    (tensor,) = made((6,), grads=[1.0])
    carry_over, _ = _carry_over(tensor)
    carry_over.before_adding(0)
    tensor.grad = None
    carry_over.before_making(0)
    tensor.grad = torch.full((6,), 3.0)
    carry_over.add_back()
    assert tensor.grad.tolist() == [3.0] * 6
    setattr(tensor.grad, MARK, 0)
    carry_over.before_adding(0)
    tensor.grad = torch.full((6,), 4.0)  # another tensor, of which no hook has told
    carry_over.add_back()
    assert tensor.grad.tolist() == [4.0] * 6


def test_a_gradient_that_is_zeroed_in_between_starts_anew():
    (tensor,) = made((6,), grads=[1.0])
    carry_over, parts = _carry_over(tensor)
    carry_over.before_adding(0)
    _add(tensor, [5.0] * 6)
    parts.backward.local[0] = tensor.grad._version
    tensor.grad.zero_()
    carry_over.before_adding(0)
    assert carry_over.put_aside == {}
    assert not parts.sums.has_misfit


def test_a_gradient_that_is_changed_in_between_is_a_misfit():
    (tensor,) = made((6,), grads=[1.0])
    carry_over, parts = _carry_over(tensor)
    carry_over.before_adding(0)
    _add(tensor, [5.0] * 6)
    parts.backward.local[0] = tensor.grad._version
    tensor.grad.mul_(2)
    carry_over.before_adding(0)
    assert parts.sums.has_misfit
    assert carry_over.misfits()[0].startswith("the gradient of parameter 'a' was changed in place (on rank 0) between")
    carry_over.end_reduction()
    assert carry_over.misfits() == {}
    assert not carry_over.adds_to_reduced


def test_autograd_may_add_into_a_new_tensor():
    (tensor,) = made((6,), grads=[1.0])
    carry_over, _ = _carry_over(tensor)
    with torch.enable_grad():  # as with create_graph=True
        carry_over.before_adding(0)
    tensor.grad = tensor.grad + 5.0
    carry_over.add_back()
    assert tensor.grad.tolist() == [5.0, 5.0, 6.0, 6.0, 6.0, 5.0]
