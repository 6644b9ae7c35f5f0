"""accumulate=k: k batches a step, equal to one process on all of them together."""

import pytest
import torch
from oracle import (
    assert_replicas,
    assert_same_parameters,
    joined_batch,
    local_part,
    make_plain,
    part_sizes,
    seeded,
    train,
    twin,
)

import dpoptim

pytestmark = pytest.mark.parallel


def _wrapped(model, comm, **options):
    inner = dpoptim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    return dpoptim.DataParallelOptimizer(inner, comm, **options)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("overlap", [False, True])
def test_k_batches_are_one_joined_batch(world, k, equal, overlap):
    model = seeded()
    expected = twin(model)
    opt = _wrapped(model, world, accumulate=k, overlap=overlap)
    plain = make_plain(opt, {"lr": 0.1, "momentum": 0.9}, expected.named_parameters())
    sizes = part_sizes(world.size, equal=equal)
    opt.batch_weight = sizes[world.rank]
    for step in range(4):
        batches = [joined_batch(k * step + i, sizes) for i in range(k)]
        for number, batch in enumerate(batches):
            before = [parameter.clone() for parameter in model.parameters()]
            assert opt.is_accumulating == (number < k - 1)
            train(opt, model, local_part(batch, sizes, world.rank))
            if number < k - 1:
                assert all(map(torch.equal, before, model.parameters())), "a step was made too early"
        train(plain, expected, torch.cat(batches))
        assert_replicas(opt, model)
        assert_same_parameters(model, expected, step)
    opt.detach()


def test_hooks_and_schedulers_see_steps_only(world):
    model = seeded()
    opt = _wrapped(model, world, accumulate=2)
    scheduler = dpoptim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    for step in range(4):
        train(opt, model, joined_batch(step, [4]))
        if opt.is_accumulating:  # the next batch begins another step
            scheduler.step()
    assert calls == ["before", "after"] * 2
    assert opt.param_groups[0]["lr"] == 0.1 * 0.25
    opt.detach()


def test_a_rank_without_gradients_in_any_batch(world):
    model = seeded()
    opt = _wrapped(model, world, accumulate=2)
    before = model.middle.weight.clone()
    for step in range(2):
        opt.zero_grad()
        if world.rank == 0:
            model(joined_batch(step, [4])).pow(2).mean().backward()
        opt.step()
    assert_replicas(opt, model)
    assert not torch.equal(before, model.middle.weight)
    opt.detach()


def test_bad_input(world):
    model = seeded()
    for value in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"accumulate must be an integer >= 1, got {value}"):
            _wrapped(model, world, accumulate=value)
    if world.size > 1:
        with pytest.raises(ValueError, match="accumulate is 1 on rank 0 but 2 on rank 1"):
            _wrapped(model, world, accumulate=1 + (world.rank == 1))
    opt = _wrapped(model, world, accumulate=2)
    with pytest.raises(ValueError, match="accumulate > 1 takes no closure"):
        opt.step(lambda: 0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(joined_batch(0, [4])).pow(2).mean()).backward()
    with pytest.raises(RuntimeError, match="accumulate > 1 does not go with GradScaler"):
        scaler.step(opt)
    with pytest.raises(ValueError, match="batch_weight must not change"):
        opt.batch_weight = 3
    opt.detach()
