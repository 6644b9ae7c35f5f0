"""DataParallelOptimizer as a torch.optim.Optimizer, and what it answers to bad input."""

import copy
import pickle
import warnings

import pytest
import torch
from oracle import (
    Net,
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

pytestmark = pytest.mark.parallel


@pytest.fixture
def wrapped(world):
    """Give a model and its wrapped AdamW."""
    model = seeded()
    opt = dpoptim.DataParallelOptimizer(dpoptim.AdamW(model.named_parameters(), lr=0.01), module=model)
    yield model, opt
    opt.detach()


def _part(world, step=0):
    sizes = part_sizes(world.size, equal=True)
    return local_part(joined_batch(step, sizes), sizes, world.rank)


# ---------------------------------------------------------------- torch's own tools, without a special case


def test_it_is_an_optimizer_with_one_live_list_of_groups(world, wrapped):
    _, opt = wrapped
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.param_groups is opt.optimizer.param_groups
    assert opt.state is opt.optimizer.state
    opt.param_groups[0]["lr"] = 0.5
    assert opt.optimizer.param_groups[0]["lr"] == 0.5
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups is opt.optimizer.param_groups
    assert "AdamW" in repr(opt)
    assert opt.communicator.world_size == world.size


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.supports("torch.amp.autocast and GradScaler", replicated="{kind}")
def test_grad_scaler_skips_the_step_on_all_ranks_after_an_overflow_on_one(world, kind):
    model, expected = seeded(dtype=torch.float32), seeded(dtype=torch.float32)
    opt = dpoptim.DataParallelOptimizer(getattr(dpoptim, kind)(model.parameters(), lr=0.01))
    plain = getattr(torch.optim, kind)(expected.parameters(), lr=0.01)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(2)]
    sizes = part_sizes(world.size, equal=True)
    for step in range(6):
        batch = joined_batch(step, sizes, dtype=torch.float32)
        overflow = step == 2
        for scaler, optimizer, net, part, spoilt in (
            (scalers[0], opt, model, local_part(batch, sizes, world.rank), overflow and world.rank == world.size - 1),
            (scalers[1], plain, expected, batch, overflow),
        ):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = net(part).float().pow(2).mean()
            if spoilt:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert_replicas(opt, model)
    for value, other in zip(model.parameters(), expected.parameters(), strict=True):
        # bfloat16 activations (2^-8) of batches that are cut differently, through five steps of 0.01
        torch.testing.assert_close(value, other, rtol=2**-7, atol=5 * 0.01)
    opt.detach()


def test_a_closure_returns_the_mean_loss_of_all_ranks(world):
    model = seeded()
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.parameters(), lr=0.1))
    opt.batch_weight = world.rank + 1

    def closure():
        opt.zero_grad()
        model(_part(world)).sum().backward()
        return torch.tensor(float(world.rank))

    weights = range(1, world.size + 1)
    mean = sum(w * r for r, w in enumerate(weights)) / sum(weights)
    loss = opt.step(closure)
    assert isinstance(loss, torch.Tensor)
    assert loss.item() == pytest.approx(mean)
    assert opt.step(lambda: closure().item()) == pytest.approx(mean)
    assert opt.step(lambda: print(closure(), end="")) is None
    assert_replicas(opt, model)
    opt.detach()


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "Adagrad"])
def test_a_plain_optimizer_loads_the_state_and_goes_on_alike(world, name):
    options = {"lr": 0.01, "momentum": 0.9} if name in ("SGD", "RMSprop") else {"lr": 0.01}
    sizes = part_sizes(world.size, equal=True)
    model = seeded()
    opt = dpoptim.DataParallelOptimizer(getattr(dpoptim, name)(model.parameters(), **options))
    for step in range(3):
        train(opt, model, local_part(joined_batch(step, sizes), sizes, world.rank))
    expected = copy.deepcopy(model)
    for parameter in expected.parameters():
        parameter._post_accumulate_grad_hooks = None
    plain = getattr(torch.optim, name)(expected.parameters(), **options)
    plain.load_state_dict(copy.deepcopy(opt.state_dict()))
    for step in range(3, 6):
        batch = joined_batch(step, sizes)
        train(opt, model, local_part(batch, sizes, world.rank))
        train(plain, expected, batch)
        assert_same_parameters(model, expected, step)
    saved = copy.deepcopy(plain.state_dict())
    opt.load_state_dict(saved)
    assert_replicas(opt, model)
    opt.detach()


def test_rank_0_alone_may_save_its_state(world, wrapped, tmp_path):
    model, opt = wrapped
    train(opt, model, _part(world))
    if world.rank == 0:
        torch.save(opt.state_dict(), tmp_path / "state.pt")
        assert torch.load(tmp_path / "state.pt", weights_only=True)["state"].keys() == opt.state_dict()["state"].keys()


