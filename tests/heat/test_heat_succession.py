"""Heat programs that wrap the same parameters twice: the later optimizer has them, the earlier one ends and says so."""

import gc

import pytest
import torch
from oracle import joined_batch, seeded
from torch import nn

from dpoptim.utils.consistency import check_replicas

heat = pytest.importorskip("heat", reason="Heat is not installed in this environment")
import dpoptim.heat as dph  # noqa: E402  needs Heat

pytestmark = pytest.mark.parallel

# A dozen float64 steps: rounding errors of 1e-16, amplified by training.
CLOSE = {"rtol": 1e-9, "atol": 1e-12}
TAKEN = "a later DataParallel or DASO has taken its parameters"


def _mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))


def _sgd(model):
    return dph.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _train(opt, model, batches):
    for batch in batches:
        opt.zero_grad()
        model(batch).pow(2).mean().backward()
        opt.step()


def _local(world, steps):
    return [joined_batch(step, [4] * world.size, 5).split(4)[world.rank] for step in steps]


def _joined(world, steps):
    return [joined_batch(step, [4] * world.size, 5) for step in steps]


def _check_equal(model, plain):
    for value, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value, expected, **CLOSE)


def _daso(world, inner, model, **options):
    opt = dph.DASO(inner, 6, heat.MPICommunication(world), warmup_epochs=6, downcast_type=torch.float, **options)
    opt.last_batch = 3
    return opt, dph.DataParallelMultiGPU(model, opt, heat.MPICommunication(world))


def test_several_optimizers_warn_and_go_on_blocking(world):
    model, plain = seeded(_mlp), seeded(_mlp)
    comm = heat.MPICommunication(world)
    opts = [dph.DataParallelOptimizer(dph.SGD(part.parameters(), lr=0.1)) for part in (model[0], model[2])]
    with pytest.warns(UserWarning, match="several optimizers average .* blocking_parameter_updates is True"):
        parallel = dph.DataParallel(model, comm, opts)
    assert parallel.blocking_parameter_updates
    assert all(opt.blocking_parameter_updates and not opt.communicator.overlap for opt in opts)
    plain_opt = torch.optim.SGD(plain.parameters(), lr=0.1)
    for batch, joined in zip(_local(world, range(3)), _joined(world, range(3)), strict=True):
        for opt in opts:
            opt.zero_grad()
        parallel(batch).pow(2).mean().backward()
        for opt in opts:
            opt.step()
        _train(plain_opt, plain, [joined])
    _check_equal(model, plain)
    assert dph.DataParallel(model, comm, opts, True).blocking_parameter_updates  # asked for, and no warning
    overlapping = dph.DataParallelOptimizer(dph.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="several optimizers must have different parameters, but two have one"):
        dph.DataParallel(model, comm, [*opts, overlapping])
    _train(opts[0], parallel, _local(world, [3]))  # refused before anything was taken


def test_an_optimizer_that_is_passed_on_again_goes_on(world):
    model, plain = seeded(_mlp), seeded(_mlp)
    comm = heat.MPICommunication(world)
    opt = dph.DataParallelOptimizer(_sgd(model))
    scheduler = dph.lr_scheduler.ExponentialLR(opt, 0.9)
    plain_opt = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    plain_scheduler = torch.optim.lr_scheduler.ExponentialLR(plain_opt, 0.9)
    hooks = []
    opt.register_step_pre_hook(lambda *_: hooks.append("step"))
    opt.torch_optimizer.note = "the wrapped optimizer's own"
    first = dph.DataParallel(model, comm, opt)
    opt.batch_weight = 4.0
    for steps, wrapped in (((0, 1), [opt]), ((2, 3), [opt, opt]), ((4, 5), [opt])):
        if len(wrapped) > 1:
            with pytest.warns(UserWarning, match="several optimizers"):
                parallel = dph.DataParallel(model, comm, wrapped)
        elif steps[0]:
            parallel = dph.DataParallel(model, comm, wrapped)
        else:
            parallel = first
        assert opt.batch_weight == 4.0
        _train(opt, parallel, _local(world, steps))
        _train(plain_opt, plain, _joined(world, steps))
        scheduler.step()
        plain_scheduler.step()
    _train(opt, first, _local(world, [6]))  # the earlier model is the same one
    _train(plain_opt, plain, _joined(world, [6]))
    _check_equal(model, plain)
    assert len(hooks) == 7
    assert opt.note == "the wrapped optimizer's own"
    check_replicas(opt.communicator, model.named_parameters())


# What has the parameters first, and what takes them; with the same wrapped optimizer or one of its own.
KINDS = ["DataParallel", "DASO"]


def _wrap(kind, world, inner, model):
    if kind == "DASO":
        return _daso(world, inner, model, scheduler=torch.optim.lr_scheduler.ExponentialLR(inner, 0.9))
    opt = dph.DataParallelOptimizer(inner)
    return opt, dph.DataParallel(model, heat.MPICommunication(world), opt)


