"""shard=True and node_shared=True: what each rank owns, what it must not see, and what it costs."""

import copy
import io
import itertools
import logging
import math
import pickle
import warnings

import pytest
import torch
from oracle import (
    MODES,
    assert_replicas,
    assert_same_parameters,
    joined_batch,
    local_part,
    part_sizes,
    seeded,
    train,
)
from torch import nn

import dpoptim
from dpoptim.comm.node import shared_memory
from dpoptim.step.divisibility import divisibility
from dpoptim.utils import checkpoint
from dpoptim.utils.consistency import digest

pytestmark = pytest.mark.parallel


@pytest.fixture(params=[mode for mode in MODES if mode != "replicated"])
def mode(request):
    """Give the arguments of both modes in turn."""
    return MODES[request.param]


def _several(world):
    if world.size == 1:
        pytest.skip("one rank has nobody to divide with")


def _wrapped(mode, name="AdamW", model=None, **options):
    model = seeded() if model is None else model
    inner = getattr(dpoptim, name)(model.named_parameters(), **{"lr": 0.01, **options})
    return model, dpoptim.DataParallelOptimizer(inner, **mode)


def _part(world, step=0):
    sizes = part_sizes(world.size, equal=True)
    return local_part(joined_batch(step, sizes), sizes, world.rank)


def _agreed(world, condition, text=""):
    """Fail on all ranks, before the next collective, if a condition does not hold on one."""
    conditions = world.allgather(bool(condition))
    assert all(conditions), f"not on ranks {[r for r, c in enumerate(conditions) if not c]}: {text}"


# ---------------------------------------------------------------- who owns what


def test_a_single_rank_is_replicated(mode, world):
    _, opt = _wrapped(mode)
    assert opt.mode == ("replicated" if world.size == 1 else "sharded" if "shard" in mode else "node-shared")
    opt.detach()


@pytest.mark.parametrize("sizes", [[1], [5, 7], [1, 1, 1, 1, 1], [3, 200_000, 11], [300_001, 2, 262_147]], ids=str)
def test_state_is_divided_to_one_element(world, sizes):
    _several(world)
    parameters = [nn.Parameter(torch.ones(size)) for size in sizes]
    opt = dpoptim.DataParallelOptimizer(dpoptim.AdamW(parameters, lr=0.1), shard=True)
    sum(p.sum() for p in parameters).backward()
    opt.step()
    form = opt.local_state_dict()
    held = sum(entry["exp_avg"].numel() for entry in form["state"].values())
    everybody = world.allgather(held)
    assert sum(everybody) == sum(sizes)
    assert max(everybody) - min(everybody) <= 1
    slices = world.allgather(opt.local_slices())
    for name in slices[0]:
        intervals = sorted(mine[name] for mine in slices if mine[name][0] < mine[name][1])
        assert intervals[0][0] == 0
        assert all(a[1] == b[0] for a, b in itertools.pairwise(intervals))
    opt.detach()


def test_matrices_are_divided_whole(world):
    _several(world)
    parameters = [nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(i))) for i in range(7)]
    opt = dpoptim.DataParallelOptimizer(dpoptim.Muon(parameters, lr=0.1), shard=True)
    owned = [name for name, (start, stop) in opt.local_slices().items() if start < stop]
    everybody = world.allgather(owned)
    assert sorted(name for names in everybody for name in names) == sorted(opt.local_slices())
    assert max(map(len, everybody)) - min(map(len, everybody)) <= 1
    opt.detach()


def test_by_what_classes_are_divided():
    parameters = [nn.Parameter(torch.ones(2, 2))]

    class Derived(torch.optim.SGD):
        pass

    class Declared(torch.optim.SGD):
        is_elementwise = False

    class Refuses(torch.optim.SGD):
        is_divisible = False

    assert divisibility(torch.optim.SGD(parameters)).by == "element"
    assert divisibility(dpoptim.RAdam(parameters)).by == "element"
    assert divisibility(dpoptim.Adafactor(parameters)).by == "parameter"
    assert divisibility(Derived(parameters)).by == "element"
    assert divisibility(Declared(parameters)).by == "parameter"
    assert divisibility(Refuses(parameters)).by == "nothing"