def test_gradients_belong_to_the_user_alone_after_backward(world):
    model = nn.Linear(512, 512)  # large enough to travel from its own memory
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        opt.zero_grad()
        model(torch.ones(1, 512)).sum().backward()
        address = model.weight.grad.data_ptr()
        assert all(bucket.flat.data_ptr() != address for bucket in opt._reducer.buckets)
        opt.step()
    opt.detach()


def test_it_can_not_be_copied_or_pickled(wrapped):
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="save its state_dict"):
            attempt(wrapped[1])


def test_detached_optimizers_leave_plain_parameters(world):
    model = seeded()
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.parameters(), lr=0.1))
    opt.detach()
    model(_part(world) * world.rank).sum().backward()
    grads = world.allgather(model.first.weight.grad.abs().sum().item())
    assert len(set(grads)) == world.size
    again = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.parameters(), lr=0.1))
    train(again, model, _part(world))
    assert_replicas(again, model)
    again.detach()


# ---------------------------------------------------------------- bad input: an error on every rank


def _raises_on_all(world, kind, match, attempt):
    with pytest.raises(kind, match=match):
        attempt()
    world.Barrier()


@pytest.mark.parametrize("only_on_last_rank", [False, True])
@pytest.mark.parametrize(
    ("kind", "match", "change"),
    [
        (ValueError, r"bucket_mb must be > 0, got -1", {"bucket_mb": -1}),
        (ValueError, r"bucket_mb must be > 0, got 0", {"bucket_mb": 0}),
        (ValueError, r'overlap must be "auto", True or False, got 3', {"overlap": 3}),
        (TypeError, r"comm_hook must be callable, got int", {"comm_hook": 3}),
        (TypeError, r"module must be a torch.nn.Module or None, got str", {"module": "model"}),
        (TypeError, r"optimizer must be a torch.optim.Optimizer, got Net", {"optimizer": "model"}),
        (TypeError, r"already a DataParallelOptimizer", {"optimizer": "wrapped"}),
    ],
)
def test_bad_arguments(world, wrapped, kind, match, change, only_on_last_rank):
    arguments = {"optimizer": dpoptim.SGD(seeded().parameters(), lr=0.1)}
    if not only_on_last_rank or world.rank == world.size - 1:
        arguments |= change
        arguments["optimizer"] = {"model": seeded(), "wrapped": wrapped[1]}.get(
            change.get("optimizer"), arguments["optimizer"]
        )
    elif only_on_last_rank:
        match = f"on rank {world.size - 1}: .*{match}"
    _raises_on_all(world, kind, match, lambda: dpoptim.DataParallelOptimizer(**arguments))


def test_a_parameter_of_another_wrapper_is_refused(world, wrapped):
    if world.size == 1:
        pytest.skip("one rank has nothing to reduce, so no wrapper holds a parameter")
    model, _ = wrapped
    inner = dpoptim.SGD(model.parameters(), lr=0.1)
    _raises_on_all(
        world, ValueError, "belongs to another DataParallelOptimizer", lambda: dpoptim.DataParallelOptimizer(inner)
    )


class Odd(nn.Module):
    def __init__(self, shape=(4, 3), name="weight", dtype=torch.float32, more=0, frozen=False):
        super().__init__()
        setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=not frozen))
        self.bias = nn.Parameter(torch.zeros(2))
        for number in range(more):
            setattr(self, f"more{number}", nn.Parameter(torch.zeros(2)))


@pytest.mark.parametrize(
    ("change", "lr", "match"),
    [
        ({"shape": (4, 2)}, 0.1, r"parameter 'weight' has shape \(4, 3\) on rank 0 but \(4, 2\) on rank {last}"),
        ({"name": "wait"}, 0.1, r"parameter 0 is 'weight' on rank 0 but 'wait' on rank {last}"),
        (
            {"dtype": torch.float64},
            0.1,
            r"parameter 'weight' has dtype torch.float32 on rank 0 but torch.float64 on rank {last}",
        ),
        (
            {"more": 1},
            0.1,
            r"has 2 parameters on rank 0 but 3 on rank {last} \(the first that only rank {last} has is 'more0'\)",
        ),
        ({"frozen": True}, 0.1, r"parameter 'weight' has requires_grad True on rank 0 but False on rank {last}"),
        ({}, 0.2, r"parameter group 0 has lr = 0.1 on rank 0 but 0.2 on rank {last}"),
    ],
)
def test_ranks_that_differ(world, change, lr, match):
    if world.size == 1:
        pytest.skip("one rank differs from nobody")
    last = world.size - 1
    model = Odd(**change) if world.rank == last else Odd()
    inner = dpoptim.SGD(model.named_parameters(), lr=lr if world.rank == last else 0.1)
    _raises_on_all(
        world, ValueError, match.format(last=last), lambda: dpoptim.DataParallelOptimizer(inner, module=model)
    )


