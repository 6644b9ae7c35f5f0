"""A signal to one rank stops all of them at the same step."""

import os
import re
import signal
import threading

import pytest

from dpoptim.utils import preemption

PROGRAM = """
import os, signal, sys, torch, dpoptim
from mpi4py import MPI
from dpoptim.comm.communicator import Communicator
from dpoptim.comm.router import Router
from dpoptim.utils import checkpoint, preemption
comm, path, number, overlap = MPI.COMM_WORLD, sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
model = torch.nn.Linear(3, 2)
opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.named_parameters(), lr=0.1), overlap=overlap)
calls = []
for kind, name in ((Communicator, "all_reduce"), (Communicator, "start_all_reduce"), (Router, "start_sum")):
    original = getattr(kind, name)
    count = lambda self, t, original=original, **k: (calls.append(len(t)), original(self, t, **k))[1]
    setattr(kind, name, count)
stop = preemption.StopSignal(opt)
for step in range(100):
    if step == 5 and comm.rank == comm.size - 1:
        os.kill(os.getpid(), number)
    opt.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    opt.step()
    if stop.should_stop:
        assert step == 5 and len(calls) == (6 * 3 if comm.size > 1 else 0), calls  # roll call, bucket, report
        checkpoint.save(path, model=model, step=step)
        print(f"<{comm.rank} saved step {step}>")
        sys.exit(preemption.EXIT_CODE)
"""


@pytest.mark.parametrize(
    ("num_ranks", "number"),
    [(1, signal.SIGTERM), (2, signal.SIGUSR1), pytest.param(4, signal.SIGTERM, marks=pytest.mark.once)],
)
def test_all_ranks_save_and_leave_at_the_same_step(mpirun, tmp_path, num_ranks, number):
    done = mpirun(num_ranks, "-c", PROGRAM, str(tmp_path), str(int(number)), str(num_ranks == 2))
    assert done.returncode == preemption.EXIT_CODE == 75, done.stderr
    assert sorted(re.findall(r"<(\d) saved step 5>", done.stdout)) == [str(rank) for rank in range(num_ranks)]
    assert f"rank {num_ranks - 1} received {number.name}: all ranks stop at the next step" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001"]


def test_handlers_are_put_back_and_those_before_are_called():
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        with preemption.StopSignal() as stop:
            assert not stop.should_stop
            os.kill(os.getpid(), signal.SIGUSR1)
            assert seen == [signal.SIGUSR1]
            assert stop.should_stop
        os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == [signal.SIGUSR1] * 2
    finally:
        signal.signal(signal.SIGUSR1, before)
        stop._roll_call._stop_requested = False  # it is that of all tests


def test_only_in_the_main_thread():
    errors = []

    def make():
        try:
            preemption.StopSignal()
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert errors == ["StopSignal must be made in the main thread: Python handles signals nowhere else"]
