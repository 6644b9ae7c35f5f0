"""Averages of weights, and BatchNorm's statistics of the whole data set."""

import copy
import itertools
import warnings

import pytest
import torch
from oracle import assert_replicas, assert_same_parameters, joined_batch, local_part, part_sizes, seeded, train, twin
from torch import nn

import dpoptim
from dpoptim.swa_utils import (
    SWALR,
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_multi_avg_fn,
    update_bn,
)
from dpoptim.utils.consistency import digest

# float64: sums of up to some hundred numbers in different orders.
RTOL, ATOL = 1e-12, 1e-13


def features():
    return nn.Sequential(
        nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=0.3)
    )


def sequences():
    return nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3, affine=False))


def images():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=None), nn.ReLU(), nn.Conv2d(3, 2, 2))


def volumes():
    return nn.Sequential(nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2))


SHAPES = {features: (5,), sequences: (2, 9), images: (2, 6, 6), volumes: (1, 4, 4, 4)}


def batches_of(sizes, shape, dtype=torch.float64):
    """Return a batch of each size."""
    generator = torch.Generator().manual_seed(sum(sizes))
    return [torch.randn(size, *shape, generator=generator, dtype=torch.float64).to(dtype) * 3 + 1 for size in sizes]


def statistics(model):
    return [(name, buffer) for name, buffer in model.named_buffers() if "running" in name or "tracked" in name]


def assert_same_statistics(model, expected, rtol=RTOL, atol=ATOL):
    for (name, value), (_, other) in zip(statistics(model), statistics(expected), strict=True):
        assert value.dtype == other.dtype
        torch.testing.assert_close(value, other, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def assert_equal_on_all(comm, model):
    everybody = comm.allgather([digest(buffer) for buffer in model.buffers()])
    assert all(other == everybody[0] for other in everybody), "statistics differ between ranks"


def weighted_by_hand(model, batches):
    """Set the statistics of a `features` model by the formula: n-weighted means of batch mean and unbiased variance."""
    first, norm_1, tanh, second, norm_2 = model
    seen_1 = [first(batch) for batch in batches]
    normed = [(x - x.mean(0)) / (x.var(0, unbiased=False) + norm_1.eps).sqrt() for x in seen_1]
    seen_2 = [second(tanh(x * norm_1.weight + norm_1.bias)) for x in normed]
    total = sum(len(batch) for batch in batches)
    for norm, seen in ((norm_1, seen_1), (norm_2, seen_2)):
        norm.running_mean.copy_(sum(len(x) * x.mean(0) for x in seen) / total)
        norm.running_var.copy_(sum(len(x) * x.var(0) for x in seen) / total)
        norm.num_batches_tracked.fill_(len(batches))


def test_names_are_those_of_torch():
    assert sorted(dpoptim.swa_utils.__all__) == sorted(torch.optim.swa_utils.__all__)
    for name in set(torch.optim.swa_utils.__all__) - {"update_bn"}:
        assert getattr(dpoptim.swa_utils, name) is getattr(torch.optim.swa_utils, name)


# ---------------------------------------------------------------- update_bn


@pytest.mark.parallel
@pytest.mark.parametrize("make", SHAPES, ids=lambda make: make.__name__)
@pytest.mark.supports("update_bn", replicated="yes")
def test_equal_batches_give_what_torch_gives_in_one_process(any_comm, make):
    """Equal batches, but another number of them on every rank."""
    model, expected = seeded(make), seeded(make)
    per_rank = [2 + rank for rank in range(any_comm.size)]
    batches = batches_of([6] * sum(per_rank), SHAPES[make])
    start = sum(per_rank[: any_comm.rank])
    update_bn(batches[start : start + per_rank[any_comm.rank]], model, comm=any_comm)
    torch.optim.swa_utils.update_bn(batches, expected)
    assert_same_statistics(model, expected)
    assert_equal_on_all(any_comm, model)


@pytest.mark.parallel
@torch.no_grad()
def test_unequal_batches_are_weighted_by_size(world):
    model, expected = seeded(features), seeded(features)
    sizes = [[7, 7, 2 + rank][: 1 + (rank + 1) % 3] for rank in range(world.size)]
    batches = batches_of(list(itertools.chain(*sizes)), (5,))
    start = sum(map(len, sizes[: world.rank]))
    own = batches[start : start + len(sizes[world.rank])]
    update_bn(own, model)
    weighted_by_hand(expected, batches)
    assert_same_statistics(model, expected)
    assert_equal_on_all(world, model)
    whole = model[0](torch.cat(batches))
    torch.testing.assert_close(model[1].running_mean, whole.mean(0), rtol=RTOL, atol=ATOL)


@pytest.mark.parallel
def test_sequences_of_unequal_length_are_weighted_by_their_values(world):
    """The mean over all values that the layer has seen on all ranks, not over samples."""
    model = nn.Sequential(nn.BatchNorm1d(2)).double()
    generator = torch.Generator().manual_seed(0)
    lengths = [[3 + rank + 4 * index for index in range(2)] for rank in range(world.size)]
    batches = [[torch.randn(3, 2, n, generator=generator, dtype=torch.float64) for n in own] for own in lengths]
    update_bn(batches[world.rank], model)
    values = torch.cat([batch.transpose(0, 1).reshape(2, -1) for batch in itertools.chain(*batches)], dim=1)
    torch.testing.assert_close(model[0].running_mean, values.mean(1), rtol=RTOL, atol=ATOL)


@pytest.mark.parallel
def test_a_rank_without_any_batch(world):
    model, expected = seeded(features), seeded(features)
    batches = batches_of([6] * max(1, world.size - 1), (5,))
    update_bn(batches[world.rank : world.rank + 1], model)  # of several ranks, the last has none
    torch.optim.swa_utils.update_bn(batches, expected)
    assert_same_statistics(model, expected)
    assert_equal_on_all(world, model)


@pytest.mark.parallel
def test_no_batch_on_any_rank_resets_as_torch_does(world):
    model, expected = seeded(features), seeded(features)
    for net in (model, expected):
        net(batches_of([6], (5,))[0] + world.rank)
    update_bn([], model)
    torch.optim.swa_utils.update_bn([], expected)
    assert_same_statistics(model, expected)


@pytest.mark.parallel
def test_a_model_without_batchnorm_leaves_the_loader_alone(world):
    def loader():
        pytest.fail("the loader was touched")
        yield

    model = seeded(lambda: nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5, track_running_stats=False)))
    update_bn(loader(), model)
    assert model.training


