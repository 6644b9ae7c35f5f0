"""What a user does to the optimizer between two steps, in every mode: as one process does, or an error on all ranks."""

import collections

import pytest
import torch
from oracle import MODES, assert_same_parameters, joined_batch, local_part, part_sizes, seeded, train
from torch import nn

import dpoptim
from dpoptim.utils.consistency import check_replicas

pytestmark = [pytest.mark.parallel, pytest.mark.ranks(2, 3)]

OPTIMIZERS = [
    ("AdamW", {"lr": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.5}),
    ("Adafactor", {"lr": 0.01}),
]


def _net():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 5))


def _pair(name, options, mode):
    model, expected = seeded(_net), seeded(_net)
    opt = dpoptim.DataParallelOptimizer(getattr(dpoptim, name)(model.parameters(), **options), **MODES[mode])
    return model, opt, expected, getattr(torch.optim, name)(expected.parameters(), **options)


def _step(world, step, model, opt, expected, plain):
    sizes = part_sizes(world.size, equal=True)
    batch = joined_batch(step, sizes)
    train(opt, model, local_part(batch, sizes, world.rank))
    train(plain, expected, batch)


def _clear(optimizer, _):
    optimizer.state.clear()


def _assign(optimizer, _):
    optimizer.state = collections.defaultdict(dict)


def _assign_to_inner(optimizer, _):
    getattr(optimizer, "optimizer", optimizer).state = collections.defaultdict(dict)


def _delete(optimizer, model):
    del optimizer.state[next(model.parameters())]


def _pop(optimizer, model):
    optimizer.state.pop(list(model.parameters())[2], None)


@pytest.mark.parametrize("reset", [_clear, _assign, _assign_to_inner, _delete, _pop])
@pytest.mark.parametrize("mode", MODES)
def test_a_state_that_is_forgotten_begins_anew(world, mode, reset):
    for name, options in OPTIMIZERS:
        model, opt, expected, plain = _pair(name, options, mode)
        for step in range(6):
            if step == 3:
                reset(opt, model)
                reset(plain, expected)
            _step(world, step, model, opt, expected, plain)
            assert_same_parameters(model, expected, step)
        full = opt.full_state_dict(rank0_only=False)
        for index, entry in plain.state_dict()["state"].items():
            for key, value in entry.items():
                torch.testing.assert_close(full["state"][index][key], value, rtol=1e-9, atol=1e-11, check_dtype=False)
        opt.detach()


@pytest.mark.parametrize("mode", ["sharded", "node-shared"])
def test_a_divided_state_is_not_read_or_written_by_parameter(world, mode):
    model, opt, *_ = _pair("AdamW", {"lr": 0.01}, mode)
    train(opt, model, torch.ones(2, 5, dtype=torch.float64))
    parameter = next(model.parameters())
    message = r"the state of this parameter is sharded among ranks: read it with full_state_dict\(\)"
    with pytest.raises(RuntimeError, match=message):
        opt.state[parameter]
    with pytest.raises(RuntimeError, match=message):
        opt.state[parameter] = {}
    with pytest.raises(RuntimeError, match=message):
        opt.state.setdefault(parameter, {})
    with pytest.raises(RuntimeError, match=message):
        opt.state.update({parameter: {}})
    assert parameter not in opt.state
    assert not opt.state
    opt.detach()
    assert "exp_avg" in opt.state[parameter]


@pytest.mark.parametrize("mode", MODES)
def test_a_state_that_is_assigned_is_taken_over(world, mode):
    model, opt, expected, plain = _pair("AdamW", {"lr": 0.01}, mode)
    for step in range(4):
        if step == 2:
            entries = {
                p: {k: v.clone() for k, v in plain.state[q].items()}
                for p, q in zip(*map(list, (model.parameters(), expected.parameters())), strict=True)
            }
            for entry in (*entries.values(), *plain.state.values()):
                entry["exp_avg"].mul_(0.5)
            opt.state = collections.defaultdict(dict, entries)
        _step(world, step, model, opt, expected, plain)
        assert_same_parameters(model, expected, step)
    opt.detach()


