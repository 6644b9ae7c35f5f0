"""Shared memory: what is left behind, who may read it, and what happens where there is none."""

import logging
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from programs import OPEN_MPI_DIRECTORY

import dpoptim.comm.node.shared_memory
from dpoptim.comm.communicator import Communicator
from dpoptim.comm.node.shared_memory import SharedMemory

# They look at the same directory; one worker takes them one after another.
pytestmark = pytest.mark.xdist_group("files in /dev/shm")

PROGRAM = """
import sys, time, torch
from dpoptim.comm.communicator import Communicator
communicator = Communicator()
tensor = torch.ones(1 << 20)
communicator.all_reduce(tensor)
assert tensor[0] == communicator.world_size
assert communicator.why_no_node_memory() is None, communicator.why_no_node_memory()
memory = communicator.share_in_node(1 << 20)
print("ready", flush=True)
"""


SMALL = """
import torch
from dpoptim.comm.mpi.messages import Messages
from dpoptim.comm.node.shared_memory import meeting
from dpoptim.comm.node.small_sums import SmallSums
from dpoptim.comm.node.staging import StagingArea
node = Messages(None, 1 << 30)
rank, size = node.rank, node.world_size
area, slots = StagingArea(node, meeting(node, sleeping=True), 1 << 20), SmallSums(node, 256)
for turn in range(12):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8):
        own = torch.arange(turn % 7).to(dtype) + rank
        expected = sum((torch.arange(turn % 7).to(dtype) + other).double() for other in range(size)).to(dtype)
        slots.all_reduce(own)
        assert torch.equal(own, expected), (turn, dtype)
    large = torch.full((700_001,), float(rank))
    area.all_reduce(large, 0.5)
    assert torch.equal(large, torch.full((700_001,), 0.5 * size * (size - 1) / 2))
print("equal")
"""


def _files():
    return {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith("dpoptim-")}


def _assert_nothing_is_left(before):
    """Names that other programs on this machine have just made are gone in a moment; one left behind stays."""
    end_s = time.monotonic() + 10
    while not (now := _files()) <= before and time.monotonic() < end_s:
        time.sleep(0.1)
    assert now <= before


def test_small_and_large_sums_in_turns(mpirun):
    done = mpirun(4, "-c", SMALL)
    assert done.stdout.count("equal") == 4, done.stderr


def test_nothing_is_left_behind(mpirun):
    before = _files()
    done = mpirun(3, "-c", PROGRAM)
    assert done.stdout.count("ready") == 3, done.stderr
    _assert_nothing_is_left(before)


