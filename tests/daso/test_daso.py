"""DASO against the obvious slow thing: one process that trains every node's model and averages them by the book."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from oracle import Net, assert_replicas, assert_same_parameters, joined_batch, local_part, seeded

import dpoptim
from dpoptim.utils.consistency import check_replicas

pytestmark = pytest.mark.parallel

# Which node each of four ranks is on: one each, in pairs, in turn, unequal.
PLACEMENTS = {
    "own": [0, 1, 2, 3],
    "pairs": [7, 7, 3, 3],
    "in turn": [0, 1, 0, 1],
    "unequal": [0, 0, 0, 1],
    "one": [0] * 4,
}
NUM_BATCHES = 6
OPTIONS = {"total_epochs": 6, "warmup_epochs": 1, "cooldown_epochs": 1, "max_global_skips": 4}
# Losses that let the cycle shrink, end at 1, and go back to the largest: a plateau takes three epochs, here one.
LOSSES = [1.0] * OPTIONS["total_epochs"]


class SlowDASO:
    """Every node's model in one process; parameters are averaged with explicit sums over nodes."""

    def __init__(self, make, nodes, sizes):
        self.models, self.optimizers = [], []
        for _ in nodes:
            model = seeded()
            self.models.append(model)
            self.optimizers.append(make(model.parameters()))
        self.nodes, self.sizes = nodes, sizes
        self.sent = self.sent_at = None
        self.samples = [0] * len(nodes)

    def _train(self, part, optimizer, model):
        optimizer.zero_grad()
        model(part).pow(2).mean().backward()
        optimizer.step()

    def step(self, batch, number, skip, wait):
        parts = batch.split(self.sizes)
        for node, (ranks, model, optimizer) in enumerate(zip(self.nodes, self.models, self.optimizers, strict=True)):
            part = batch if skip == 0 else torch.cat([parts[rank] for rank in ranks])
            self.samples[node] += len(part) if skip else 0
            self._train(part, optimizer, model)
        if skip == 0 or len(self.nodes) == 1:
            return
        if self.sent is not None and number - self.sent_at >= wait:
            self.receive(number)
        if number % skip == 0:
            if self.sent is not None:
                self.receive(number)
            self.sent, self.sent_at = self.mean(), number
            self.samples = [0] * len(self.nodes)

    def shares(self):
        samples = self.samples if any(self.samples) else [sum(self.sizes[r] for r in ranks) for ranks in self.nodes]
        return [n / sum(samples) for n in samples]

    @torch.no_grad()
    def mean(self):
        columns = zip(*(model.parameters() for model in self.models), strict=True)
        return [sum(s * p for s, p in zip(self.shares(), column, strict=True)) for column in columns]

    @torch.no_grad()
    def receive(self, number):
        waited, nodes = 2 * (number - self.sent_at) or 1, len(self.nodes)
        for model in self.models:
            for parameter, mean in zip(model.parameters(), self.sent, strict=True):
                parameter.copy_((waited * parameter + nodes * mean) / (waited + nodes))
        self.sent = None

    @torch.no_grad()
    def synchronize(self, number):
        if self.sent is not None:
            self.receive(number)
        mean = self.mean()
        shares = self.shares()
        for model in self.models:
            for parameter, value in zip(model.parameters(), mean, strict=True):
                parameter.copy_(value)
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        for index, entry in states[0]["state"].items():
            for key, value in entry.items():
                if value.numel() > 1:
                    value.copy_(sum(s * st["state"][index][key] for s, st in zip(shares, states, strict=True)))
        for optimizer in self.optimizers:
            optimizer.load_state_dict(copy.deepcopy(states[0]))
        self.samples = [0] * len(self.nodes)


def _nodes(placement, world_size):
    colors = PLACEMENTS[placement][:world_size]
    return [[r for r, c in enumerate(colors) if c == color] for color in dict.fromkeys(colors)]


def _daso(world, model, optimizer="SGD", options=None, placement="own", **more):
    inner = getattr(dpoptim, optimizer)(model.named_parameters(), **(options or {"lr": 0.05, "momentum": 0.9}))
    return dpoptim.DASO(inner, world, node=PLACEMENTS[placement][world.rank], **{**OPTIONS, **more})


