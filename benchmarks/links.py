"""The training steps of `step.py` on hosts joined by a slow network.

    python benchmarks/links.py --hosts 2 --rate 1gbit --ranks 1 2      # as root, with the mpich wheel

Starts `step.py` on network namespaces (`hosts.py`) with so many ranks on each host, and prints its tables.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from hosts import Hosts, missing
from report import tables

_CONTENDERS = ("local", "DDP", "replicated", "sharded", "node-shared")


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
    parser.add_argument("--timeout", type=float, default=900, help="seconds for a run")
    parser.add_argument("--json", type=Path, help="directory for every round's times")
    args = parser.parse_args()
    reason = missing()
    if reason is not None:
        sys.exit(f"no hosts to be had: {reason}")
    program = str(Path(__file__).with_name("step.py"))
    for ranks in args.ranks:
        with Hosts(args.hosts, rate=args.rate) as hosts, tempfile.TemporaryDirectory() as directory:
            place = Path(directory, "result.json")
            options = ("--rounds", str(args.rounds), "--steps", str(args.steps), "--models", args.models)
            command = (program, *options, "--json", str(place), "--contenders", *args.contenders)
            first = {"DPOPTIM_FIRST_HOST": hosts.addresses[0]}
            try:
                done = hosts.mpirun(ranks, *command, timeout_s=args.timeout, env=first)
            except subprocess.TimeoutExpired as late:
                sys.exit(f"stopped after {args.timeout:g} s; until then:\n{late.stdout}\n{late.stderr}")
            if done.returncode:
                sys.exit(done.stderr)
            result = json.loads(place.read_text())
        result["configuration"]["link"] = args.rate
        print("\n".join(tables(result)), flush=True)
        if args.json:
            args.json.mkdir(parents=True, exist_ok=True)
            (args.json / f"{args.hosts}x{ranks}-{args.rate}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
