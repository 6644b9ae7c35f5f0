"""The examples: the same curve on any number of ranks, resumed where they stopped, accurate."""

import json
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = ("--eval-every", "10", "--batch-size", "8", "--context", "32", "--steps", "20")
GPT = str(EXAMPLES / "train_gpt.py")


# Runs the example on a machine that fails right after its first checkpoint is complete.
INTERRUPTED = f"""
import runpy
from dpoptim.utils import checkpoint
original = checkpoint.save
def save(*args, **parts):
    original(*args, **parts)
    raise RuntimeError("the machine is gone")
checkpoint.save = save
runpy.run_path({GPT!r}, run_name="__main__")
"""


def _train_gpt(mpirun, num_ranks, output):
    done = mpirun(num_ranks, GPT, "--output", str(output), *SHORT, timeout_s=110)
    assert done.returncode == 0, done.stderr
    return json.loads((output / "history.json").read_text()), done


def _assert_same_curve(history, expected):
    for part in ("train", "validation"):
        steps, losses = zip(*history[part], strict=True)
        expected_steps, expected_losses = zip(*expected[part], strict=True)
        assert steps == expected_steps
        # float32 sums in another order, 2^-24 each, amplified by twenty steps of AdamW
        assert losses == pytest.approx(expected_losses, rel=1e-4)


@pytest.mark.once
def test_the_gpt_learns_the_same_curve_on_any_number_of_ranks_also_resumed(mpirun, tmp_path):
    whole, done = _train_gpt(mpirun, 1, tmp_path / "whole")
    assert whole["validation"][-1][1] < whole["validation"][0][1]
    assert (tmp_path / "whole" / "train.png").read_bytes().startswith(b"\x89PNG")
    assert len(done.stdout) > 200, "a sample of text"

    done = mpirun(4, "-c", INTERRUPTED, "--output", str(tmp_path / "parts"), *SHORT)
    assert done.returncode != 0
    assert "the machine is gone" in done.stderr
    resumed, done = _train_gpt(mpirun, 2, tmp_path / "parts")
    assert "resumed at step 10" in done.stdout + done.stderr
    _assert_same_curve(resumed, whole)

    again, done = _train_gpt(mpirun, 1, tmp_path / "parts")
    assert "finished already at step 20" in done.stdout + done.stderr
    assert again == resumed


@pytest.mark.once
def test_the_digits_are_recognised(mpirun):
    done = mpirun(2, "-W", "error", str(EXAMPLES / "train_digits.py"), quick_start=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    accuracies = [float(percent) for percent in re.findall(r"accuracy ([\d.]+)%", done.stdout)]
    assert accuracies[-1] > 97


def test_digits_are_loaded_with_heat_trained_and_evaluated_with_heat(mpirun):
    pytest.importorskip("heat", reason="Heat is not installed in this environment")
    done = mpirun(3, str(EXAMPLES / "heat_classify.py"), quick_start=False)
    assert done.returncode == 0, done.stderr
    accuracy = float(re.search(r"accuracy ([\d.]+)%", done.stdout)[1])
    assert accuracy > 88  # of writers that the training has not seen


@pytest.mark.parametrize("name", ["train_gpt.py", "train_digits.py", "heat_classify.py"])
def test_examples_are_short(name):
    assert len((EXAMPLES / name).read_text().splitlines()) < 120
