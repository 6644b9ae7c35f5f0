"""kill -9 at random instants of saving: the newest complete checkpoint loads, and is at most one save old.

At 10 instants, at 50 with ``make test-kills``.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dpoptim.utils import checkpoint

NUM_KILLS = int(os.environ.get("DPOPTIM_TEST_KILLS", "6"))

# Saves without end, and says when a save has returned. In the weights every element is the number of the save.
PROGRAM = """
import os, sys, torch
from dpoptim.utils import checkpoint
path, blocking, size = sys.argv[1], sys.argv[2] == "True", int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
print(f"<pid {os.getpid()}>", flush=True)
model = torch.nn.Sequential(*(torch.nn.Linear(700, 700) for _ in range(3)))
saved = checkpoint.load(path, model=model, missing_ok=True)
number = saved["number"] if saved else 0
while True:
    number += 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(number)
    checkpoint.save(path, model=model, number=number, blocking=blocking, keep=2)
    if os.environ.get("OMPI_COMM_WORLD_RANK", "0") == "0":
        print(f"<{'saved' if blocking else 'began'} {number}>", flush=True)
"""


def _start(num_ranks, path, blocking):
    launcher = [str(Path(sys.executable).parent / "mpirun"), "-n", str(num_ranks)] if num_ranks > 1 else []
    return subprocess.Popen(
        [*launcher, sys.executable, "-c", PROGRAM, str(path), str(blocking)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        errors="replace",
    )


def _kill_at_random(job, num_ranks, generator):
    """Kill one rank or all a random while after the first save; return the output."""
    pids, text = [], ""
    while "<saved" not in text and "<began" not in text:
        line = job.stdout.readline()
        assert line, "the program ended by itself"
        text += line
        pids += [int(pid) for pid in re.findall(r"<pid (\d+)>", line)]
    time.sleep(generator.uniform(0, 0.3))
    for pid in pids if generator.random() < 0.5 else [generator.choice(pids)]:
        os.kill(pid, signal.SIGKILL)
    rest = job.stdout.read()  # communicate() would lose what readline() has read ahead
    job.wait(timeout=60)
    return text + rest


@pytest.mark.parametrize(("num_ranks", "blocking", "share"), [(1, True, 0.3), (2, True, 0.4), (2, False, 0.3)])
@pytest.mark.once
@pytest.mark.timeout(60 + 20 * NUM_KILLS)
def test_the_newest_checkpoint_loads_after_kill_9(tmp_path, num_ranks, blocking, share):
    num_kills = round(share * NUM_KILLS)
    generator = random.Random(num_ranks + blocking)
    model = torch.nn.Sequential(*(torch.nn.Linear(700, 700) for _ in range(3)))
    for _ in range(num_kills):
        with _start(num_ranks, tmp_path, blocking) as job:
            output = _kill_at_random(job, num_ranks, generator)
        numbers = [int(number) for number in re.findall(r"<(?:saved|began) (\d+)>", output)]
        # A save in the background is complete when the next one has begun.
        at_least = numbers[-1] if blocking else numbers[-1] - 1
        saved = checkpoint.load(tmp_path, model=model, missing_ok=True)
        number = saved["number"] if saved else 0
        assert at_least <= number <= numbers[-1] + 1
        assert not saved or all(bool((parameter == number).all()) for parameter in model.parameters())
        assert len(list(tmp_path.glob("checkpoint-*"))) <= 3
