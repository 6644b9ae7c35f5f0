"""What can be wrong with a checkpoint: an error that names the file, on every rank, and the last good one stays."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import agreed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Net, assert_same, joined_batch, seeded, train
from torch import nn

import dpoptim
from dpoptim.utils import checkpoint
from dpoptim.utils.checkpoint import CheckpointError
from dpoptim.utils.checkpoint.index import checksum, dump_index, parse_index
from dpoptim.utils.checkpoint.loading import open_checkpoint

pytestmark = pytest.mark.once
parallel = pytest.mark.parallel
FILE = "rank-00000.safetensors"


def _net(width=5):
    model = seeded(lambda: Net(width))
    return model, torch.optim.Adam([(n, p) for n, p in model.named_parameters() if p.requires_grad])


@pytest.fixture
def path(world, tmp_path):
    """Give a directory with two good checkpoints, the same on all ranks."""
    path = world.bcast(tmp_path)
    model, opt = _net()
    train(opt, model, joined_batch(0, [3]))
    for step in (1, 2):
        checkpoint.save(path, model=model, optimizer=opt, step=step)
    return path


def _newest(path):
    return path / "checkpoint-00000002"


def _truncate(path):
    os.truncate(_newest(path) / FILE, (_newest(path) / FILE).stat().st_size - 100)


def _flip(path, where=-50):
    data = bytearray((_newest(path) / FILE).read_bytes())
    data[where] ^= 4
    (_newest(path) / FILE).write_bytes(data)


def _edit(path, change, mend=True):
    index = _newest(path) / "index.json"
    head = json.loads(index.read_text())
    change(head)
    if mend:
        text = json.dumps(head["content"], sort_keys=True, separators=(",", ":"))
        head["xxh3_64"] = checksum(text.encode())
    index.write_text(json.dumps(head))


def _symlink(path):
    shutil.move(_newest(path) / FILE, path / "elsewhere")
    (_newest(path) / FILE).symlink_to(path / "elsewhere")


def _fifo(path):
    (_newest(path) / FILE).unlink()
    os.mkfifo(_newest(path) / FILE)


def _append(path):
    with (_newest(path) / FILE).open("ab") as file:
        file.write(b"more")


def _rename_to(name):
    return lambda path: _edit(path, lambda head: head["content"]["files"][0].__setitem__(0, name))


DAMAGES = {
    "truncated": (_truncate, rf"{FILE} is truncated: it has \d+ bytes, the index says \d+"),
    "bit flipped": (_flip, rf"{FILE} is damaged: tensor '.*' does not have its checksum in elements"),
    "header flipped": (lambda path: _flip(path, 30), rf"{FILE} is damaged: its header does not have its checksum"),
    "longer": (_append, rf"{FILE} is not the one that was written"),
    "file missing": (lambda path: (_newest(path) / FILE).unlink(), rf"{FILE} is missing"),
    "symlink": (_symlink, rf"{FILE} is a symbolic link: a checkpoint's files lie in its directory"),
    "fifo": (_fifo, rf"{FILE} is no regular file"),
    "dot dot": (_rename_to("../x.safetensors"), r"index.json is damaged.*names a file '\.\./x.safetensors'"),
    "absolute": (_rename_to("/etc/passwd"), r"index.json is damaged.*names a file '/etc/passwd'"),
    "newer": (
        lambda path: _edit(path, lambda head: head.update(version=2)),
        r"index.json .*is of format version 2, and this dpoptim reads up to 1: use a newer dpoptim",
    ),
    "index flipped": (
        lambda path: _edit(path, lambda head: head["content"]["about"].update(world_size=9), mend=False),
        r"index.json is damaged.*its content does not have its checksum",
    ),
    "index empty": (lambda path: (_newest(path) / "index.json").write_text(""), r"index.json is damaged"),
    "index binary": (lambda path: (_newest(path) / "index.json").write_bytes(b"\xff\xfe"), r"index.json is damaged"),
    "index deep": (lambda path: (_newest(path) / "index.json").write_text("[" * 10**5), r"index.json is damaged"),
    "index pickled": (
        lambda path: (_newest(path) / "index.json").write_bytes(pickle.dumps(1)),
        r"index.json is damaged",
    ),
    "index missing": (lambda path: (_newest(path) / "index.json").unlink(), None),
}


@parallel
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_an_error_on_every_rank_that_offers_the_good_one(world, path, name):
    damage, message = DAMAGES[name]
    if world.rank == 0:
        damage(path)
    world.Barrier()
    model, opt = _net()
    with agreed(world):
        if message is None:  # not complete, hence not the newest
            assert checkpoint.load(path, model=model, optimizer=opt)["step"] == 1
            with pytest.raises(CheckpointError, match=r"index.json is missing; .*checkpoint-00000001 is complete"):
                checkpoint.load(_newest(path), model=model)
        else:
            with pytest.raises(CheckpointError, match=message + r".*; .*checkpoint-00000001 is complete"):
                checkpoint.load(path, model=model, optimizer=opt)
    with agreed(world):
        assert checkpoint.load(path / "checkpoint-00000001", model=model, optimizer=opt)["step"] == 1


@parallel
def test_what_does_not_fit_the_program_changes_nothing(world, path):
    def fails(match, **parts):
        before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
        with pytest.raises(CheckpointError, match=r"index.json " + match):
            checkpoint.load(path, **parts)
        assert_same({name: part.state_dict() for name, part in parts.items()}, before)

    model, _ = _net()
    fails(
        "does not fit the program: model: 'first.weight' has shape \\(5, 5\\) in the checkpoint but", model=_net(6)[0]
    )
    fails("does not fit the program: model: 'first.weight' has dtype torch.float64", model=_net()[0].float())
    fails("does not fit .*: the checkpoint has no '0.bias'", model=nn.Sequential(nn.Linear(2, 2)))
    fails("does not fit .*: the program has no 'frozen.bias', which", model=nn.ModuleDict({"first": nn.Linear(5, 5)}))
    fails("has no part 'ema', it has model, step, optimizer", ema=model)
    fails("has 'optimizer' as optimizer, the program as module", optimizer=model)
    fails(
        "does not fit .*: optimizer is of class Adam in the checkpoint but of SGD",
        optimizer=torch.optim.SGD(model.parameters()),
    )
    fails("does not fit .*: optimizer: parameter 'first.weight' has shape", optimizer=_net(6)[1])
    fails(
        "does not fit .*: optimizer: parameter 'first.weight' has dtype float64",
        optimizer=torch.optim.Adam([(n, p) for n, p in _net()[0].float().named_parameters() if p.requires_grad]),
    )
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": named[:2]}, {"params": named[2:]}]
    fails(
        r"does not fit .*: optimizer has groups of \[7\] parameters in the checkpoint but of \[2, 5\]",
        optimizer=torch.optim.Adam(groups),
    )
    strange = [(f"x{n}", p) for n, p in named]
    fails(
        "does not fit .*: the checkpoint has no 'xfirst.bias', which the program has",
        optimizer=torch.optim.Adam(strange),
    )
    if world.size > 1 and world.rank == 1:
        model = _net(6)[0]
    if world.size > 1:
        with pytest.raises(
            CheckpointError, match=r"on rank 1: .*'first.weight'" if world.rank != 1 else "'first.weight'"
        ):
            checkpoint.load(path, model=model)


@parallel
def test_nothing_there(world, tmp_path):
    path = world.bcast(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere does not exist: give the directory that was saved to"):
        checkpoint.load(path / "nowhere")
    with pytest.raises(CheckpointError, match="has no complete checkpoint: give"):
        checkpoint.load(path)
    if world.rank == 0:
        (path / "file").write_text("")
    world.Barrier()
    with pytest.raises(CheckpointError, match="file is no directory"):
        checkpoint.load(path / "file")
    with pytest.raises(CheckpointError, match=r"file.* can't be written: .*; there is no complete checkpoint yet"):
        checkpoint.save(path / "file", step=1)


def _tear(path):
    """Make sure that loading would run code if it unpickled."""

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {path}",))

    return Evil()


def test_no_pickle_is_executed(tmp_path, path):
    trap = tmp_path / "sprung"
    torch.save({"model": _tear(trap)}, _newest(path) / FILE)
    with pytest.raises(CheckpointError):
        checkpoint.load(path, model=_net()[0])
    (_newest(path) / "index.json").write_bytes(pickle.dumps(_tear(trap)))
    with pytest.raises(CheckpointError):
        checkpoint.load(path, model=_net()[0])
    assert not trap.exists()
    sources = Path(checkpoint.__file__).parent.glob("*.py")
    users = [
        source.name for source in sources if "pickle.load" in source.read_text() or "Unpickler" in source.read_text()
    ]
    assert users in ([], ["convert.py"]), "converting from torch's own formats, with an allow-list"


FULL = """
import sys, torch
from mpi4py import MPI
from dpoptim.utils import checkpoint
path, blocking = sys.argv[1], sys.argv[2] == "True"
rank = MPI.COMM_WORLD.rank
small, large = torch.nn.Linear(10, 10), torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(8)))
checkpoint.save(path, model=small, step=1)
try:
    checkpoint.save(path, model=large, step=2, blocking=blocking)
    checkpoint.wait()