def test_nothing_is_left_behind_after_a_kill(mpirun):
    before = _files()
    done = mpirun(2, "-c", PROGRAM + "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode != 0
    assert "ready" in done.stdout
    _assert_nothing_is_left(before)


class Alone:
    """A node of one rank, which looks at the file when the others would open it."""

    rank, world_size = 0, 1
    path = None

    def barrier(self):
        pass

    def all_gather_object(self, item):
        return [item]

    def broadcast_object(self, item, root):
        if item is not None:
            self.path, _ = item
            status = Path(self.path).stat()
            self.mode, self.device = stat.S_IMODE(status.st_mode), status.st_dev
            self.names = _files()
        return item


def test_it_never_has_a_name():
    before, node = _files(), Alone()
    SharedMemory(node, 100)
    assert node.names <= before, "a rank killed now would leave it behind"
    assert node.mode == 0o600


def test_what_is_not_counted_is_not_in_dev_shm():
    before, node = _files(), Alone()
    memory = SharedMemory(node, 100, counted=False)
    assert node.device != Path("/dev/shm").stat().st_dev
    assert node.names <= before
    assert node.mode == 0o600
    assert not memory.tensor(torch.uint8, [100]).any()


def test_a_system_without_anonymous_files_says_so(monkeypatch):
    monkeypatch.delattr(dpoptim.comm.node.shared_memory.os, "memfd_create")
    with pytest.raises(OSError, match=r"no 0\.0 MiB of memory to share \(rank 0 of the node: this system has no files"):
        SharedMemory(Alone(), 100, counted=False)


@pytest.mark.parametrize("why", ["refused", "unknown"])
def test_other_users_may_not_read_it_where_it_needs_a_name(monkeypatch, why):
    def unnamed_is_refused(path, flags, *mode):
        if flags & unnamed == unnamed:
            raise OSError("refused")
        return original(path, flags, *mode)

    before, node, original, unnamed = _files(), Alone(), os.open, os.O_TMPFILE
    if why == "refused":
        monkeypatch.setattr(dpoptim.comm.node.shared_memory.os, "open", unnamed_is_refused)
    else:
        monkeypatch.delattr(dpoptim.comm.node.shared_memory.os, "O_TMPFILE")
    SharedMemory(node, 100)
    assert node.names - before == {Path(node.path).name}
    assert node.mode == 0o600
    assert not Path(node.path).exists()


@pytest.mark.parallel
def test_ranks_that_do_not_see_each_other_in_proc_share_memory_too(world, monkeypatch):
    def is_elsewhere(path, flags, *mode):
        return original("/dev/null" if str(path).startswith("/proc/") else path, flags, *mode)

    before, original = _files(), os.open
    communicator = Communicator(world)
    if world.rank == 1:
        monkeypatch.setattr(dpoptim.comm.node.shared_memory.os, "open", is_elsewhere)
    tensor = communicator.share_in_node(100).tensor(torch.uint8, [100])
    tensor[world.rank] = 7
    communicator.barrier()
    found = tensor[: world.size].tolist()
    communicator.barrier()
    communicator.free()
    assert found == [7] * world.size
    if world.rank == 0:
        _assert_nothing_is_left(before)


def test_memory_lives_as_long_as_its_tensors():
    tensor = SharedMemory(Alone(), 100).tensor(torch.int64, [3], offset_bytes=8).fill_(7)
    assert tensor.tolist() == [7, 7, 7]


def test_no_memory_is_an_error_that_leaves_nothing(tmp_path, monkeypatch):
    node = Alone()
    with pytest.raises(OSError, match=r"no 1048576\.0 MiB of memory to share in /dev/shm \(rank 0 of the node"):
        SharedMemory(node, 1 << 40)
    assert not Path(node.path).exists()
    monkeypatch.setattr(dpoptim.comm.node.shared_memory, "_DIRECTORY", str(tmp_path / "missing"))
    with pytest.raises(OSError, match="No such file or directory"):
        SharedMemory(Alone(), 100)


@pytest.mark.parallel
def test_without_memory_messages_give_the_same_and_the_reason_is_told(world, monkeypatch, caplog):
    if world.size == 1:
        pytest.skip("one rank shares memory with nobody")
    generator = torch.Generator().manual_seed(world.rank)
    values = torch.randint(0, 100, (1 << 20,), generator=generator).float()
    with_memory, without = values.clone(), values.clone()
    communicator = Communicator(world)
    communicator.all_reduce(with_memory)
    communicator.free()
    if world.rank == 1:  # one rank alone can't map
        monkeypatch.setattr(dpoptim.comm.node.shared_memory.mmap, "mmap", _refuse)
    communicator = Communicator(world)
    with caplog.at_level(logging.WARNING):
        communicator.all_reduce(without)
        communicator.all_reduce(values)
    why = communicator.why_no_node_memory()
    with pytest.raises(OSError, match="rank 1 of the node: no map"):
        communicator.share_in_node(1000)
    communicator.free()
    assert torch.equal(with_memory, without)
    assert "rank 1 of the node: no map" in why
    assert len([record for record in caplog.records if "by messages" in record.message]) == 1


def _refuse(*_):
    raise OSError("no map")


@pytest.mark.once  # with Open MPI
def test_a_job_of_a_test_has_open_mpis_memory_to_itself(mpirun):
    done = mpirun(2, "-c", "from mpi4py import MPI\nprint(open('/proc/self/maps').read())")
    assert done.returncode == 0, done.stderr
    segments = {line.split()[-1] for line in done.stdout.splitlines() if "/sm_segment" in line}
    assert len(segments) == 2
    assert {str(Path(name).parent) for name in segments} == {os.environ[OPEN_MPI_DIRECTORY]}


@pytest.mark.once  # with Open MPI: MPICH itself dies of a small /dev/shm
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small /dev/shm needs root")
def test_a_small_dev_shm(tmp_path):
    """In a mount namespace of its own: room for a part of the staging area, then for none."""
    launcher = Path(sys.executable).parent / "mpirun"
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\nfrom dpoptim.comm.communicator import Communicator\nc = Communicator()\n"
        "t = torch.ones(1 << 20)\nc.all_reduce(t)\nassert t[0] == 2\nprint(c.why_no_node_memory(), flush=True)\n"
    )
    environment = {**os.environ, "OMPI_MCA_btl": "self,tcp", "UCX_TLS": "tcp,self"}
    for size, expected in (("1m", "None\n"), ("4k", "MiB of memory to share")):
        command = f"mount -t tmpfs -o size={size} tmpfs /dev/shm && exec {launcher} -n 2 {sys.executable} {program}"
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", command],
            capture_output=True,
            text=True,
            timeout=60,
            env=environment,
            check=False,
        )
        if "unshare" in done.stderr or "mount:" in done.stderr:
            pytest.skip(f"no mount namespace is to be had: {done.stderr.strip()}")
        assert done.stdout.count(expected) == 2, (size, done.stdout, done.stderr)


def test_a_program_ended_by_sigterm_leaves_nothing(tmp_path):
    before = _files()
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            PROGRAM.replace("tensor[0]", "1 or tensor[0]").replace("memory() is None", "memory() != ''")
            + "time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    ) as job:
        assert job.stdout.readline() == "ready\n"
        job.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    _assert_nothing_is_left(before)
