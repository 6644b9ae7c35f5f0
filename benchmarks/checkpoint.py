"""Saving and loading 1 GB of state: dpoptim, torch.save by rank 0, torch.distributed.checkpoint.

    mpirun -n 2 python benchmarks/checkpoint.py

All write to one directory and flush to the disk (fsync) before the clock stops; in turn, round by round, in
one run. Needs a machine that is otherwise idle.
"""

import argparse
import os
import resource
import shutil
import socket
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from mpi4py import MPI
from torch import nn

import dpoptim
from dpoptim.utils import checkpoint

comm = MPI.COMM_WORLD
warnings.simplefilter("ignore")


def make(size_mb: int) -> tuple[nn.Module, dpoptim.DataParallelOptimizer]:
    """Return a model with AdamW's state: a third of the size each for weights and moments."""
    width = 1024
    layers = max(1, round(size_mb * 1e6 / (3 * 4 * width * width)))
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    optimizer = dpoptim.DataParallelOptimizer(dpoptim.AdamW(model.named_parameters(), lr=1e-3))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def flush(path: Path) -> None:
    """Flush every file below a directory, and the directories."""
    for place in [*path.rglob("*"), path, path.parent]:
        descriptor = os.open(place, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def timed(action: Callable[[], object]) -> float:
    """Return the seconds until all ranks have done it."""
    comm.Barrier()
    start_s = time.perf_counter()
    action()
    comm.Barrier()
    return time.perf_counter() - start_s


def peak_mb() -> float:
    """Return the most memory this process has had since the last call, in MiB, and start anew."""
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def main() -> None:
    """Measure and print the table on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=1000, help="size of the state")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--path", type=Path, default=Path("runs/checkpoint-benchmark"))
    args = parser.parse_args()
    port = None
    if comm.rank == 0:
        args.path.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{comm.bcast(port)}", rank=comm.rank, world_size=comm.size
    )
    model, optimizer = make(args.mb)
    ours, theirs, dcp_path = args.path / "ours", args.path / "torch", args.path / "dcp"

    def everything() -> dict[str, object]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def save_torch() -> None:
        if comm.rank == 0:
            theirs.mkdir(exist_ok=True)
            torch.save(everything(), theirs / "file.pt")
            flush(theirs)

    def load_torch() -> None:
        torch.load(theirs / "file.pt", weights_only=True)

    def save_dcp() -> None:
        dcp.save(everything(), storage_writer=dcp.FileSystemWriter(dcp_path, sync_files=True))

    def load_dcp() -> None:
        dcp.load(everything(), checkpoint_id=dcp_path)

    def save_later() -> None:
        checkpoint.save(ours, model=model, optimizer=optimizer, blocking=False, keep=1)

    def load_ours() -> None:
        optimizer.state.clear()
        checkpoint.load(ours, model=model, optimizer=optimizer)

    actions: dict[str, Callable[[], object]] = {
        "save dpoptim": lambda: checkpoint.save(ours, model=model, optimizer=optimizer, keep=1),
        "save torch.save, rank 0": save_torch,
        "save torch.distributed.checkpoint": save_dcp,
        "save dpoptim, blocking=False": save_later,
        "  then wait": checkpoint.wait,
        "one copy of the state": lambda: _copy(model, optimizer),
        "load torch.load": load_torch,
        "load torch.distributed.checkpoint": load_dcp,
        "load dpoptim": load_ours,
    }
    times: dict[str, list[float]] = {name: [] for name in actions}
    peaks: dict[str, float] = {}
    for round_number in range(args.rounds + 1):
        for name, action in actions.items():
            peak_mb()
            before = resource_mb()
            seconds = timed(action)
            if round_number:  # the first warms up
                times[name].append(seconds)
                peaks[name] = max(peaks.get(name, 0), peak_mb() - before)
    peaks = {name: max(comm.allgather(peak)) for name, peak in peaks.items()}
    if comm.rank == 0:
        print(
            f"{args.mb} MB, {comm.size} ranks, {args.rounds} rounds, torch {torch.__version__}; peak over before, MiB"
        )
        print("| | median s | min | max | peak |\n|---|---|---|---|---|")
        for name, values in times.items():
            row = f"{statistics.median(values):.3f} | {min(values):.3f} | {max(values):.3f} | {peaks[name]:.0f}"
            print(f"| {name} | {row} |", flush=True)
        shutil.rmtree(args.path)
    dist.destroy_process_group()


def resource_mb() -> float:
    """Return the memory this process has now, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _copy(model: nn.Module, optimizer: dpoptim.DataParallelOptimizer) -> None:
    for tensor in [*model.parameters(), *(v for e in optimizer.state.values() for v in e.values())]:
        tensor.detach().clone()


if __name__ == "__main__":
    main()
