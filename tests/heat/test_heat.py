"""Heat programs with the import changed, and one test for each thing that goes wrong with Heat's own classes."""

import copy
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import joined_batch, seeded
from torch import nn

import dpoptim
from dpoptim.utils.consistency import check_replicas

heat = pytest.importorskip("heat", reason="Heat is not installed in this environment")
import dpoptim.heat as dph  # noqa: E402  needs Heat

pytestmark = pytest.mark.parallel

README = Path(__file__).parents[2] / "README.md"

# Twenty float64 steps at most: rounding errors of 1e-16, amplified by training.
CLOSE = {"rtol": 1e-9, "atol": 1e-12}

# In the form of Heat's MNIST example: its Dataset of a DNDarray with split=0, its DataLoader, a scheduler on the inner
# optimizer. It runs with Heat's own classes too.
PROGRAM = """
import torch
import heat as ht
from heat.nn import DataParallel
from heat.optim import Adadelta, DataParallelOptimizer
from heat.optim.lr_scheduler import StepLR

rows = ht.array(data, split=0)
dataset = Dataset(rows, ishuffle=ishuffle)
loader = ht.utils.data.datatools.DataLoader(dataset=dataset, batch_size=4)
optimizer = Adadelta(model.parameters(), lr=1.0)
dp_optim = DataParallelOptimizer(optimizer, blocking=blocking)
scheduler = StepLR(optimizer, step_size=1, gamma=0.7)
dp_model = DataParallel(model, comm=dataset.comm, optimizer=dp_optim, blocking_parameter_updates=blocking)
for epoch in range(3):
    dp_model.train()
    for batch in loader:
        seen.append(batch.clone())
        dp_optim.zero_grad()
        loss = dp_model(batch).pow(2).mean()
        loss.backward()
        dp_optim.step()
    dp_model.eval()
    scheduler.step()
    if epoch == 1:
        loader.last_epoch = True
"""


class ShuffledDataset(heat.utils.data.datatools.Dataset):
    """As Heat asks of its users: what is shuffled between ranks is said by the subclass."""

    def Shuffle(self):  # noqa: N802  Heat's name
        heat.utils.data.datatools.dataset_shuffle(dataset=self, attrs=[["data", "htdata"]])

    def Ishuffle(self):  # noqa: N802
        heat.utils.data.datatools.dataset_ishuffle(dataset=self, attrs=[["data", "htdata"]])


def _mlp(width=5):
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 2))


def _make(world, model, blocking=False, optimizer="SGD", **options):
    inner = getattr(dph, optimizer)(model.parameters(), **(options or {"lr": 0.1, "momentum": 0.9}))
    opt = dph.DataParallelOptimizer(inner, blocking)
    return opt, dph.DataParallel(model, heat.MPICommunication(world), opt, blocking)


def _train(opt, model, batch):
    opt.zero_grad()
    model(batch).pow(2).mean().backward()
    opt.step()


def _local(world, step, width=5):
    return joined_batch(step, [4] * world.size, width).split(4)[world.rank]


