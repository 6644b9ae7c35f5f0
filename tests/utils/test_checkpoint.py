"""Checkpoints: what was saved is what is loaded, at any number of ranks."""

import json
import random
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from checkpoints import MODES, Run, agreed, sub_communicators
from meeting import meet
from oracle import EVERY_OPTIMIZER, NAMES_AND_MODES, OPTIMIZERS, assert_same, assert_same_parameters, seeded
from torch import nn

import dpoptim
from dpoptim.utils import checkpoint
from dpoptim.utils.checkpoint import plan
from dpoptim.utils.checkpoint.loading import open_checkpoint

pytestmark = pytest.mark.parallel

CONFIGURATIONS = [
    (name, options, mode)
    for name, options in [*OPTIMIZERS, *(pair for pair in EVERY_OPTIMIZER.items() if pair[0] in ("Muon", "SparseAdam"))]
    for mode in MODES
    if (name, mode) in NAMES_AND_MODES
]


def _path(world, tmp_path):
    """Return rank 0's directory on all ranks."""
    return world.bcast(tmp_path)


def _full_state(run):
    """Return the state of all ranks together, in torch's form; collective."""
    whole = getattr(run.opt, "full_state_dict", None)
    return run.opt.state_dict() if whole is None else whole(rank0_only=False)


@pytest.mark.parametrize(("name", "options", "mode"), CONFIGURATIONS)
@pytest.mark.once
@pytest.mark.ranks(4)  # whose first 1, 2, 3 and 4 save, and load what each of these have saved
def test_training_goes_on_as_if_it_had_not_stopped(world, tmp_path, name, options, mode):
    path = _path(world, tmp_path)
    comms = sub_communicators(world)
    for n in comms:
        if comms[n] is not None:
            run = Run(comms[n], name, options, mode=mode).train(3)
            checkpoint.save(path / str(n), **run.parts, step=run.step)
            state = _full_state(run.train(3))
        meet(world)
        for m in comms:
            if comms[m] is not None:
                # Where a divided bucket is cut decides which elements torch's vector loops round otherwise.
                same_cuts = m == n and mode != "replicated"
                other = Run(comms[m], name, options, seed=5, mode=mode, bucket_mb=25 if same_cuts else 0.0001)
                other.step = checkpoint.load(path / str(n), **other.parts)["step"]
                other_state = _full_state(other.train(3))
            with agreed(world):
                if m == n and comms[n] is not None:
                    assert_same(dict(other.model.state_dict()), dict(run.model.state_dict()))
                    assert_same(dict(other.ema.state_dict()), dict(run.ema.state_dict()))
                    assert_same(other_state, state)
                    assert_same(other.scheduler.state_dict(), run.scheduler.state_dict())
                elif (
                    comms[n] is not None and comms[m] is not None and name != "LBFGS"
                ):  # it branches on rounding errors
                    assert_same_parameters(other.model[1], run.model[1])
                    assert_same_parameters(other.ema.module[1], run.ema.module[1])
            if comms[m] is not None:
                other.end()
        if comms[n] is not None:
            run.end()


@pytest.mark.parametrize("loading_mode", MODES)
@pytest.mark.parametrize("saving_mode", MODES)
@pytest.mark.ranks(4)  # and their first 1, 2 and 3
def test_every_bit_comes_back_in_any_mode(world, tmp_path, saving_mode, loading_mode):
    path = _path(world, tmp_path)
    comms = sub_communicators(world)
    options = {"lr": 0.01, "amsgrad": True}
    for n in comms:
        expected = None
        if comms[n] is not None:
            run = Run(comms[n], "Adam", options, mode=saving_mode).train(2)
            checkpoint.save(path / str(n), **run.parts)
            expected = _full_state(run)
            run.end()
        expected = world.bcast(expected)
        for m in comms:
            if comms[m] is not None:
                other = Run(comms[m], "Adam", options, seed=3, mode=loading_mode)
                checkpoint.load(path / str(n), **other.parts)
                state = _full_state(other)
                other.end()
            with agreed(world):
                if comms[m] is not None:
                    assert_same(state, expected)