@pytest.mark.parametrize("declared", [True, False])
def test_an_optimizer_of_somebody_else(world, mode, declared):
    class Signs(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        state = self.state[p]
                        state["sum"] = state.get("sum", torch.zeros_like(p)).add(p.grad)
                        p.sub_(state["sum"].sign(), alpha=group["lr"])

    if declared:
        Signs.is_elementwise = True
    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(), seeded()
    opt = dpoptim.DataParallelOptimizer(Signs(model.named_parameters(), lr=0.01), **mode)
    plain = Signs(expected.named_parameters(), lr=0.01)
    for step in range(4):
        batch = joined_batch(step, sizes)
        train(opt, model, local_part(batch, sizes, world.rank))
        train(plain, expected, batch)
        assert_same_parameters(model, expected, step)
    full = opt.full_state_dict(rank0_only=False)
    for index, entry in plain.state_dict()["state"].items():
        torch.testing.assert_close(full["state"][index]["sum"], entry["sum"], rtol=1e-9, atol=1e-11)
    opt.detach()


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_those_that_stay_replicated_say_so(world, mode, name):
    _several(world)
    model = nn.Embedding(5, 3, sparse=name == "SparseAdam")
    inner = getattr(dpoptim, name)(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=f"{name} can't be sharded among ranks, since it .*: it stays replicated"):
        opt = dpoptim.DataParallelOptimizer(inner, **mode)
    assert opt.mode == "replicated"
    opt.detach()


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("hook", [None, "bf16_compress"])
def test_own_gradients_are_the_global_mean(world, mode, hook):
    sizes = part_sizes(world.size, equal=False)
    model, expected = seeded(), seeded()
    comm_hook = hook and getattr(dpoptim.comm_hooks, hook)
    inner = dpoptim.SGD(model.named_parameters(), lr=0.1)
    opt = dpoptim.DataParallelOptimizer(inner, comm_hook=comm_hook, **mode)
    opt.batch_weight = sizes[world.rank]
    batch = joined_batch(0, sizes)
    model(local_part(batch, sizes, world.rank)).pow(2).mean().backward()
    expected(batch).pow(2).mean().backward()
    others = dict(expected.named_parameters())
    # float64 sums of a few dozen terms in another order; bfloat16 keeps 8 bits of each rank's contribution
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if hook is None else {"rtol": 2**-6, "atol": 2**-6}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (others[name].grad is None)
        if parameter.grad is not None:
            own = slice(*opt.local_slices()[name])
            torch.testing.assert_close(parameter.grad.view(-1)[own], others[name].grad.view(-1)[own], **tolerance)
    opt.detach()


@pytest.mark.parametrize("mode", ["sharded", "node-shared"])
def test_a_state_of_which_some_ranks_have_stepped_their_part(world, tmp_path, mode):
    class Fails(dpoptim.Adam):
        def step(self, closure=None):
            if world.rank == world.size - 1:
                raise ArithmeticError("this rank alone")
            return super().step(closure)

    parameter = nn.Parameter(torch.ones(64, dtype=torch.float64))
    opt = dpoptim.DataParallelOptimizer(Fails([parameter]), **MODES[mode])
    parameter.sum().backward()
    with pytest.raises((RuntimeError, ArithmeticError), match="this rank alone"):
        opt.step()
    if opt.mode != "replicated" and world.size > 1:
        with pytest.raises(RuntimeError, match=r"of parameter '.*' some ranks have stepped their part and others not"):
            opt.full_state_dict()
        with pytest.raises(RuntimeError, match=r"some ranks have stepped their part and others not, since a step"):
            checkpoint.save(world.bcast(tmp_path), optimizer=opt)
        with pytest.warns(UserWarning, match="since a step has failed: their state is dropped"):
            opt.detach()
        assert not opt.state
    opt.detach()


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
@pytest.mark.supports("clip_grad_norm_", sharded="{mode}", limits="torch's own does not know the other ranks' parts")
def test_clipping_is_exact(world, mode, norm_type, max_norm):
    sizes = part_sizes(world.size, equal=False)
    model, expected = seeded(), seeded()
    _, opt = _wrapped(mode, "SGD", model, lr=0.5)
    plain = torch.optim.SGD(expected.parameters(), lr=0.5)
    opt.batch_weight = sizes[world.rank]
    for step in range(3):
        batch = joined_batch(step, sizes)
        for optimizer, net, part in ((opt, model, local_part(batch, sizes, world.rank)), (plain, expected, batch)):
            optimizer.zero_grad()
            net(part).pow(2).mean().backward()
        norm = opt.clip_grad_norm_(max_norm, norm_type)
        expected_norm = nn.utils.clip_grad_norm_(expected.parameters(), max_norm, norm_type)
        assert norm.dtype == expected_norm.dtype
        torch.testing.assert_close(norm, expected_norm, rtol=1e-10, atol=0)
        opt.step()
        plain.step()
        assert_same_parameters(model, expected, step)
        assert_replicas(opt, model)
    opt.detach()


def test_a_norm_that_is_no_number_is_an_error_on_all(world, mode):
    model, opt = _wrapped(mode)
    (model(_part(world)).sum() * (math.nan if world.rank == 0 else 1.0)).backward()
    with pytest.raises(RuntimeError, match=r"non-finite|is nan, so it can't be clipped"):
        opt.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert not opt.clip_grad_norm_(1.0).isfinite()
    opt.detach()


@pytest.mark.supports("torch.amp.autocast and GradScaler", sharded="{mode}")
def test_grad_scaler_skips_the_step_on_all_ranks(world, mode):
    model, expected = seeded(dtype=torch.float32), seeded(dtype=torch.float32)
    _, opt = _wrapped(mode, "SGD", model, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    scales = []
    for step in range(5):
        opt.zero_grad()
        loss = model(_part(world, step).float()).pow(2).mean()
        if step in (1, 3) and world.rank == step % world.size:
            # one element alone: it is in one rank's part
            loss = loss + model.middle.bias[step] * math.inf
        before = [digest(parameter) for parameter in model.parameters()]
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        _agreed(world, (before == [digest(p) for p in model.parameters()]) == (step in (1, 3)), f"step {step}")
        scales.append(scaler.get_scale())
        assert_replicas(opt, model)
    assert world.allgather(scales) == [scales] * world.size
    assert scales == [2.0**10, 2.0**9, 2.0**9, 2.0**8, 2.0**8]
    del expected
    opt.detach()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("by", ["optimizer", "model"])
def test_gradients_may_be_cleared_in_every_way(world, mode, set_to_none, by):
    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(), seeded()
    _, opt = _wrapped(mode, "SGD", model)
    plain = torch.optim.SGD(expected.parameters(), lr=0.01)
    for step in range(4):
        batch = joined_batch(step, sizes)
        for optimizer, net, part in ((opt, model, local_part(batch, sizes, world.rank)), (plain, expected, batch)):
            (optimizer if by == "optimizer" else net).zero_grad(set_to_none=set_to_none)
            net(part).pow(2).mean().backward()
            if step == 2:  # once more
                net(part).mean().backward()
            optimizer.step()
        assert_same_parameters(model, expected, step)
    opt.detach()


def test_gradients_that_are_never_cleared_add_up(world, mode):
    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(), seeded()
    _, opt = _wrapped(mode, "SGD", model)
    plain = torch.optim.SGD(expected.parameters(), lr=0.01)
    for step in range(4):
        batch = joined_batch(step, sizes)
        for optimizer, net, part in ((opt, model, local_part(batch, sizes, world.rank)), (plain, expected, batch)):
            net(part).pow(2).mean().backward()
            optimizer.step()
        assert_same_parameters(model, expected, step)
    opt.detach()


def test_sparse_gradients_are_an_error_that_names_the_parameter(world, mode):
    _several(world)
    model = nn.Embedding(7, 3, sparse=True)
    _, opt = _wrapped(mode, "SGD", model)
    with pytest.raises(RuntimeError, match="parameter 'weight' has a sparse gradient"):
        model(torch.tensor([1, 2])).sum().backward()
    opt.detach()


# ---------------------------------------------------------------- parameters of every kind


def test_parameters_of_several_dtypes_shapes_and_layouts(world, mode):
    def make():
        generator = torch.Generator().manual_seed(0)
        layout = {"memory_format": torch.channels_last}
        values = [
            torch.randn(7, generator=generator),
            torch.randn(3, 4, 2, 2, generator=generator).to(**layout),
            torch.randn(80, 60, 6, 6, generator=generator).to(**layout),
            torch.randn((), generator=generator),
            torch.randn(400, 500, generator=generator, dtype=torch.float64),
            torch.randn(5, generator=generator).bfloat16(),
            torch.randn(3, 3, generator=generator).to(torch.complex64),
            torch.empty(0, 4),
        ]
        return [nn.Parameter(value) for value in values]

    parameters, expected = make(), make()
    opt = dpoptim.DataParallelOptimizer(torch.optim.Adam(parameters, lr=0.1, foreach=False), **mode)
    plain = torch.optim.Adam(expected, lr=0.1, foreach=False)
    for _ in range(3):
        for optimizer, own in ((opt, parameters), (plain, expected)):
            optimizer.zero_grad()
            sum((p * p.conj()).real.sum().double() for p in own).backward()
            optimizer.step()
    for parameter, other in zip(parameters, expected, strict=True):
        assert parameter.dtype == other.dtype
        assert parameter.shape == other.shape
        # the mean of N equal gradients: a rounding of each, and bfloat16's of the division by N
        tolerance = 2**-6 if parameter.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(parameter, other, rtol=tolerance, atol=tolerance)
    full = opt.full_state_dict(rank0_only=False)
    whole = {**plain.state_dict(), "state": {i: entry for i, entry in plain.state_dict()["state"].items() if i != 7}}
    for index, entry in whole["state"].items():  # nobody owns anything of the empty parameter
        assert full["state"][index]["exp_avg"].shape == entry["exp_avg"].shape
        tolerance = 2**-6 if entry["exp_avg"].dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(full["state"][index]["exp_avg"], entry["exp_avg"], rtol=tolerance, atol=tolerance)
    opt.load_full_state_dict(plain.state_dict() if world.rank == 0 else None)
    again = opt.full_state_dict(rank0_only=False)
    for index, entry in whole["state"].items():
        for key, value in entry.items():
            assert torch.equal(again["state"][index][key], value), (index, key)
    opt.detach()


@pytest.mark.supports("clip_grad_value_", sharded="{mode}")
def test_clipping_by_value(world, mode):
    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(), seeded()
    _, opt = _wrapped(mode, "SGD", model, lr=0.5)
    plain = torch.optim.SGD(expected.parameters(), lr=0.5)
    for step in range(3):
        batch = joined_batch(step, sizes)
        for optimizer, net, part in ((opt, model, local_part(batch, sizes, world.rank)), (plain, expected, batch)):
            optimizer.zero_grad()
            net(part).pow(2).mean().backward()
            nn.utils.clip_grad_value_(net.parameters(), 1e-3)
            optimizer.step()
        assert_same_parameters(model, expected, step)
    opt.detach()


@pytest.mark.supports("AveragedModel: EMA", sharded="{mode}")
def test_averages_of_the_weights(world, mode):
    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(), seeded()
    _, opt = _wrapped(mode, "AdamW", model)
    plain = torch.optim.AdamW(expected.parameters(), lr=0.01)
    averages = [
        dpoptim.swa_utils.AveragedModel(net, multi_avg_fn=dpoptim.swa_utils.get_ema_multi_avg_fn(0.9))
        for net in (model, expected)
    ]
    for step in range(4):
        batch = joined_batch(step, sizes)
        train(opt, model, local_part(batch, sizes, world.rank))
        train(plain, expected, batch)
        for average, net in zip(averages, (model, expected), strict=True):
            average.update_parameters(net)
    assert_same_parameters(*(average.module for average in averages))
    assert not torch.equal(averages[0].module.first.weight, model.first.weight)
    opt.detach()


def test_parameters_without_gradients_stay_as_they_are(world, mode):
    model, idle = seeded(), seeded(seed=1)
    groups = [{"params": list(model.parameters())}, {"params": list(idle.parameters())}]
    opt = dpoptim.DataParallelOptimizer(dpoptim.AdamW(groups, lr=0.01), **mode)
    for step in range(3):
        train(opt, model, _part(world, step))
        _agreed(world, all(map(torch.equal, idle.parameters(), seeded(seed=1 + step).parameters())), f"step {step}")
        with opt.exclusive():
            idle.load_state_dict(seeded(seed=2 + step).state_dict())
    opt.detach()


def test_groups_with_options_of_their_own(world, mode):
    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(), seeded()

    def groups(net):
        own = list(net.parameters())
        return [{"params": own[::2], "lr": 0.03, "weight_decay": 0.1}, {"params": own[1::2], "betas": (0.5, 0.6)}]

    opt = dpoptim.DataParallelOptimizer(dpoptim.AdamW(groups(model), lr=0.01), **mode)
    plain = torch.optim.AdamW(groups(expected), lr=0.01)
    schedulers = [dpoptim.lr_scheduler.ExponentialLR(optimizer, 0.7) for optimizer in (opt, plain)]
    for step in range(5):
        batch = joined_batch(step, sizes)
        train(opt, model, local_part(batch, sizes, world.rank))
        train(plain, expected, batch)
        for scheduler in schedulers:
            scheduler.step()
        opt.param_groups[1]["weight_decay"] = plain.param_groups[1]["weight_decay"] = 0.1 * step
        assert_same_parameters(model, expected, step)
    opt.detach()


@pytest.mark.supports("named parameters", sharded="{mode}")
def test_names_are_those_of_the_model(world, mode):
    _, opt = _wrapped(mode)
    assert opt.param_groups[0]["param_names"][0] == "first.weight"
    assert "first.weight" in opt.local_slices()
    full = opt.full_state_dict(rank0_only=False)
    assert full["param_groups"][0]["param_names"] == opt.param_groups[0]["param_names"]
    opt.detach()


def test_a_parameter_may_be_given_other_memory_where_it_is_the_ranks_own(world):
    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(lambda: nn.Linear(300, 300)), seeded(lambda: nn.Linear(300, 300))
    _, opt = _wrapped({"shard": True}, "AdamW", model)
    plain = torch.optim.AdamW(expected.parameters(), lr=0.01)
    for step in range(4):
        batch = joined_batch(step, sizes, width=300)
        train(opt, model, local_part(batch, sizes, world.rank))
        train(plain, expected, batch)
        model.weight.data = model.weight.data.clone()
        assert_same_parameters(model, expected, step)
    opt.detach()


# ---------------------------------------------------------------- state


@pytest.mark.supports("state_dict", limits="full_state_dict() where the state is sharded")
def test_state_dict_says_what_to_call_instead(world, mode):
    _several(world)
    model, opt = _wrapped(mode)
    train(opt, model, _part(world))
    with pytest.raises(RuntimeError, match=r"is sharded among ranks .*: call full_state_dict\(\) on all of them, or"):
        opt.state_dict()
    assert not opt.state
    opt.detach()


def test_the_full_state_is_rank_0s_alone_unless_asked(world, mode):
    model, opt = _wrapped(mode)
    train(opt, model, _part(world))
    full = opt.full_state_dict()
    assert (full is None) == (world.rank != 0)
    plain = torch.optim.AdamW(seeded().named_parameters(), lr=0.5)
    if full is not None:
        plain.load_state_dict(full)
    everywhere = opt.full_state_dict(rank0_only=False)
    plain.load_state_dict(everywhere)
    assert plain.param_groups[0]["lr"] == 0.01
    opt.detach()


@pytest.mark.parametrize("how", ["full", "local", "torch"])
@pytest.mark.parametrize("name", ["AdamW", "NAdam", "Adagrad", "Adafactor", "Muon", "SGD"])
def test_a_state_of_torch_is_loaded_and_training_goes_on_alike(world, mode, how, name):
    class Matrices(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(5, 6, bias=name != "Muon"), nn.Tanh(), nn.Linear(6, 5, bias=name != "Muon"))

    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(Matrices, seed=world.rank), seeded(Matrices)
    options = {"lr": 0.02, "momentum": 0.9} if name == "SGD" else {"lr": 0.02}
    inner = getattr(dpoptim, name)(model.named_parameters(), **{**options, "lr": 0.5})
    plain = getattr(dpoptim, name)(expected.parameters(), **options)
    opt = dpoptim.DataParallelOptimizer(inner, **mode)
    for step in range(3):
        train(plain, expected, joined_batch(step, sizes))
    state = copy.deepcopy(plain.state_dict())
    for group in state["param_groups"]:
        group["param_names"] = opt.param_groups[0]["param_names"]
    seen = []
    opt.register_load_state_dict_post_hook(lambda _: seen.append("post"))
    if how == "full":
        opt.register_load_state_dict_pre_hook(lambda _, given: seen.append("pre"))
        opt.load_full_state_dict(state if world.rank == 0 else None)
        seen = [text for text in seen if text == "post" or world.rank == 0]
        assert seen.count("post") == 1
    elif how == "torch":
        opt.load_state_dict(state)
        assert seen == ["post"]
    else:
        source = dpoptim.DataParallelOptimizer(getattr(dpoptim, name)(seeded(Matrices).named_parameters(), **options))
        source.load_state_dict(state)
        whole = source.local_state_dict()
        source.detach()
        opt.load_local_state_dict(dpoptim.utils.state_dict.shard(whole, opt.local_slices()))
    with opt.exclusive():
        model.load_state_dict(expected.state_dict())
    for step in range(3, 6):
        batch = joined_batch(step, sizes)
        train(opt, model, local_part(batch, sizes, world.rank))
        train(plain, expected, batch)
        assert_same_parameters(model, expected, step)
    assert opt.param_groups[0]["lr"] == 0.02
    opt.detach()


def test_a_state_that_does_not_fit_is_an_error_on_all_ranks(world, mode):
    model, opt = _wrapped(mode)
    wrong = {"state": {0: {"step": torch.ones(()), "exp_avg": torch.ones(2, 2), "exp_avg_sq": torch.ones(2, 2)}}}
    wrong["param_groups"] = [{**opt.param_groups[0], "params": list(range(len(opt.param_groups[0]["params"])))}]
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 'first\.weight' must have shape"):
        opt.load_full_state_dict(wrong if world.rank == 0 else None)
    with pytest.raises(TypeError, match="state_dict must be a mapping on rank 0, got NoneType"):
        opt.load_full_state_dict(None)
    train(opt, model, _part(world))
    opt.detach()


def test_hooks_of_the_state_dict_run_where_it_is_whole(world, mode):
    _, opt = _wrapped(mode)
    seen = []
    opt.register_state_dict_pre_hook(lambda _: seen.append("pre"))
    opt.register_state_dict_post_hook(lambda _, state: {**state, "more": 1})
    full = opt.full_state_dict(rank0_only=False)
    assert seen == ["pre"]
    assert full["more"] == 1
    opt.detach()


def test_detaching_puts_the_state_together(world, mode):
    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(), seeded()
    _, opt = _wrapped(mode, "AdamW", model)
    plain = torch.optim.AdamW(expected.parameters(), lr=0.01)
    for step in range(6):
        batch = joined_batch(step, sizes)
        if step == 3:
            inner = opt.optimizer
            opt.detach()
            assert inner.state
        train(*(opt, model, local_part(batch, sizes, world.rank)) if step < 3 else (inner, model, batch))
        train(plain, expected, batch)
        assert_same_parameters(model, expected, step)


# ---------------------------------------------------------------- memory that a node shares


def _shared_model(world, **options):
    _several(world)
    model = seeded(**options)
    return _wrapped({"node_shared": True}, "AdamW", model)


def test_parameters_lie_once_a_node(world):
    model, opt = _shared_model(world)
    world.Barrier()
    if world.rank == world.size - 1:
        with torch.no_grad():
            model.middle.bias[2] = 42.0
    world.Barrier()
    seen = model.middle.bias[2].item()
    opt.detach()
    assert seen == 42.0
    world.Barrier()
    with torch.no_grad():
        model.middle.bias[2] = world.rank  # everybody's own again
    world.Barrier()
    _agreed(world, model.middle.bias[2].item() == world.rank)


def test_exclusive_counts_rank_0_alone(world):
    for settings in MODES.values():
        model = seeded()
        _, opt = _wrapped(settings, "SGD", model)
        before = model.middle.weight.detach().clone()
        with opt.exclusive(), torch.no_grad():
            model.middle.weight.mul_(2.0 + world.rank)
        _agreed(world, torch.equal(model.middle.weight, 2 * before))
        assert_replicas(opt, model)
        train(opt, model, _part(world))
        assert_replicas(opt, model)
        opt.detach()


def test_an_error_within_exclusive_leaves_what_is_shared(world):
    model, opt = _shared_model(world)
    before = model.middle.weight.detach().clone()
    with pytest.raises(KeyError), opt.exclusive():
        raise KeyError
    _agreed(world, torch.equal(model.middle.weight, before))
    train(opt, model, _part(world))
    assert_replicas(opt, model)
    opt.detach()


def test_load_state_dict_and_copies_of_the_model_are_safe(world):
    model, opt = _shared_model(world)
    train(opt, model, _part(world))
    other = seeded(seed=5)
    clone = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    size_bytes = buffer.tell()
    plain = io.BytesIO()
    torch.save(other.state_dict(), plain)
    assert size_bytes == plain.tell()
    pickled = pickle.loads(pickle.dumps(model))
    world.Barrier()
    model.load_state_dict(other.state_dict())
    world.Barrier()
    _agreed(world, torch.equal(model.middle.weight, other.middle.weight))
    _agreed(world, not torch.equal(clone.middle.weight, other.middle.weight))
    assert torch.equal(pickled.middle.weight, clone.middle.weight)
    train(opt, model, _part(world))
    assert_replicas(opt, model)
    opt.detach()


def test_a_parameter_that_leaves_the_shared_memory_is_an_error_on_all(world):
    model, opt = _shared_model(world)
    train(opt, model, _part(world))
    if world.rank == 0:
        model.middle.bias.data = model.middle.bias.data.clone()
    pattern = r"'middle\.bias' is no longer in the memory that the node shares"
    with pytest.raises(RuntimeError, match=pattern):
        train(opt, model, _part(world))


def test_without_shared_memory_each_rank_has_its_own(world, monkeypatch, caplog):
    _several(world)
    monkeypatch.setattr(shared_memory, "_DIRECTORY", "/nowhere")
    with caplog.at_level(logging.WARNING):
        model, opt = _wrapped({"node_shared": True})
    assert opt.mode == "sharded"
    assert "node_shared=True has one copy of the parameters a rank, as shard=True" in caplog.text
    train(opt, model, _part(world))
    assert_replicas(opt, model)
    opt.detach()


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"shard": True, "node_shared": True}, "shard and node_shared exclude each other"),
        ({"shard": 1}, "shard must be True or False, got 1"),
        ({"node_shared": "yes"}, "node_shared must be True or False, got 'yes'"),
    ],
)
def test_bad_arguments(settings, pattern):
    with pytest.raises((TypeError, ValueError), match=pattern):
        _wrapped(settings)


