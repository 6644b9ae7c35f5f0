"""ReduceLROnPlateau: ranks with different metrics decide alike."""

import copy
import random

import pytest
import torch
from torch import nn

import dpoptim
from dpoptim.lr_scheduler import ReduceLROnPlateau

OPTIONS = [
    {"patience": 1, "factor": 0.5},
    {"patience": 2, "factor": 0.3, "mode": "max", "cooldown": 2, "threshold": 0.05},
    {"patience": 0, "factor": 0.8, "threshold_mode": "abs", "threshold": 0.01, "min_lr": [0.02, 0.001]},
]


def groups():
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    return [{"params": [first]}, {"params": [second], "lr": 0.3}]


def metric_of(rank, epoch, seed=0):
    """Return a metric that wanders, on each rank by its own way."""
    generator = random.Random(1000 * seed + rank)
    metric = 5.0
    for _ in range(epoch + 1):
        metric += generator.uniform(-0.7, 0.6)
    return metric


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def local_rates(options, rank, num_epochs):
    """Return the rates that a rank would have if it decided by itself."""
    plain = torch.optim.SGD(groups(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(plain, **options)
    for epoch in range(num_epochs):
        scheduler.step(metric_of(rank, epoch))
    return rates(plain)


@pytest.mark.parallel
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=["min", "max", "abs"])
def test_ranks_decide_alike_and_as_torch_on_the_mean(world, options, uneven):
    """The size of the last batch, which may still be set, says nothing about an epoch's metric."""
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(groups(), lr=0.1))
    plain = torch.optim.SGD(groups(), lr=0.1)
    if uneven:
        opt.batch_weight = 1 + 2 * world.rank
    scheduler = ReduceLROnPlateau(opt, **options)
    expected = torch.optim.lr_scheduler.ReduceLROnPlateau(plain, **options)
    for epoch in range(25):
        metrics = [metric_of(rank, epoch) for rank in range(world.size)]
        scheduler.step(torch.tensor(metrics[world.rank], dtype=torch.float64))
        expected.step(sum(metrics) / world.size)
        assert len(set(map(tuple, world.allgather(rates(opt))))) == 1, "the ranks drift apart"
        assert rates(opt) == rates(plain)
        assert scheduler.get_last_lr() == expected.get_last_lr()
        assert scheduler.best == pytest.approx(expected.best, rel=1e-14)  # a sum of up to four numbers
        assert scheduler.num_bad_epochs == expected.num_bad_epochs
    assert rates(opt)[0] < 0.1, "nothing was decided"
    opt.detach()


def test_ranks_that_decide_by_themselves_would_drift():
    """The metrics of these tests tell a common decision from local ones."""
    for options in OPTIONS:
        assert len({tuple(local_rates(options, rank, 25)) for rank in range(4)}) > 1


@pytest.mark.parallel
def test_no_number_on_one_rank_is_none_on_all(world):
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(groups(), lr=0.1))
    scheduler = ReduceLROnPlateau(opt, patience=0, factor=0.5)
    scheduler.step(1.0)
    scheduler.step(float("nan") if world.rank == world.size - 1 else 0.1)
    assert rates(opt) == [0.05, 0.15]
    assert scheduler.best == 1.0
    opt.detach()


@pytest.mark.parallel
@pytest.mark.parametrize("options", OPTIONS, ids=["min", "max", "abs"])
def test_goes_on_from_a_saved_state(world, options):
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(groups(), lr=0.1))
    scheduler = ReduceLROnPlateau(opt, **options)
    for epoch in range(10):
        scheduler.step(metric_of(world.rank, epoch))
    saved = copy.deepcopy((opt.state_dict(), scheduler.state_dict()))
    for epoch in range(10, 25):
        scheduler.step(metric_of(world.rank, epoch))
    again = dpoptim.DataParallelOptimizer(dpoptim.SGD(groups(), lr=0.1))
    scheduler_again = ReduceLROnPlateau(again, **options)
    again.load_state_dict(saved[0])
    scheduler_again.load_state_dict(saved[1])
    for epoch in range(10, 25):
        scheduler_again.step(metric_of(world.rank, epoch))
    assert rates(again) == rates(opt)
    assert scheduler_again.state_dict() == scheduler.state_dict()
    assert rates(opt)[0] < saved[0]["param_groups"][0]["lr"], "nothing was decided after the save"
    again.detach()
    opt.detach()


@pytest.mark.parallel
def test_a_state_goes_to_torchs_class_and_back(world):
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(groups(), lr=0.1))
    scheduler = ReduceLROnPlateau(opt, **OPTIONS[0])
    for epoch in range(10):
        scheduler.step(metric_of(0, epoch))
    plain = torch.optim.SGD(groups(), lr=0.1)
    torch_scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(plain, **OPTIONS[0])
    plain.load_state_dict(opt.state_dict())
    torch_scheduler.load_state_dict(scheduler.state_dict())
    for epoch in range(10, 20):
        torch_scheduler.step(metric_of(0, epoch))
        scheduler.step(metric_of(0, epoch))
        assert rates(plain) == rates(opt)
    scheduler.load_state_dict(torch_scheduler.state_dict())
    assert scheduler.last_epoch == 20
    opt.detach()


@pytest.mark.parallel
@pytest.mark.parametrize("options", OPTIONS, ids=["min", "max", "abs"])
def test_with_a_plain_optimizer_it_is_torchs_and_local(world, options):
    """Each rank steps another number of times: a collective would hang."""
    plain, other = torch.optim.SGD(groups(), lr=0.1), torch.optim.SGD(groups(), lr=0.1)
    ours = ReduceLROnPlateau(plain, **options)
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(other, **options)
    for epoch in range(10 + 5 * world.rank):
        ours.step(metric_of(world.rank, epoch))
        torchs.step(metric_of(world.rank, epoch))
        assert rates(plain) == rates(other)
    assert ours.state_dict() == torchs.state_dict()


def test_it_is_a_scheduler_of_torchs_kind():
    """Code that asks for torch's class finds it, as torch's ChainedScheduler, which refuses it."""
    plain = torch.optim.SGD(groups(), lr=0.1)
    ours = ReduceLROnPlateau(plain)
    assert isinstance(ours, torch.optim.lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(ValueError, match="does not support `ReduceLROnPlateau`"):
        torch.optim.lr_scheduler.ChainedScheduler([ours])
