"""``python -m dpoptim bench``."""

import re

import pytest

from dpoptim.__main__ import main

COLLECTIVES = ["all_reduce", "reduce_scatter", "all_gather", "broadcast"]


def _numbers(output, name):
    line = next(line for line in output.splitlines() if line.startswith(f"{name} "))
    return [float(text) for text in re.findall(r"(?<= )\d+\.?\d*(?= |$)", line)]


@pytest.mark.once
def test_bench_measures_collectives_and_steps_and_gives_reasons(mpirun):
    done = mpirun(3, "-m", "dpoptim", "bench", "--seconds", "0.5", timeout_s=100)
    assert (done.returncode, done.stderr) == (0, "")
    output = done.stdout
    assert output.count("memcpy") == 1, "one rank alone prints"
    assert ": 3 ranks on 1 node, 1 thread each\n" in output
    for name in ["memcpy", *COLLECTIVES]:
        numbers = _numbers(output, name)
        assert len(numbers) == 5
        assert min(numbers[1:]) > 0
    for name in ["local", "replicated", "shard=True", "node_shared=True"]:
        milliseconds, ratio = _numbers(output, name)[:2]
        assert milliseconds > 0
        assert ratio > 0
    for choice in ["exchange in a node", "overlap", "waiting", "step of AdamW", "fastest mode"]:
        assert re.search(rf"^{choice} +\w", output, re.MULTILINE), choice
    exchange = "^exchange in a node +large tensors (read from|through a staging area: rank)"
    assert re.search(exchange, output, re.MULTILINE)


def test_bench_of_one_rank_says_so(capsys):
    assert main(["bench", "--seconds", "0.5"]) == 0
    output = capsys.readouterr().out
    assert "1 rank on 1 node" in output
    assert "note: this is one rank, start it with mpirun to measure an exchange" in output
    assert "all_reduce" not in output
    assert re.search(r"^exchange in a node +by messages, not through shared memory: every rank", output, re.MULTILINE)


def test_bench_says_why_a_mode_is_not_here(capsys, monkeypatch):
    from dpoptim.commands import bench

    class Refusing(bench.DataParallelOptimizer):
        def __init__(self, optimizer, *, overlap="auto", **options):
            if overlap != "auto":
                raise ValueError("overlap needs another MPI")
            super().__init__(optimizer, **options)

    monkeypatch.setattr(bench, "DataParallelOptimizer", Refusing)
    assert main(["bench", "--seconds", "0.5"]) == 0
    assert re.search(r"^replicated, overlap=\w+ +not here: overlap needs another MPI$", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("seconds", ["0", "-1", "inf", "soon"])
def test_an_impossible_time_is_refused(capsys, seconds):
    with pytest.raises(SystemExit) as error:
        main(["bench", "--seconds", seconds])
    assert error.value.code == 2
    assert "--seconds" in capsys.readouterr().err
