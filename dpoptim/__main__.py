"""``python -m dpoptim info``, ``check`` and ``checkpoint``: this machine and MPI, N ranks against one, saved state."""

import argparse
import sys
from collections.abc import Sequence

from dpoptim.diagnostics import check, info
from dpoptim.utils.checkpoint.commands import add_commands, run

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; collective under mpirun. Return the exit status, the same on every rank."""
    parser = argparse.ArgumentParser(prog="python -m dpoptim", description="Data-parallel optimizers over MPI.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="say what MPI, nodes, ranks and torch are here, and how optimizers step")
    commands.add_parser("check", help="train on all ranks and in one process, and compare (under mpirun)")
    add_commands(commands.add_parser("checkpoint", help="look into checkpoints, verify and convert them"))
    parsed = parser.parse_args(arguments)
    command = parsed.command
    if command == "checkpoint":
        return run(parsed)
    return info() if command == "info" else check()


if __name__ == "__main__":
    sys.exit(main())
