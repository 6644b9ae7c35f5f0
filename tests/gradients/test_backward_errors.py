"""Backward passes that fail, are left out, or are thrown away; and what errors say."""

import contextlib

import pytest
import torch
from oracle import MODES, joined_batch, local_part, seeded, twin
from torch import nn

import dpoptim

pytestmark = pytest.mark.parallel


def _net():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def _make(world, mode, *, overlap=False, name="SGD", **options):
    model = seeded(_net)
    expected = twin(model)
    settings = {"lr": 0.1, "momentum": 0.9}
    opt = dpoptim.DataParallelOptimizer(
        getattr(dpoptim, name)(model.named_parameters(), **settings),
        world,
        overlap=overlap,
        bucket_mb=1e-4,
        **mode,
        **options,
    )
    return model, opt, expected, getattr(torch.optim, name)(expected.parameters(), **settings)


def _batch(world, step):
    sizes = [3] * world.size
    batch = joined_batch(step, sizes)
    return batch, local_part(batch, sizes, world.rank)


def _loss(model, batch):
    return model(batch).pow(2).mean()


def _assert_same(model, expected, what):
    for value, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-12, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("cleared", ["opt", "model", "in place", "not"])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_backward_that_raised_on_all_ranks_is_a_batch_left_out(world, mode, overlap, cleared):
    for where, kind, is_alone in ((4, RuntimeError, True), (2, KeyboardInterrupt, False), (0, RuntimeError, False)):
        model, opt, expected, plain = _make(world, mode, overlap=overlap)
        other = None if is_alone else _make(world, mode, overlap=overlap)[1]
        fails = []
        for module in (model, expected):

            def check(gradient, kind=kind, fails=fails):
                if fails:
                    raise kind("no memory left")

            list(module.parameters())[where].register_hook(check)
        for step in range(5):
            joined, own = _batch(world, step)
            fails[:] = [True] if step in (1, 3) else []
            if cleared == "opt" or not fails:
                opt.zero_grad()
                plain.zero_grad()
            elif cleared != "not":
                model.zero_grad(set_to_none=cleared == "model")
                expected.zero_grad(set_to_none=cleared == "model")
            try:
                _loss(model, own).backward()
            except kind:
                assert fails
                with contextlib.suppress(kind):
                    _loss(expected, joined).backward()
                continue
            _loss(expected, joined).backward()
            opt.step()
            plain.step()
            _assert_same(model, expected, f"gradient {where}, step {step}")
        opt.detach()
        if other is not None:
            other.detach()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_backward_that_raised_on_one_rank_is_an_error_on_all(world, mode, overlap):
    for where in (2, 0):
        model, opt, _, _ = _make(world, mode, overlap=overlap)
        fails = []

        def check(gradient, fails=fails):
            if fails:
                raise ValueError("no memory left")

        list(model.parameters())[where].register_hook(check)
        match = "at different places .*1 backward passes that raised|a backward raised an error on ranks 0"
        with pytest.raises(RuntimeError, match=match) if world.size > 1 else contextlib.nullcontext():
            for step in range(4):
                opt.zero_grad()
                fails[:] = [True] if step == 2 and world.rank == 0 else []
                try:
                    _loss(model, _batch(world, step)[1]).backward()
                except ValueError:
                    continue
                opt.step()
        opt._reducer.detach()


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_step_left_out_and_then_a_rank_without_gradients(world, mode):
    for clears in (lambda opt, _: opt.zero_grad(), lambda _, model: model.zero_grad()):
        model, opt, expected, plain = _make(world, mode)
        for step in range(5):
            idle = world.size - 1 if step == 3 and world.size > 1 else None
            joined, own = _batch(world, step)
            clears(opt, model)
            plain.zero_grad()
            if world.rank != idle:
                _loss(model, own).backward()
            parts = [part for rank, part in enumerate(joined.split(3)) if rank != idle]
            (sum(_loss(expected, part) for part in parts) / world.size).backward()
            if step != 2:
                opt.step()
                plain.step()
        _assert_same(model, expected, "after all")
        opt.detach()


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_norms_of_what_was_not_reduced_yet(world, mode):
    model, opt, expected, plain = _make(world, mode)
    for step in range(4):
        idle = (step % world.size) if step > 1 and world.size > 1 else None
        joined, own = _batch(world, step)
        opt.zero_grad()
        plain.zero_grad()
        with opt.no_sync() if step < 2 else contextlib.nullcontext():
            if world.rank != idle:
                _loss(model, own).mul(30).backward()
        parts = [part for rank, part in enumerate(joined.split(3)) if rank != idle]
        (sum(_loss(expected, part) * 30 for part in parts) / world.size).backward()
        norm = opt.clip_grad_norm_(0.1)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(expected.parameters(), 0.1))
        opt.step()
        plain.step()
        _assert_same(model, expected, f"step {step}")
    opt.detach()


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_several_losses_of_each_accumulated_batch(world, mode, k):
    """Two backward passes a batch, the second of which reaches some parameters only; clipped at the end."""
    model, opt, expected, plain = _make(world, mode, accumulate=k)
    for step in range(3):
        plain.zero_grad()
        for batch in range(k):
            joined, own = _batch(world, k * step + batch)
            opt.zero_grad()
            for module, data, by in ((model, own, 1), (expected, joined, k)):
                (_loss(module, data) / by).backward()
                (module[4:](torch.ones(2, 4, dtype=torch.float64)).abs().mean() / by).backward()
            opt.clip_grad_norm_(0.05)
            opt.step()
        nn.utils.clip_grad_norm_(expected.parameters(), 0.05)
        plain.step()
        _assert_same(model, expected, f"step {step}")
    opt.detach()


