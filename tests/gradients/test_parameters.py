"""Parameters: their names, and what a gradient of each is like."""

import pytest
import torch
from reducing import made, parameters_of
from torch import nn

from dpoptim.gradients.parameters import can_have_gradient, in_layout_of, is_taken_away, like_gradient, version


def test_parameters_are_known_by_their_numbers():
    tensors = made((2,), (3,), (4,), grads=[1.0, None, 3.0])
    parameters = parameters_of(*tensors[:2])
    kept = parameters.tensors
    parameters.add(tensors[2:], ["last"], [7])
    assert len(parameters) == 3
    assert parameters.tensors is kept, "who has asked for them sees those that come later"
    assert parameters.describe(2) == "parameter 'last'"
    assert parameters.groups == [0, 0, 7]
    assert [gradient is None for gradient in parameters.gradients()] == [False, True, False]
    assert parameters.gradients_of([2, 0]) == [tensors[2].grad, tensors[0].grad]


def test_what_can_have_a_gradient():
    dtypes = (torch.float16, torch.complex64, torch.int64, torch.bool)
    assert [can_have_gradient(torch.zeros(1, dtype=dtype)) for dtype in dtypes] == [True, True, False, False]


def test_a_gradient_is_like_its_parameter_or_of_its_own_dtype():
    (parameter,) = made((3, 2))
    assert like_gradient(parameter) is parameter
    if not hasattr(parameter, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    parameter.grad_dtype = torch.float64
    like = like_gradient(parameter)
    assert (like.dtype, like.shape) == (torch.float64, parameter.shape)


def test_a_gradient_gets_its_parameters_layout():
    parameter = nn.Parameter(torch.zeros(2, 3).t())
    gradient = torch.arange(6.0).view(3, 2)
    assert in_layout_of(gradient, gradient) is gradient
    laid_out = in_layout_of(parameter, gradient)
    assert laid_out.stride() == parameter.stride() != gradient.stride()
    assert torch.equal(laid_out, gradient)


def test_a_gradient_is_taken_away_by_a_hook_beside_ours():
    (parameter,) = made((2,))
    parameter.register_post_accumulate_grad_hook(lambda _: None)
    assert not is_taken_away(parameter), "nobody else could have"
    parameter.register_post_accumulate_grad_hook(lambda _: None)
    assert is_taken_away(parameter)
    parameter.grad = torch.zeros(2)
    assert not is_taken_away(parameter)


def test_a_version_changes_with_what_is_written():
    gradient = torch.zeros(2)
    before = version(gradient)
    assert version(gradient) == before
    gradient.add_(1)
    assert version(gradient) != before
    with torch.inference_mode():
        assert version(torch.zeros(2)) == version(None) == -1