@pytest.mark.parametrize("ishuffle", [False, True])
@pytest.mark.parametrize("blocking", [False, True])
def test_heats_example_runs_with_the_import_changed_and_equals_one_process(world, ishuffle, blocking):
    changed = PROGRAM.replace("heat.nn", "dpoptim.heat").replace("heat.optim", "dpoptim.heat")
    assert sum(a != b for a, b in zip(PROGRAM.splitlines(), changed.splitlines(), strict=True)) == 3
    data = joined_batch(0, [11 * world.size + 1])
    model = seeded(_mlp, seed=world.rank)
    initial = world.bcast(copy.deepcopy(model))
    names = {"data": data, "Dataset": ShuffledDataset, "ishuffle": ishuffle, "blocking": blocking, "seen": []}
    torch.manual_seed(world.rank)
    exec(changed, {**names, "model": model})

    check_replicas(dpoptim.comm.communicator.Communicator.shared(world), model.named_parameters())
    everybody = world.allgather(names["seen"])
    optimizer = torch.optim.Adadelta(initial.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    for number, batches in enumerate(zip(*everybody, strict=True)):
        optimizer.zero_grad()
        torch.stack([initial(batch).pow(2).mean() for batch in batches]).mean().backward()
        optimizer.step()
        if number % 3 == 2:
            scheduler.step()
    for value, expected in zip(model.parameters(), initial.parameters(), strict=True):
        torch.testing.assert_close(value, expected, **CLOSE)


@pytest.mark.parametrize("changed", [False, True])
def test_the_readmes_program_runs_before_and_after_the_change(world, changed):
    block = re.search(r"```diff\n(.*?)```", README.read_text(), flags=re.DOTALL)[1]
    drop, keep = ("-", "+") if changed else ("+", "-")
    lines = [line for line in block.splitlines() if not line.startswith(drop)]
    assert len([line for line in lines if line.startswith(keep)]) == 2
    state = torch.random.get_rng_state()
    exec("\n".join(line[1:] for line in lines), {})
    torch.random.set_rng_state(state)


def test_the_example_is_a_heat_program(world):
    if world.size == 1:
        pytest.skip("Heat's non-blocking mode crashes on one rank")
    names = {"data": joined_batch(0, [11 * world.size + 1], dtype=torch.float32), "seen": []}
    with torch.random.fork_rng(devices=[]):  # Heat sets the global seed
        exec(
            PROGRAM,
            {**names, "Dataset": ShuffledDataset, "ishuffle": False, "blocking": True, "model": seeded(_mlp).float()},
        )
    assert len(names["seen"]) == 9


# ------------------------------------------------------------------ the list of what goes wrong in Heat's classes


def test_a_transformer_trains_without_blocking(world):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
    opt, parallel = _make(world, model, blocking=False)
    before = [value.clone() for value in model.parameters()]
    for step in range(3):
        _train(opt, parallel, _local(world, step, 8).unsqueeze(0))
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True) if b.grad.any())
    check_replicas(opt.communicator, model.named_parameters())


def test_one_rank_trains_without_blocking(world):
    from mpi4py import MPI

    model = seeded(_mlp)
    opt, parallel = _make(MPI.COMM_SELF, model)
    _train(opt, parallel, _local(world, 0))
    assert not torch.equal(model[0].weight, seeded(_mlp)[0].weight)


@pytest.mark.parametrize("blocking", [False, True])
def test_gradients_are_there_to_be_clipped_and_read_after_backward(world, blocking):
    model, plain = seeded(_mlp), seeded(_mlp)
    _, parallel = _make(world, model, blocking)
    parallel(_local(world, 0)).pow(2).mean().backward()
    plain(joined_batch(0, [4] * world.size)).pow(2).mean().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(plain.parameters(), 1e-3), **CLOSE)
    for value, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value.grad, expected.grad, **CLOSE)