def test_what_can_not_be_divided(mode):
    with pytest.raises(ValueError, match="differentiable=True does not go with shard or node_shared"):
        _wrapped(mode, "SGD", differentiable=True)
    on_meta = dpoptim.SGD([nn.Parameter(torch.ones(2, device="meta"))], lr=0.1)
    if "node_shared" in mode:
        # Several ranks are told first that it has no values.
        with pytest.raises(ValueError, match=r"needs all parameters on cpu, got one on meta|is on the meta device"):
            dpoptim.DataParallelOptimizer(on_meta, **mode)


def test_modes_that_differ_between_ranks_are_an_error_on_all(world):
    _several(world)
    model = seeded()
    inner = dpoptim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="shard"):
        dpoptim.DataParallelOptimizer(inner, shard=world.rank == 0)


def test_a_step_that_fails_on_one_rank_fails_on_all(world, mode, monkeypatch):
    _several(world)
    model, opt = _wrapped(mode)
    train(opt, model, _part(world))
    if world.rank == world.size - 1:

        def fail():
            raise FloatingPointError("no such number")

        monkeypatch.setattr(opt._mode._step, "step", lambda *_: fail())
    with pytest.raises((RuntimeError, FloatingPointError), match="no such number"):
        train(opt, model, _part(world))


