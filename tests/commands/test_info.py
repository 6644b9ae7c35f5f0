"""``python -m dpoptim info``."""

import re

import torch

import dpoptim


def test_info_says_what_is_here(mpirun):
    done = mpirun(3, "-m", "dpoptim", "info")
    assert (done.returncode, done.stderr) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line and " " in line)
    assert done.stdout.count("dpoptim") == 1, "one rank alone prints"
    assert "ranks                 3\n" in done.stdout
    assert "nodes                 1, 3 ranks a node\n" in done.stdout
    assert torch.__version__ in lines["torch"]
    assert "MPI" in lines
    for name in dpoptim.torch_optim.__all__:
        if isinstance(getattr(dpoptim, name), type):
            assert name in lines
    assert lines["SGD"] == "fused"
    assert lines["AdamW"] == "fused, those below 512 elements together"
    assert lines["RMSprop"] == "flat, those below 4096 elements together, large ones in parts"
    assert lines["LBFGS"] == "for-loop"
    assert re.search(r"^reads others' memory +(yes$|no \(rank \d of the node: )", done.stdout, re.MULTILINE)
    assert lines["piece_bytes"] == "786432"
