"""A training step by every way there is: dpoptim's modes, torch's DDP, ZeRO and FSDP2, Heat, and without any exchange.

    mpirun -n 2 python benchmarks/step.py

All ways (`contenders.py`) train the same models (`models.py`) with AdamW, in turn, round by round, in one run, in an
order drawn anew for each round. What counts is the *overhead*: the median step less the median step of `local`, as a
ratio to that of DDP with the same fused AdamW. Times drift with the machine; the ratio of medians of an interleaved run
does less. The memory of a way, measured first, is that of its construction and first steps (`memory.py`). Later the
process keeps freed memory (Note [glibc] there). A way that raises an error stands in the table with it. Set
OMP_NUM_THREADS, and leave the machine alone meanwhile; `make bench` measures 1 to 4 ranks and draws.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, Program, start_gloo, stop_gloo
from memory import PeakMemory, give_back_freed_memory, keep_freed_memory
from models import MODELS, Task, tiny
from mpi4py import MPI
from report import tables

from dpoptim.comm.communicator import Communicator

comm = MPI.COMM_WORLD
_WARM_UP_STEPS = 3
_WARM_UP_ROUNDS = 2


def measure_memory(make: Callable[[], Task], name: str) -> dict[str, Any]:
    """Return the memory of a contender's construction and first steps, or its error; collective."""
    error, held, memory = None, {}, PeakMemory()
    try:
        first = CONTENDERS[name](tiny())  # what it loads and allocates once is not the model's
        first.step()
        first.close()
        comm.Barrier()
        with memory:
            program = CONTENDERS[name](make())
            for _ in range(_WARM_UP_STEPS):  # Heat's non-blocking step shows its errors in the second
                program.step()
            comm.Barrier()
        held = program.held_bytes()
        comm.Barrier()  # what is shared is shared until all have looked
        program.close()
    except Exception as caught:  # any, since it is another library's
        error = f"{type(caught).__name__}: {caught}".splitlines()[0][:160]
    ranks = comm.allgather((error, held, memory.peak_bytes))
    if any(other for other, _, _ in ranks):
        return {"fails": next(other for other, _, _ in ranks if other)}
    kinds = ("parameters", "gradients", "state")
    return {
        "held_mb": {kind: round(statistics.mean(held[kind] for _, held, _ in ranks) / 1e6, 3) for kind in kinds},
        "peak_mb": round(statistics.mean(peak for _, _, peak in ranks) / 1e6, 3),
    }


def measure_times(
    make: Callable[[], Task], names: Sequence[str], num_rounds: int, num_steps: int
) -> dict[str, list[float]]:
    """Return each contender's milliseconds of a step in every round; collective."""
    programs: dict[str, Program] = {}
    for name in names:
        torch.manual_seed(comm.rank)
        programs[name] = CONTENDERS[name](make())
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(_WARM_UP_ROUNDS + num_rounds):
        order = random.Random(round_number).sample(names, len(names))  # noqa: S311  the same on all ranks
        for name in order:
            comm.Barrier()
            start_s = time.perf_counter()
            for _ in range(num_steps):
                programs[name].step()
            comm.Barrier()
            if round_number >= _WARM_UP_ROUNDS:
                times[name].append(round((time.perf_counter() - start_s) / num_steps * 1e3, 3))
    for program in programs.values():
        program.close()
    return times


def configuration(args: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured, and on what; collective."""
    communicator = Communicator.shared()
    try:
        from heat import __version__ as heat
    except ImportError:
        heat = None
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "ranks": comm.size,
        "nodes": communicator.topology.num_nodes,
        "processor": next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "mpi": communicator.library()["library"],
        "heat": heat,
        "rounds": args.rounds,
        "steps": args.steps,
    }


def main() -> None:
    """Measure every model and print the tables on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="interleaved rounds; medians are over them")
    parser.add_argument("--steps", type=int, default=3, help="steps in a round")
    parser.add_argument("--models", default="", help="only models whose name contains this")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--json", type=Path, help="write every round's times here")
    args = parser.parse_args()
    start_gloo()
    models = {name: make for name, make in MODELS.items() if args.models in name}
    result: dict[str, Any] = {"configuration": configuration(args), "models": {}}
    give_back_freed_memory()
    for model, make in models.items():
        result["models"][model] = {name: measure_memory(make, name) for name in args.contenders}
    keep_freed_memory()
    for model, measured in result["models"].items():
        working = [name for name in args.contenders if "fails" not in measured[name]]
        times = measure_times(models[model], working, args.rounds, args.steps)
        for name in working:
            measured[name]["ms"] = times[name]
    if comm.rank == 0:
        print("\n".join(tables(result)), flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result))
    stop_gloo()


if __name__ == "__main__":
    main()
