"""What DASO refuses of a rank's own loss."""

import math

import pytest
import torch

from dpoptim.daso.arguments import checked_loss


@pytest.mark.parametrize("loss", [2, 2.0, torch.tensor(2.0), torch.tensor([[2.0]], requires_grad=True)])
def test_a_loss_is_a_number_or_a_tensor_of_one_element(loss):
    assert checked_loss(loss) == (2.0, None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_told_with_what_it_is(value):
    own, error = checked_loss(torch.tensor(value))
    assert repr(own) == repr(value)
    assert isinstance(error, ValueError)
    assert str(error) == f"loss must be finite, got {value}: training has diverged"


@pytest.mark.parametrize(
    ("loss", "kind"), [("much", ValueError), (None, TypeError), (torch.ones(2), (RuntimeError, ValueError))]
)
def test_what_is_no_number_is_an_error_of_its_kind(loss, kind):
    own, error = checked_loss(loss)
    assert math.isnan(own)
    assert isinstance(error, kind)
