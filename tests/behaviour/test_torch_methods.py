"""Each method of each optimizer of torch, on the wrapper against the plain class."""

import copy

import pytest
import torch
from oracle import (
    EVERY_OPTIMIZER,
    MODES,
    NAMES_AND_MODES,
    assert_replicas,
    assert_same_parameters,
    joined_batch,
    local_part,
    make_plain,
    model_for,
    part_sizes,
    seeded,
    train,
)
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import dpoptim

pytestmark = [pytest.mark.parallel, pytest.mark.ranks(2)]

every_optimizer = pytest.mark.parametrize(("name", "mode"), NAMES_AND_MODES)


def _whole_state(opt):
    return opt.state_dict() if opt.mode == "replicated" else opt.full_state_dict(rank0_only=False)


def _pair(world, name, mode, **more):
    """Return the wrapper and the plain optimizer, each with its model, and the sizes of the ranks' batches."""
    options = EVERY_OPTIMIZER[name] | more
    model, expected = seeded(model_for(name)), seeded(model_for(name))
    opt = dpoptim.DataParallelOptimizer(getattr(dpoptim, name)(model.parameters(), **options), **MODES[mode])
    plain = make_plain(opt, options, expected.parameters())
    sizes = part_sizes(world.size, equal=False)
    opt.batch_weight = sizes[world.rank]
    return opt, model, plain, expected, sizes


def _step(world, pair, step):
    opt, model, plain, expected, sizes = pair
    batch = joined_batch(step, sizes)
    train(opt, model, local_part(batch, sizes, world.rank))
    train(plain, expected, batch)
    assert_replicas(opt, model)
    assert_same_parameters(model, expected, step)


def _assert_same_bits(left, right):
    if isinstance(left, torch.Tensor):
        # torch makes numbers of float32 (eta, mu_product) float64 when it loads them beside such parameters: exact
        assert torch.equal(left, right.to(left.dtype))
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key, value in left.items():
            _assert_same_bits(value, right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for value, other in zip(left, right, strict=True):
            _assert_same_bits(value, other)
    else:
        assert left == right


@every_optimizer
@pytest.mark.supports("state_dict", replicated="{name}", sharded="{name}")
@pytest.mark.supports("load_state_dict", replicated="{name}", sharded="{name}")
def test_a_state_goes_to_the_plain_class_and_back_bit_for_bit(world, name, mode):
    pair = _pair(world, name, mode)
    opt, model, plain, expected, _ = pair
    for step in range(3):
        _step(world, pair, step)
    saved = copy.deepcopy(_whole_state(opt))
    plain.load_state_dict(copy.deepcopy(saved))
    with torch.no_grad():
        for parameter, other in zip(expected.parameters(), model.parameters(), strict=True):
            parameter.copy_(other)
    back = copy.deepcopy(plain.state_dict())
    _assert_same_bits(back["state"], saved["state"])
    opt.load_state_dict(copy.deepcopy(back))
    _assert_same_bits(_whole_state(opt), saved)
    for step in range(3, 6):
        _step(world, pair, step)
    opt.detach()


@pytest.mark.parametrize(("name", "mode"), [case for case in NAMES_AND_MODES if case[0] != "LBFGS"])
@pytest.mark.supports("add_param_group", replicated="{name}", sharded="{name}")
def test_a_group_added_later(world, name, mode):
    options = EVERY_OPTIMIZER[name]
    sizes = part_sizes(world.size, equal=False)
    models = [seeded(lambda: nn.ModuleList(model_for(name)() for _ in range(2))) for _ in range(2)]
    opt = dpoptim.DataParallelOptimizer(getattr(dpoptim, name)(models[0][0].parameters(), **options), **MODES[mode])
    plain = make_plain(opt, options, models[1][0].parameters())
    opt.batch_weight = sizes[world.rank]
    for step in range(5):
        if step == 2:
            for optimizer, net in ((opt, models[0]), (plain, models[1])):
                optimizer.add_param_group({"params": list(net[1].parameters()), "lr": 0.003})
        batch = joined_batch(step, sizes)
        for optimizer, net, part in ((opt, models[0], local_part(batch, sizes, world.rank)), (plain, models[1], batch)):
            optimizer.zero_grad()
            (net[0](part).pow(2).mean() + (net[1](part).pow(2).mean() if step >= 2 else 0)).backward()
            if name == "Adagrad" and optimizer is plain:
                _let_adagrad_begin(plain)
            optimizer.step()
        assert_replicas(opt, models[0])
        assert_same_parameters(models[0], models[1], step)
    opt.detach()


@every_optimizer
@pytest.mark.supports("zero_grad", replicated="{name}", sharded="{name}")
def test_zero_grad(world, name, mode):
    opt, model, _, _, sizes = _pair(world, name, mode)
    for set_to_none in (False, True):
        model(local_part(joined_batch(0, sizes), sizes, world.rank)).pow(2).mean().backward()
        assert any(parameter.grad is not None for parameter in model.parameters())
        opt.zero_grad(set_to_none=set_to_none)
        for parameter in model.parameters():
            if set_to_none:
                assert parameter.grad is None
            elif parameter.grad is not None:
                assert not parameter.grad.to_dense().any()
    opt.detach()


def test_zero_grad_of_a_class_of_its_own_is_called(world):
    class Careful(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):
            calls.append(set_to_none)
            super().zero_grad(set_to_none)

    calls, model = [], torch.nn.Linear(2, 2)
    opt = dpoptim.DataParallelOptimizer(Careful(model.parameters(), lr=0.1), world)
    model(torch.ones(1, 2)).sum().backward()
    opt.zero_grad()
    assert model.weight.grad is None
    opt.detach()
    assert calls == [True]


def test_the_profiler_sees_a_step(world):
    model = seeded()
    opt = dpoptim.DataParallelOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), world)
    with torch.profiler.profile(acc_events=True) as profile:
        train(opt, model, joined_batch(world.rank, [3]))
    opt.detach()
    assert "Optimizer.step#DataParallelOptimizer.step" in [event.key for event in profile.key_averages()]