@pytest.mark.parallel
def test_statistics_of_float32_are_summed_in_float64(world):
    """Two hundred batches far from zero: a float32 sum would lose digits that this one keeps."""
    model = nn.Sequential(nn.BatchNorm1d(3))
    batches = [batch + 1000 for batch in batches_of([4] * 200 * world.size, (3,), torch.float32)]
    update_bn(batches[world.rank :: world.size], model)
    exact = torch.cat(batches).double().mean(0)
    # a batch's mean is rounded to float32 by the layer, the result once more: half a unit in the last place each
    torch.testing.assert_close(model[0].running_mean.double(), exact, rtol=2**-23, atol=0)
    assert model[0].running_mean.dtype == torch.float32
    assert model[0].num_batches_tracked == 200 * world.size


@pytest.mark.parallel
def test_momentum_and_training_flags_are_restored(world):
    model = seeded(features)
    model[1].momentum = None
    model.eval()
    model[3].train()
    user_hooks = copy.copy(model[1]._forward_hooks)
    update_bn(batches_of([6], (5,)), model)
    assert [module.training for module in model] == [False, False, False, True, False]
    assert not model.training
    assert (model[1].momentum, model[4].momentum) == (None, 0.3)
    assert model[1]._forward_hooks == user_hooks


@pytest.mark.parallel
def test_batches_in_tuples_and_lists_and_on_a_device(world):
    model, expected = seeded(features), seeded(features)
    batches = batches_of([6] * 2 * world.size, (5,))
    own = batches[2 * world.rank : 2 * world.rank + 2]
    update_bn([(own[0], "label"), [own[1]]], model, "cpu")
    torch.optim.swa_utils.update_bn(batches, expected, "cpu")
    assert_same_statistics(model, expected)


