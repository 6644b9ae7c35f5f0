"""Invariants 1 and 2: N ranks end where one process on the joined batch ends, and are the same bits on the way."""

import contextlib
import warnings

import pytest
import torch
from oracle import (
    MODES,
    OPTIMIZERS,
    Net,
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
from torch import nn

import dpoptim
from dpoptim.utils.consistency import digest

pytestmark = pytest.mark.parallel

NUM_STEPS = 20


@pytest.fixture(params=MODES)
def mode(request):
    """Give the arguments of every mode in turn."""
    return MODES[request.param]


@pytest.fixture(params=["when backward ends", "by a thread", "looked after"])
def overlap(request, monkeypatch):
    """Give what to say for every way of exchanging gradients while backward runs, and for none, in turn."""
    if request.param == "looked after":
        request.getfixturevalue("looked_after")
        monkeypatch.setattr(dpoptim.comm.mpi.messages, "_IN_PIECES_BYTES", 256)
        monkeypatch.setattr(dpoptim.comm.mpi.messages, "_PIECE_BYTES", 100)
        monkeypatch.setattr(dpoptim.comm.mpi.messages, "_SHARE_BYTES", 1)
    return request.param != "when backward ends"


def _wrap(name, options, model, **settings):
    inner = getattr(dpoptim, name)(model.named_parameters(), **options)
    if name == "LBFGS" and {"shard", "node_shared"} & settings.keys():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LBFGS can't be sharded")
            return dpoptim.DataParallelOptimizer(inner, module=model, **settings)
    return dpoptim.DataParallelOptimizer(inner, module=model, **settings)


@pytest.mark.parametrize(
    "equal", [pytest.param(True, id="equal", marks=pytest.mark.ranks(2)), pytest.param(False, id="unequal")]
)
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_optimizer_ends_where_one_process_ends(world, mode, name, options, equal):
    sizes = part_sizes(world.size, equal=equal)
    model = seeded(seed=world.rank)  # only rank 0's weights survive
    expected = seeded(seed=0)
    opt = _wrap(name, options, model, **mode)
    plain = make_plain(opt, options, expected.parameters())
    opt.batch_weight = sizes[world.rank]
    for step in range(NUM_STEPS):
        batch = joined_batch(step, sizes)
        train(opt, model, local_part(batch, sizes, world.rank))
        train(plain, expected, batch)
        assert_replicas(opt, model)
        assert_same_parameters(model, expected, step)
    assert model.unused.weight.grad is None
    assert model.frozen.weight.grad is None
    opt.detach()


@pytest.mark.parametrize("bucket_mb", [25, 1e-5], ids=["one bucket", "a bucket a tensor"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_settings_do_not_change_the_result(world, mode, overlap, bucket_mb, set_to_none):
    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(), seeded()
    opt = _wrap("AdamW", {"lr": 0.01}, model, overlap=overlap, bucket_mb=bucket_mb, **mode)
    plain = torch.optim.AdamW(expected.parameters(), lr=0.01)
    for step in range(6):
        batch = joined_batch(step, sizes)
        for optimizer, net, part in (
            (opt, model, local_part(batch, sizes, world.rank)),
            (plain, expected, batch),
        ):
            optimizer.zero_grad(set_to_none=set_to_none)
            net(part).pow(2).mean().backward()
            optimizer.step()
        assert_replicas(opt, model)
        assert_same_parameters(model, expected, step)
    opt.detach()


def test_gradients_are_the_global_mean_when_backward_returns(world, overlap):
    sizes = part_sizes(world.size, equal=False)
    model, expected = seeded(), seeded()
    opt = _wrap("SGD", {"lr": 0.1}, model, overlap=overlap)
    opt.batch_weight = sizes[world.rank]
    for step in range(3):
        batch = joined_batch(step, sizes)
        model.zero_grad()
        expected.zero_grad()
        model(local_part(batch, sizes, world.rank)).pow(2).mean().backward()
        expected(batch).pow(2).mean().backward()
        for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
            assert (parameter.grad is None) == (other.grad is None)
            if other.grad is not None:
                # float64 sums of a few dozen terms in another order
                torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-12, atol=1e-14)
    opt.detach()


@pytest.mark.parametrize("no_sync", [True, False])
def test_accumulation_over_several_backwards(world, mode, no_sync, overlap):
    sizes = part_sizes(world.size, equal=False)
    model, expected = seeded(), seeded()
    opt = _wrap("AdamW", {"lr": 0.01}, model, overlap=overlap, **mode)
    plain = torch.optim.AdamW(expected.parameters(), lr=0.01)
    opt.batch_weight = sizes[world.rank]
    for step in range(6):
        opt.zero_grad()
        plain.zero_grad()
        for micro in range(3):
            batch = joined_batch(100 * step + micro, sizes)
            with opt.no_sync() if no_sync and micro < 2 else contextlib.nullcontext():
                model(local_part(batch, sizes, world.rank)).pow(2).mean().backward()
            expected(batch).pow(2).mean().backward()
        opt.step()
        plain.step()
        assert_replicas(opt, model)
        assert_same_parameters(model, expected, step)
    opt.detach()


def test_a_step_after_no_sync_alone_reduces_first(world, mode):
    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(), seeded()
    opt = _wrap("SGD", {"lr": 0.1}, model, **mode)
    plain = torch.optim.SGD(expected.parameters(), lr=0.1)
    batch = joined_batch(0, sizes)
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append(model.middle.bias.grad.clone()))
    with opt.no_sync():
        model(local_part(batch, sizes, world.rank)).pow(2).mean().backward()
    expected(batch).pow(2).mean().backward()
    opt.step()
    plain.step()
    assert_same_parameters(model, expected)
    own = slice(*opt.local_slices()["middle.bias"])
    torch.testing.assert_close(seen[0][own], expected.middle.bias.grad[own], rtol=1e-12, atol=1e-14)
    opt.detach()


@pytest.mark.parametrize("no_sync", [True, False])
def test_accumulation_where_some_ranks_have_no_gradient(world, mode, no_sync):
    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(), seeded()
    opt = _wrap("AdamW", {"lr": 0.01}, model, **mode)
    plain = torch.optim.AdamW(expected.parameters(), lr=0.01)
    for step in range(4):
        opt.zero_grad()
        plain.zero_grad()
        for micro in range(3):
            batch = joined_batch(10 * step + micro, sizes)
            with opt.no_sync() if no_sync and micro < 2 else contextlib.nullcontext():
                if micro == 2 or world.rank != (step + micro) % world.size or not no_sync:
                    model(local_part(batch, sizes, world.rank)).pow(2).mean().backward()
            for rank in range(world.size):
                if micro == 2 or rank != (step + micro) % world.size or not no_sync:
                    (expected(local_part(batch, sizes, rank)).pow(2).mean() / world.size).backward()
        opt.step()
        plain.step()
        assert_replicas(opt, model)
        assert_same_parameters(model, expected, step)
    opt.detach()


class Gated(nn.Module):
    """Uses each of its experts only if told to."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))

    def forward(self, x, which):
        return x + sum(self.experts[i](x) for i in which) if which else x


def test_parameters_unused_on_some_ranks(world, mode, overlap):
    """Each rank uses other experts in each step, at times none at all; expert 3 never, by nobody."""
    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(Gated), seeded(Gated)
    opt = _wrap("AdamW", {"lr": 0.01}, model, overlap=overlap, **mode)
    plain = torch.optim.AdamW(expected.parameters(), lr=0.01)

    def choice(step, rank):
        return [i for i in range(3) if (step + rank + i) % 3 != 0] if (step + rank) % 4 else []

    for step in range(12):
        batch = joined_batch(step, sizes)
        opt.zero_grad()
        which = choice(step, world.rank)
        loss = model(local_part(batch, sizes, world.rank), which).pow(2).mean()
        if which:
            loss.backward()
        opt.step()
        plain.zero_grad()
        for rank in range(world.size):
            part = expected(local_part(batch, sizes, rank), choice(step, rank)).pow(2).mean() / world.size
            if part.requires_grad:
                part.backward()
        plain.step()
        for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
            assert (parameter.grad is None) == (other.grad is None)
        assert_replicas(opt, model)
        assert_same_parameters(model, expected, step)
    opt.detach()


def test_late_unfrozen_and_late_frozen_parameters(world, mode, overlap):
    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(), seeded()
    opt = _wrap("AdamW", {"lr": 0.01}, model, overlap=overlap, **mode)
    plain = torch.optim.AdamW(expected.parameters(), lr=0.01)
    for step in range(9):
        for net in (model, expected):
            net.frozen.requires_grad_(3 <= step < 6)
            net.middle.requires_grad_(step < 5)
        batch = joined_batch(step, sizes)
        train(opt, model, local_part(batch, sizes, world.rank))
        train(plain, expected, batch)
        assert_replicas(opt, model)
        assert_same_parameters(model, expected, step)
    opt.detach()


@pytest.mark.supports("two optimizers on one model", replicated="Adafactor and AdamW", sharded="{mode}")
def test_two_optimizers_on_one_model(world, mode):
    sizes = part_sizes(world.size, equal=False)
    model, expected = seeded(), seeded()

    def split(net):
        matrices = [p for p in net.parameters() if p.ndim == 2]
        vectors = [p for p in net.parameters() if p.ndim < 2]
        return matrices, vectors

    opts = [
        dpoptim.DataParallelOptimizer(getattr(dpoptim, kind)(parameters, lr=0.01), **mode)
        for kind, parameters in zip(("Adafactor", "AdamW"), split(model), strict=True)
    ]
    plains = [
        getattr(torch.optim, kind)(parameters, lr=0.01)
        for kind, parameters in zip(("Adafactor", "AdamW"), split(expected), strict=True)
    ]
    for step in range(8):
        batch = joined_batch(step, sizes)
        for optimizers, net, part in (
            (opts, model, local_part(batch, sizes, world.rank)),
            (plains, expected, batch),
        ):
            for optimizer in optimizers:
                optimizer.zero_grad()
                if net is model:
                    optimizer.batch_weight = sizes[world.rank]
            net(part).pow(2).mean().backward()
            for optimizer in optimizers:
                optimizer.step()
        assert_same_parameters(model, expected, step)
    for opt in opts:
        assert_replicas(opt, model)
        opt.detach()


def test_parameters_of_several_dtypes(world):
    """float64, float32, bfloat16 and complex parameters keep their dtypes; each is reduced in its own precision."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(7, dtype=torch.float64, generator=generator).to(dtype) for dtype in dtypes]
    parameters = [nn.Parameter(value + world.rank) for value in values]
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(parameters, lr=0.5))
    own = [torch.arange(7, dtype=torch.float64).add(world.rank).to(dtype) for dtype in dtypes]
    sum((p * g.conj()).sum().real.double() for p, g in zip(parameters, own, strict=True)).backward()
    for parameter, value, dtype in zip(parameters, values, dtypes, strict=True):
        mean = torch.arange(7, dtype=torch.float64) + (world.size - 1) / 2
        assert parameter.dtype == parameter.grad.dtype == dtype
        assert torch.equal(parameter.detach(), value)  # broadcast from rank 0
        # one rounding to the dtype on the wire, one of each rank's scaled gradient
        torch.testing.assert_close(
            parameter.grad, mean.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps
        )
    opt.step()
    opt.detach()


