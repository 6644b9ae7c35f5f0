"""Ranks that are not where the others are: an error on every rank, never a wait for ever."""

import re

import pytest

PRELUDE = """
import contextlib, sys, torch, dpoptim
from mpi4py import MPI
rank = MPI.COMM_WORLD.rank
def make(**options):
    model = torch.nn.Linear(3, 2)
    return model, dpoptim.DataParallelOptimizer(dpoptim.SGD(model.named_parameters(), lr=0.1), **options)
def train(model, opt, steps=1):
    for _ in range(steps):
        opt.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        opt.step()
model, opt = make()
train(model, opt, 2)
"""


def _run(mpirun, num_ranks, body):
    return mpirun(num_ranks, "-c", PRELUDE + body)


def test_a_rank_with_fewer_batches_is_named_and_nobody_waits(mpirun):
    done = _run(mpirun, 3, "train(model, opt, 3 if rank != 1 else 2)")
    assert done.returncode != 0
    assert "rank 1 left the program while others go on (optimizer 0, step 4" in done.stderr, done.stderr


def test_a_rank_that_leaves_is_noticed_by_whatever_optimizer_the_others_use(mpirun):
    done = _run(
        mpirun,
        2,
        """
model2, opt2 = make()
train(model2, opt2)
if rank == 1:
    sys.exit(3)
train(model2, opt2)
""",
    )
    assert done.returncode != 0
    assert "rank 1 left the program" in done.stderr, done.stderr


def test_all_ranks_leaving_together_is_no_error(mpirun):
    done = mpirun(3, "-c", PRELUDE + "print('bye')", quick_start=False)  # nothing of its end is left out
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.count("bye") == 3


def test_an_uncaught_exception_on_one_rank_ends_the_job(mpirun):
    done = _run(mpirun, 3, "if rank == 2: raise KeyError('lost file')\ntrain(model, opt, 5)")
    assert done.returncode != 0
    assert "KeyError: 'lost file'" in done.stderr


def test_a_rank_killed_ends_the_job(mpirun):
    done = _run(
        mpirun, 2, "import os, signal\nif rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntrain(model, opt, 5)"
    )
    assert done.returncode != 0


# What every rank survives, one after the other in one job, each on a communicator and with optimizers of its own.
PLACES = """
def report(case):
    @contextlib.contextmanager
    def reported():
        try:
            yield
        except (RuntimeError, ValueError) as error:
            print(f'<{case} {rank}: {error}>', flush=True)
    return reported()

def make_on_its_own(**options):
    return make(comm=MPI.COMM_WORLD.Dup(), **options)

model, opt = make_on_its_own()
train(model, opt, 2)
with report('no_sync'):
    for _ in range(3):
        opt.zero_grad()
        with opt.no_sync() if rank == 0 else contextlib.nullcontext():
            model(torch.ones(1, 3)).sum().backward()
        model(torch.ones(1, 3)).sum().backward()
        opt.step()

comm = MPI.COMM_WORLD.Dup()
model, opt = make(comm=comm)
train(model, opt, 2)
other, other_opt = make(comm=comm)
with report('order'):
    for m, o in [(model, opt), (other, other_opt)][:: 1 if rank else -1]:
        train(m, o)

calls = {
    'mean': lambda opt: opt.mean(1.0),
    'buffers': lambda opt: opt.average_buffers(),
    'group': lambda opt: opt.add_param_group({'params': [('new', torch.nn.Parameter(torch.ones(2)))]}),
}
for name, call in calls.items():
    model, opt = make_on_its_own(module=torch.nn.Linear(3, 2))
    with report(name):
        call(opt) if rank == 0 else model(torch.ones(1, 3)).sum().backward()

model, opt = make_on_its_own()
scheduler = dpoptim.lr_scheduler.ReduceLROnPlateau(opt)
with report('metric'):
    scheduler.step(torch.ones(2) if rank == 0 else 1.0)
train(model, opt)
"""


def test_ranks_at_different_places_is_an_error_on_all_that_says_where_each_is(mpirun):
    done = _run(mpirun, 2, PLACES)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"<no_sync {rank}: the ranks are at different places (rank " in done.stdout, done.stdout
        assert f"<order {rank}: the ranks are at different places (rank 1: optimizer 0, step 2" in done.stdout
        for case, purpose in (
            ("mean", "averaging a number"),
            ("buffers", "averaging buffers"),
            ("group", "adding a parameter group"),
        ):
            places = rf"rank 1: optimizer 0, step 0, 0 no_sync[^<]*rank 0: optimizer 0, step 0, {purpose}"
            assert re.search(rf"<{case} {rank}: the ranks are at different places \({places}", done.stdout), done.stdout
    assert "1 no_sync() blocks" in done.stdout
    assert "<metric 1: on rank 0: " in done.stdout
    assert "<metric 0: " in done.stdout


@pytest.mark.parametrize(("steps", "lost"), [(2, 1), pytest.param(3, 0, marks=pytest.mark.once)])
def test_a_rank_that_leaves_is_noticed_on_whichever_communicator_the_others_wait(mpirun, lost, steps):
    done = _run(
        mpirun,
        4,
        f"""
pair = MPI.COMM_WORLD.Split(rank // 2)
model2, opt2 = make(comm=pair)
for step in range(4):
    if rank == {lost} and step == {steps}:
        sys.exit(3)
    train(*((model, opt) if step % 2 else (model2, opt2)))
""",
    )
    assert done.returncode != 0
    assert f"rank {lost} left the program while others go on" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("num_ranks", "steps", "when"),
    [
        (4, 2, "after backward"),
        *(
            pytest.param(*case, marks=pytest.mark.once)
            for case in ((2, 2, "before backward"), (4, 1, "before backward"))
        ),
    ],
)
def test_a_rank_that_leaves_in_a_cycle_of_daso_is_named(mpirun, num_ranks, steps, when):
    done = _run(
        mpirun,
        num_ranks,
        f"""
opt.detach()
daso = dpoptim.DASO(dpoptim.SGD(model.parameters(), lr=0.1), total_epochs=9, warmup_epochs=0, node=rank // 2)
daso.end_epoch(1.0)
for step in range(9):
    daso.zero_grad()
    for phase in ("before backward", "after backward"):
        if (rank, step, phase) == (1, {steps}, "{when}"):
            sys.exit(3)
        if phase == "before backward":
            model(torch.ones(1, 3)).sum().backward()
    daso.step()
""",
    )
    assert done.returncode != 0
    assert "rank 1 left the program while others go on" in done.stderr, done.stderr


def test_a_closure_that_one_rank_alone_forgets_is_an_error_and_no_wait(mpirun):
    program = """
import torch, dpoptim
model = torch.nn.Linear(2, 2)
opt = dpoptim.DataParallelOptimizer(dpoptim.LBFGS(model.parameters()))
def closure():
    opt.zero_grad()
    loss = model(torch.ones(1, 2)).sum()
    loss.backward()
    return loss
opt.step(None if opt.communicator.rank == 1 else closure)
"""
    done = mpirun(2, "-c", program)
    assert done.returncode != 0
    assert "LBFGS.step() missing 1 required positional argument: 'closure'" in done.stderr
    assert "rank 1 left the program" in done.stderr