def test_the_state_is_written_once_and_evenly(world, tmp_path):
    path = _path(world, tmp_path)
    model = seeded(lambda: nn.Sequential(*(nn.Linear(60, 60) for _ in range(5))))
    opt = dpoptim.DataParallelOptimizer(dpoptim.AdamW(model.named_parameters(), lr=0.1))
    model(torch.ones(2, 60, dtype=torch.float64)).sum().backward()
    opt.step()
    checkpoint.save(path, model=model, optimizer=opt)
    _, index, _ = open_checkpoint(path)
    numel = sum(p.numel() for p in model.parameters())
    stored = sum(t.numel for name, t in index.tensors.items() if "rng" not in name and "step" not in name)
    assert stored == 3 * numel
    sizes = [file.size_bytes - file.header_bytes for file in index.files]
    assert len(sizes) == world.size
    assert max(sizes) - min(sizes) < 64, sizes
    opt.detach()


def test_a_plain_script_reads_the_weights_with_safetensors_alone(world, tmp_path):
    path = _path(world, tmp_path)
    run = Run(world, "Adam", {"lr": 0.01}).train(1)
    checkpoint.save(path, **run.parts)
    weights = {}
    for file in checkpoint.latest(path).glob("*.safetensors"):
        with safetensors.safe_open(file, "pt") as tensors:
            weights |= {k.removeprefix("model."): tensors.get_tensor(k) for k in tensors.keys() if k[:6] == "model."}  # noqa: SIM118
    other = Run(world, "Adam", {"lr": 0.01}, seed=7)
    other.model.load_state_dict(weights)
    for (name, value), expected in zip(other.model.named_parameters(), run.model.parameters(), strict=True):
        assert torch.equal(value, expected), name
    run.end()
    other.end()


class Thing:
    """An object with state_dict of every kind of value."""

    def __init__(self):
        self.state = {}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


VALUES = {
    "none": None,
    "numbers": [0, -1, 2**80, 1.5, float("inf"), True, 1 + 2j],
    "text": "Ünï\u2028\x00",
    "tuple": (1, (2, [3])),
    "set": {1, 2},
    "keys": {1: "a", (2, 3): "b", None: 0, "$tensor": "no tensor"},
    "counter": Counter({5: 2}),
    "ordered": OrderedDict(b=1, a=2),
    "tensors": [torch.arange(6).view(2, 3).t(), torch.tensor(2.5), torch.empty(0, 3), {"deep.er": torch.ones(1)}],
    "deep": {"er": torch.zeros(1)},
    "dtypes": [torch.ones(3).to(dtype) for dtype in checkpoint.index.DTYPES],
    "conjugate": torch.tensor([1 + 2j]).conj(),
    "bytes": b"\x00\xff",
    "dtype": torch.bfloat16,
    "size": torch.Size([1, 2]),
    "array": np.arange(3, dtype=np.float32),
    "$odd": {"$dict": 1},
}


def test_every_kind_of_value_comes_back(world, tmp_path):
    path = _path(world, tmp_path)
    thing, other = Thing(), Thing()
    thing.state = VALUES
    checkpoint.save(path, thing=thing, values=VALUES, step=3, nan=float("nan"), best=None)
    back = checkpoint.load(path, thing=other)
    assert back.keys() == {"values", "step", "nan", "best"}
    assert (back["step"], back["best"], repr(back["nan"])) == (3, None, "nan")
    for values in (back["values"], other.state):
        assert np.array_equal(values.pop("array"), VALUES["array"])
        assert_same(values, {key: value for key, value in VALUES.items() if key != "array"})


def test_what_needs_pickle_is_refused_by_name(world, tmp_path):
    with pytest.raises(
        TypeError, match=r"'history.best.1' is of type PosixPath, which a checkpoint can't hold: give numbers"
    ):
        checkpoint.save(_path(world, tmp_path), history={"best": [1, Path("x")]})
    with pytest.raises(TypeError, match=r"'x' is a tensor of layout torch.sparse_coo.*to_dense"):
        checkpoint.save(_path(world, tmp_path), x=torch.ones(2).to_sparse())
    assert checkpoint.latest(_path(world, tmp_path)) is None