@pytest.mark.parametrize("kind", ["pre", "post", "global pre", "global post"])
def test_a_step_hook_that_is_alone_runs_as_long_as_it_is_registered(world, kind):
    model, calls = seeded(), []
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.parameters(), lr=0.1), world)
    register = {
        "pre": opt.register_step_pre_hook,
        "post": opt.register_step_post_hook,
        "global pre": register_optimizer_step_pre_hook,
        "global post": register_optimizer_step_post_hook,
    }[kind]
    train(opt, model, joined_batch(world.rank, [3]))
    handle = register(lambda optimizer, *_: calls.append(optimizer))
    train(opt, model, joined_batch(world.rank, [3]))
    handle.remove()
    train(opt, model, joined_batch(world.rank, [3]))
    opt.detach()
    assert [optimizer is opt for optimizer in calls] == [True]


def test_the_profiler_sees_zero_grad(world):
    model = torch.nn.Linear(2, 2)
    opt = dpoptim.DataParallelOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), world)
    model(torch.ones(1, 2)).sum().backward()
    with torch.profiler.profile(acc_events=True) as profile:
        opt.zero_grad()
    opt.detach()
    assert model.weight.grad is None
    assert "Optimizer.zero_grad#SGD.zero_grad" in [event.key for event in profile.key_averages()]


@every_optimizer
@pytest.mark.supports("step", replicated="{name}", sharded="{name}")
@pytest.mark.supports("{name}", replicated="yes", sharded="{mode}")
def test_step(world, name, mode):
    if name == "LBFGS":
        pair = _pair(world, name, mode)
        for step in range(5):
            _step(world, pair, step)
        pair[0].detach()
        return
    opt, model, plain, expected, sizes = _pair(world, name, mode)
    for step in range(5):
        batch = joined_batch(step, sizes)
        for optimizer, net, part in ((opt, model, local_part(batch, sizes, world.rank)), (plain, expected, batch)):
            optimizer.zero_grad()
            net(part).pow(2).mean().backward()
            assert optimizer.step() is None
        assert_replicas(opt, model)
        assert_same_parameters(model, expected, step)
    opt.detach()


