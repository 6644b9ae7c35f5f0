"""``python -m dpoptim check --optimizer``: one class in each mode, against one process."""

import pytest
import torch

from dpoptim.__main__ import main

pytestmark = pytest.mark.parallel

HERE = __name__


class UsesTheRank(torch.optim.SGD):
    """Steps longer on other ranks than 0."""

    def step(self, closure=None):
        from mpi4py import MPI

        for group in self.param_groups:
            group["lr"] *= 1 + MPI.COMM_WORLD.rank
        return super().step(closure)


class Fails(torch.optim.SGD):
    """Can make one step, not two."""

    num_steps = 0

    def step(self, closure=None):
        self.num_steps += 1
        if self.num_steps > 1:
            raise RuntimeError("can't step twice")
        return super().step(closure)


class Demands(torch.optim.SGD):
    """Demands a closure, matrices alone, and an option."""

    def __init__(self, params, *, rates):
        params = list(params)
        if any(parameter.dim() != 2 for parameter in params):
            raise ValueError("matrices alone")
        super().__init__(params, lr=rates[0])

    def step(self, closure):
        return super().step(closure)


def _check(capsys, world, *arguments):
    """Return the exit status, and what rank 0 prints; the others print nothing."""
    capsys.readouterr()
    status = main(["check", *arguments])
    output, errors = capsys.readouterr()
    assert world.allgather(status) == [status] * world.size
    if world.rank:
        assert (output, errors) == ("", "")
    output, errors = world.bcast((output, errors))
    return status, dict(line.split(maxsplit=1) for line in output.splitlines()), errors


def test_a_right_class_is_equal_in_each_mode(capsys, world):
    arguments = "--optimizer", "torch.optim:AdamW", "--options", "lr=0.01, betas=(0.8, 0.9)"
    status, lines, errors = _check(capsys, world, *arguments)
    assert (status, errors) == (0, "")
    modes = [lines[mode] for mode in ("replicated", "sharded", "node-shared")]
    assert modes == ["equal"] * 3
    assert lines["torch.optim.adamw:AdamW:"] == f"{world.size} ranks against one process, 12 steps in float64"
    status, lines, _ = _check(capsys, world, *arguments[:2], "--options", '{"lr": 0.1}', "--modes", "sharded")
    assert (status, lines["sharded"], "replicated" in lines) == (0, "equal", False)


def test_what_stays_replicated_and_what_is_refused_says_why(capsys, world):
    demands = "--optimizer", f"{HERE}:Demands", "--options", "rates=[0.1]", "--modes", "replicated,sharded"
    status, lines, _ = _check(capsys, world, *demands)
    assert (status, lines["replicated"]) == (0, "equal")
    stays = "stays replicated, and equal: Demands can't be sharded among ranks, since it needs a closure"
    assert lines["sharded"].startswith("equal" if world.size == 1 else stays)
    status, lines, _ = _check(capsys, world, "--optimizer", f"{HERE}:Fails", "--modes", "replicated")
    assert (status, lines["replicated"]) == (0, "refused: RuntimeError: can't step twice")


def test_a_wrong_class_differs(capsys, world):
    if world.size == 1:
        pytest.skip("one rank can't differ from others")
    status, lines, _ = _check(capsys, world, "--optimizer", f"{HERE}:UsesTheRank", "--modes", "replicated,sharded")
    assert status == 1
    assert lines["replicated"] == "DIFFERS in step 0: ranks hold different bits of '0.weight'"
    assert lines["sharded"].startswith("DIFFERS at the end: parameter group 0 has lr = ")  # each rank has set its own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "SGD"], "--optimizer must be package.module:Class, got 'SGD'"),
        (
            ["--optimizer", "no.such:Class"],
            "--optimizer no.such:Class: can't import no.such: ModuleNotFoundError: No mod",
        ),
        (["--optimizer", "torch.optim:Sgd"], "--optimizer torch.optim:Sgd: torch.optim has no Sgd"),
        (["--optimizer", "torch.nn:Linear"], "torch.nn:Linear: Linear is no subclass of torch.optim.Optimizer"),
        (
            ["--optimizer", "torch.optim:SGD", "--options", "lr=x"],
            "--options must be as 'lr=0.1, betas=(0.9, 0.99)' or a",
        ),
        (["--optimizer", "torch.optim:SGD", "--options", "0.1"], "got '0.1': each option needs a name"),
        (
            ["--optimizer", "torch.optim:SGD", "--options", "mu=1"],
            "with mu=1 does not train a small network in one proc",
        ),
        (["--optimizer", "torch.optim:SGD", "--modes", "shard"], "of replicated,sharded,node-shared, got 'shard'"),
        (["--modes", "sharded"], "--options and --modes need --optimizer package.module:Class"),
    ],
)
def test_wrong_arguments_are_named_once(capsys, world, arguments, message):
    status, lines, errors = _check(capsys, world, *arguments)
    assert (status, lines) == (2, {})
    assert errors.startswith("python -m dpoptim check: ")
    assert message in errors
