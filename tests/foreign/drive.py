"""Run the sweep: the oracles, then every optimizer in every mode at each number of ranks, and what hangs is killed.

    python drive.py DIRECTORY [--ranks 2 3] [--only TEXT]

``DIRECTORY`` keeps the oracles, and gets ``results.json``.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from catalogue import entries
from programs import ENVIRONMENT

HERE = Path(__file__).parent
MODES = ("replicated", "sharded", "node-shared")
LIMIT_S = 90  # of one optimizer in one mode, which takes half a second where cores are free
START_S = 120  # of a program's start
_ENVIRONMENT = os.environ | ENVIRONMENT | {"TORCHDYNAMO_DISABLE": "1"}  # some compile their steps, for half a minute


def make_oracles(directory: Path, num_parts: int) -> None:
    """Train every optimizer by itself, where it is not done yet."""
    directory.mkdir(parents=True, exist_ok=True)
    commands = [
        [sys.executable, str(HERE / "make_oracles.py"), str(directory), str(part), str(num_parts)]
        for part in range(num_parts)
    ]
    with (directory / "log").open("w") as log:
        jobs = [subprocess.Popen(command, stdout=log, stderr=log, env=_ENVIRONMENT) for command in commands]
        codes = [job.wait() for job in jobs]
    if any(codes):
        raise RuntimeError(f"make_oracles.py failed: see {directory / 'log'}")


def sweep(directory: Path, num_ranks: int, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Return a result for every entry in every mode."""
    todo = [(number, mode) for number in numbers for mode in MODES]
    found: list[dict[str, Any]] = []
    while len(found) < len(todo):
        found += _run_until_it_hangs(directory, num_ranks, todo[len(found) :])
    return found


def _run_until_it_hangs(directory: Path, num_ranks: int, todo: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    results, list_path = directory / f"lines-{num_ranks}", directory / f"todo-{num_ranks}"
    for path in directory.glob(f"{results.name}*"):
        path.unlink()
    list_path.write_text("\n".join(f"{number},{mode}" for number, mode in todo))
    launcher = str(Path(sys.executable).parent / "mpirun")
    command = [launcher, "-n", str(num_ranks), sys.executable, str(HERE / "sweep.py")]
    command += [str(directory / "oracles"), str(results), str(list_path)]
    with (directory / f"log-{num_ranks}").open("a") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, env=_ENVIRONMENT, start_new_session=True)
        try:
            how = _wait(job, results)
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if not lines:
        raise RuntimeError(f"the sweep does not start: see {directory / f'log-{num_ranks}'}")
    found = [line for line in lines if "verdict" in line]
    if "verdict" not in lines[-1] and "done" not in lines[-1]:
        errors = [f"rank {path.suffix[1:]}: {path.read_text()}" for path in sorted(directory.glob(f"{results.name}.*"))]
        found.append({**lines[-1], "verdict": how, "text": "; ".join(errors)})
    return found


def _wait(job: subprocess.Popen[bytes], results: Path) -> str:
    """Wait until a program ends or stops making progress, and say which."""
    size, since = -1, time.monotonic()
    while job.poll() is None:
        time.sleep(0.05)
        now = results.stat().st_size if results.exists() else -1
        if now != size:
            size, since = now, time.monotonic()
        if time.monotonic() - since > (LIMIT_S if size > 0 else START_S):
            return "hang"
    return "crash"


def table(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield lines that count verdicts by mode and number of ranks, classes and wrappers apart."""
    for kind in dict.fromkeys(result["kind"] for result in results):
        yield f"{kind}:"
        for mode in MODES:
            for ranks in sorted({result["ranks"] for result in results}):
                chosen = [r for r in results if (r["kind"], r["mode"], r["ranks"]) == (kind, mode, ranks)]
                counts = Counter(result["verdict"] for result in chosen)
                texts = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
                unsaved = sum(
                    any(stage in r.get("errors", {}) for stage in ("state_dict", "checkpoint", "resuming"))
                    for r in chosen
                    if r["verdict"] in ("right", "replicated with a warning")
                )
                yield f"  {mode}, {ranks} ranks: {len(chosen)}: {texts}" + f"; of the right {unsaved} not saved" * (
                    unsaved > 0
                )


def run_sweep(directory: Path, ranks: Sequence[int], only: str = "") -> list[dict[str, Any]]:
    """Return a result for every entry whose name contains ``only``, mode and number of ranks."""
    make_oracles(directory / "oracles", os.cpu_count() or 1)
    numbers = [number for number, entry in enumerate(entries()) if only in entry.name]
    return [result for num_ranks in ranks for result in sweep(directory, num_ranks, numbers)]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--only", default="", help="entries whose name contains this")
    arguments = parser.parse_args()
    results = run_sweep(arguments.directory, arguments.ranks, arguments.only)
    path = arguments.directory / "results.json"
    path.write_text("[\n" + ",\n".join(json.dumps(result) for result in results) + "\n]\n")
    print(*table(results), sep="\n")


if __name__ == "__main__":
    main()