@every_optimizer
@pytest.mark.supports("step(closure)", replicated="{name}", sharded="{name}")
def test_step_with_a_closure_returns_the_global_loss(world, name, mode):
    opt, model, plain, expected, sizes = _pair(world, name, mode)
    for step in range(3):
        batch = joined_batch(step, sizes)
        losses = []
        for optimizer, net, part in ((opt, model, local_part(batch, sizes, world.rank)), (plain, expected, batch)):

            def closure(optimizer=optimizer, net=net, part=part):
                optimizer.zero_grad()
                loss = net(part).pow(2).mean()
                loss.backward()
                return loss

            losses.append(optimizer.step(closure))
        # a mean over the joined batch against a weighted mean of means, in float64
        torch.testing.assert_close(losses[0], losses[1].detach(), rtol=1e-10, atol=1e-12)
        assert len({float(loss) for loss in world.allgather(losses[0])}) == 1
        assert_same_parameters(model, expected, step)
    opt.detach()


HOOKS = {
    "register_step_pre_hook": "step",
    "register_step_post_hook": "step",
    "register_state_dict_pre_hook": "save",
    "register_state_dict_post_hook": "save",
    "register_load_state_dict_pre_hook": "load",
    "register_load_state_dict_post_hook": "load",
}


@pytest.mark.parametrize("register", HOOKS)
@every_optimizer
@pytest.mark.supports("{register}", replicated="{name}", sharded="{name}")
def test_a_hook_runs_once_with_the_wrapper_in_its_order(world, name, mode, register):
    opt, model, _, _, sizes = _pair(world, name, mode)
    calls = []

    def note(label):
        def hook(optimizer, *_):
            gradients = [p.grad.to_dense().sum().item() for p in model.parameters() if p.grad is not None]
            calls.append((label, optimizer, gradients))

        return hook

    handles = [getattr(opt, register)(note("second"))]
    if HOOKS[register] == "step":
        handles.append(getattr(opt, register)(note("third")))
        order = ["second", "third"]
    else:
        handles.append(getattr(opt, register)(note("third")))
        handles.append(getattr(opt, register)(note("first"), prepend=True))
        order = ["first", "second", "third"]
    train(opt, model, local_part(joined_batch(0, sizes), sizes, world.rank))
    saved = _whole_state(opt)
    opt.load_state_dict(saved)
    assert [label for label, _, _ in calls] == order
    for _, optimizer, gradients in calls:
        assert optimizer is opt
        if register == "register_step_post_hook" or name != "LBFGS":  # whose closure makes the gradients in the step
            assert gradients
        if mode == "replicated":
            assert len(set(map(tuple, world.allgather(gradients)))) == 1, "not reduced yet"
    for handle in handles:
        handle.remove()
    train(opt, model, local_part(joined_batch(0, sizes), sizes, world.rank))
    assert len(calls) == len(order)
    opt.detach()


def test_hooks_receive_the_wrapper_and_run_once_after_the_reduction(world):
    model = seeded()
    inner = dpoptim.SGD(model.parameters(), lr=0.1)
    calls = []

    def note(what):
        def hook(optimizer, *_):
            calls.append((what, optimizer))

        return hook

    inner.register_step_pre_hook(note("pre, registered on the inner optimizer"))
    opt = dpoptim.DataParallelOptimizer(inner)
    handles = [
        opt.register_step_pre_hook(note("pre")),
        opt.register_step_post_hook(note("post")),
        opt.register_state_dict_pre_hook(note("state_dict pre")),
        opt.register_state_dict_pre_hook(note("state_dict pre first"), prepend=True),
        opt.register_state_dict_post_hook(note("state_dict post")),
        opt.register_load_state_dict_pre_hook(note("load pre")),
        opt.register_load_state_dict_post_hook(note("load post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    train(opt, model, joined_batch(world.rank, [3]))
    opt.load_state_dict(opt.state_dict())
    for handle in handles:
        handle.remove()
    train(opt, model, joined_batch(world.rank, [3]))
    assert [what for what, _ in calls] == [
        "global pre",
        "pre, registered on the inner optimizer",
        "pre",
        "post",
        "global post",
        "state_dict pre first",
        "state_dict pre",
        "state_dict post",
        "load pre",
        "load post",
        "pre, registered on the inner optimizer",
    ]
    assert all(optimizer is opt for _, optimizer in calls)
    opt.detach()


def _let_adagrad_begin(optimizer):
    """Give parameters added to the plain class the state that torch up to 2.11 forgets."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {"step": torch.zeros(()), "sum": torch.zeros_like(parameter)}
