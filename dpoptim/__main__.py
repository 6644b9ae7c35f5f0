"""``python -m dpoptim``: this machine and MPI, N ranks against one process, how fast it is, saved state."""

import argparse
import sys
from collections.abc import Sequence

from dpoptim.commands.bench import bench
from dpoptim.commands.check import check
from dpoptim.commands.checkpoint import add_commands, run
from dpoptim.commands.class_check import MODES, check_class
from dpoptim.commands.info import info

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; collective under mpirun. Return the exit status, the same on every rank."""
    parser = argparse.ArgumentParser(prog="python -m dpoptim", description="Data-parallel optimizers over MPI.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="say what MPI, nodes, ranks and torch are here, and how optimizers step")
    check_parser = commands.add_parser(
        "check", help="train on all ranks and in one process, and compare (under mpirun)"
    )
    check_parser.add_argument(
        "--optimizer",
        metavar="MODULE:CLASS",
        help="check this class in each mode, also saved and resumed (default: every class of torch.optim, replicated)",
    )
    check_parser.add_argument(
        "--options", help="arguments of the class, such as 'lr=0.1, betas=(0.9, 0.99)' or a JSON object"
    )
    check_parser.add_argument("--modes", help=f"of the class: which of {','.join(MODES)} (default: all)")
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
    if command == "info":
        return info()
    of_class = (parsed.optimizer, parsed.options, parsed.modes)
    return check() if of_class == (None, None, None) else check_class(*of_class)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be > 0, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
