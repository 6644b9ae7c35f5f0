"""Program: train every optimizer on all ranks, in every mode, and say what became of it; under mpirun.

    mpirun -n N python sweep.py ORACLES RESULTS TASKS

``TASKS`` holds lines "number of an entry, mode". Rank 0 adds to ``RESULTS`` a line of JSON before and after each, so
that whoever started the program knows at which one it hangs or dies. What a rank raises is in ``RESULTS.RANK``.
"""

import contextlib
import copy
import functools
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from catalogue import Entry, entries
from training import STEPS, Net, Oracle, described, difference, make, make_net, seed_all, train, values_of

import dpoptim
from dpoptim.utils import checkpoint
from dpoptim.utils.consistency import digest

MODES: dict[str, dict[str, Any]] = {"replicated": {}, "sharded": {"shard": True}, "node-shared": {"node_shared": True}}
# Rounding in float64 and float32, relative to the whole movement: steps divide by roots of small numbers, and cubes of
# rounding errors in twelve steps stay far below these; what is wrong is off by more than 1e-4.
_ROUNDING = {torch.float64: 1e-7, torch.float32: 1e-3}
_OF_NOISE = 100  # times what rounding errors in the gradients alone do to the class itself


class StoppedError(Exception):
    """A stage failed on all ranks."""


class Trial:
    """One optimizer in one mode."""

    def __init__(self, world: Any, comm: Any, entry: Entry, oracle: Oracle, noise: float, mode: str) -> None:
        self.world, self.comm, self.entry, self.oracle, self.mode = world, comm, entry, oracle, mode
        self.tolerance = max(_ROUNDING[oracle.dtype], _OF_NOISE * noise)
        self.found: dict[str, Any] = {"off": {}, "errors": {}, "warnings": [], "alike": True, "mode now": None}
        # One way on two ranks and the other on three; other packages' wrappers are nothing that a checkpoint knows.
        is_even = (len(entry.name) + list(MODES).index(mode) + world.size) % 2 == 0
        self.how_to_save = "checkpoint" if is_even and entry.kind != "theirs around ours" else "state_dict"
        self.made: list[Any] = []
        self.errors_path = Path(f"{sys.argv[2]}.{world.rank}")

    def make(self, model: Net) -> tuple[Any, Any]:
        """Return what the user holds, and the class that is tried; collective."""
        ours = []

        def wrap(optimizer: Any) -> Any:
            ours.append(dpoptim.DataParallelOptimizer(optimizer, self.comm, overlap=False, **MODES[self.mode]))
            return ours[0]

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt = make(self.entry, model, self.oracle.num_groups, wrap)
        if not self.made:
            texts = [str(warning.message) for warning in caught]
            self.found["warnings"] = [text for text in texts if re.search(r"\brank|replicat|divide", text)]
            self.found["mode now"] = ours[0].mode
        self.made.append(ours[0])
        return opt, (opt if self.entry.kind == "theirs around ours" else ours[0].optimizer)

    def train(self, opt: Any, inner: Any, model: Net, steps: range) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(opt, inner, model, steps, way=self.oracle.way, rank=self.world.rank, num_ranks=self.world.size)

    def stage(self, name: str, action: Callable[[], Any]) -> Any:
        """Do something on all ranks, and learn what they raise; collective.

        Raises
        ------
        StoppedError
            If it failed.
        """
        error, result = None, None
        try:
            result = action()
        except Exception as caught:
            error = described(caught)
            self.errors_path.write_text(f"{name}: {error}")
        meet(self.world)
        errors = self.world.allgather(error)
        self.errors_path.unlink(missing_ok=True)
        if any(errors):
            everywhere = all(errors)
            text = next(text for text in errors if text)
            self.found["errors"][name] = text if everywhere else f"on some ranks only: {text}"
            self.found["some ranks"] = self.found.get("some ranks", False) or not everywhere
            raise StoppedError
        return result

    def compare(self, name: str, model: Net, *expected: list[torch.Tensor] | None) -> None:
        """Compare with the oracle, or the nearest of several, and between ranks; collective."""
        ours = values_of(model)
        offs = [difference(ours, theirs, self.oracle.start) for theirs in expected if theirs is not None]
        self.found["off"][name] = max(self.world.allgather(min(offs))) if offs else 0.0
        digests = self.world.allgather([digest(values) for values in ours])
        self.found["alike"] = self.found["alike"] and all(other == digests[0] for other in digests)

    def run(self) -> None:
        """Train, save, go on, resume, and train with seeds that differ between ranks; collective."""
        whole = self.oracle.whole
        model = make_net(self.oracle.dtype)
        seed_all(1)
        opt, inner = self.stage("construction", lambda: self.make(model))
        self.stage("training", lambda: self.train(opt, inner, model, range(STEPS)))
        self.compare("training", model, whole.middle)
        values = copy.deepcopy(model.state_dict())
        how = self.how_to_save
        saved = None
        with contextlib.suppress(StoppedError):
            saved = self.stage(how, functools.partial(_SAVE[how], self, opt, model))
        rest = range(STEPS, 2 * STEPS)
        self.stage("training on", lambda: self.train(opt, inner, model, rest))
        self.compare("training on", model, whole.end)
        seed_all(100 + self.world.rank)
        self.stage("training with seeds that differ", lambda: self.train(opt, inner, model, range(2)))
        self.compare("training with seeds that differ", model)
        if saved is not None:
            resumed = self.stage("resuming", lambda: self._resume(saved, values, rest))
            self.compare("resuming", resumed, whole.end, self.oracle.resumed)

    def _save_state(self, opt: Any, model: Net) -> Any:
        if isinstance(opt, dpoptim.DataParallelOptimizer) and opt.mode != "replicated":
            return copy.deepcopy(opt.full_state_dict(rank0_only=False))
        return copy.deepcopy(opt.state_dict())

    def _save_checkpoint(self, opt: Any, model: Net) -> Path:
        path = Path(self.world.bcast(tempfile.mkdtemp(prefix="foreign-", dir="/dev/shm")))
        checkpoint.save(path, model=model, optimizer=opt)
        return path

    def _resume(self, state: Any, values: Any, steps: range) -> Net:
        model = make_net(self.oracle.dtype)
        model.load_state_dict(values)
        seed_all(1)
        opt, inner = self.make(model)
        if self.how_to_save == "checkpoint":
            checkpoint.load(state, model=model, optimizer=opt)
        elif isinstance(opt, dpoptim.DataParallelOptimizer) and opt.mode != "replicated":
            opt.load_full_state_dict(state)
        else:
            opt.load_state_dict(state)
        self.train(opt, inner, model, steps)
        return model

    def verdict(self) -> str:
        """Return what it comes to, the worst first."""
        found = self.found
        if found.get("some ranks"):
            return "error on some ranks"
        if not found["alike"]:
            return "replicas differ"
        if any(off > self.tolerance for off in found["off"].values()):
            return "WRONG"
        if any(stage in found["errors"] for stage in ("construction", "training", "training on")):
            return "error"
        if "training with seeds that differ" in found["errors"]:
            return "error"
        if found["mode now"] == "replicated" and self.mode != "replicated":
            return "replicated with a warning" if found["warnings"] else "replicated without a word"
        return "right"