def _replace(optimizer):
    group = optimizer.param_groups[0]
    group["params"][0] = nn.Parameter(torch.ones(7, 5, dtype=torch.float64))


def _append(optimizer):
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(2, dtype=torch.float64)))


def _remove(optimizer):
    optimizer.param_groups[0]["params"].pop()


def _remove_group(optimizer):
    del optimizer.param_groups[0]


@pytest.mark.parametrize("change", [_replace, _append, _remove, _remove_group])
@pytest.mark.parametrize("mode", MODES)
def test_other_parameters_in_the_groups_are_an_error_that_says_what_to_do(world, mode, change):
    model = seeded(_net)
    parameters = list(model.parameters())
    groups = [{"params": parameters[:3]}, {"params": parameters[3:]}]
    opt = dpoptim.DataParallelOptimizer(dpoptim.AdamW(groups, lr=0.01), **MODES[mode])
    train(opt, model, torch.ones(2, 5, dtype=torch.float64))
    change(opt)
    model(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"param_groups must keep the parameters that were wrapped, but .* add_param_group\(\)"
    ):
        opt.step()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adafactor"])
def test_gradients_that_are_changed_or_set_by_hand(world, mode, name):
    model, opt, expected, plain = _pair(name, {"lr": 0.01}, mode)
    sizes = part_sizes(world.size, equal=True)
    for net in (model, expected):
        net[2].requires_grad_(False)
    for step in range(4):
        batch = joined_batch(step, sizes)
        for optimizer, net, part in ((opt, model, local_part(batch, sizes, world.rank)), (plain, expected, batch)):
            optimizer.zero_grad()
            net(part).pow(2).mean().backward()
            generator = torch.Generator().manual_seed(step)
            for index, p in enumerate(net.parameters()):
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                if p.grad is None:
                    p.requires_grad_(True)
                    p.grad = noise  # of what no rank trains
                    p.requires_grad_(False)
                elif index % 2:
                    p.grad.add_(noise)
                else:
                    p.grad = p.grad + 0.1 * p.detach()
            optimizer.step()
        assert_same_parameters(model, expected, step)
    check_replicas(opt.communicator, model.named_parameters())
    opt.detach()


@pytest.mark.parametrize(
    ("mode", "how"),
    [
        ("replicated", "data"),
        ("replicated", "set_"),
        ("replicated", "channels_last"),
        ("sharded", "data"),
        ("sharded", "set_"),  # channels_last: below
    ],
)
def test_parameters_that_are_given_other_memory(world, mode, how):
    def make():
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3), nn.Flatten())

    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(make), seeded(make)
    opt = dpoptim.DataParallelOptimizer(dpoptim.AdamW(model.parameters(), lr=0.01), **MODES[mode])
    plain = torch.optim.AdamW(expected.parameters(), lr=0.01)
    for step in range(4):
        if step == 2:
            if how == "channels_last":
                model.to(memory_format=torch.channels_last)
            for p in model.parameters():
                if how == "data":
                    p.data = p.data.clone()
                elif how == "set_":
                    with torch.no_grad():
                        p.set_(p.detach().clone())
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(sum(sizes), 2, 6, 6, generator=generator, dtype=torch.float64)
        train(opt, model, local_part(batch, sizes, world.rank))
        train(plain, expected, batch)
        assert_same_parameters(model, expected, step)
    opt.detach()


def test_another_layout_of_what_is_stepped_in_its_place_is_an_error(world):
    model = nn.Conv2d(64, 64, 7)  # so large that it is not copied
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.parameters(), lr=0.01), shard=True)
    model.to(memory_format=torch.channels_last)
    model(torch.ones(1, 64, 8, 8)).sum().backward()
    with pytest.raises(RuntimeError, match=r"has another memory layout .* than when the optimizer was constructed"):
        opt.step()


