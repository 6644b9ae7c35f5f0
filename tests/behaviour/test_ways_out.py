"""One rank leaves, or is elsewhere: the others are not kept waiting, and are told which rank it is, and where."""

import re

import pytest

PROGRAM = """
import contextlib, os, signal, sys, tempfile
import torch, dpoptim
from mpi4py import MPI
from dpoptim.utils import checkpoint, consistency
comm = MPI.COMM_WORLD
rank, path = comm.rank, comm.bcast(tempfile.mkdtemp())
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as batch scripts have it

def leave(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)

class Leaving(dpoptim.SGD):
    is_elementwise = True  # so that it is not tried out

    def step(self, closure=None):
        if rank == 1:
            leave()
        return super().step(closure)

class LeavingNumber(float):
    def __mul__(self, other):
        leave()

class LeavingObject:
    load_state_dict = None

    def state_dict(self):
        leave()

def make(kind=dpoptim.SGD, net=None, **options):
    net = net or torch.nn.Linear(4, 300)
    return net, dpoptim.DataParallelOptimizer(kind(net.parameters(), lr=0.1), **options)

def train(net, opt, num_steps=1):
    for _ in range(num_steps):
        opt.zero_grad()
        net(torch.ones(1, 4)).sum().backward()
        opt.step()
"""

LEAVES = {
    "hook": """
def hook(communicator, bucket):
    if rank == 1 and opt_steps:
        leave()
    return dpoptim.comm_hooks.allreduce(communicator, bucket)
opt_steps = []
net, opt = make(comm_hook=hook)
train(net, opt)
opt_steps.append(1)
train(net, opt)
""",
    "backward": """
net = torch.nn.Sequential(torch.nn.Linear(4, 300), torch.nn.Linear(300, 1000))
net, opt = make(net=net, overlap=True, bucket_mb=0.001)
train(net, opt, 2)
if rank == 1:
    net[0].weight.register_hook(leave)
train(net, opt, 2)
""",
    "step": "train(*make(Leaving, shard=True))",
    "step in shared memory": "train(*make(Leaving, node_shared=True))",
    "mean": "make()[1].mean(LeavingNumber(1.0) if rank == 1 else 1.0)",
    "save": "net, opt = make()\ncheckpoint.save(path, model=net, scheduler=LeavingObject() if rank == 1 else net)",
}


@pytest.mark.parametrize("place", LEAVES)
def test_a_rank_that_exits_where_others_wait_ends_the_job_and_says_where(mpirun, place):
    done = mpirun(2, "-c", PROGRAM + LEAVES[place] + "\nprint('went on', flush=True)", timeout_s=60)
    assert done.returncode != 0
    assert "went on" not in done.stdout
    says_where = "dpoptim: rank 1 left the program .*in the middle of .*where the others wait"
    is_told = "rank 1 left the program while others go on"  # where they are about to meet
    assert re.search(f"{says_where}|{is_told}", done.stderr), done.stderr


@pytest.mark.parametrize("place", LEAVES)
def test_ranks_that_exit_together_end_well(mpirun, place):
    program = LEAVES[place].replace("rank == 1", "True")
    done = mpirun(2, "-c", PROGRAM.replace("rank == 1", "True") + program + "\nprint('went on')", timeout_s=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


ELSEWHERE = {
    "checkpoint.wait": (
        "checkpoint.save(path, model=net, optimizer=opt, blocking=False)\nif rank == 1: checkpoint.wait()",
        "rank 1: waiting for a checkpoint",
    ),
    "check_replicas": (
        "if rank == 1: consistency.check_replicas(opt.communicator, net.state_dict().items())",
        "rank 1: comparing replicas",
    ),
    "another optimizer": ("if rank == 1: make()", "rank 1: constructing an optimizer"),
    "its own checkpoint": ("if rank == 1: checkpoint.save(path, model=net)", "rank 1: saving a checkpoint"),
    "its own mean": ("if rank == 1: opt.mean(1.0)", "rank 1: optimizer 0, step 3, averaging a number"),
}


@pytest.mark.parametrize("call", ELSEWHERE)
def test_what_one_rank_calls_alone_is_an_error_on_all(mpirun, call):
    alone, where = ELSEWHERE[call]
    program = f"""
net, opt = make()
train(net, opt, 3)
try:
    {alone.replace(chr(10), chr(10) + "    ")}
    train(net, opt)
except RuntimeError as error:
    print(f"<{{rank}}: {{error}}>", flush=True)
"""
    done = mpirun(2, "-c", PROGRAM + program, timeout_s=60)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"<{rank}: the ranks are at different places (" in done.stdout, done.stdout
    assert done.stdout.count(where) == 2, done.stdout
    assert done.stdout.count("rank 0: optimizer 0, step 3, 0 no_sync() blocks") == 2, done.stdout


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_program_may_finalize_mpi_itself(mpirun, num_ranks):
    program = "net, opt = make()\ntrain(net, opt)\nMPI.Finalize()\nprint('done', flush=True)"
    done = mpirun(num_ranks, "-c", PROGRAM + program, timeout_s=60)
    assert (done.returncode, done.stdout.count("done")) == (0, num_ranks), done.stderr


def test_a_rank_that_finalizes_mpi_before_the_others_is_an_error_on_them(mpirun):
    program = "net, opt = make()\ntrain(net, opt)\nif rank == 1: MPI.Finalize()\nelse: train(net, opt)"
    done = mpirun(2, "-c", PROGRAM + program, timeout_s=60)
    assert done.returncode != 0
    assert "rank 1 left the program while others go on" in done.stderr, done.stderr


def test_communicators_of_the_users_are_freed_with_what_hangs_at_them(mpirun):
    """MPICH has 2048; one optimizer needs some more for itself."""
    program = """
for _ in range(800):
    own = comm.Dup()
    net, opt = make(net=torch.nn.Linear(4, 2), comm=own)
    opt.detach()
    own.Free()
print("done", flush=True)
"""
    done = mpirun(2, "-c", PROGRAM + program, timeout_s=240)
    assert (done.returncode, done.stdout.count("done")) == (0, 2), done.stderr


def test_an_optimizer_goes_on_when_its_communicator_is_freed(mpirun):
    program = """
own = comm.Dup()
(net, opt), (other, other_opt) = make(comm=own), make(comm=own)
shared = opt.roll_call.communicator
freed = []
shared.users.when_freed(lambda: freed.append(1))
own.Free()
train(net, opt, 2)
opt.detach()
train(other, other_opt, 2)
assert not freed
other_opt.detach()
assert freed == [1]
train(*make())
print("done", flush=True)
"""
    done = mpirun(2, "-c", PROGRAM + program, timeout_s=60)
    assert (done.returncode, done.stdout.count("done")) == (0, 2), done.stderr


def test_a_checkpoint_in_the_background_is_completed_when_its_communicator_is_freed(mpirun):
    program = """
own = comm.Dup()
net, opt = make(comm=own)
shared, freed = opt.roll_call.communicator, []
shared.users.when_freed(lambda: freed.append(1))
checkpoint.save(path, model=net, optimizer=opt, step=7, blocking=False)
opt.detach()
own.Free()
checkpoint.wait()
assert freed == [1]
assert checkpoint.load(path, model=net)["step"] == 7
print("done", flush=True)
"""
    done = mpirun(2, "-c", PROGRAM + program, timeout_s=60)
    assert (done.returncode, done.stdout.count("done")) == (0, 2), done.stderr