def _train(opt, model, batch):
    opt.zero_grad()
    model(batch).pow(2).mean().backward()
    opt.step()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(
    ("optimizer", "options"), [("SGD", {"lr": 0.05, "momentum": 0.9}), ("AdamW", {"lr": 0.01, "foreach": True})]
)
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.ranks(4)  # with fewer, some placements are the same
def test_it_ends_where_the_nodes_trained_in_one_process_end(world, placement, optimizer, options, equal):
    nodes = _nodes(placement, world.size)
    sizes = [4] * world.size if equal else [3 + 2 * rank for rank in range(world.size)]
    model = seeded(seed=world.rank)
    with torch.no_grad():
        for value, initial in zip(model.parameters(), seeded().parameters(), strict=True):
            value.copy_(initial if world.rank == 0 else value)  # the others receive rank 0's
    opt = _daso(world, model, optimizer, options, placement)
    opt.stability.patience = 0
    opt.batch_weight = sizes[world.rank]
    slow = SlowDASO(lambda parameters: getattr(torch.optim, optimizer)(parameters, **options), nodes, sizes)
    mine = next(number for number, ranks in enumerate(nodes) if world.rank in ranks)
    skips = []
    for epoch in range(OPTIONS["total_epochs"]):
        skips.append((opt.global_skip, opt.batches_to_wait))
        for number in range(NUM_BATCHES):
            batch = joined_batch(epoch * NUM_BATCHES + number, sizes)
            _train(opt, model, local_part(batch, sizes, world.rank))
            slow.step(batch, number, *skips[-1])
            assert_same_parameters(model, slow.models[mine], epoch * NUM_BATCHES + number)
        opt.end_epoch(LOSSES[epoch])
        if skips[-1][0]:
            slow.synchronize(NUM_BATCHES)
        assert_same_parameters(model, slow.models[mine], epoch)
        assert_replicas(opt, model)
    assert skips == [(0, 0), (4, 1), (2, 1), (1, 1), (4, 1), (0, 0)]


