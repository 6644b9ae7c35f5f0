"""How the tests run, alone and on every rank of an mpirun.

``pytest`` alone runs all tests, the parallel ones on one rank. ``mpirun -n N pytest`` runs those marked
``parallel``, the same ones in the same order on every rank. After each test the ranks agree on its outcome: a test
that fails on one rank fails on all, so that they stay in step, and rank 0 shows every rank's traceback.

Long tables, which would find at one number of ranks what they find at another, are marked ``ranks(2, 3)``:
``mpirun -n N pytest`` leaves them out at other N, and says so at its end. Whoever names a file gets all of its tests.
What needs but one environment (no MPI, no particular torch) is marked ``once``; ``make test`` leaves it out of its
second.
"""

import atexit
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from meeting import meet
from programs import ENVIRONMENT, OPEN_MPI_DIRECTORY, QUICK_START

import dpoptim.comm.overlap
import dpoptim.gradients.homes
from dpoptim.comm.communicator import Communicator
from dpoptim.comm.mpi.messages import Messages
from dpoptim.comm.mpi.polled import PolledMessages
from dpoptim.comm.overlap import Trial

UNDER_MPIRUN = any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"))
if UNDER_MPIRUN:
    # Ranks that clear old temporary directories in one place stumble over each other, and one that dies of it ends all.
    _own_root = tempfile.mkdtemp(prefix="dpoptim-tests-")
    atexit.register(shutil.rmtree, _own_root, ignore_errors=True)
    os.environ["PYTEST_DEBUG_TEMPROOT"] = _own_root


@pytest.hookimpl(trylast=True)  # after the terminal reporter
def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    num_ranks = rank = 0  # alone
    if UNDER_MPIRUN:
        from mpi4py import MPI

        num_ranks, rank = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if MPI.COMM_WORLD.rank != 0 and reporter is not None:
            reporter._tw._file = open(os.devnull, "w")  # noqa: PTH123, SIM115  open for as long as pytest runs
    config.pluginmanager.register(support.recorder(num_ranks, rank), "support")


_left_out = pytest.StashKey[int]()


def pytest_collection_finish() -> None:
    """Keep Python from looking for garbage among all that torch and pytest have made, again and again."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.freeze)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not UNDER_MPIRUN:
        return
    from mpi4py import MPI

    parallel = [item for item in items if item.get_closest_marker("parallel") is not None]
    chosen = parallel
    if config.args == config.getini("testpaths"):
        chosen = [item for item in parallel if _is_for(MPI.COMM_WORLD.size, item)]
    kept = set(chosen)
    config.stash[_left_out] = len(parallel) - len(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = chosen


def _is_for(num_ranks: int, item: pytest.Item) -> bool:
    mark = item.get_closest_marker("ranks")
    return mark is None or num_ranks in mark.args


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if num_tests := config.stash.get(_left_out, 0):
        terminalreporter.write_line(
            f"{num_tests} parallel tests are for other numbers of ranks (mark ranks); naming their files runs them here"
        )


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Let a test that failed on one rank fail on all.

    If the others don't come, as from a collective that this rank has left, it says what it has died of before they end.
    """
    if not UNDER_MPIRUN:
        return (yield)
    from mpi4py import MPI

    error, result = None, None
    try:
        result = yield
    except BaseException as caught:  # pytest's own outcomes are BaseExceptions; raised again below
        error = caught
    text = None if error is None else "".join(traceback.format_exception(error))
    capture = pyfuncitem.config.pluginmanager.get_plugin("capturemanager")

    def say() -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n--- rank {MPI.COMM_WORLD.rank}, {pyfuncitem.nodeid}:\n{text}", file=sys.stderr, flush=True)

    meet(MPI.COMM_WORLD, say if text is not None else None)
    failures = {rank: text for rank, text in enumerate(MPI.COMM_WORLD.allgather(text)) if text is not None}
    if error is not None and len(failures) == MPI.COMM_WORLD.size:
        raise error
    if failures:
        pytest.fail("\n".join(f"--- rank {rank}:\n{text}" for rank, text in failures.items()), pytrace=False)
    return result


@pytest.fixture(autouse=True)
def _large_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """With three ranks take the gradients of the tests' small models for large ones (dpoptim/gradients/homes.py)."""
    if UNDER_MPIRUN:
        from mpi4py import MPI

        if MPI.COMM_WORLD.size == 3:
            monkeypatch.setattr(dpoptim.gradients.homes, "_LARGE_BYTES", 16)


@pytest.fixture(autouse=True)
def _environment_of_programs() -> Generator[None, None, None]:
    """Set the environment of the programs that a test starts.

    They get a directory of their own for the memory that Open MPI's ranks share: it names its files after 16 bits of a
    hash of the launcher's process id, so that two jobs at the same time may write into each other's memory and crash.
    """
    if UNDER_MPIRUN:
        yield
        return
    # Not by the test's own monkeypatch, which a test may have change how files are removed.
    with (
        tempfile.TemporaryDirectory(prefix="open-mpi-of-tests-", dir="/dev/shm") as directory,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in (ENVIRONMENT | QUICK_START | {OPEN_MPI_DIRECTORY: directory}).items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def world() -> Any:
    """Return mpi4py's COMM_WORLD."""
    from mpi4py import MPI

    return MPI.COMM_WORLD


@pytest.fixture(params=["SELF", "WORLD", "DUP"])
def any_comm(request: pytest.FixtureRequest) -> Generator[Any, None, None]:
    """Give COMM_SELF, COMM_WORLD and a duplicate of it in turn."""
    from mpi4py import MPI

    if request.param == "DUP":
        comm = MPI.COMM_WORLD.Dup()
        yield comm
        comm.Free()
    else:
        yield getattr(MPI, f"COMM_{request.param}")


@pytest.fixture
def mpirun() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs a Python program on N ranks and returns what became of it.

    Without ``quick_start`` it runs as a user's program does, with torch's compiler.
    """

    def run(
        num_ranks: int, *args: str, quick_start: bool = True, timeout_s: float = 120, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        launcher = str(Path(sys.executable).parent / "mpirun")
        environment = {name: value for name, value in os.environ.items() if quick_start or name not in QUICK_START}
        command = [launcher, "-n", str(num_ranks), sys.executable, *args]
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            errors="replace",  # a character may be cut where ranks write at once
            env=environment,
            cwd=cwd,
        ) as job:
            try:
                output, errors = job.communicate(timeout=timeout_s)
            except BaseException:
                job.terminate()  # the launcher ends its ranks, which a kill of it would leave behind
                raise
        return subprocess.CompletedProcess(command, job.returncode, output, errors)

    return run


@pytest.fixture
def looked_after(world: Any, monkeypatch: pytest.MonkeyPatch) -> Generator[None, None, None]:
    """Let every rank have a node for itself, and ``overlap=True`` mean that hooks look after what is under way."""
    own = world.Dup()  # the communicator that others share knows the real nodes
    shared = Communicator.shared
    monkeypatch.setattr(Communicator, "shared", lambda comm=None: shared(own))
    monkeypatch.setattr(Messages, "split_node", lambda self: self.split(self.rank, 0))
    monkeypatch.setattr(dpoptim.comm.overlap, "try_overlap", lambda _: Trial(polled_s=1.0))
    made = []
    init = PolledMessages.__init__

    def note_and_init(self: PolledMessages, messages: Messages) -> None:
        made.append(self)
        init(self, messages)

    monkeypatch.setattr(PolledMessages, "__init__", note_and_init)
    yield
    assert made or world.size == 1