except checkpoint.CheckpointError as error:
    print(f"<{rank}: {error}>")
print(f"<{rank} has {checkpoint.load(path, model=small)['step']}>")
checkpoint.save(path, model=small, step=3, blocking=blocking)
print(f"<{rank} has {checkpoint.load(path, model=small)['step']}>")
"""


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk(mpirun, tmp_path, blocking):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        done = mpirun(3, "-c", FULL, str(tmp_path / "run"), str(blocking))
        assert done.returncode == 0, done.stderr
        for rank in range(3):
            assert f"<{rank} has 1>" in done.stdout
            assert f"<{rank} has 3>" in done.stdout
        assert done.stdout.count("rank-0000") >= 3
        assert "can't be written: No space left on device; " in done.stdout
        assert "checkpoint-00000001 is complete" in done.stdout
        names = sorted(path.name for path in (tmp_path / "run").iterdir())
        assert names == ["checkpoint-00000001", "checkpoint-00000002"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


NO_PERMISSION = """
import os, sys
path = sys.argv[1]
from dpoptim.utils import checkpoint
checkpoint.save(path, step=1)
os.chmod(path, 0o555)
os.setuid(65534)
for action in (lambda: checkpoint.save(path, step=2), lambda: checkpoint.save(path + "/new", step=2)):
    try:
        action()
    except checkpoint.CheckpointError as error:
        print(f"<{error}>")
