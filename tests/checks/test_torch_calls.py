"""torch's own functions on gradients of which each rank has a part, and what becomes of norms by hand."""

import pytest
import torch
from oracle import MODES, assert_same_parameters, joined_batch, local_part, part_sizes, seeded
from torch import nn
from torch.nn.utils import clip_grad_norm_

import dpoptim

pytestmark = [pytest.mark.parallel, pytest.mark.ranks(2, 3)]


def _whole(parameters, norm_type):
    return clip_grad_norm_(parameters, 0.1, norm_type)


def _some(parameters, norm_type):
    return clip_grad_norm_(list(parameters)[1:4], 0.1, norm_type)


def _twice(parameters, norm_type):
    parameters = list(parameters)
    clip_grad_norm_(parameters, 0.3, norm_type)
    return clip_grad_norm_(parameters, 0.1, norm_type)


def _in_two_calls(parameters, norm_type):
    parameters = list(parameters)
    total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], norm_type)
    nn.utils.clip_grads_with_norm_(parameters, 0.1, total)
    return total


@pytest.mark.parametrize("clip", [_whole, _some, _twice, _in_two_calls])
@pytest.mark.parametrize("name", ["SGD", "Adafactor"])
@pytest.mark.parametrize("mode", MODES)
def test_torchs_clipping_is_that_of_one_process(world, mode, name, clip):
    sizes = part_sizes(world.size, equal=True)
    for norm_type in (2.0, 1.0, float("inf")):
        model, expected = seeded(), seeded()
        opt = dpoptim.DataParallelOptimizer(getattr(dpoptim, name)(model.parameters(), lr=0.1), **MODES[mode])
        plain = getattr(torch.optim, name)(expected.parameters(), lr=0.1)
        for step in range(3):
            batch = joined_batch(step, sizes)
            norms = []
            for optimizer, net, part in ((opt, model, local_part(batch, sizes, world.rank)), (plain, expected, batch)):
                optimizer.zero_grad()
                (net(part).pow(2).mean() * 10).backward()
                norms.append(clip(net.parameters(), norm_type))
                optimizer.step()
            torch.testing.assert_close(*norms, rtol=1e-9, atol=0)
            assert_same_parameters(model, expected, step)
        opt.detach()


@pytest.mark.parametrize("mode", MODES)
def test_a_rank_without_gradients_clips_and_scales_as_the_others(world, mode):
    sizes = part_sizes(world.size, equal=True)
    for unscales in (False, True):
        model, expected = seeded(), seeded()
        opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.parameters(), lr=0.1), **MODES[mode])
        plain = torch.optim.SGD(expected.parameters(), lr=0.1)
        scalers = [torch.amp.GradScaler("cpu", init_scale=4.0, enabled=unscales) for _ in range(2)]
        for step in range(4):
            idle = step % world.size if step else None  # a GradScaler wants to scale a loss first
            batch = joined_batch(step, sizes)
            opt.zero_grad()
            plain.zero_grad()
            if world.rank != idle:
                scalers[0].scale(model(local_part(batch, sizes, world.rank)).pow(2).mean() * 10).backward()
            parts = [part for rank, part in enumerate(batch.split(sizes)) if rank != idle]
            scalers[1].scale(sum(expected(part).pow(2).mean() * 10 for part in parts) / world.size).backward()
            for scaler, optimizer, net in ((scalers[0], opt, model), (scalers[1], plain, expected)):
                scaler.unscale_(optimizer)
                clip_grad_norm_(net.parameters(), 0.1)
                scaler.step(optimizer)
                scaler.update()
            assert_same_parameters(model, expected, step)
        opt.detach()


def _by_factor(parameters):
    total = torch.stack([p.grad.norm() for p in parameters]).norm()
    for p in parameters:
        p.grad.mul_(min(1.0, 0.1 / (float(total) + 1e-6)))


def _if_larger(parameters):
    factor = 0.1 / (sum(p.grad.pow(2).sum() for p in parameters).sqrt() + 1e-6)
    if factor < 1:
        for p in parameters:
            p.grad.mul_(factor)


def _orthogonally(parameters):
    for p in parameters:
        p.grad.sub_(p * ((p * p.grad).sum() / (p * p).sum()))


@pytest.mark.parametrize("clip", [_by_factor, _if_larger, _orthogonally])
@pytest.mark.parametrize("mode", ["sharded", "node-shared"])
def test_who_reads_whole_gradients_is_told(world, mode, clip):
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 5)))
    sizes = part_sizes(world.size, equal=True)
    opt = dpoptim.DataParallelOptimizer(dpoptim.AdamW(model.parameters(), lr=0.1), **MODES[mode])
    before = [p.detach().clone() for p in model.parameters()]
    (model(local_part(joined_batch(0, sizes), sizes, world.rank)).pow(2).mean() * 10).backward()
    with torch.no_grad():
        clip(list(model.parameters()))
    with pytest.raises(RuntimeError, match=r"was read as a whole between backward\(\) and step\(\)"):
        opt.step()
    if mode == "sharded":
        assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("mode", ["sharded", "node-shared"])
def test_work_by_element_disturbs_nothing(world, mode):
    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(), seeded()
    opt = dpoptim.DataParallelOptimizer(dpoptim.AdamW(model.parameters(), lr=0.1), **MODES[mode])
    plain = torch.optim.AdamW(expected.parameters(), lr=0.1)
    for step in range(4):
        batch = joined_batch(step, sizes)
        for optimizer, net, part in ((opt, model, local_part(batch, sizes, world.rank)), (plain, expected, batch)):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            for _ in range(2):  # the second adds to what was reduced
                net(part).pow(2).mean().backward()
            nn.utils.clip_grad_value_(net.parameters(), 0.2)
            for p in net.parameters():
                if p.grad is not None:
                    p.grad.mul_(-0.5).add_(0.01)
            optimizer.step()
        assert_same_parameters(model, expected, step)
    opt.detach()
