"""The training steps of `step.py` on hosts joined by a slow network.

    python benchmarks/links.py --hosts 2 --rate 1gbit --ranks 1 2      # as root, with the mpich wheel

Starts `step.py` on network namespaces (`hosts.py`) with so many ranks on each host, and prints its tables.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hosts import Hosts, missing
from report import tables

__all__ = ["measure_on_hosts"]

_CONTENDERS = ("local", "DDP", "replicated", "sharded", "node-shared")


def measure_on_hosts(
    num_hosts: int, ranks: int, rate: str | None, options: Sequence[str], *, timeout_s: float = 900
) -> dict[str, Any]:
    """Return what `step.py` measures with so many ranks on each of so many hosts.

    Parameters
    ----------
    num_hosts, ranks : int
        How many hosts, and how many ranks on each.
    rate : str, optional
        Bandwidth of each host's link; None as fast as it is.
    options : sequence of str
        Of `step.py`.

    Raises
    ------
    RuntimeError
        It failed, or took longer than ``timeout_s``; with what it has printed.
    """
    program = str(Path(__file__).with_name("step.py"))
    with Hosts(num_hosts, rate=rate) as hosts, tempfile.TemporaryDirectory() as directory:
        place = Path(directory, "result.json")
        first = {"DPOPTIM_FIRST_HOST": hosts.addresses[0]}
        try:
            done = hosts.mpirun(ranks, program, *options, "--json", str(place), timeout_s=timeout_s, env=first)
        except subprocess.TimeoutExpired as late:
            raise RuntimeError(f"stopped after {timeout_s:g} s: {late.stdout}\n{late.stderr}") from late
        if done.returncode:
            raise RuntimeError(done.stderr)
        result: dict[str, Any] = json.loads(place.read_text())
    result["configuration"]["link"] = rate or "an unshaped link"
    return result


def main() -> None:
    """Measure with each number of ranks and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="on each host, one run for each number")
    parser.add_argument("--rate", default="1gbit", help="bandwidth of a host's link")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="steps in a round")
    parser.add_argument("--models", default="", help="only models whose name contains this")
    parser.add_argument("--contenders", nargs="+", default=list(_CONTENDERS), metavar="NAME")
    parser.add_argument("--json", type=Path, help="directory for every round's times")
    args = parser.parse_args()
    reason = missing()
    if reason is not None:
        sys.exit(f"no hosts to be had: {reason}")
    options = ("--rounds", str(args.rounds), "--steps", str(args.steps), "--models", args.models)
    for ranks in args.ranks:
        result = measure_on_hosts(args.hosts, ranks, args.rate, (*options, "--contenders", *args.contenders))
        print("\n".join(tables(result)), flush=True)
        if args.json:
            args.json.mkdir(parents=True, exist_ok=True)
            (args.json / f"{args.hosts}x{ranks}-{args.rate}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
