"""``python -m dpoptim info`` and ``check``."""

import re

import pytest
import torch

import dpoptim
from dpoptim.__main__ import main
from dpoptim.commands import diagnostics


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


def test_check_finds_all_equal(mpirun):
    done = mpirun(2, "-m", "dpoptim", "check")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.count(" equal\n") == sum(
        isinstance(getattr(dpoptim, n), type) for n in dpoptim.torch_optim.__all__
    )


def test_check_names_the_step_that_differs(capsys, monkeypatch):
    class Wrong(dpoptim.DataParallelOptimizer):
        num_steps = 0

        def step(self, closure=None):
            loss = super().step(closure)
            self.num_steps += 1
            if self.num_steps == 4:
                self.param_groups[0]["params"][0].data.add_(1e-3)
            return loss

    monkeypatch.setattr(diagnostics, "DataParallelOptimizer", Wrong)
    assert main(["check"]) == 1
    assert "AdamW                 DIFFERS in step 3: off by 1.0e-03" in capsys.readouterr().out


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        main(["train"])
    assert error.value.code == 2
    assert "invalid choice: 'train'" in capsys.readouterr().err