def test_float64_is_reduced_in_float64(world):
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD([parameter], lr=1.0))
    (parameter * (1 + 2.0**-40)).sum().backward()
    # the sum of N equal numbers, each divided by N before: at most a few roundings at 2^-53
    torch.testing.assert_close(parameter.grad, torch.full_like(parameter, 1 + 2.0**-40), rtol=2.0**-50, atol=0)
    opt.detach()


def test_a_gradient_that_overflows_on_one_rank_is_infinite_on_all(world):
    model = seeded()
    opt = _wrap("SGD", {"lr": 0.1}, model)
    scale = float("inf") if world.rank == world.size - 1 else 1.0
    (model(joined_batch(0, [2])).pow(2).mean() * scale).backward()
    assert not torch.isfinite(model.middle.weight.grad).any()
    opt.detach()


def test_groups_added_later_are_broadcast_and_reduced(world, mode):
    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(), seeded()

    def first_and_rest(net):
        return list(net.first.named_parameters()), [
            (name, p) for name, p in net.named_parameters() if not name.startswith("first") and p is not net.last.weight
        ]

    (first, rest), (first_expected, rest_expected) = first_and_rest(model), first_and_rest(expected)
    opt = dpoptim.DataParallelOptimizer(dpoptim.AdamW(first, lr=0.01), **mode)
    plain = torch.optim.AdamW(first_expected, lr=0.01)
    with torch.no_grad():
        for _, parameter in rest:
            parameter.add_(world.rank)
    for step in range(8):
        if step == 3:
            opt.add_param_group({"params": rest, "lr": 0.003})
            plain.add_param_group({"params": rest_expected, "lr": 0.003})
        batch = joined_batch(step, sizes)
        if step < 3:
            with torch.no_grad():
                hidden = [local_part(batch, sizes, world.rank), batch]
            for optimizer, net, part in ((opt, model, hidden[0]), (plain, expected, hidden[1])):
                optimizer.zero_grad()
                net.first(part).pow(2).mean().backward()
                optimizer.step()
        else:
            train(opt, model, local_part(batch, sizes, world.rank))
            train(plain, expected, batch)
        assert_replicas(opt, model.first)
    assert_replicas(opt, model)
    assert_same_parameters(model, expected)
    opt.detach()