@pytest.mark.parametrize("mode", MODES)
def test_parameters_that_change_their_group(world, mode):
    def groups(parameters):
        return [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.5}]

    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(_net), seeded(_net)
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(groups(list(model.parameters())), lr=0.1), **MODES[mode])
    plain = torch.optim.SGD(groups(list(expected.parameters())), lr=0.1)
    for optimizer in (opt, plain):
        first, second = optimizer.param_groups
        first["params"].append(second["params"].pop(0))
    batch = joined_batch(0, sizes)
    if mode == "replicated":
        train(opt, model, local_part(batch, sizes, world.rank))
        train(plain, expected, batch)
        assert_same_parameters(model, expected)
    else:
        with pytest.raises(RuntimeError, match="parameters were moved to another group"):
            train(opt, model, local_part(batch, sizes, world.rank))
    opt.detach()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", [_replace, _append, _remove, _remove_group])
def test_an_optimizer_with_other_groups_can_be_detached(world, mode, change):
    model, opt, expected, plain = _pair("SGD", {"lr": 0.1, "momentum": 0.9}, mode)
    opt.add_param_group({"params": [nn.Parameter(torch.ones(3, dtype=torch.float64))]})
    _step(world, 0, model, opt, expected, plain)
    change(opt)
    opt.detach()
    for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
        buffer = opt.state[parameter]["momentum_buffer"]
        torch.testing.assert_close(buffer, plain.state[other]["momentum_buffer"])


def _square_net():
    return nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))


def _backward(world, step, model, expected):
    sizes = part_sizes(world.size, equal=True)
    batch = joined_batch(step, sizes)
    model(local_part(batch, sizes, world.rank)).pow(2).mean().backward()
    expected(batch).pow(2).mean().backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_shared", [False, True])
def test_gradients_that_are_given_to_another_parameter(world, mode, is_shared):
    model, expected = seeded(_square_net), seeded(_square_net)
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.parameters(), lr=0.1), **MODES[mode])
    plain = torch.optim.SGD(expected.parameters(), lr=0.1)
    _backward(world, 0, model, expected)
    for net in (model, expected):
        first, second = net[0].weight, net[2].weight
        first.grad, second.grad = second.grad, second.grad if is_shared else first.grad
    plain.step()
    if mode == "replicated":
        opt.step()
        assert_same_parameters(model, expected)
    else:
        with pytest.raises(RuntimeError, match="'0 of group 0' was given the gradient of parameter '2 of group 0'"):
            opt.step()
    opt.detach()


@pytest.mark.parametrize("mode", ["sharded", "node-shared"])
@pytest.mark.parametrize("clears", ["opt", "model", "in place"])
def test_a_program_that_sees_the_infinite_elements_and_leaves_out_its_steps_is_told(world, mode, clears):
    model, expected = seeded(_square_net), seeded(_square_net)
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.parameters(), lr=0.1), **MODES[mode])
    _backward(world, 0, model, expected)  # twice: what is added to is no step left out
    _backward(world, 0, model, expected)
    opt.step()
    opt.zero_grad()
    _backward(world, 1, model, expected)

    def leave_out():
        if clears == "in place":
            for parameter in model.parameters():
                parameter.grad.zero_()
            opt.step()
            return
        for step in range(2, 5):
            (opt if clears == "opt" else model).zero_grad()
            _backward(world, step, model, expected)

    with pytest.warns(UserWarning, match="If the program has looked at them first: each rank has the mean of its own"):
        leave_out()
    opt.detach()


@pytest.mark.parametrize("mode", ["sharded", "node-shared"])
def test_the_wrapped_optimizer_is_not_stepped_by_itself(world, mode):
    model = seeded(_net)
    inner = dpoptim.SGD(model.parameters(), lr=0.1)
    opt = dpoptim.DataParallelOptimizer(inner, **MODES[mode])
    with pytest.raises(RuntimeError, match="the step of the wrapped SGD was called"):
        inner.step()
    opt.detach()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("again", [False, True])