print(checkpoint.load(path))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming a user without permission needs root")
def test_a_directory_without_write_permission(tmp_path):
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == 0 and str(directory).startswith("/tmp/"):
            directory.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", NO_PERMISSION, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("can't be written: Permission denied; ") == 2, done.stdout
    assert "checkpoint-00000001 is complete" in done.stdout
    assert "{'step': 1}" in done.stdout


# ------------------------------------------------------------------------------------------ fuzzing

# The same examples in every run, which then pass or fail for a reason in the change that is tested.
FEW = settings(
    deadline=None, max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def good(path):
    directory = _newest(path)
    return directory, {file.name: file.read_bytes() for file in directory.iterdir()}, _net()


@FEW
@given(data=st.data())
def test_flipped_bytes_anywhere_are_an_error_or_harmless(good, data):
    directory, files, (model, opt) = good
    name = data.draw(st.sampled_from(sorted(files)))
    content = bytearray(files[name])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    try:
        (directory / name).write_bytes(content)
        assert checkpoint.load(directory, model=model, optimizer=opt) == {"step": 2}
    except CheckpointError as error:
        message = str(error)
    else:
        message = name
    finally:
        (directory / name).write_bytes(files[name])
    assert name in message


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


def _places(tree, here=()):
    yield here
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, item in items:
        yield from _places(item, (*here, key))


@FEW
@given(edits=st.lists(st.tuples(st.integers(0, 1 << 20), st.booleans(), JSON), min_size=1, max_size=2))
def test_an_index_with_anything_in_any_place_is_an_error_or_loads(good, edits):
    directory, files, _ = good
    model, opt = _net()
    content = json.loads(files["index.json"])["content"]
    for number, is_removed, value in edits:
        places = [place for place in _places(content) if place]
        *front, last = places[number % len(places)]
        inside = content
        for key in front:
            inside = inside[key]
        if is_removed and isinstance(inside, dict):
            del inside[last]
        else:
            inside[last] = value
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    head = {
        "format": "dpoptim-checkpoint",
        "version": 1,
        "xxh3_64": checksum(text.encode()),
        "content": content,
    }
    (directory / "index.json").write_text(json.dumps(head))
    try:
        checkpoint.load(directory, model=model, optimizer=opt)
    except CheckpointError:
        pass
    finally:
        (directory / "index.json").write_bytes(files["index.json"])


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(), JSON.map(json.dumps), st.binary().map(lambda b: b.decode("latin1"))))
def test_any_text_as_an_index_is_an_error(text):
    with pytest.raises(CheckpointError, match=r"some/index.json is damaged or no index of a checkpoint"):
        parse_index(text, "some/index.json")


def test_the_index_survives_a_round_trip(path):
    directory, index, _ = open_checkpoint(path)
    assert parse_index(dump_index(index), "x") == index
    assert dpoptim.utils.checkpoint.latest(path) == directory