@pytest.mark.parametrize("shares", [True, False], ids=["same-inner", "new-inner"])
@pytest.mark.parametrize("then", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_a_later_optimizer_takes_the_parameters(world, first, then, shares):
    model, plain = seeded(_mlp, seed=world.rank), seeded(_mlp, seed=0)
    inner = _sgd(model)
    early, parallel = _wrap(first, world, inner, model)
    early_inner_steps = []
    _train(early, parallel, _local(world, range(4)))
    plain_opt = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    plain_scheduler = torch.optim.lr_scheduler.ExponentialLR(plain_opt, 0.9)
    for joined in _joined(world, range(4)):
        _train(plain_opt, plain, [joined])
        if first == "DASO":
            plain_scheduler.step()
    if first == "DASO":
        early.reset()
    if not shares:
        inner = _sgd(model)
        plain_opt = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    if then == "DASO":
        plain_scheduler = torch.optim.lr_scheduler.ExponentialLR(plain_opt, 0.9)
    late, parallel = _wrap(then, world, inner, model)

    weights = [parameter.detach().clone() for parameter in model.parameters()]
    inner.register_step_pre_hook(lambda *_: early_inner_steps.append(1))
    with pytest.raises(RuntimeError, match=f"{type(early).__name__} can make no step: {TAKEN}"):
        early.step()
    assert not early_inner_steps
    with pytest.raises(AttributeError, match=TAKEN):
        early.mean(1.0, weight=1.0)
    with pytest.raises(AttributeError, match=TAKEN):
        early.zero_grad()
    assert repr(early).startswith(f"{type(early).__name__} of ")
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))

    for batch, joined in zip(_local(world, range(4, 8)), _joined(world, range(4, 8)), strict=True):
        _train(late, parallel, [batch])
        _train(plain_opt, plain, [joined])
        if then == "DASO":
            plain_scheduler.step()
    _check_equal(model, plain)
    check_replicas(late.communicator, model.named_parameters())


@pytest.mark.parametrize("dropped_by", ["all", "rank 0", "none"])
def test_what_a_rank_has_collected_as_garbage_does_not_matter(world, dropped_by):
    model, plain = seeded(_mlp), seeded(_mlp)
    gc.disable()
    try:
        kept, parallel = _wrap("DASO", world, _sgd(model), model)
        _train(kept, parallel, _local(world, [0]))
        if dropped_by == "all" or (dropped_by == "rank 0" and world.rank == 0):
            kept = parallel = None
            gc.collect()
        inner = _sgd(model)
        late, parallel = _wrap("DataParallel", world, inner, model)
    finally:
        gc.enable()
    _train(torch.optim.SGD(plain.parameters(), lr=0.1), plain, _joined(world, [0]))
    plain_opt = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    _train(late, parallel, _local(world, range(1, 4)))
    _train(plain_opt, plain, _joined(world, range(1, 4)))
    _check_equal(model, plain)
    if kept is not None:
        with pytest.raises(RuntimeError, match=TAKEN):
            kept.step()


def test_what_is_refused_takes_nothing(world):
    model, plain = seeded(_mlp), seeded(_mlp)
    inner = _sgd(model)
    opt, parallel = _daso(world, inner, model)
    plain_opt = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    _train(opt, parallel, _local(world, [0]))
    with pytest.raises(TypeError, match="total_epochs must be an int"):
        dph.DASO(inner, "ten", heat.MPICommunication(world))
    with pytest.raises(ValueError, match="warmup_epochs must be >= 0"):
        dph.DASO(inner, 6, heat.MPICommunication(world), warmup_epochs=-1)
    with pytest.raises(TypeError, match="local_optimizer is already a DataParallelOptimizer"):
        dph.DASO(opt, 6, heat.MPICommunication(world))
    with pytest.raises(TypeError, match="goes to DataParallelMultiGPU"):
        dph.DataParallel(model, heat.MPICommunication(world), opt)
    _train(opt, parallel, _local(world, [1]))
    _train(plain_opt, plain, _joined(world, [0, 1]))
    _check_equal(model, plain)


def test_an_optimizer_of_more_ranks_than_are_here_is_not_ended(world):
    model, plain = seeded(_mlp), seeded(_mlp)
    opt, parallel = _wrap("DataParallel", world, _sgd(model), model)
    alone = heat.MPICommunication(world).Split(world.rank, 0)
    late = dph.DataParallelOptimizer(_sgd(model))
    if world.size == 1:
        dph.DataParallel(model, alone, late)
        return
    with pytest.raises(ValueError, match=f"belong to a DataParallelOptimizer of {world.size} ranks, which are not all"):
        dph.DataParallel(model, alone, late)
    _train(opt, parallel, _local(world, range(2)))
    plain_opt = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    _train(plain_opt, plain, _joined(world, range(2)))
    _check_equal(model, plain)


def test_ranks_that_have_different_optimizers_all_say_so(world):
    if world.size < 3:
        pytest.skip("needs two ranks with a common optimizer and one without")
    model = seeded(_mlp)
    comm = heat.MPICommunication(world).Split(world.rank >= 2, world.rank)
    if world.rank < 2:
        dph.DataParallel(model, comm, dph.DataParallelOptimizer(_sgd(model)))
    late = dph.DataParallelOptimizer(_sgd(model))
    with pytest.raises(ValueError, match=r"same optimizers on all ranks, got .*on rank 0 but none on rank 2"):
        dph.DataParallel(model, heat.MPICommunication(world), late)


def test_detached_parameters_are_free(world):
    model = seeded(_mlp)
    opt, parallel = _wrap("DataParallel", world, _sgd(model), model)
    _train(opt, parallel, _local(world, [0]))
    opt.detach()
    late, parallel = _wrap("DASO", world, _sgd(model), model)
    _train(late, parallel, _local(world, [1]))
    late.detach()
    late.local_optimizer.step()  # by itself: no hook of the wrapper is left
    again = dph.DataParallel(model, heat.MPICommunication(world), opt)
    _train(opt, again, _local(world, [2]))
    check_replicas(opt.communicator, model.named_parameters())