def test_a_grad_scaler_sees_the_overflow_of_any_rank(world):
    model = seeded(_mlp)
    opt, parallel = _make(world, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for factor in (1.0, math.inf if world.rank == 0 else 1.0):
        before = model[0].weight.clone()
        opt.zero_grad()
        scaler.scale(parallel(_local(world, 0)).pow(2).mean() * factor).backward()
        scaler.step(opt)
        scaler.update()
        assert torch.equal(before, model[0].weight) == (scaler.get_scale() == 128.0)
    assert scaler.get_scale() == 128.0


@pytest.mark.parametrize("where", ["inner", "wrapper"])
def test_a_step_uses_the_rate_of_its_own_time(world, where):
    """Heat makes the step in the next forward, when the scheduler has moved on."""
    model, plain = seeded(_mlp), seeded(_mlp)
    inner = dph.SGD(model.parameters(), lr=0.5)
    opt = dph.DataParallelOptimizer(inner)
    sched = dph.lr_scheduler.StepLR(opt if where == "wrapper" else inner, 1, gamma=0.1)
    parallel = dph.DataParallel(model, heat.MPICommunication(world), opt)
    plain_opt = torch.optim.SGD(plain.parameters(), lr=0.5)
    plain_sched = torch.optim.lr_scheduler.StepLR(plain_opt, 1, gamma=0.1)
    for step in range(3):
        _train(opt, parallel, _local(world, step))
        _train(plain_opt, plain, joined_batch(step, [4] * world.size))
        sched.step()
        plain_sched.step()
        for value, expected in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(value, expected, **CLOSE)


def test_a_state_dict_taken_after_a_step_is_whole_and_resumes(world):
    model = seeded(_mlp)
    opt, parallel = _make(world, model)
    _train(opt, parallel, _local(world, 0))
    saved = copy.deepcopy({"model": parallel.state_dict(), "opt": opt.state_dict()})
    assert len(saved["opt"]["param_groups"][0]["params"]) == len(saved["opt"]["state"]) == 4
    assert all(name.startswith("module.") for name in saved["model"])
    other = seeded(_mlp, seed=1)
    other_opt, other_parallel = _make(world, other)
    other_parallel.load_state_dict(saved["model"])
    other_opt.load_state_dict(saved["opt"])
    for o, p, m in ((opt, parallel, model), (other_opt, other_parallel, other)):
        _train(o, p, _local(world, 1))
        check_replicas(o.communicator, m.named_parameters())
    assert torch.equal(model[0].weight, other[0].weight)


def test_my_seed_and_my_weights_stay(world):
    torch.manual_seed(42 + world.rank)
    model = seeded(_mlp, seed=world.rank)
    state = torch.random.get_rng_state()
    _make(world, model)
    assert torch.equal(torch.random.get_rng_state(), state)
    for value, expected in zip(model.parameters(), seeded(_mlp, seed=0).parameters(), strict=True):
        assert torch.equal(value, expected), "rank 0's weights, as they were"


@pytest.mark.parametrize("blocking", [False, True])
def test_frozen_layers_are_left_alone(world, blocking):
    model = seeded(_mlp)
    model[0].requires_grad_(False)
    opt, parallel = _make(world, model, blocking)
    _train(opt, parallel, _local(world, 0))
    assert torch.equal(model[0].weight, seeded(_mlp)[0].weight)
    assert not torch.equal(model[2].weight, seeded(_mlp)[2].weight)


def test_double_precision_gradients_keep_their_digits(world):
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    module = nn.Module()
    module.weight = weight
    opt = dph.DataParallelOptimizer(dph.SGD([weight], lr=1.0))
    dph.DataParallel(module, heat.MPICommunication(world), opt, blocking_parameter_updates=True)
    (weight * (1.0 + 2.0**-40)).sum().backward()
    assert weight.grad.item() == pytest.approx(1.0 + 2.0**-40, rel=1e-15)


@pytest.mark.parametrize("blocking", [False, True])
def test_every_parameter_group_is_trained_at_its_own_rate(world, blocking):
    model, plain = seeded(_mlp), seeded(_mlp)

    def groups(m):
        return [{"params": m[0].parameters(), "lr": 0.1}, {"params": m[2].parameters(), "lr": 0.01}]

    opt = dph.DataParallelOptimizer(dph.SGD(groups(model)), blocking)
    parallel = dph.DataParallel(model, heat.MPICommunication(world), opt, blocking)
    plain_opt = torch.optim.SGD(groups(plain))
    for step in range(3):
        _train(opt, parallel, _local(world, step))
        _train(plain_opt, plain, joined_batch(step, [4] * world.size))
    for value, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value, expected, **CLOSE)


def _daso(world, model, **options):
    inner = dph.SGD(model.parameters(), lr=0.1, momentum=0.9)
    opt = dph.DASO(inner, 6, heat.MPICommunication(world), **{"warmup_epochs": 1, "cooldown_epochs": 1, **options})
    opt.last_batch = 4
    return opt, dph.DataParallelMultiGPU(model, opt, heat.MPICommunication(world))


@pytest.mark.parametrize("visible_gpus", [0, 1])
def test_daso_trains_on_ranks_without_gpus_and_with_one_visible_gpu(world, visible_gpus, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible_gpus)
    model = seeded(_mlp, seed=world.rank)
    opt, parallel = _daso(world, model, verbose=True)
    assert torch.equal(model[0].weight, seeded(_mlp, seed=0)[0].weight)
    first_loss = parallel(joined_batch(0, [64])).pow(2).mean().item()
    for epoch in range(6):
        for number in range(5):
            batch = _local(world, 5 * epoch + number)
            opt.zero_grad()
            loss = parallel(batch).pow(2).mean()
            loss.backward()
            opt.step()
        check_replicas(opt.communicator, model.named_parameters())  # after the last batch
        opt.epoch_loss_logic(loss)
    assert parallel(joined_batch(0, [64])).pow(2).mean().item() < first_loss
    assert opt.epoch == 6
    assert ("global exchange every 4 batches" in capsys.readouterr().out) == (world.rank == 0)
    opt.reset()
    assert (opt.epoch, opt.global_skip, model[0].weight.grad) == (0, 0, None)


