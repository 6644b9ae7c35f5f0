"""Program: train every optimizer by itself and keep where it came to, for the sweep to compare with.

``python make_oracles.py DIRECTORY PART NUM_PARTS``
"""

import pickle
import signal
import sys
import time
from pathlib import Path

import torch
from catalogue import entries
from training import Oracle, oracle

LIMIT_S = 30  # of the process's own time


class TooLong(BaseException):
    """An optimizer takes too long by itself."""


def _too_long(*_: object) -> None:
    raise TooLong(f"takes longer than {LIMIT_S} s by itself")


torch.set_num_threads(1)
signal.signal(signal.SIGPROF, _too_long)
directory, part, num_parts = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for number, entry in enumerate(entries()):
    if number % num_parts != part:
        continue
    path = directory / f"{number}.pickle"
    if path.exists():
        continue
    start = time.perf_counter()
    print(number, entry.name, flush=True)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        found = {num_groups: oracle(entry, num_groups) for num_groups in (1, 2)}
    except TooLong as error:
        found = dict.fromkeys((1, 2), Oracle(error=str(error)))
    signal.setitimer(signal.ITIMER_PROF, 0)
    partial = path.with_suffix(".partial")
    partial.write_bytes(pickle.dumps(found))
    partial.rename(path)
    if time.perf_counter() - start > 2:
        print(f"   {time.perf_counter() - start:.1f} s", flush=True)