@pytest.mark.parallel
def test_a_shared_layer_a_frozen_one_and_one_that_is_not_called(world):
    """As in torch: every call counts as a batch, a layer kept in evaluation mode or not called is reset."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.frozen, self.unused = (nn.BatchNorm1d(5) for _ in range(3))

        def train(self, mode=True):
            super().train(mode)
            self.frozen.eval()
            return self

        def forward(self, x):
            return self.shared(torch.tanh(self.shared(self.frozen(input=x))))

    model, expected = seeded(Odd), seeded(Odd)
    batches = batches_of([6] * 3 * world.size, (5,))
    for net in (model, expected):
        nn.init.constant_(net.frozen.running_mean, 3.0)
        nn.init.constant_(net.unused.running_mean, 3.0)
    update_bn(batches[world.rank :: world.size], model)
    torch.optim.swa_utils.update_bn(batches, expected)
    assert_same_statistics(model, expected)
    assert model.shared.num_batches_tracked == 6 * world.size


@pytest.mark.parallel
def test_dataset_divided_by_a_sampler(world):
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    data = TensorDataset(batches_of([8 * world.size + 5], (5,))[0])
    sampler = DistributedSampler(data, world.size, world.rank, shuffle=False, drop_last=True)
    model, expected = seeded(features), seeded(features)
    update_bn(DataLoader(data, 5, sampler=sampler), model)
    num_used = len(sampler) * world.size
    (kept,) = data[:num_used]
    parts = [list(kept[rank :: world.size].split(5)) for rank in range(world.size)]
    with torch.no_grad():
        weighted_by_hand(expected, list(itertools.chain(*parts)))
    assert_same_statistics(model, expected)


def test_a_compiled_model():
    model, expected = seeded(features), seeded(features)
    batches = batches_of([6, 6, 6], (5,))
    compiled = torch.compile(model, backend="eager")
    compiled(batches[0])
    update_bn(batches, compiled)
    torch.optim.swa_utils.update_bn(batches, expected)
    assert_same_statistics(model, expected)


# ---------------------------------------------------------------- update_bn: errors


def message_of(comm, kind, call):
    """Return the message of the error that every rank must raise, having seen that each did."""
    try:
        call()
    except kind as error:
        message = str(error)
    else:
        message = None
    everybody = comm.allgather(message)
    assert None not in everybody, f"raised on some ranks only: {everybody}"
    return message


@pytest.mark.parallel
@pytest.mark.parametrize("where", ["loader", "model"])
def test_an_error_on_one_rank_is_raised_on_all_and_changes_nothing(world, where):
    model = seeded(features)
    update_bn(batches_of([6], (5,)), model)
    model.eval()
    before = [buffer.clone() for buffer in model.buffers()]
    last = world.size - 1

    def loader():
        yield torch.ones(3, 5, dtype=torch.float64)
        if world.rank == last and where == "loader":
            raise ValueError("file 7 is gone")
        yield torch.ones(1 if world.rank == last else 4, 5, dtype=torch.float64)

    message = message_of(world, ValueError, lambda: update_bn(loader(), model))
    expected = "file 7 is gone" if where == "loader" else "Expected more than 1 value per channel"
    assert expected in message
    assert message.startswith(f"on rank {last}: ") == (world.rank != last)
    assert not model.training
    assert model[4].momentum == 0.3
    assert not model[1]._forward_hooks
    for buffer, other in zip(model.buffers(), before, strict=True):
        assert torch.equal(buffer, other)
    update_bn(batches_of([6], (5,)), model)  # the ranks are in step


@pytest.mark.parallel
def test_something_that_is_no_module(world):
    message = message_of(world, TypeError, lambda: update_bn([], None if world.rank == 0 else seeded(features)))
    assert message.endswith("model must be a torch.nn.Module, got NoneType")


@pytest.mark.parallel
def test_something_that_is_no_communicator(world):
    message = message_of(world, TypeError, lambda: update_bn([], seeded(features), comm="world"))
    assert message == "comm must be an mpi4py communicator, a Heat communicator or None, got str"


@pytest.mark.parallel
def test_a_lazy_layer_without_a_shape(world):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # older versions of torch warn that lazy modules are new
        model = nn.Sequential(nn.Linear(5, 4), nn.LazyBatchNorm1d())
    message = message_of(world, ValueError, lambda: update_bn(batches_of([6], (5,)), model))
    assert message == "BatchNorm layer '1' must know its number of features, but is lazy: call the model once before"


@pytest.mark.parallel
def test_models_that_differ_between_ranks(world):
    if world.size == 1:
        pytest.skip("needs two ranks")
    last = world.size - 1
    other = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    model = other if world.rank == last else nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    message = message_of(world, ValueError, lambda: update_bn([], model))
    assert message == (
        f"BatchNorm layer '1' has 4 features on rank 0 but 3 features on rank {last}: every rank must pass the same "
        "model"
    )
    model = nn.Linear(5, 3) if world.rank == last else other
    assert "has 3 features on rank 0 but no statistics on rank" in message_of(
        world, ValueError, lambda: update_bn([], model)
    )


@pytest.mark.parallel
def test_a_layer_called_past_its_hooks(world):
    class Direct(nn.Sequential):
        def forward(self, x):
            return self[0].forward(x)

    model = Direct(nn.BatchNorm1d(5)).double()
    message = message_of(world, RuntimeError, lambda: update_bn(batches_of([6, 6], (5,)), model))
    assert message == (
        "BatchNorm layer '0' has seen 2 batches, its forward hook only 0: call the layer itself, not its forward method"
    )


PRELUDE = """
import sys, torch, dpoptim
from mpi4py import MPI
rank = MPI.COMM_WORLD.rank
model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.named_parameters(), lr=0.1))
batch = torch.randn(4, 3)
"""


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("dpoptim.swa_utils.update_bn([], model) if rank else model(batch).sum().backward()", "at different places"),
        ("dpoptim.swa_utils.update_bn((sys.exit(3) for _ in range(1 - rank)), model)", "rank 0 left the program"),
    ],
    ids=["backward", "left in the loader"],
)
def test_a_rank_that_is_elsewhere_is_an_error_and_no_wait(mpirun, body, expected):
    done = mpirun(2, "-c", PRELUDE + body, quick_start=False)  # update_bn asks the compiler
    assert done.returncode != 0
    assert expected in done.stderr, done.stderr
    assert "update_bn" in done.stderr


# ---------------------------------------------------------------- averages


@pytest.mark.parallel
@pytest.mark.parametrize(
    ("options", "row"),
    [
        ({}, "AveragedModel: SWA"),
        ({"multi_avg_fn": get_swa_multi_avg_fn()}, "AveragedModel: multi_avg_fn"),
        ({"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, "get_ema_multi_avg_fn"),
        ({"avg_fn": get_ema_avg_fn(0.8)}, "AveragedModel: avg_fn"),
        ({"avg_fn": get_ema_avg_fn(0.9)}, "AveragedModel: EMA"),
    ],
    ids=["swa", "swa foreach", "ema foreach", "avg_fn", "ema"],
)
@pytest.mark.supports("{row}", replicated="yes")
def test_averages_are_equal_on_all_ranks_and_to_one_process(world, options, row):
    sizes = part_sizes(world.size, equal=False)
    model, expected = seeded(seed=0), seeded(seed=0)
    opt = dpoptim.DataParallelOptimizer(dpoptim.AdamW(model.parameters(), lr=0.01))
    opt.batch_weight = sizes[world.rank]
    plain = torch.optim.AdamW(expected.parameters(), lr=0.01)
    averaged, averaged_expected = AveragedModel(model, **options), AveragedModel(expected, **options)
    for step in range(8):
        batch = joined_batch(step, sizes)
        train(opt, model, local_part(batch, sizes, world.rank))
        train(plain, expected, batch)
        if step >= 3:
            averaged.update_parameters(model)
            averaged_expected.update_parameters(expected)
    assert_replicas(opt, averaged)
    assert_same_parameters(averaged, averaged_expected)
    assert averaged.n_averaged == 5
    opt.detach()


@pytest.mark.parallel
def test_an_averaged_model_is_not_reduced(world):
    """The copy has no hooks: its backward is each rank's own."""
    model = seeded()
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.parameters(), lr=0.1))
    averaged = AveragedModel(model)
    if world.rank == 0:
        averaged(joined_batch(0, [3])).sum().backward()
    train(opt, model, joined_batch(1, [3]))
    assert_replicas(opt, model)
    opt.detach()


