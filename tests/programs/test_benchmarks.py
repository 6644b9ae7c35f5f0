"""The benchmark programs run, and their tables say what was measured."""

import json
from pathlib import Path

import pytest
import report
import scaling

STEP = str(Path(__file__).parents[2] / "benchmarks" / "step.py")
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
    assert "| local | 10.0 (0.00) |\n| DDP | 20.0 (1.00) |\n| ours | 12.5 (0.25 ± " in text
    assert "| theirs | fails: RuntimeError |" in text
    assert "theirs, MLP: RuntimeError: no such thing" in text
    assert "| ours | 2.0 + 2.0 + 4.0, 8 |" in text


def test_what_all_share_in_a_round_is_no_error_of_the_overhead():
    result = _result()
    measured = result["models"]["MLP"]
    for name, own_ms in {"local": 10.0, "DDP": 20.0, "ours": 15.0}.items():
        measured[name]["ms"] = [drift_ms + own_ms for drift_ms in range(0, 1000, 100)]
    assert report.error(result, "MLP", "ours") == pytest.approx(0)
    measured["ours"]["ms"] = [12.0, 18.0] * 5
    measured["local"]["ms"], measured["DDP"]["ms"] = [10.0] * 10, [20.0] * 10
    assert report.error(result, "MLP", "ours") == pytest.approx(0.3)
    assert report.error(result, "MLP", "DDP") is None


def test_one_rank_has_no_overhead():
    assert "| ours | 12.5 |" in report.tables(_result(ranks=1))


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    report.draw([_result(), _result(ranks=4)], tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.once
def test_every_way_trains_under_mpirun(mpirun, tmp_path):
    place = tmp_path / "result.json"
    options = ("--rounds", "1", "--steps", "1", "--models", "small", "--json", str(place), "--contenders")
    done = mpirun(2, STEP, *options, *CONTENDERS, quick_start=False, timeout_s=110)
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


COSTS = scaling.Costs(4e-10, 8e-11, 1.1, 9e-10, 3e-5, 5e-5, 1e-4)


def _points():
    for hosts, ranks, rate in [(1, 2, None), (1, 3, None), (2, 1, "1gbit"), (2, 2, "1gbit"), (3, 2, "320mbit")]:
        for gradient_bytes, calls in [(42e6, 5), (9.5e6, 12), (1.6e6, 1)]:
            point = {"hosts": hosts, "ranks": ranks, "rate": rate, "cores": 2, "calls": calls}
            link = {None: float("inf"), "1gbit": 125e6, "320mbit": 40e6}[rate]
            place = scaling.Place(hosts, ranks, link, max(1, hosts * ranks / 2))
            work = scaling.Workload(gradient_bytes, calls)
            steps = {mode: 50 + scaling.overhead_s(COSTS, mode, place, work) * 1e3 for mode in scaling.MODES}
            yield point | {"gradient_bytes": gradient_bytes, "ms": {"local": 50.0} | steps}


def test_the_cost_model_finds_the_costs_that_made_the_measurements():
    found = scaling.fit(list(_points()))
    assert list(vars(found).values()) == pytest.approx(list(vars(COSTS).values()), rel=1e-6)


def test_a_cost_is_never_negative():
    points = list(_points())
    for point in points:
        point["ms"] |= {mode: ms - 2 * (point["ranks"] > 1) for mode, ms in point["ms"].items() if mode != "local"}
    assert min(vars(scaling.fit(points)).values()) >= 0


def test_one_rank_has_no_overhead_in_the_model():
    for mode in scaling.MODES:
        assert scaling.overhead_s(COSTS, mode, scaling.Place(1, 1, float("inf")), scaling.Workload(4e7, 5)) == 0
