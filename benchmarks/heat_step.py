"""A training step of dpoptim.heat's classes against Heat's own of the same names, blocking and non-blocking.

    mpirun -n 2 python benchmarks/heat_step.py

All train the models of `models.py` with AdamW, in turn, round by round, in one run. The optimizer is made as a Heat
program makes it: Heat's with torch's AdamW, dpoptim's with dpoptim.heat's. `Heat, fused` is Heat's with the fused
step that dpoptim chooses, so that what is left is communication. Heat's non-blocking mode makes its step in the next
forward; all contenders do the same number of each. Where Heat's classes raise an error it stands in the table.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import heat as ht
import torch
from models import MODELS, Task

import dpoptim.heat
from dpoptim.communicator import Communicator

OPTIONS = {"lr": 1e-4}
comm = ht.MPI_WORLD


def _program(task: Task, library: Any, optimizer: torch.optim.Optimizer, *, blocking: bool) -> Callable[[], None]:
    optim, neural = (ht.optim, ht.nn) if library is ht else (library, library)
    dp_optimizer = optim.DataParallelOptimizer(optimizer, blocking)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = neural.DataParallel(task.model, comm, dp_optimizer, blocking)

    def step() -> None:
        dp_optimizer.zero_grad()
        model(task.batch).pow(2).mean().backward()
        dp_optimizer.step()

    return step


def _heat(task: Task, *, blocking: bool, **options: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(task.model.parameters(), **OPTIONS, **options)
    return _program(task, ht, optimizer, blocking=blocking)


def _dpoptim(task: Task, *, blocking: bool) -> Callable[[], None]:
    optimizer = dpoptim.heat.AdamW(task.model.parameters(), **OPTIONS)
    return _program(task, dpoptim.heat, optimizer, blocking=blocking)


CONTENDERS: dict[str, Callable[[Task], Callable[[], None]]] = {
    "Heat, blocking": lambda task: _heat(task, blocking=True),
    "Heat, blocking, fused": lambda task: _heat(task, blocking=True, fused=True),
    "Heat, non-blocking": lambda task: _heat(task, blocking=False),
    "dpoptim.heat, blocking": lambda task: _dpoptim(task, blocking=True),
    "dpoptim.heat, non-blocking": lambda task: _dpoptim(task, blocking=False),
}


def measure(make: Callable[[], Task], num_rounds: int, steps_a_round: int) -> dict[str, list[float] | str]:
    """Return the milliseconds of a step in every round, or the error, of every contender; collective."""
    steps: dict[str, Callable[[], None]] = {}
    result: dict[str, list[float] | str] = {}
    for name, contender in CONTENDERS.items():
        torch.manual_seed(comm.rank)
        step = contender(make())
        error = None
        try:
            for _ in range(2):  # warm-up; a non-blocking step of Heat shows its errors in the second
                step()
        except (RuntimeError, ValueError, IndexError, AttributeError, KeyError, TypeError) as caught:
            error = type(caught).__name__
        if any(others := comm.handle.allgather(error)):
            result[name] = next(other for other in others if other)
        else:
            steps[name], result[name] = step, []
    for _ in range(num_rounds):
        for name, step in steps.items():
            comm.handle.Barrier()
            start_s = time.perf_counter()
            for _ in range(steps_a_round):
                step()
            comm.handle.Barrier()
            result[name].append((time.perf_counter() - start_s) / steps_a_round * 1e3)
    return result


def main() -> None:
    """Measure every model and print the table on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="interleaved rounds; medians are over them")
    parser.add_argument("--steps", type=int, default=3, help="steps in a round")
    parser.add_argument("--models", default="", help="only models whose name contains this")
    parser.add_argument("--json", type=Path, help="write every round's times here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    library = Communicator.shared().library()["library"]
    if comm.rank == 0:
        print(f"{comm.size} ranks, torch {torch.__version__}, Heat {ht.__version__}, {library}")
        print(f"median ms a step over {args.rounds} rounds of {args.steps}; in brackets Heat, blocking = 1\n")
        print(f"| model | {' | '.join(CONTENDERS)} |")
        print("|---" * (len(CONTENDERS) + 1) + "|")
    raw = {}
    for name, make in MODELS.items():
        if args.models not in name:
            continue
        raw[name] = measure(make, args.rounds, args.steps)
        first = statistics.median(raw[name]["Heat, blocking"])
        cells = []
        for times in raw[name].values():
            median = None if isinstance(times, str) else statistics.median(times)
            cells.append(f"fails: {times}" if median is None else f"{median:.1f} ({median / first:.2f})")
        if comm.rank == 0:
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    if comm.rank == 0 and args.json:
        args.json.write_text(json.dumps({"ranks": comm.size, "torch": torch.__version__, "mpi": library, "ms": raw}))


if __name__ == "__main__":
    main()
