"""Whether two checkouts train to the same bits: a digest of the parameters after some steps, by model and mode.

    mpirun -n 2 python benchmarks/bits.py > before      # in one checkout
    mpirun -n 2 python benchmarks/bits.py > after       # in the other, with the same MPI and torch
    diff before after

A refactoring changes none of them. What changes the order of a sum changes them all.
"""

import argparse
import hashlib

import torch
from models import MODELS
from mpi4py import MPI

import dpoptim

_MODES: dict[str, dict[str, bool]] = {
    "replicated": {},
    "sharded": {"shard": True},
    "node-shared": {"node_shared": True},
}


def digest(parameters: list[torch.Tensor]) -> str:
    """Return a digest of all bytes, in order."""
    found = hashlib.sha256()
    for parameter in parameters:
        found.update(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def main() -> None:
    """Train every model in every mode, and print the digests on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    comm = MPI.COMM_WORLD
    for name, make in MODELS.items():
        for mode, options in _MODES.items():
            torch.manual_seed(comm.rank)  # each rank has its own batch; parameters are rank 0's
            task = make()
            opt = dpoptim.DataParallelOptimizer(dpoptim.AdamW(task.model.parameters(), lr=1e-3), **options)
            for _ in range(args.steps):
                opt.zero_grad()
                task.model(task.batch).pow(2).mean().backward()
                opt.step()
            digests = comm.allgather(digest(list(task.model.parameters())))
            if comm.rank == 0:
                verdict = "" if len(set(digests)) == 1 else ", and others on other ranks"
                print(f"{comm.size} ranks, {name}, {mode}: {digests[0]}{verdict}", flush=True)
            opt.detach()


if __name__ == "__main__":
    main()