def test_dasos_scheduler_steps_with_the_optimizer(world):
    model = seeded(_mlp)
    inner = dph.SGD(model.parameters(), lr=0.1)
    scheduler = dph.lr_scheduler.ExponentialLR(inner, 0.5)
    opt = dph.DASO(inner, 6, heat.MPICommunication(world), scheduler=scheduler)
    opt.last_batch = 1
    for step in range(3):
        _train(opt, model, _local(world, step))
    assert opt.local_optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)


def test_daso_with_frozen_parameters_corrupts_no_weights(world):
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3), nn.Linear(3, 2)).double()
    model[0].requires_grad_(False)
    opt, parallel = _daso(world, model, warmup_epochs=0, downcast_type=torch.float, sending_chunk_size=7)
    frozen = model[0].weight.clone()
    opt.epoch_loss_logic(1.0)
    for _ in range(5):
        _train(opt, parallel, torch.ones(2, 5, dtype=torch.float64))
    plain = world.bcast(model)
    assert torch.equal(model[0].weight, frozen)
    for value, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value, expected, **CLOSE)


def test_daso_tells_all_ranks_of_a_nan_on_one(world):
    opt, parallel = _daso(world, seeded(_mlp))
    _train(opt, parallel, _local(world, 0) * (math.nan if world.rank == world.size - 1 else 1.0))
    with pytest.raises(ValueError, match="must be finite"):
        opt.epoch_loss_logic(0.0)


def test_daso_has_a_state_dict(world):
    model = seeded(_mlp)
    opt, parallel = _daso(world, model)
    _train(opt, parallel, _local(world, 0))
    state = copy.deepcopy(opt.state_dict())
    other, _ = _daso(world, seeded(_mlp))
    other.load_state_dict(state)
    assert other.current_batch == 1
    assert len(other.state) == 4


def test_daso_wants_to_know_the_last_batch(world):
    opt, parallel = _daso(world, seeded(_mlp))
    opt.last_batch = None
    with pytest.raises(ValueError, match="last_batch must be set before the first step"):
        _train(opt, parallel, _local(world, 0))


# ------------------------------------------------------------------ communicators, bad input


def test_the_ranks_of_a_split_train_by_themselves(world):
    comm = heat.MPICommunication(world).Split(world.rank % 2, world.rank)
    model = seeded(_mlp, seed=world.rank)
    opt = dph.DataParallelOptimizer(dph.SGD(model.parameters(), lr=0.1))
    parallel = dph.DataParallel(model, comm, opt)
    _train(opt, parallel, _local(world, 0))
    assert opt.communicator.world_size == comm.size
    check_replicas(opt.communicator, model.named_parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: heat.optim.DataParallelOptimizer(torch.optim.SGD(m.parameters(), lr=0.1)), "got heat.optim"),
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1), "got torch.optim.sgd.SGD"),
        (lambda m: dph.DASO(torch.optim.SGD(m.parameters(), lr=0.1), 3), "DataParallelMultiGPU"),
    ],
)
def test_an_optimizer_of_another_kind_is_refused_on_all_ranks(world, make, message):
    model = seeded(_mlp)
    optimizer = make(model)
    if world.rank != world.size - 1 and not isinstance(optimizer, dph.DASO):
        optimizer = dph.DataParallelOptimizer(dph.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=message):
        dph.DataParallel(model, heat.MPI_WORLD, optimizer)
    with pytest.raises(TypeError, match=r"must be a dpoptim\.heat\.DASO"):
        dph.DataParallelMultiGPU(model, heat.optim.DataParallelOptimizer(torch.optim.SGD(model.parameters(), lr=0.1)))


