"""``python -m dpoptim``: this machine and MPI, N ranks against one process, how fast it is, saved state."""

import argparse
import sys
from collections.abc import Sequence

from dpoptim.bench import bench
from dpoptim.diagnostics import check, info
from dpoptim.utils.checkpoint.commands import add_commands, run

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; collective under mpirun. Return the exit status, the same on every rank."""
    parser = argparse.ArgumentParser(prog="python -m dpoptim", description="Data-parallel optimizers over MPI.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="say what MPI, nodes, ranks and torch are here, and how optimizers step")
    commands.add_parser("check", help="train on all ranks and in one process, and compare (under mpirun)")
    bench_parser = commands.add_parser(
        "bench", help="measure collectives and training steps here, and say what was chosen and why (under mpirun)"
    )
    bench_parser.add_argument(
        "--seconds", type=_positive, default=10.0, help="about how long to measure (default: %(default)g)"
    )
    add_commands(commands.add_parser("checkpoint", help="look into checkpoints, verify and convert them"))
    parsed = parser.parse_args(arguments)
    command = parsed.command
    if command == "checkpoint":
        return run(parsed)
    if command == "bench":
        return bench(parsed.seconds)
    return info() if command == "info" else check()


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be > 0, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
