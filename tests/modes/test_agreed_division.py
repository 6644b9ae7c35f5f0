"""By what ranks agree to shard an optimizer, and that a switched option is found."""

import pytest
import torch
from torch import nn

from dpoptim.modes.agreed_division import OptionsWatch, agreed_division, check_new_group


class Says:
    """Stands for a communicator in which rank 0 says this."""

    def __init__(self, rank=0, of_rank_0=None):
        self.rank, self._of_rank_0 = rank, of_rank_0

    def broadcast_object(self, item):
        return item if self.rank == 0 else self._of_rank_0


class Coupled(torch.optim.Optimizer):
    """Steps each element by itself, unless ``mixes``."""

    def __init__(self, parameters, lr=0.1, mixes=False):
        super().__init__(parameters, {"lr": lr, "mixes": mixes})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            scale = sum(parameter.grad.sum() for parameter in trained) if group["mixes"] else 1.0
            for parameter in trained:
                parameter.sub_(parameter.grad * scale, alpha=group["lr"])


def _coupled(**options):
    return Coupled(nn.Linear(3, 2).parameters(), **options)


@pytest.mark.parametrize(
    ("make", "by"),
    [
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1), "element"),
        (torch.optim.Adafactor, "parameter"),
        (torch.optim.LBFGS, "nothing"),
        (torch.optim.SparseAdam, "nothing"),
        (Coupled, "element"),
        (lambda parameters: Coupled(parameters, mixes=True), "nothing"),
    ],
)
def test_by_what_a_class_is_sharded(make, by):
    found, why_not = agreed_division(make(nn.Linear(3, 2).parameters()), Says())
    assert found == by
    assert bool(why_not) == (by == "nothing")


def test_of_other_classes_than_torchs_rank_0_has_the_say():
    class Found:
        by, why_not = "nothing", "was tried on rank 0"

    assert agreed_division(_coupled(), Says(1, Found)) == ("nothing", "was tried on rank 0")
    assert agreed_division(torch.optim.SGD(nn.Linear(3, 2).parameters()), Says(1, Found))[0] == "element"


def test_a_new_group_that_can_not_be_sharded_is_an_error_on_all():
    check_new_group(_coupled(), Says(), by_element=True)
    with pytest.raises(ValueError, match="with the new group Coupled can't be sharded, since it") as caught:
        check_new_group(_coupled(mixes=True), Says(), by_element=True)
    assert caught.value.raised_on_all_ranks
    adafactor = torch.optim.Adafactor(nn.Linear(3, 2).parameters())
    check_new_group(adafactor, Says(), by_element=False)
    with pytest.raises(ValueError, match="with the new group Adafactor can be sharded by whole parameter alone"):
        check_new_group(adafactor, Says(), by_element=True)


def test_an_option_that_is_switched_is_found():
    optimizer = _coupled()
    watch = OptionsWatch(optimizer, by_element=True)
    optimizer.param_groups[0]["lr"] = 0.01  # what schedulers do
    watch.check()
    optimizer.param_groups[0]["mixes"] = True
    with pytest.raises(ValueError, match="an option of a parameter group was switched, and Coupled"):
        watch.check()
    watch.note()
    watch.check()


def test_options_of_torchs_own_classes_are_not_watched():
    optimizer = torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1)
    watch = OptionsWatch(optimizer, by_element=True)
    optimizer.param_groups[0]["nesterov"] = True
    watch.check()
