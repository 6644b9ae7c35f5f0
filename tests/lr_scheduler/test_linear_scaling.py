"""LinearScalingLR: from the rate of one rank to that of all, alone and with other schedulers."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import dpoptim
from dpoptim.lr_scheduler import LinearScalingLR

RATES = (0.1, 0.3)
# A rate is the product of one factor a step, each with a rounding or two of 1e-16.
RTOL = 1e-13


def make(lr=0.1, **options):
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    return torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 3 * lr}], lr=lr, **options)


def rates_of(optimizer, scheduler, num_steps):
    """Return the rates that each step is made with."""
    seen = []
    for _ in range(num_steps):
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return seen


def expected_rates(factor, warmup_steps, num_steps, after=lambda _: 1.0):
    """Return what the rule says: equal increments, then the scaled rate times what another scheduler makes of it."""
    curve = []
    for step in range(num_steps):
        growth = 1 + (factor - 1) * step / warmup_steps if step < warmup_steps else factor
        curve.append([rate * growth * after(step) for rate in RATES])
    return curve


def assert_rates(seen, expected):
    torch.testing.assert_close(
        torch.tensor(seen, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=RTOL, atol=0
    )


@pytest.mark.parametrize("factor", [1, 3, 2.5, 1024])
@pytest.mark.parametrize("warmup_steps", [1, 7, 100])
def test_grows_in_equal_increments_to_the_scaled_rate(factor, warmup_steps):
    optimizer = make()
    scheduler = LinearScalingLR(optimizer, warmup_steps=warmup_steps, factor=factor)
    assert_rates(rates_of(optimizer, scheduler, 120), expected_rates(factor, warmup_steps, 120))
    assert scheduler.factor == factor


def test_no_warmup_scales_at_once():
    optimizer = make()
    scheduler = LinearScalingLR(optimizer, warmup_steps=0, factor=4)
    assert_rates(rates_of(optimizer, scheduler, 5), [[4 * rate for rate in RATES]] * 5)


@pytest.mark.parallel
def test_factor_is_the_number_of_ranks(any_comm):
    opt = dpoptim.DataParallelOptimizer(make(), any_comm)
    scheduler = LinearScalingLR(opt, warmup_steps=4)
    assert scheduler.factor == any_comm.size
    seen = []
    for _ in range(6):
        seen.append([group["lr"] for group in opt.param_groups])
        for group in opt.param_groups:
            group["params"][0].sum().backward()
        opt.step()
        scheduler.step()
    assert_rates(seen, expected_rates(any_comm.size, 4, 6))
    assert all(other == seen for other in any_comm.allgather(seen))
    opt.detach()


@pytest.mark.parallel
def test_scaled_steps_follow_one_rank_on_small_batches(world):
    """What the rule is for: with linear gradients, one scaled step of N ranks moves as far as N steps of one."""
    ours, alone = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD([ours], lr=0.1))
    LinearScalingLR(opt, warmup_steps=0)
    plain = torch.optim.SGD([alone], lr=0.1)
    samples = torch.arange(world.size, dtype=torch.float32)
    (ours * samples[world.rank]).sum().backward()
    opt.step()
    for sample in samples:
        plain.zero_grad()
        (alone * sample).sum().backward()
        plain.step()
    torch.testing.assert_close(ours, alone)
    opt.detach()


AFTER = {
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=30),
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 4, gamma=0.5),
    "multi-step": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [3, 9], gamma=0.1),
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "polynomial": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 20, power=2.0),
    "restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 6),
}


def in_sequence(optimizer, name, warmup_steps=5, factor=4):
    warmup = LinearScalingLR(optimizer, warmup_steps=warmup_steps, factor=factor)
    return lr_scheduler.SequentialLR(optimizer, [warmup, AFTER[name](optimizer)], milestones=[warmup_steps])


def chained(optimizer, name, warmup_steps=5, factor=4):
    warmup = LinearScalingLR(optimizer, warmup_steps=warmup_steps, factor=factor)
    return lr_scheduler.ChainedScheduler([warmup, AFTER[name](optimizer)], optimizer)


@pytest.mark.parametrize("name", AFTER)
def test_another_scheduler_starts_from_the_scaled_rate(name):
    optimizer = make()
    seen = rates_of(optimizer, in_sequence(optimizer, name), 30)
    scaled = make(4 * RATES[0])
    assert_rates(seen[:5], expected_rates(4, 5, 5))
    assert_rates(seen[5:], rates_of(scaled, AFTER[name](scaled), 25))


@pytest.mark.parametrize("name", ["step", "multi-step", "exponential"])
@pytest.mark.parametrize("warmup_steps", [0, 5])
def test_chained_with_another_scheduler_the_factors_multiply(name, warmup_steps):
    optimizer, alone = make(), make(1.0)
    seen = rates_of(optimizer, chained(optimizer, name, warmup_steps), 30)
    other = [rate for rate, _ in rates_of(alone, AFTER[name](alone), 30)]
    assert_rates(seen, expected_rates(4, warmup_steps, 30, lambda step: other[step]))


def test_beside_reduce_on_plateau():
    optimizer = make()
    warmup = LinearScalingLR(optimizer, warmup_steps=2, factor=4)
    plateau = dpoptim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for _ in range(3):
        optimizer.step()
        warmup.step()
    plateau.step(1.0)
    plateau.step(1.0)
    assert_rates([[group["lr"] for group in optimizer.param_groups]], [[2 * rate for rate in RATES]])


@pytest.mark.parametrize("saved_after", [2, 5, 11])
@pytest.mark.parametrize("compose", [in_sequence, chained])
def test_goes_on_from_a_saved_state(compose, saved_after):
    optimizer = make(momentum=0.9)
    scheduler = compose(optimizer, "exponential")
    rates_of(optimizer, scheduler, saved_after)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    again = make(momentum=0.9)
    scheduler_again = compose(again, "exponential")
    again.load_state_dict(saved[0])
    scheduler_again.load_state_dict(saved[1])
    assert rates_of(again, scheduler_again, 10) == rates_of(optimizer, scheduler, 10)


@pytest.mark.parallel
def test_goes_on_from_a_state_of_the_wrapper(world):
    def rank_of_all():
        opt = dpoptim.DataParallelOptimizer(make())
        return opt, LinearScalingLR(opt, warmup_steps=6)

    def go(opt, scheduler, num_steps):
        for group in opt.param_groups:
            group["params"][0].sum().backward()
        return rates_of(opt, scheduler, num_steps)

    (opt, scheduler), (again, scheduler_again) = rank_of_all(), rank_of_all()
    go(opt, scheduler, 3)
    again.load_state_dict(opt.state_dict())
    scheduler_again.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    rest = go(opt, scheduler, 6)
    assert go(again, scheduler_again, 6) == rest
    assert_rates(rest, expected_rates(world.size, 6, 9)[3:])
    opt.detach()
    again.detach()


def test_resuming_with_last_epoch_scales_nothing():
    """The other way of torch to resume: it goes on as LinearLR does on rates that were scaled by hand."""
    optimizer = make()
    rates_of(optimizer, LinearScalingLR(optimizer, warmup_steps=5, factor=4), 2)
    again, by_hand = make(), make()
    for each in (again, by_hand):
        each.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    scheduler = LinearScalingLR(again, warmup_steps=5, factor=4, last_epoch=1)
    linear = lr_scheduler.LinearLR(by_hand, 1 / 4, 1.0, 5, last_epoch=1)
    assert scheduler.base_lrs == pytest.approx([4 * rate for rate in RATES], rel=RTOL)
    assert rates_of(again, scheduler, 8) == rates_of(by_hand, linear, 8)


def test_tensor_rates_are_scaled_in_place_and_once():
    """Groups without a rate of their own share the default's tensor."""
    lr = torch.tensor(0.1, dtype=torch.float64)
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [p]} for p in parameters], lr=lr, foreach=False)
    scheduler = LinearScalingLR(optimizer, warmup_steps=0, factor=3)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.3, rel=RTOL)
    assert [float(rate) for rate in scheduler.base_lrs] == [lr.item()] * 2


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"warmup_steps": -1, "factor": 2}, ValueError, r"^warmup_steps must be >= 0, got -1$"),
        ({"warmup_steps": 2.5, "factor": 2}, TypeError, r"^warmup_steps must be an int, got 2\.5$"),
        ({"warmup_steps": True, "factor": 2}, TypeError, r"^warmup_steps must be an int, got True$"),
        ({"warmup_steps": 5, "factor": 0.5}, ValueError, r"^factor must be >= 1 and finite, got 0\.5: for smaller"),
        ({"warmup_steps": 5, "factor": float("nan")}, ValueError, r"^factor must be >= 1 and finite, got nan"),
        ({"warmup_steps": 5, "factor": float("inf")}, ValueError, r"^factor must be >= 1 and finite, got inf"),
        ({"warmup_steps": 5, "factor": "4"}, TypeError, r"^factor must be a number or None, got '4'$"),
        ({"warmup_steps": 5}, ValueError, r"^factor must be given for an optimizer that knows no .* got None for SGD"),
    ],
)
def test_bad_arguments_change_nothing(arguments, kind, message):
    optimizer = make()
    with pytest.raises(kind, match=message):
        LinearScalingLR(optimizer, **arguments)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(RATES)
    assert not any("initial_lr" in group for group in optimizer.param_groups)


def test_no_optimizer():
    with pytest.raises(TypeError, match=r"^optimizer must be a torch\.optim\.Optimizer, got list$"):
        LinearScalingLR([], warmup_steps=5, factor=2)


def test_another_scheduler_was_there_first():
    """It would anneal from the unscaled rate, and nobody would notice."""
    optimizer = make()
    lr_scheduler.ExponentialLR(optimizer, 0.9)
    with pytest.raises(ValueError, match=r"parameter group 0 must not have an initial_lr yet, got 0\.1: construct Lin"):
        LinearScalingLR(optimizer, warmup_steps=5, factor=4)
    assert optimizer.param_groups[0]["lr"] == RATES[0]


def test_a_state_that_was_scaled_is_not_scaled_again():
    optimizer, again = make(), make()
    LinearScalingLR(optimizer, warmup_steps=5, factor=4)
    again.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"got 0\.4: .* before loading a state_dict$"):
        LinearScalingLR(again, warmup_steps=5, factor=4)
