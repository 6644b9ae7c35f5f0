"""What a closure returns when its loss is averaged, and in which order."""

import math

import pytest
import torch

from dpoptim.modes.closures import averaged


class Log:
    """Stands for a reducer, and for ranks whose mean is the double."""

    def __init__(self):
        self.done = []

    def finish(self):
        self.done.append("finish")

    def expect_backward(self):
        self.done.append("expect")

    def mean(self, value):
        self.done.append(value)
        return 2 * value


@pytest.mark.parametrize("loss", [1.5, torch.tensor(1.5, dtype=torch.float64), torch.tensor([1.5], requires_grad=True)])
def test_a_loss_is_averaged_when_gradients_are(loss):
    log = Log()
    found = averaged(lambda: log.done.append("closure") or loss, log, log.mean)()
    assert log.done == ["closure", "finish", 1.5, "expect"]
    assert isinstance(found, torch.Tensor) == isinstance(loss, torch.Tensor)
    assert float(found) == 3.0
    if isinstance(loss, torch.Tensor):
        assert found.dtype == loss.dtype
        assert not found.requires_grad


def test_a_closure_that_returns_nothing_meets_the_others_all_the_same():
    log = Log()
    assert averaged(lambda: None, log, log.mean)() is None
    done = log.done
    assert (done[0], done[2]) == ("finish", "expect")
    assert math.isnan(done[1])


def test_gradients_are_computed_within_whatever_is_around():
    seen = []
    with torch.no_grad():
        averaged(lambda: seen.append(torch.is_grad_enabled()), Log(), lambda value: value)()
    assert seen == [True]
