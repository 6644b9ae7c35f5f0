"""Every scheduler on the wrapper sets the rates that it sets on a plain optimizer, through a save and a load."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.optim.lr_scheduler as torch_schedulers
from oracle import MODES
from torch import nn

import dpoptim

pytestmark = pytest.mark.parallel

NUM_STEPS = 100
PACKAGES = (dpoptim.lr_scheduler, torch_schedulers)
ARGUMENTS = {
    "LambdaLR": {"lr_lambda": [lambda step: 0.95**step, lambda step: 1 / (1 + step)]},
    "MultiplicativeLR": {"lr_lambda": lambda step: 0.95},
    "StepLR": {"step_size": 30},
    "MultiStepLR": {"milestones": [20, 50, 51]},
    "ConstantLR": {"total_iters": 40},
    "LinearLR": {"total_iters": 60},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 60, "power": 2.0},
    "CosineAnnealingLR": {"T_max": 30},
    "CosineAnnealingWarmRestarts": {"T_0": 7, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.001, "max_lr": 0.01, "step_size_up": 13},
    "OneCycleLR": {"max_lr": [0.01, 0.02], "total_steps": NUM_STEPS + 1},
    "ReduceLROnPlateau": {"patience": 3, "cooldown": 2},
}


def _make(package, name, optimizer):
    if name == "ChainedScheduler":
        return package.ChainedScheduler(
            [package.ConstantLR(optimizer, total_iters=9), package.ExponentialLR(optimizer, 0.9)]
        )
    if name == "SequentialLR":
        parts = [package.LinearLR(optimizer, total_iters=20), package.CosineAnnealingLR(optimizer, 40)]
        return package.SequentialLR(optimizer, parts, milestones=[20])
    if name == "SWALR":
        swa_utils = dpoptim.swa_utils if package is dpoptim.lr_scheduler else torch.optim.swa_utils
        return swa_utils.SWALR(optimizer, swa_lr=[0.05, 0.01], anneal_epochs=60)
    return getattr(package, name)(optimizer, **copy.deepcopy(ARGUMENTS[name]))


def _parameters():
    return [nn.Parameter(torch.full((3,), 0.5, dtype=torch.float64)) for _ in range(2)]


def _groups(parameters):
    return [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.003}]


def _wrapped(**mode):
    parameters = _parameters()
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(_groups(parameters), lr=0.01, momentum=0.9), **mode)
    return opt, parameters


def _metric(step):
    return 1 / (1 + step) if step < 30 else 1 + step


NAMES = [*ARGUMENTS, "ChainedScheduler", "SequentialLR", "SWALR"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.ranks(2)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.supports("{name}", replicated="yes", sharded="{mode}")
def test_the_same_rates_for_100_steps(world, name, mode):
    opt, ours = _wrapped(**MODES[mode])
    scheduler = _make(dpoptim.lr_scheduler, name, opt)
    theirs = _parameters()
    plain = torch.optim.SGD(_groups(theirs), lr=0.01, momentum=0.9, foreach=False)
    plain_scheduler = _make(torch_schedulers, name, plain)
    rates = []
    for step in range(NUM_STEPS):
        if step == NUM_STEPS // 2:  # everything anew, from what was saved
            saved = copy.deepcopy((opt.full_state_dict(rank0_only=False), scheduler.state_dict()))
            weights = [parameter.detach().clone() for parameter in ours]
            opt.detach()
            opt, ours = _wrapped(**MODES[mode])
            scheduler = _make(dpoptim.lr_scheduler, name, opt)
            with torch.no_grad():
                for parameter, weight in zip(ours, weights, strict=True):
                    parameter.copy_(weight)
            opt.load_state_dict(saved[0])
            scheduler.load_state_dict(saved[1])
        for optimizer, parameters in ((opt, ours), (plain, theirs)):
            optimizer.zero_grad()
            sum((parameter * parameter).sum() for parameter in parameters).backward()
            optimizer.step()
        if name == "ReduceLROnPlateau":
            # Each rank has a metric of its own, of which the mean decides; sums of few small numbers are exact.
            scheduler.step(_metric(step) + (world.rank - (world.size - 1) / 2) * 0.25)
            plain_scheduler.step(_metric(step))
        else:
            scheduler.step()
            plain_scheduler.step()
        for group, other in zip(opt.param_groups, plain.param_groups, strict=True):
            assert group["lr"] == other["lr"], f"step {step}"
            assert group["momentum"] == other["momentum"], f"step {step}"
        assert scheduler.get_last_lr() == plain_scheduler.get_last_lr()
        rates.append(tuple(scheduler.get_last_lr()))
    assert len(set(rates)) > 1
    for parameter, other in zip(ours, theirs, strict=True):
        # one process has the same gradient as each rank: what differs is the rounding of its N-th parts
        torch.testing.assert_close(parameter, other, rtol=1e-12, atol=1e-14)
    opt.detach()


PRINTED = [
    ((True, 0, 0.01), "Adjusting learning rate of group 0 to 1.0000e-02.\n"),
    ((True, 1, torch.tensor(0.5), 3), "Epoch 00003: adjusting learning rate of group 1 to 5.0000e-01.\n"),
    ((True, 0, 0.01, 2.5), "Epoch 2.50: adjusting learning rate of group 0 to 1.0000e-02.\n"),
    ((False, 0, 0.01), ""),
]


@pytest.mark.parametrize("name", [*ARGUMENTS, "ChainedScheduler", "SequentialLR", "LinearScalingLR"])
def test_every_scheduler_prints_rates_on_rank_0(world, name, capsys):
    opt, _ = _wrapped()
    plain = torch.optim.SGD(_groups(_parameters()), lr=0.01)
    for optimizer, prints in ((opt, world.rank == 0), (plain, True)):
        if name == "LinearScalingLR":
            scheduler = dpoptim.lr_scheduler.LinearScalingLR(optimizer, warmup_steps=3, factor=2)
        else:
            scheduler = _make(dpoptim.lr_scheduler, name, optimizer)
        for arguments, text in PRINTED:
            scheduler.print_lr(*arguments)
            assert capsys.readouterr().out == (text if prints else "")
    opt.detach()


@pytest.mark.parametrize("name", [*ARGUMENTS, "ChainedScheduler", "SequentialLR"])
def test_schedulers_are_torchs(name):
    make = (
        _make(package, name, torch.optim.SGD(_groups(_parameters()), lr=0.01, momentum=0.9)) for package in PACKAGES
    )
    ours, theirs = make
    assert isinstance(ours, type(theirs))
    assert isinstance(ours, dpoptim.lr_scheduler.LRScheduler)
    assert isinstance(theirs, dpoptim.lr_scheduler.LRScheduler)
    assert inspect.signature(type(ours)) == inspect.signature(type(theirs))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    if name not in ("LambdaLR", "MultiplicativeLR", "CyclicLR"):  # functions that pickle cannot find by name
        restored = pickle.loads(pickle.dumps(ours))
        assert type(restored) is type(ours)
        assert restored.get_last_lr() == theirs.get_last_lr()
