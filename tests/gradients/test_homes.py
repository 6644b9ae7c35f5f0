"""Gradients in memory that the node shares: where they lie, and that a user does not notice."""

import logging
import os

import pytest
import torch
from torch import nn

import dpoptim
import dpoptim.comm.node.shared_memory
from dpoptim.gradients.homes import is_large

pytestmark = pytest.mark.parallel

MODES = pytest.mark.parametrize(
    "mode", [{}, {"shard": True}, {"node_shared": True}], ids=["replicated", "sharded", "node"]
)
_WIDTH = 384  # its square is large, of any dtype


def _model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, 3))


def _batch(step, rank):
    return torch.randn(4, _WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))


def _loss(model, batch):
    return model(batch).pow(2).mean()


def _wrapped(model, world, mode):
    return dpoptim.DataParallelOptimizer(dpoptim.SGD(model.parameters(), lr=0.1, momentum=0.9), world, **mode)


def _train(optimizer, model, world, step, *, set_to_none=True):
    optimizer.zero_grad(set_to_none=set_to_none)
    _loss(model, _batch(step, world.rank)).backward()
    optimizer.step()


def _trained_by_one(world, num_steps):
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(num_steps):
        optimizer.zero_grad()
        for rank in range(world.size):
            (_loss(model, _batch(step, rank)) / world.size).backward()
        optimizer.step()
    return model


def _assert_alike(model, expected):
    for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-6)


def _lie_together(optimizer, world):
    """Whether this rank's large gradients lie where the others can sum them."""
    if world.size == 1 or optimizer.communicator.why_no_peer_memory() is not None:
        pytest.skip("no rank reads another's memory here")
    large = [p for group in optimizer.param_groups for p in group["params"] if is_large(p)]
    reducer = optimizer._reducer
    at_home = [home.has(reducer._parameters.tensors[index].grad) for index, home in reducer._homes.items()]
    return len(at_home) == len(large) > 0 and all(at_home)


@MODES
def test_large_gradients_lie_together_and_train_as_one_process(world, mode):
    model = _model()
    optimizer = _wrapped(model, world, mode)
    for step in range(3):
        _train(optimizer, model, world, step)
    _assert_alike(model, _trained_by_one(world, 3))
    assert _lie_together(optimizer, world)
    optimizer.detach()


@MODES
def test_what_was_a_gradient_is_not_overwritten(world, mode):
    model = _model()
    optimizer = _wrapped(model, world, mode)
    held, before = [], []
    for step in range(4):
        _train(optimizer, model, world, step)
        gradient = model[0].weight.grad
        held.append(gradient if step % 2 else gradient[5:].view(-1))
        before.append(held[-1].clone())
    assert all(torch.equal(now, then) for now, then in zip(held, before, strict=True))
    _assert_alike(model, _trained_by_one(world, 4))
    optimizer.detach()


@MODES
def test_a_buffer_of_the_users_stays_the_gradient(world, mode):
    model = _model()
    optimizer = _wrapped(model, world, mode)
    buffer = torch.zeros(_WIDTH, _WIDTH)
    for step in range(3):
        optimizer.zero_grad()
        model[0].weight.grad = buffer.zero_()
        _loss(model, _batch(step, world.rank)).backward()
        assert model[0].weight.grad is buffer
        optimizer.step()
    _assert_alike(model, _trained_by_one(world, 3))
    optimizer.detach()


@MODES
def test_a_gradient_that_is_zeroed_stays_the_same_tensor(world, mode):
    model = _model()
    optimizer = _wrapped(model, world, mode)
    first = None
    for step in range(3):
        _train(optimizer, model, world, step, set_to_none=False)
        first = first if step else model[0].weight.grad
        assert model[0].weight.grad is first
    _assert_alike(model, _trained_by_one(world, 3))
    optimizer.detach()


@MODES
def test_gradients_of_several_backward_passes(world, mode):
    model = _model()
    optimizer = _wrapped(model, world, mode)
    for step in range(3):
        optimizer.zero_grad()
        with optimizer.no_sync():
            (_loss(model, _batch(step, world.rank)) / 4).backward()
        (_loss(model, _batch(step, world.rank)) / 4).backward()
        (_loss(model, _batch(step, world.rank)) / 2).backward()
        optimizer.step()
    _assert_alike(model, _trained_by_one(world, 3))
    optimizer.detach()


@MODES
def test_a_parameter_that_has_a_gradient_on_some_ranks_only(world, mode):
    model = _model()
    optimizer = _wrapped(model, world, mode)
    expected = _model()
    reference = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        missing = step % world.size
        optimizer.zero_grad()
        short = model[2:] if world.rank == missing else model
        _loss(short, _batch(step, world.rank)).backward()
        optimizer.step()
        reference.zero_grad()
        for rank in range(world.size):
            (_loss(expected[2:] if rank == missing else expected, _batch(step, rank)) / world.size).backward()
        reference.step()
    _assert_alike(model, expected)
    optimizer.detach()


@MODES
def test_groups_that_come_later_and_parameters_that_are_unfrozen(world, mode):
    model, expected = _model(), _model()
    optimizers = []
    for each in (model, expected):
        each[2].weight.requires_grad_(False)
        inner = torch.optim.SGD([each[0].weight, each[2].weight], lr=0.1, momentum=0.9)
        optimizers.append(dpoptim.DataParallelOptimizer(inner, world, **mode) if each is model else inner)
    for step in range(5):
        if step == 1:
            model[2].weight.requires_grad_(True)
            expected[2].weight.requires_grad_(True)
        if step == 3:
            for optimizer, each in zip(optimizers, (model, expected), strict=True):
                optimizer.add_param_group({"params": [each[3].weight, each[2].bias], "lr": 0.05})
        for optimizer in optimizers:
            optimizer.zero_grad()
        _loss(model, _batch(step, world.rank)).backward()
        for rank in range(world.size):
            (_loss(expected, _batch(step, rank)) / world.size).backward()
        for optimizer in optimizers:
            optimizer.step()
    _assert_alike(model, expected)
    assert _lie_together(optimizers[0], world)
    optimizers[0].detach()


@MODES
def test_where_there_is_no_memory_to_lend_gradients_stay_private(world, monkeypatch, caplog, mode):
    def refuse(_):
        raise OSError("no memory today")

    if world.rank == 0:
        monkeypatch.setattr(dpoptim.comm.node.shared_memory.os, "memfd_create", refuse)
    model = _model()
    with caplog.at_level(logging.INFO, "dpoptim"):
        optimizer = _wrapped(model, world, mode)
    for step in range(3):
        _train(optimizer, model, world, step)
    _assert_alike(model, _trained_by_one(world, 3))
    assert not optimizer._reducer._homes
    if world.size > 1 and optimizer.communicator.why_no_peer_memory() is None:
        assert f"no memory today) (rank {world.rank})" in caplog.text
    optimizer.detach()


def test_a_home_lives_as_long_as_the_gradient_in_it(world):
    model = _model()
    optimizer = _wrapped(model, world, {})
    _loss(model, _batch(0, world.rank)).backward()
    gradient = model[0].weight.grad
    before = gradient.clone()
    optimizer.detach()
    del optimizer
    world.Barrier()
    model.zero_grad()
    assert torch.equal(gradient, before)
    _loss(model, _batch(1, world.rank)).backward()
    assert model[0].weight.grad.data_ptr() != gradient.data_ptr()
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("dpoptim-")]  # noqa: PTH208