THROWN_AWAY = {
    "zero_": lambda p: p.grad.zero_(),
    "none": lambda p: setattr(p, "grad", None),
    "zeros": lambda p: setattr(p, "grad", torch.zeros_like(p)),
    "a copy": lambda p: setattr(p, "grad", p.grad.clone()),
    "kept": lambda p: None,
}


@pytest.mark.parametrize("how", THROWN_AWAY)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_gradients_thrown_away_between_backward_passes(world, mode, how):
    """After one that was reduced, and after one more that was not."""
    for num_local in (0, 1):
        model, opt, expected, plain = _make(world, mode)
        for step in range(3):
            opt.zero_grad()
            plain.zero_grad()
            for number in range(2 + num_local):
                joined, own = _batch(world, 3 * step + number)
                with opt.no_sync() if 0 < number < 1 + num_local else contextlib.nullcontext():
                    _loss(model, own).backward()
                _loss(expected, joined).backward()
                if number == num_local and not (num_local and how == "a copy"):
                    for parameter in (*model.parameters(), *expected.parameters()):
                        THROWN_AWAY[how](parameter)
            opt.step()
            plain.step()
            _assert_same(model, expected, f"{num_local} local, step {step}")
        opt.detach()


def test_a_gradient_scaled_while_a_part_was_put_aside_is_an_error(world):
    model, opt, _, _ = _make(world, MODES["sharded"])
    with (
        pytest.raises(RuntimeError, match=r"was changed in place .on rank 0. between two backward passes")
        if world.size > 1
        else contextlib.nullcontext()
    ):
        _loss(model, _batch(world, 0)[1]).backward()
        with opt.no_sync():
            _loss(model, _batch(world, 1)[1]).backward()
        for parameter in model.parameters():
            parameter.grad.mul_(0.5)
        _loss(model, _batch(world, 2)[1]).backward()
    opt._reducer.detach()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_hook_of_the_users_comes_before_ours_whenever_it_was_registered(world, mode, overlap):
    model, opt, expected, plain = _make(world, mode, overlap=overlap)

    def mask(parameter):
        parameter.grad.mul_(torch.arange(parameter.shape[-1]) % 2)

    for parameter in (*model.parameters(), *expected.parameters()):
        parameter.register_post_accumulate_grad_hook(mask)
    for step in range(3):
        joined, own = _batch(world, step)
        for module, optimizer, batch in ((model, opt, own), (expected, plain, joined)):
            optimizer.zero_grad()
            _loss(module, batch).backward()
            optimizer.step()
        _assert_same(model, expected, f"step {step}")
    opt.detach()


# ---------------------------------------------------------------- what errors say


def _computed():
    return torch.ones(3, requires_grad=True) * 2


UNFIT = {
    "lazy": (lambda: nn.LazyLinear(3).weight, "is not initialised yet .a lazy module.: run the module once"),
    "meta": (lambda: nn.Linear(2, 3, device="meta").weight, "is on the meta device .*to_empty"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_parameters_that_have_no_values_are_named(world, what):
    make, match = UNFIT[what]
    for mode in MODES.values():
        for named in ([("fc", make())], [nn.Parameter(torch.ones(2)), make()]):
            name = "fc" if isinstance(named[0], tuple) else "1 of group 0"
            with (
                pytest.raises(ValueError, match=f"parameter '{name}' {match}")
                if world.size > 1
                else contextlib.suppress(Exception)
            ):
                dpoptim.DataParallelOptimizer(torch.optim.SGD(named, lr=0.1), world, **mode)


def test_tensors_that_were_computed_are_named(world):
    inner = torch.optim.SGD([_computed()], lr=0.1, differentiable=True)
    with (
        pytest.raises(ValueError, match="parameter '0 of group 0' is the result of a computation")
        if world.size > 1
        else contextlib.nullcontext()
    ):
        dpoptim.DataParallelOptimizer(inner, world)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_detaching_twice_does_nothing_and_what_is_collective_says_so(world, mode):
    model, opt, expected, plain = _make(world, mode)
    joined, own = _batch(world, 0)
    _loss(model, own).backward()
    _loss(expected, joined).backward()
    opt.step()
    plain.step()
    opt.detach()
    opt.detach()
    for step in (1, 2):  # the same batch on all ranks, without communication
        for module, optimizer in ((model, opt), (expected, plain)):
            optimizer.zero_grad()
            _loss(module, _batch(world, step)[0]).backward()
            optimizer.step()
    _assert_same(model, expected, "after detach()")
    with pytest.raises(RuntimeError, match=r"was detached .asked for averaging a number.: construct another"):
        opt.mean(1.0)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
def test_gradients_of_another_dtype_than_the_parameters(world):
    parameter = nn.Parameter(torch.arange(6.0).bfloat16())
    parameter.grad_dtype = torch.float32
    inner = torch.optim.SGD([parameter], lr=0.1)
    for name in ("sharded", "node-shared"):
        with (
            pytest.warns(UserWarning, match=r"is torch.bfloat16, but its gradient is kept in torch.float32.*replicated")
            if world.size > 1
            else contextlib.nullcontext()
        ):
            dpoptim.DataParallelOptimizer(inner, world, **MODES[name]).detach()
    opt = dpoptim.DataParallelOptimizer(inner, world)
    values = [torch.arange(6.0) * (1 + 2**-10 * rank) for rank in range(world.size)]
    for _ in range(2):
        parameter.grad = None
        (parameter.float() * values[world.rank]).sum().backward()
        assert parameter.grad.dtype is torch.float32
        rounded = [value.bfloat16().float() for value in values]  # by autograd, on the way through float()
        torch.testing.assert_close(parameter.grad, sum(rounded) / world.size)
    opt.detach()