def test_a_group_that_is_added_when_it_has_gradients(world, mode, again):
    model, expected = seeded(_square_net), seeded(_square_net)
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model[:3].parameters(), lr=0.1, momentum=0.9), **MODES[mode])
    plain = torch.optim.SGD(expected[:3].parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        _backward(world, step, model, expected)
        if step == 1:
            opt.add_param_group({"params": list(model[4].parameters())})
            plain.add_param_group({"params": list(expected[4].parameters())})
        if again:
            _backward(world, 5 + step, model, expected)
        for optimizer in (opt, plain):
            optimizer.step()
            optimizer.zero_grad()
        if step == 0:
            model.zero_grad()
            expected.zero_grad()
        assert_same_parameters(model, expected, step)
    check_replicas(opt.communicator, model.named_parameters())
    opt.detach()


def test_a_group_with_gradients_is_not_added_in_the_middle_of_an_accumulation(world):
    model, expected = seeded(_square_net), seeded(_square_net)
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model[:3].parameters(), lr=0.1), accumulate=2)
    _backward(world, 0, model, expected)
    with pytest.raises(RuntimeError, match="has a gradient already: with accumulate add it after zero_grad"):
        opt.add_param_group({"params": list(model[4].parameters())})
    opt.detach()


class _ForSome(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, has_gradient):
        ctx.has_gradient = has_gradient
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return gradient, torch.ones(5, 5, dtype=torch.float64) if ctx.has_gradient else None, None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("where", ["nowhere", "on one rank"])
def test_a_function_that_returns_no_gradient(world, mode, overlap, where):
    model, expected = seeded(_square_net), seeded(_square_net)
    extra, other = (nn.Parameter(torch.ones(5, 5, dtype=torch.float64)) for _ in range(2))
    opt = dpoptim.DataParallelOptimizer(
        dpoptim.SGD([extra, *model.parameters()], lr=0.1), overlap=overlap, **MODES[mode]
    )
    plain = torch.optim.SGD([other, *expected.parameters()], lr=0.1)
    sizes = part_sizes(world.size, equal=True)
    for step in range(3):
        batch = joined_batch(step, sizes)
        has_gradient = where == "on one rank" and world.rank == 0
        opt.zero_grad()
        _ForSome.apply(model(local_part(batch, sizes, world.rank)), extra, has_gradient).pow(2).mean().backward()
        opt.step()
        plain.zero_grad()
        expected(batch).pow(2).mean().backward()
        other.grad = torch.full_like(other, 1 / world.size) if where == "on one rank" else None
        plain.step()
        assert_same_parameters(model, expected, step)
        torch.testing.assert_close(extra, other)
    opt.detach()


def test_parameters_that_come_to_share_memory_are_an_error(world):
    model = seeded(_net)
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.parameters(), lr=0.01), shard=True)
    batch = torch.ones(1, 5, dtype=torch.float64)
    train(opt, model, batch)
    first, second = seeded(lambda: nn.Linear(5, 5)), seeded(lambda: nn.Linear(5, 5))
    opt.add_param_group({"params": [first.weight, second.weight]})
    first.weight.data = second.weight.detach()
    for layer in (model, first, second):
        layer(batch).sum().backward()
    with pytest.raises(RuntimeError, match=r"shapes \(5, 5\), \(5, 5\) were given memory that they share"):
        opt.step()
    opt.detach()


@pytest.mark.parametrize("mode", ["sharded", "node-shared"])
def test_parameters_that_share_memory_stay_replicated(world, mode):
    def make():
        whole = torch.arange(12.0, dtype=torch.float64) / 10
        first = nn.Parameter(whole[:8])
        return [first, nn.Parameter(whole[4:]), nn.Parameter(torch.ones(3, dtype=torch.float64))]

    mine = make()
    with pytest.warns(UserWarning, match=r"since parameters .* share memory: it stays replicated"):
        opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(mine, lr=0.1), **MODES[mode])
    assert opt.mode == "replicated"
    opt.detach()


def test_a_part_of_a_larger_tensor_keeps_its_place(world, caplog):
    whole = torch.arange(12.0, dtype=torch.float64)
    parameter = nn.Parameter(whole[2:6])
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD([parameter], lr=0.5), node_shared=True)
    assert opt.mode == "sharded"
    assert "a parameter is a part of a larger tensor" in caplog.text
    parameter.sum().backward()
    opt.step()
    torch.testing.assert_close(whole[1:7], torch.tensor([1.0, 1.5, 2.5, 3.5, 4.5, 6.0], dtype=torch.float64))
    opt.detach()