def test_ranks_that_differ_in_order_kind_or_settings(world):
    if world.size == 1:
        pytest.skip("one rank differs from nobody")
    odd = world.rank == world.size - 1
    parameters = list(Odd().named_parameters())
    inner = dpoptim.SGD(parameters[::-1] if odd else parameters, lr=0.1)
    _raises_on_all(
        world, ValueError, "parameter 0 is 'weight' on rank 0 but 'bias'", lambda: dpoptim.DataParallelOptimizer(inner)
    )
    inner = getattr(dpoptim, "NAdam" if odd else "RAdam")(Odd().parameters(), lr=0.1)
    _raises_on_all(world, ValueError, "on rank 0 but", lambda: dpoptim.DataParallelOptimizer(inner))
    inner = dpoptim.SGD(Odd().parameters(), lr=0.1)
    _raises_on_all(
        world,
        ValueError,
        "bucket_mb is 25 on rank 0 but 1 on rank",
        lambda: dpoptim.DataParallelOptimizer(inner, bucket_mb=1 if odd else 25),
    )
    inner = dpoptim.SGD(Odd().parameters(), lr=0.1)
    if odd:
        for parameter in inner.param_groups[0]["params"]:
            inner.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    _raises_on_all(world, ValueError, "load the state on every rank", lambda: dpoptim.DataParallelOptimizer(inner))


def test_a_bad_group_on_one_rank_is_refused_on_all(world, wrapped):
    _, opt = wrapped
    group = {"params": [("new", nn.Parameter(torch.zeros(2)))]}
    if world.rank == world.size - 1:
        group = {"params": [nn.Parameter(torch.zeros(2))]}  # without a name, beside groups with names
    _raises_on_all(world, ValueError, "with/without names", lambda: opt.add_param_group(group))


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_batch_weight_must_be_positive(wrapped, value):
    with pytest.raises(ValueError, match=f"batch_weight must be > 0 and finite, got {value}"):
        wrapped[1].batch_weight = value
    assert wrapped[1].batch_weight == 1


def test_batch_weight_is_fixed_while_gradients_wait(world, wrapped):
    if world.size == 1:
        pytest.skip("gradients of one rank wait for nobody")
    model, opt = wrapped
    with opt.no_sync():
        model(_part(world)).sum().backward()
    with pytest.raises(ValueError, match=r"batch_weight must not change from 1 to 7"):
        opt.batch_weight = 7
    opt.step()
    opt.batch_weight = 7


@pytest.mark.parametrize("overlap", [False, True])
def test_a_model_moved_after_construction_is_an_error_on_all_ranks(world, overlap):
    if world.size == 1:
        pytest.skip("one rank has no buckets, and torch itself takes a moved model")
    probe = seeded()
    weight = probe.first.weight
    moves = [lambda model: model.to(torch.float32)]
    if probe.to("meta").first.weight is weight:  # some versions of torch make new parameters on the way to meta
        moves.append(lambda model: model.to("meta"))
    for convert in moves:
        model = seeded()
        opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.named_parameters(), lr=0.1), overlap=overlap)
        train(opt, model, _part(world))
        opt.zero_grad()
        if world.rank == world.size - 1:
            model = convert(model)
        batch = _part(world).to(model.first.weight)
        with pytest.raises(RuntimeError, match=r"parameter 'first.weight' is torch.* when the optimizer was construct"):
            model(batch).sum().backward()
        world.Barrier()


def test_null_freed_and_inter_communicators(world):
    from mpi4py import MPI

    freed = world.Dup()
    freed.Free()
    inner = dpoptim.SGD(Net().parameters(), lr=0.1)
    for comm, kind, match in (
        (MPI.COMM_NULL, ValueError, "got MPI.COMM_NULL"),
        (freed, ValueError, "got MPI.COMM_NULL"),
        (3, TypeError, "must be an mpi4py communicator, a Heat communicator or None, got int"),
    ):
        _raises_on_all(world, kind, match, lambda comm=comm: dpoptim.DataParallelOptimizer(inner, comm))
    if world.size > 1:
        local = world.Split(color=world.rank % 2, key=world.rank)
        inter = local.Create_intercomm(0, world, 1 - world.rank % 2, 7)
        _raises_on_all(
            world, ValueError, "must be an intracommunicator", lambda: dpoptim.DataParallelOptimizer(inner, inter)
        )
        inter.Free()
        local.Free()


def test_sub_communicators_train_apart(world):
    local = world.Split(color=world.rank % 2, key=world.rank)
    model = seeded(seed=world.rank % 2)
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.parameters(), lr=0.1), local)
    train(opt, model, _part(world))
    assert_replicas(opt, model)
    assert opt.communicator.world_size == local.size
    opt.detach()


def test_nothing_warns(world):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = seeded()
        opt = dpoptim.DataParallelOptimizer(dpoptim.AdamW(model.parameters()))
        scheduler = dpoptim.lr_scheduler.StepLR(opt, 1)
        train(opt, model, _part(world))
        scheduler.step()
        opt.detach()