def test_sparse_embedding_beside_dense_layers(world):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(11, 4, sparse=True)
            self.out = nn.Linear(4, 3)

        def forward(self, indices):
            return self.out(self.words(indices))

    model, expected = seeded(Words), seeded(Words)
    for overlap in (False, True):
        opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.parameters(), lr=0.1), overlap=overlap)
        plain = torch.optim.SGD(expected.parameters(), lr=0.1)
        for step in range(6):
            batch = torch.randint(0, 11, (world.size * 4,), generator=torch.Generator().manual_seed(step))
            for optimizer, net, part in ((opt, model, batch.view(world.size, 4)[world.rank]), (plain, expected, batch)):
                optimizer.zero_grad()
                net(part).pow(2).mean().backward()
                optimizer.step()
            assert model.words.weight.grad.is_sparse
            assert_replicas(opt, model)
            assert_same_parameters(model, expected, step)
        opt.detach()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.supports("activation checkpointing", sharded="{mode}")
def test_activation_checkpointing(world, mode, use_reentrant, overlap):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Net):
        def forward(self, x):
            x = checkpoint(lambda y: torch.tanh(self.middle(y)), torch.tanh(self.first(x)), use_reentrant=use_reentrant)
            return self.last(x)

    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(Checkpointed), seeded(Checkpointed)
    opt = _wrap("AdamW", {"lr": 0.01}, model, overlap=overlap, **mode)
    plain = torch.optim.AdamW(expected.parameters(), lr=0.01)
    for step in range(5):
        batch = joined_batch(step, sizes).requires_grad_()
        train(opt, model, local_part(batch, sizes, world.rank))
        train(plain, expected, batch)
        assert_replicas(opt, model)
        assert_same_parameters(model, expected, step)
    opt.detach()