def test_blocking_phases_equal_the_plain_optimizer(world):
    model, plain_model = seeded(), seeded()
    opt = _daso(world, model, placement="pairs", warmup_epochs=9, total_epochs=9)
    plain = dpoptim.DataParallelOptimizer(dpoptim.SGD(plain_model.named_parameters(), lr=0.05, momentum=0.9), world)
    for step in range(4):
        batch = local_part(joined_batch(step, [4] * world.size), [4] * world.size, world.rank)
        _train(opt, model, batch)
        _train(plain, plain_model, batch)
    check_replicas(opt.communicator, model.named_parameters())
    for value, other in zip(model.parameters(), plain_model.parameters(), strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("placement", ["own", "pairs", "unequal"])
@pytest.mark.parametrize("stop", [(1, 1), (1, 2), (2, 3), (3, 0)])
@pytest.mark.once
@pytest.mark.ranks(4)  # where all placements differ
def test_a_run_resumed_in_the_middle_of_a_cycle_equals_the_uninterrupted_one(world, tmp_path, placement, stop):
    sizes = [3 + rank for rank in range(world.size)]

    def run(opt, sched, model, begin, end):
        for epoch in range(begin[0], OPTIONS["total_epochs"]):
            for number in range(begin[1] if epoch == begin[0] else 0, NUM_BATCHES):
                if (epoch, number) == end:
                    return
                batch = joined_batch(epoch * NUM_BATCHES + number, sizes)
                _train(opt, model, local_part(batch, sizes, world.rank))
            opt.end_epoch(LOSSES[epoch])
            sched.step()

    def make(seed=0, **more):
        model = seeded(seed=seed)
        opt = _daso(world, model, "AdamW", {"lr": 0.01}, placement, **more)
        opt.batch_weight = sizes[world.rank]
        return model, opt, dpoptim.lr_scheduler.StepLR(opt, 1, gamma=0.8)

    whole, opt, sched = make()
    run(opt, sched, whole, (0, 0), None)
    first, opt, sched = make()
    run(opt, sched, first, (0, 0), stop)
    path = tmp_path / f"{world.rank}.pt"
    torch.save({"model": first.state_dict(), "opt": opt.state_dict(), "sched": sched.state_dict()}, path)
    run(opt, sched, first, stop, None)
    second, opt, sched = make(seed=1)
    saved = torch.load(path, weights_only=True)
    second.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    sched.load_state_dict(saved["sched"])
    run(opt, sched, second, stop, None)
    for a, b, c in zip(whole.parameters(), first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_a_state_of_another_place_is_refused_in_the_middle_of_a_cycle_and_loaded_after_synchronize(world):
    if world.size == 1:
        pytest.skip("needs several nodes")
    model = seeded()
    opt = _daso(world, model, warmup_epochs=0)
    opt.end_epoch(1.0)
    batch = joined_batch(0, [4])
    _train(opt, model, batch + world.rank)
    state = world.bcast(opt.state_dict())
    with pytest.raises(ValueError, match="in the middle of a cycle on rank 0") if world.rank else nullcontext():
        opt.load_state_dict(state)
    opt.synchronize()
    check_replicas(opt.communicator, model.named_parameters())
    opt.load_state_dict(world.bcast(opt.state_dict()))
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    plain.load_state_dict(opt.state_dict())
    assert plain.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("hook", ["bf16_compress", "fp16_compress"])
def test_a_narrow_exchange_keeps_the_precision_of_parameters(world, hook):
    """A parameter of 1 in bfloat16 would lose each of these steps; the differences that travel do not."""

    def train(comm_hook):
        model = torch.nn.Linear(3, 3, bias=False)
        torch.nn.init.ones_(model.weight)
        opt = _daso(world, model, options={"lr": 1e-4}, warmup_epochs=0, max_global_skips=1, comm_hook=comm_hook)
        opt.end_epoch(1.0)
        for _ in range(8):
            opt.zero_grad()
            model.weight.sum().backward()
            opt.step()
        opt.synchronize()
        check_replicas(opt.communicator, model.named_parameters())
        return model.weight.detach()

    weight = train(getattr(dpoptim.comm_hooks, hook))
    assert (1 - weight).min() > 3e-4
    torch.testing.assert_close(1 - weight, 1 - train(None), rtol=2**-8, atol=1e-6)


def test_frozen_parameters_keep_their_bits_and_may_be_unfrozen(world):
    model = seeded()
    frozen = model.frozen.weight.clone()
    options = {"lr": 0.05, "momentum": 0.9, "foreach": True}  # torch's fused SGD takes no parameter later
    opt = _daso(world, model, options=options, warmup_epochs=0, cooldown_epochs=0)
    opt.end_epoch(1.0)
    for step in range(3):
        _train(opt, model, joined_batch(step, [4]) + world.rank)
    opt.synchronize()
    assert torch.equal(model.frozen.weight, frozen)
    model.frozen.requires_grad_(True)
    for step in range(3):
        _train(opt, model, joined_batch(step, [4]) + world.rank)
    opt.synchronize()
    assert not torch.equal(model.frozen.weight, frozen)
    check_replicas(opt.communicator, model.named_parameters())


def test_a_parameter_used_on_one_node_only_has_state_on_all_in_the_end(world):
    class Fork(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)

    model = seeded(Fork)
    opt = _daso(world, model, "AdamW", {"lr": 0.1}, warmup_epochs=0, cooldown_epochs=0)
    opt.end_epoch(1.0)
    for _ in range(3):
        opt.zero_grad()
        (model.a if world.rank == 0 else model.b)(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
        opt.step()
    opt.end_epoch(1.0)
    assert_replicas(opt, model)
    assert len(opt.state) == (4 if world.size > 1 else 2)


@pytest.mark.parametrize("phase", ["blocking", "cycling"])
def test_a_nan_on_one_rank_is_an_error_on_all(world, phase):
    model = seeded()
    opt = _daso(world, model, warmup_epochs=int(phase == "blocking"), max_global_skips=2)
    opt.end_epoch(1.0)

    def train():
        for step in range(3):
            batch = joined_batch(step, [4])
            _train(opt, model, batch * (math.nan if world.rank == world.size - 1 else 1.0))
        opt.end_epoch(1.0)

    with pytest.raises(ValueError, match="must be finite") as caught:
        train()
    if phase == "cycling" and 0 == world.rank < world.size - 1:
        assert f"on rank {world.size - 1}: parameters must be finite, but" in str(caught.value)
    other = _daso(world, seeded())
    with pytest.raises(ValueError, match="loss must be finite, got nan"):
        other.end_epoch(math.nan if world.rank == world.size - 1 else 1.0)
    with pytest.raises(TypeError):
        other.end_epoch(None if world.rank == world.size - 1 else 1.0)


@pytest.mark.parametrize("clip", [False, True])
def test_a_step_that_one_node_skips_for_an_overflow_leaves_nodes_in_step(world, clip):
    model = seeded()
    opt = _daso(world, model, warmup_epochs=0, cooldown_epochs=0, max_global_skips=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
    opt.add_scaler(scaler)
    opt.end_epoch(1.0)
    for step in range(5):
        opt.zero_grad()
        overflow = math.inf if step == 2 and world.rank == world.size - 1 else 1.0
        scaler.scale(model(joined_batch(step, [4])).pow(2).mean() * overflow).backward()
        if clip:
            scaler.unscale_(opt)
            opt.clip_grad_norm_(1.0)
        opt.step()
    opt.end_epoch(1.0)
    check_replicas(opt.communicator, model.named_parameters())
    scales = opt.communicator.all_gather_object(scaler.state_dict())
    assert all(scale == scales[0] for scale in scales)
    scaler.scale(model(joined_batch(0, [4])).pow(2).mean()).backward()
    with pytest.raises(RuntimeError, match=r"opt.add_scaler\(scaler\) once"):
        scaler.step(opt)


def test_groups_mixed_types_and_schedulers(world):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 4), "b": torch.nn.Linear(4, 2).to(torch.bfloat16)})
    groups = [{"params": model["a"].parameters(), "lr": 0.1}, {"params": model["b"].parameters(), "lr": 0.01}]
    opt = dpoptim.DASO(torch.optim.SGD(groups, momentum=0.9), world, node=world.rank, **{**OPTIONS, "warmup_epochs": 0})
    sched = dpoptim.lr_scheduler.OneCycleLR(opt, [0.1, 0.01], total_steps=20)
    opt.end_epoch(1.0)
    rates = []
    for step in range(10):
        opt.zero_grad()
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step + world.rank))
        model["b"](model["a"](x).bfloat16()).float().pow(2).mean().backward()
        opt.step()
        sched.step()
        rates.append(opt.param_groups[1]["lr"])
    assert len(set(rates)) == 10
    opt.end_epoch(1.0)
    check_replicas(opt.communicator, model.named_parameters())
    assert model["b"].weight.dtype is torch.bfloat16