@pytest.mark.parallel
def test_update_bn_of_an_average_after_training(world):
    """The recipe of torch's documentation, on every rank: training with BatchNorm, averaging, update_bn."""
    model = seeded(features)
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.parameters(), lr=0.1))
    scheduler = SWALR(opt, swa_lr=0.05, anneal_epochs=2)
    averaged = AveragedModel(model)
    batches = batches_of([6] * 4 * world.size, (5,))
    own = batches[world.rank :: world.size]
    for batch in own:
        train(opt, model, batch)
        averaged.update_parameters(model)
        scheduler.step()
    expected = twin(averaged)
    update_bn(own, averaged)
    torch.optim.swa_utils.update_bn(batches, expected)
    assert_same_statistics(averaged, expected)
    assert_equal_on_all(world, averaged)
    assert_replicas(opt, averaged)
    opt.detach()


@pytest.mark.parallel
@pytest.mark.parametrize("anneal_strategy", ["cos", "linear"])
def test_swalr_on_the_wrapper(world, anneal_strategy):
    """The same rates as on a plain optimizer, through a save and a load in the middle."""
    options = {"swa_lr": [0.05, 0.01], "anneal_epochs": 5, "anneal_strategy": anneal_strategy}

    def groups():
        first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
        return [{"params": [first]}, {"params": [second], "lr": 0.3}]

    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(groups(), lr=0.1))
    plain = torch.optim.SGD(groups(), lr=0.1)
    scheduler, plain_scheduler = SWALR(opt, **options), SWALR(plain, **options)
    for step in range(10):
        if step == 4:
            saved = copy.deepcopy((opt.state_dict(), scheduler.state_dict()))
            opt.detach()
            opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(groups(), lr=0.1))
            scheduler = SWALR(opt, **options)
            opt.load_state_dict(saved[0])
            scheduler.load_state_dict(saved[1])
        for group in opt.param_groups:
            for parameter in group["params"]:
                parameter.sum().backward()
        for optimizer, each in ((opt, scheduler), (plain, plain_scheduler)):
            optimizer.step()
            each.step()
        assert scheduler.get_last_lr() == plain_scheduler.get_last_lr()
        assert [group["lr"] for group in opt.param_groups] == [group["lr"] for group in plain.param_groups]
    opt.detach()