_SAVE = {"state_dict": Trial._save_state, "checkpoint": Trial._save_checkpoint}


def meet(world: Any) -> None:
    """Wait for all ranks, asleep; collective."""
    arrived = world.Ibarrier()
    while not arrived.Test():
        time.sleep(5e-4)


def main() -> None:
    """Try what is to do."""
    from mpi4py import MPI

    torch.set_num_threads(1)
    oracles, results, todo = (Path(argument) for argument in sys.argv[1:])
    world = MPI.COMM_WORLD
    comm = world.Dup()
    everything = entries()
    for line in todo.read_text().splitlines():
        number, mode = line.split(",")
        entry = everything[int(number)]
        both = pickle.loads((oracles / f"{number}.pickle").read_bytes())
        oracle = both[1 + (world.size > 2)]  # two groups on three ranks
        about = {"name": entry.name, "package": entry.package, "kind": entry.kind, "mode": mode, "ranks": world.size}
        _write(world, results, about)
        if oracle.error is not None:
            _write(world, results, {**about, "verdict": "fails without dpoptim", "text": oracle.error})
            continue
        trial = Trial(world, comm, entry, oracle, max(some.noise for some in both.values()), mode)
        start = time.perf_counter()
        stopped = False
        try:
            trial.run()
        except StoppedError:
            stopped = True
        result = {**about, "verdict": trial.verdict(), "way": oracle.way, "dtype": str(oracle.dtype)}
        result |= {"groups": oracle.num_groups, "tolerance": trial.tolerance, **trial.found}
        result |= {"its own resuming": oracle.resume_error, "seconds": round(time.perf_counter() - start, 2)}
        _write(world, results, result)
        if stopped or trial.found["errors"]:
            comm = world.Dup()  # whatever the ranks left behind in the other one
        else:
            for ours in trial.made:
                ours.detach()
        for path in Path("/dev/shm").glob("foreign-*"):
            shutil.rmtree(path, ignore_errors=True)
    _write(world, results, {"done": True})
    meet(world)
    sys.stdout.flush()
    os._exit(0)  # not MPI's end, which waits for what was abandoned after errors


def _write(world: Any, results: Path, line: dict[str, Any]) -> None:
    if world.rank == 0:
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