def test_numbers_and_buffers_are_averaged_over_all_ranks_while_nodes_differ(world):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    opt = _daso(world, model, warmup_epochs=0, module=model)
    opt.end_epoch(1.0)
    _train(opt, model, joined_batch(world.rank, [4], width=3, dtype=torch.float32))
    assert opt.mean(float(world.rank)) == pytest.approx((world.size - 1) / 2)
    sched = dpoptim.lr_scheduler.ReduceLROnPlateau(opt, patience=0)
    for epoch in range(3):
        sched.step(1.0 + epoch * world.rank)
    opt.average_buffers()
    check_replicas(opt.communicator, model.named_buffers())


def test_the_wrapper_can_be_detached_with_an_exchange_pending(world, monkeypatch):
    model = seeded()
    opt = _daso(world, model, warmup_epochs=0)
    opt.end_epoch(1.0)
    _train(opt, model, joined_batch(0, [4]))
    shared, left = opt.roll_call.communicator, []
    remove = shared.users.remove
    monkeypatch.setattr(shared.users, "remove", lambda: left.append(1) or remove())
    opt.detach()
    opt.detach()  # does nothing
    assert len(left) == 2, "the reducer, and DASO itself"
    again = _daso(world, model)
    _train(again, model, joined_batch(1, [4]))
    check_replicas(again.communicator, model.named_parameters())


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"total_epochs": 0}, ValueError, "total_epochs must be >= 1, got 0"),
        ({"total_epochs": 2.0}, TypeError, "total_epochs must be an int, got float"),
        ({"warmup_epochs": -1}, ValueError, "warmup_epochs must be >= 0, got -1"),
        ({"skip_reduction_factor": 0}, ValueError, "skip_reduction_factor must be >= 1, got 0"),
        ({"stability_level": 1}, TypeError, "stability_level must be a float, got int"),
        ({"comm_hook": 3}, TypeError, "comm_hook must be callable, got int"),
        ({"node": "a"}, TypeError, "node must be an int or None, got str"),
    ],
)
def test_a_bad_argument_on_one_rank_is_an_error_on_all(world, options, kind, message):
    inner = torch.optim.SGD(seeded().parameters(), lr=0.1)
    with pytest.raises(kind, match=message):
        dpoptim.DASO(inner, world, **{**OPTIONS, **(options if world.rank == world.size - 1 else {})})


def test_different_arguments_are_an_error(world):
    if world.size == 1:
        return
    inner = torch.optim.SGD(seeded().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="max_global_skips is 4 on rank 0 but 5 on rank 1"):
        dpoptim.DASO(inner, world, **{**OPTIONS, "max_global_skips": 4 + (world.rank == 1)})
    with pytest.raises(ValueError, match=r"on all ranks or on none, it is None on ranks \[1\]"):
        dpoptim.DASO(inner, world, node=None if world.rank == 1 else 0, **OPTIONS)


def test_a_closure_is_refused(world):
    opt = _daso(world, seeded(Net))
    with pytest.raises(TypeError, match="DASO takes no closure"):
        opt.step(lambda: None)