def test_module_broadcasts_buffers_and_frozen_parameters(world):
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.BatchNorm1d(3)), seed=world.rank)
    model[1].running_mean += world.rank
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model[1].parameters(), lr=0.1), module=model)
    assert_replicas(opt, model)
    assert torch.equal(model[1].running_mean, torch.zeros(3, dtype=torch.float64))
    model[1].running_mean.fill_(world.rank)
    model[1].num_batches_tracked.fill_(world.rank + 5)
    opt.average_buffers()
    assert torch.equal(model[1].running_mean, torch.full((3,), (world.size - 1) / 2, dtype=torch.float64))
    assert model[1].num_batches_tracked == 5
    opt.detach()


def test_a_state_loaded_before_wrapping_goes_on(world, mode):
    """Wrapping an optimizer in the middle of training keeps its state, and its scheduler."""
    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(), seeded()
    inner = dpoptim.AdamW(model.parameters(), lr=0.01)
    plain = torch.optim.AdamW(expected.parameters(), lr=0.01)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in (inner, plain)]
    for net, optimizer in ((model, inner), (expected, plain)):
        train(optimizer, net, joined_batch(0, sizes))
    opt = dpoptim.DataParallelOptimizer(inner, **mode)
    for step in range(1, 5):
        batch = joined_batch(step, sizes)
        train(opt, model, local_part(batch, sizes, world.rank))
        train(plain, expected, batch)
        for scheduler in schedulers:
            scheduler.step()
        assert_same_parameters(model, expected, step)
    assert_replicas(opt, model)
    opt.detach()


def test_weights_are_not_reinitialised_and_seeds_untouched(world):
    torch.manual_seed(5 + world.rank)
    model = twin(seeded(seed=3))
    before = torch.random.get_rng_state()
    opt = _wrap("SGD", {"lr": 0.1}, model)
    assert torch.equal(before, torch.random.get_rng_state())
    for value, other in zip(model.parameters(), seeded(seed=3).parameters(), strict=True):
        assert torch.equal(value, other)
    opt.detach()


def test_a_rank_without_a_gradient_gets_it_in_the_layout_of_the_parameter(world, mode):
    """Or torch's fused step, which goes through memory in order, would apply it to other elements there."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(3, 4, 2, 2, generator=generator).to(memory_format=torch.channels_last)
    parameters = [nn.Parameter(value.clone(memory_format=torch.preserve_format)), nn.Parameter(torch.zeros(2))]
    opt = dpoptim.DataParallelOptimizer(torch.optim.AdamW(parameters, lr=0.1, fused=True), **mode)
    for _ in range(2):
        opt.zero_grad()
        loss = parameters[1].sum()
        if world.rank == 0:
            loss = loss + (parameters[0] * torch.arange(48.0).view(3, 4, 2, 2)).sum()
        loss.backward()
        assert parameters[0].grad.stride() == parameters[0].stride()
        opt.step()
        assert len({digest(parameter) for parameter in world.allgather(parameters[0].detach())}) == 1
    opt.detach()