def test_a_rank_that_leaves_out_the_step_is_found(world, mode):
    _several(world)
    model, opt = _wrapped(mode)
    train(opt, model, _part(world))
    model(_part(world)).sum().backward()
    loss = model(_part(world)).sum()
    with pytest.raises(RuntimeError, match="different places"):
        (loss.backward if world.rank == 0 else opt.step)()


@pytest.mark.supports("torch.compile of the model", sharded="{mode}")
def test_torch_compile(world, mode):
    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(), seeded()
    _, opt = _wrapped(mode, "AdamW", model)
    plain = torch.optim.AdamW(expected.parameters(), lr=0.01)
    compiled = torch.compile(model, backend="eager")
    for step in range(3):
        batch = joined_batch(step, sizes)
        train(opt, compiled, local_part(batch, sizes, world.rank))
        train(plain, expected, batch)
        assert_same_parameters(model, expected, step)
    opt.detach()


def test_no_warning_is_given_without_a_reason(mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, opt = _wrapped(mode)
    opt.detach()


def test_a_model_that_is_converted_later_is_an_error_on_all(world, mode):
    _several(world)
    model, opt = _wrapped(mode)
    train(opt, model, _part(world))
    model.float()
    with pytest.raises(RuntimeError, match="move or convert the model first, then construct the optimizer"):
        train(opt, model, _part(world).float())
