"""The benchmark programs run, and their tables say what was measured."""

import json
from pathlib import Path

import pytest
import report

STEP = str(Path(__file__).parent.parent / "benchmarks" / "step.py")
CONTENDERS = ["local", "DDP", "DDP + ZeRO", "FSDP2", "replicated", "sharded", "node-shared"]
HELD_MB = {"parameters": 2.0, "gradients": 2.0, "state": 4.0}


def _result(**configuration):
    conf = {"ranks": 2, "nodes": 1, "processor": "x", "cores": 2, "threads": 1, "torch": "2", "mpi": "MPI 5"}
    return {
        "configuration": conf | {"heat": None, "rounds": 3, "steps": 1} | configuration,
        "models": {
            "MLP": {
                "local": {"ms": [9.0, 10.0, 30.0], "held_mb": HELD_MB, "peak_mb": 8.4},
                "DDP": {"ms": [20.0, 20.0, 20.0], "held_mb": HELD_MB, "peak_mb": 9.0},
                "ours": {"ms": [12.5, 12.0, 13.0], "held_mb": HELD_MB, "peak_mb": 8.0},
                "theirs": {"fails": "RuntimeError: no such thing"},
            }
        },
    }


def test_tables_have_medians_overheads_errors_and_memory():
    text = "\n".join(report.tables(_result()))
    assert "2 ranks of 1 thread on one node (x, 2 cores)" in text
    assert "| local | 10.0 (0.00) |\n| DDP | 20.0 (1.00) |\n| ours | 12.5 (0.25) |" in text
    assert "| theirs | fails: RuntimeError |" in text
    assert "theirs, MLP: RuntimeError: no such thing" in text
    assert "| ours | 2.0 + 2.0 + 4.0, 8 |" in text


def test_one_rank_has_no_overhead():
    assert "| ours | 12.5 |" in report.tables(_result(ranks=1))


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    report.draw([_result(), _result(ranks=4)], tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_every_way_trains_under_mpirun(mpirun, tmp_path):
    place = tmp_path / "result.json"
    options = ("--rounds", "1", "--steps", "1", "--models", "small", "--json", str(place), "--contenders")
    done = mpirun(2, STEP, *options, *CONTENDERS, timeout_s=110)
    assert done.returncode == 0, done.stderr
    result = json.loads(place.read_text())
    assert result["configuration"]["ranks"] == 2
    (measured,) = result["models"].values()
    assert list(measured) == CONTENDERS
    held = {name: contender["held_mb"] for name, contender in measured.items()}
    whole = held["local"]
    assert whole["state"] == pytest.approx(2 * whole["parameters"], rel=0.01)
    for name in ["DDP + ZeRO", "FSDP2", "sharded", "node-shared"]:
        assert held[name]["state"] == pytest.approx(whole["state"] / 2, rel=0.02), name
    for name in ["FSDP2", "node-shared"]:
        assert held[name]["parameters"] == pytest.approx(whole["parameters"] / 2, rel=0.02), name