def test_bad_arguments_are_refused(world):
    model = seeded(_mlp)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="blocking must be a bool, got int"):
        dph.DataParallelOptimizer(inner, 1)
    with pytest.raises(TypeError, match=r"torch_optimizer must be a torch\.optim\.Optimizer, got Sequential"):
        dph.DataParallelOptimizer(model)
    with pytest.raises(RuntimeError, match=r"pass the optimizer to DataParallel\(module, comm, optimizer\) first"):
        dph.DataParallelOptimizer(inner).step()
    with pytest.raises(AttributeError, match=r"has no attribute .communicator.: pass"):
        _ = dph.DataParallelOptimizer(inner).communicator


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"local_optimizer": 1}, TypeError),
        ({"comm": 1}, TypeError),
        ({"total_epochs": "ten"}, TypeError),
        ({"warmup_epochs": "ten"}, TypeError),
        ({"cooldown_epochs": "ten"}, TypeError),
        ({"scheduler": "ten"}, TypeError),
        ({"stability_level": "ten"}, TypeError),
        ({"max_global_skips": "ten"}, TypeError),
        ({"sending_chunk_size": "ten"}, TypeError),
        ({"verbose": "ten"}, TypeError),
        ({"use_mpi_groups": "ten"}, TypeError),
        ({"downcast_type": "ten"}, TypeError),
        ({"downcast_type": torch.bool}, ValueError),
        ({"skip_reduction_factor": "ten"}, TypeError),
        ({"local_skip_factor": "ten"}, TypeError),
        ({"warmup_epochs": -1}, ValueError),
        ({"cooldown_epochs": -1}, ValueError),
        ({"max_global_skips": -1}, ValueError),
        ({"sending_chunk_size": -1}, ValueError),
        ({"total_epochs": -1}, ValueError),
        ({"skip_reduction_factor": -1}, ValueError),
        ({"local_skip_factor": -1}, ValueError),
    ],
    ids=str,
)
def test_daso_raises_the_errors_of_heats(world, options, kind):
    given = {"local_optimizer": torch.optim.SGD(seeded(_mlp).parameters(), lr=0.1), "total_epochs": 3, **options}
    with pytest.raises(kind):
        dph.DASO(**given)
    with pytest.raises(kind):
        heat.optim.DASO(**given)


def _public(module):
    """Return the names that a module of Heat's has for its users."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "").startswith(("heat.optim", "heat.nn", "torch.optim"))
    ]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (dph, heat.optim),
        (dph, heat.nn),
        (dph.data_parallel, heat.nn.data_parallel),
        (dph.dp_optimizer, heat.optim.dp_optimizer),
        (dph.utils, heat.optim.utils),
        (dph, torch.optim),
        (dph, torch.optim.lr_scheduler),
        (dph.lr_scheduler, torch.optim.lr_scheduler),
        (dph.swa_utils, torch.optim.swa_utils),
    ],
    ids=lambda module: module.__name__,
)
def test_every_public_name_is_here(ours, theirs):
    names = vars(theirs).get("__all__") or _public(theirs)
    assert names
    for name in names:
        assert hasattr(ours, name), name
    with pytest.raises(AttributeError, match="asdf"):
        _ = ours.asdf


def test_names_are_those_of_torch_and_heat():
    for name in ("dp_optimizer", "lr_scheduler", "utils"):  # modules of ht.optim
        assert getattr(dph, name).__name__ == f"dpoptim.heat.{name}"
    assert dph.SGD is dpoptim.SGD
    assert dph.Optimizer is torch.optim.Optimizer
    assert dph.swa_utils is dpoptim.swa_utils
    assert dph.dp_optimizer.DASO is dph.DASO
    assert dph.utils.DetectMetricPlateau(patience=1).patience == 1
    for name in torch.optim.lr_scheduler.__all__:
        own, torchs = getattr(dph.lr_scheduler, name), getattr(torch.optim.lr_scheduler, name)
        assert own is getattr(dph, name)
        assert issubclass(own, torchs)
        assert (own is torchs) == (name != "ReduceLROnPlateau")
    assert dph.lr_scheduler._LRScheduler is torch.optim.lr_scheduler._LRScheduler
    assert dph.ReduceLROnPlateau is dpoptim.lr_scheduler.ReduceLROnPlateau  # decides on the mean over ranks


OLD_HEAT = """
import sys, types
old = types.ModuleType("heat")
old.__version__ = "1.6.0"
sys.modules["heat"] = {module}
try:
    import dpoptim.heat
except ImportError as error:
    print(error)
"""


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("module", "message"),
    [("old", "needs Heat >= 1.7, got 1.6.0: pip install --upgrade heat"), ("None", "which is not installed")],
)
def test_a_missing_or_old_heat_is_said_so(module, message):
    done = subprocess.run(
        [sys.executable, "-c", OLD_HEAT.replace("{module}", module)], capture_output=True, text=True, check=False
    )
    assert message in done.stdout, done.stderr
