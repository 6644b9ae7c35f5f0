"""A training step of dpoptim against torch's DistributedDataParallel and against the same work without any exchange.

    mpirun -n 2 python benchmarks/step.py

All train the same models with the same fused AdamW, in turn, round by round, in one run. What counts is the *overhead*:
the median step less the median step of `local`, as a ratio to DDP's overhead. Times drift with the machine; the ratio
of medians of an interleaved run does not. Set OMP_NUM_THREADS, and leave the machine alone meanwhile.
"""

import argparse
import json
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from models import MODELS, Task
from mpi4py import MPI
from torch.nn.parallel import DistributedDataParallel

import dpoptim
from dpoptim.communicator import Communicator

comm = MPI.COMM_WORLD
OPTIONS = {"lr": 1e-4}


def local(task: Task) -> Callable[[], None]:
    """Every rank trains for itself."""
    return _step(task, task.model, torch.optim.AdamW(task.model.parameters(), fused=True, **OPTIONS))


def ddp(task: Task) -> Callable[[], None]:
    """DistributedDataParallel over gloo."""
    optimizer = torch.optim.AdamW(task.model.parameters(), fused=True, **OPTIONS)
    return _step(task, DistributedDataParallel(task.model), optimizer)


def replicated(task: Task, *, overlap: bool) -> Callable[[], None]:
    """DataParallelOptimizer."""
    inner = dpoptim.AdamW(task.model.parameters(), **OPTIONS)
    return _step(task, task.model, dpoptim.DataParallelOptimizer(inner, overlap=overlap))


CONTENDERS: dict[str, Callable[[Task], Callable[[], None]]] = {
    "local": local,
    "DDP": ddp,
    "dpoptim": lambda task: replicated(task, overlap=False),
    "dpoptim, overlap": lambda task: replicated(task, overlap=True),
}


def _step(task: Task, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        model(task.batch).float().pow(2).mean().backward()
        optimizer.step()

    return step


def measure(make: Callable[[], Task], num_rounds: int, steps_a_round: int) -> dict[str, list[float]]:
    """Return the milliseconds of a step in every round, of every contender. Collective."""
    steps = {}
    for name, contender in CONTENDERS.items():
        torch.manual_seed(comm.rank)
        steps[name] = contender(make())
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for round_number in range(num_rounds + 2):
        for name, step in steps.items():
            comm.Barrier()
            start_s = time.perf_counter()
            for _ in range(steps_a_round):
                step()
            comm.Barrier()
            if round_number >= 2:  # the first two warm up
                times[name].append((time.perf_counter() - start_s) / steps_a_round * 1e3)
    return times


def start_gloo() -> None:
    """Make the process group that DDP needs; rank 0 finds a free port for it."""
    port = None
    if comm.rank == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    address = f"tcp://127.0.0.1:{comm.bcast(port)}"
    dist.init_process_group("gloo", init_method=address, rank=comm.rank, world_size=comm.size)


def main() -> None:
    """Measure every model and print the table on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="interleaved rounds; medians are over them")
    parser.add_argument("--steps", type=int, default=3, help="steps in a round")
    parser.add_argument("--models", default="", help="only models whose name contains this")
    parser.add_argument("--json", type=Path, help="write every round's times here")
    args = parser.parse_args()
    start_gloo()
    library = Communicator.shared().library()["library"]
    if comm.rank == 0:
        print(f"{comm.size} ranks, {torch.get_num_threads()} threads each, torch {torch.__version__}, {library}")
        print(f"median ms a step, {args.rounds} rounds of {args.steps}; in brackets the overhead over local, DDP = 1\n")
        print(f"| model | {' | '.join(CONTENDERS)} |")
        print("|---" * (len(CONTENDERS) + 1) + "|")
    raw = {}
    for name, make in MODELS.items():
        if args.models not in name:
            continue
        raw[name] = measure(make, args.rounds, args.steps)
        medians = {contender: statistics.median(times) for contender, times in raw[name].items()}
        overhead = medians["DDP"] - medians["local"]
        cells = [f"{median:.2f} ({(median - medians['local']) / overhead:.2f})" for median in medians.values()]
        if comm.rank == 0:
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    if comm.rank == 0 and args.json:
        args.json.write_text(json.dumps({"ranks": comm.size, "torch": torch.__version__, "mpi": library, "ms": raw}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