def test_random_numbers_go_on_on_the_same_number_of_ranks(world, tmp_path):
    path = _path(world, tmp_path)

    def draw():
        return (
            torch.rand(2).tolist(),
            np.random.rand(2).tolist(),
            random.random(),
            random.gauss(0, 1),
            np.random.randn(),
        )

    torch.manual_seed(world.rank), np.random.seed(world.rank), random.seed(world.rank)
    draw()
    checkpoint.save(path)
    expected = draw()
    checkpoint.load(path)
    assert draw() == expected
    before = torch.get_rng_state()
    checkpoint.load(path, rng=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_numbers_are_derived_on_another_number_of_ranks(world, tmp_path):
    path = _path(world, tmp_path)
    single = sub_communicators(world)[1]
    if single is not None:
        checkpoint.save(path, comm=single)
    meet(world)
    checkpoint.load(path)
    numbers = world.allgather((torch.rand(1).item(), np.random.rand(), random.random()))
    checkpoint.load(path)
    again = world.allgather((torch.rand(1).item(), np.random.rand(), random.random()))
    assert numbers == again
    assert len(set(numbers)) == world.size


def test_buffers_that_differ_between_ranks_stay_each_ranks_own(world, tmp_path):
    path = _path(world, tmp_path)
    model = nn.BatchNorm1d(3)
    model(torch.randn(4, 3, generator=torch.Generator().manual_seed(world.rank)))
    own = model.running_mean.clone()
    checkpoint.save(path, model=model)
    model.running_mean.zero_()
    checkpoint.load(path, model=model)
    assert torch.equal(model.running_mean, own)
    single = sub_communicators(world)[1]
    if single is not None:
        model.running_mean.zero_()
        checkpoint.load(path, model=model, comm=single)
        assert torch.equal(model.running_mean, own), "rank 0's"


def test_the_last_k_are_kept(world, tmp_path):
    path = _path(world, tmp_path)
    for step in range(5):
        checkpoint.save(path, keep=2, step=step, blocking=step % 2 == 0)
    checkpoint.wait()
    # what is removed in the background has another name by now
    assert sorted(p.name for p in path.glob("checkpoint-*")) == ["checkpoint-00000004", "checkpoint-00000005"]
    assert checkpoint.latest(path).name == "checkpoint-00000005"
    assert checkpoint.load(path)["step"] == 4
    assert checkpoint.load(path / "checkpoint-00000004")["step"] == 3
    checkpoint.save(path, keep=None)
    assert len(list(path.glob("checkpoint-*"))) == 3


def test_a_save_in_the_background_holds_what_was_there_when_it_was_called(world, tmp_path):
    path = _path(world, tmp_path)
    run = Run(world, "Adam", {"lr": 0.01}).train(2)
    other = Run(world, "Adam", {"lr": 0.01}, seed=3).train(1)
    checkpoint.save(path, **run.parts, blocking=False)
    expected = {name: value.clone() for name, value in run.model.state_dict().items()}
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.zero_()
    checkpoint.save(path, **run.parts, blocking=False)
    checkpoint.wait()
    checkpoint.wait()
    checkpoint.load(path / "checkpoint-00000001", **other.parts)
    assert_same(dict(other.model.state_dict()), expected)
    assert torch.count_nonzero(other.model[1].first.weight)
    run.end()
    other.end()


def test_what_a_killed_save_left_is_removed_and_never_taken(world, tmp_path):
    path = _path(world, tmp_path)
    checkpoint.save(path, step=1)
    if world.rank == 0:
        for name in (".saving-00000002", ".removing-00000001"):
            (path / name).mkdir()
            (path / name / "rank-00000.safetensors").write_bytes(b"half")
        (path / "checkpoint-00000009").mkdir()
        (path / "checkpoint-00000010").symlink_to(path / "checkpoint-00000001")
    meet(world)
    assert checkpoint.latest(path).name == "checkpoint-00000001"
    assert checkpoint.load(path)["step"] == 1
    checkpoint.save(path, step=2)
    assert not list(path.glob(".*"))
    assert checkpoint.load(path)["step"] == 2


def test_torch_optimizers_without_names_and_other_names(world, tmp_path):
    path = _path(world, tmp_path)

    def make(named):
        model = seeded(lambda: nn.Linear(3, 2))
        opt = torch.optim.Adam(model.named_parameters() if named else model.parameters())
        model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
        opt.step()
        return model, opt

    for saves_names in (True, False):
        model, opt = make(saves_names)
        checkpoint.save(path, optimizer=opt)
        for loads_names in (True, False):
            _, other = make(loads_names)
            other.zero_grad()
            other.state.clear()
            checkpoint.load(path, optimizer=other)
            assert_same(other.state_dict()["state"], opt.state_dict()["state"])
            assert ("param_names" in other.param_groups[0]) == loads_names
    checkpoint.save(path, model=model, optimizer=opt)
    assert json.loads((checkpoint.latest(path) / "index.json").read_text())["content"]["parts"]["optimizer"][
        "shapes"
    ] == {
        "weight": [2, 3],
        "bias": [2],
    }


def test_samplers_that_know_their_epoch(world, tmp_path):
    path = _path(world, tmp_path)
    sampler = torch.utils.data.DistributedSampler(range(8), 2, 0)
    sampler.set_epoch(4)
    checkpoint.save(path, sampler=sampler)
    other = torch.utils.data.DistributedSampler(range(8), 2, 0)
    checkpoint.load(path, sampler=other)
    assert other.epoch == 4


def test_shares_are_level():
    held = [{"a": (0, 10), "b": (0, 10)}, {"a": (0, 10), "b": (0, 10)}, {"a": (3, 7)}]
    holdings = plan.holdings(held)
    assert holdings == {(0, 1): [("a", 0, 3), ("a", 7, 10), ("b", 0, 10)], (0, 1, 2): [("a", 3, 7)]}
    loads = [0, 30, 0]
    shares = plan.divide_held((0, 1, 2), [("a", 0, 10), ("b", 0, 10)], {"a": 4, "b": 8}, loads)
    assert sum(loads) == 30 + 10 * 4 + 10 * 8
    assert max(loads) - min(loads) <= 16, loads
    for name in "ab":
        pieces = sorted(piece for share in shares.values() for piece in share.get(name, []))
        assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces)][: len(pieces)]
        assert pieces[-1][1] == 10


