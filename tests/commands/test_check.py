"""``python -m dpoptim check``."""

import pytest

import dpoptim
from dpoptim.__main__ import main
from dpoptim.commands import check


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

    monkeypatch.setattr(check, "DataParallelOptimizer", Wrong)
    assert main(["check"]) == 1
    assert "AdamW                 DIFFERS in step 3: off by 1.0e-03" in capsys.readouterr().out


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        main(["train"])
    assert error.value.code == 2
    assert "invalid choice: 'train'" in capsys.readouterr().err