def test_argument_errors(world, tmp_path):
    path = _path(world, tmp_path)
    with pytest.raises(TypeError, match="path must be a str or a Path, got int"):
        checkpoint.save(3)
    with pytest.raises(ValueError, match="keep must be >= 1, got 0: None keeps all"):
        checkpoint.save(path, keep=0)
    with pytest.raises(TypeError, match=r"keep must be an int or None, got 2\.5"):
        checkpoint.save(path, keep=2.5)
    with pytest.raises(TypeError, match="blocking must be True or False, got None"):
        checkpoint.save(path, blocking=None)
    with pytest.raises(TypeError, match="'step' of type int is returned, not loaded into"):
        checkpoint.load(path, step=3)
    with pytest.raises(TypeError, match=r"'scheduler' of type int needs load_state_dict\(\)"):
        checkpoint.load(path, scheduler=3)
    assert checkpoint.load(path, missing_ok=True) is None
    assert checkpoint.latest(path / "nowhere") is None
    if world.size > 1:
        with pytest.raises(
            ValueError, match=r"path must be the same on all ranks, got .*/0 on rank 0 but .*/1 on rank 1"
        ):
            checkpoint.save(path / str(world.rank))
        with pytest.raises(
            ValueError, match="'x' must be alike on all ranks, got value on rank 0 but absent on rank 1"
        ):
            checkpoint.save(path, **({} if world.rank else {"x": 1}))
        with pytest.raises((TypeError, ValueError), match=r"keep must be >= 1, got 0"):
            checkpoint.save(path, keep=0 if world.rank == 1 else 3)
