"""``python -m dpoptim check --optimizer package.module:Class``: one optimizer class on N ranks and in one process."""

import ast
import importlib
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.roll_call import RollCall
from dpoptim.optimizer import DataParallelOptimizer
from dpoptim.utils.checkpoint.rng import get_rng, set_rng
from dpoptim.utils.consistency import digest, run_together

__all__ = ["MODES", "check_class"]

MODES: dict[str, dict[str, Any]] = {
    "replicated": {},
    "sharded": {"shard": True},
    "node-shared": {"node_shared": True},
}

_NUM_STEPS = 12
_SAVED_AFTER = 6
# In float64, relative to how far a parameter has moved: optimizers keep numbers such as a step size in float32.
_TOLERANCE = 1e-6
# Line searches and the like make much of rounding. What they make of a hundred times as much is allowed for, 4 times.
_ROUNDED_BY = 1 + 1e-14
_ALLOWED_CHANGES = 4
_HIDDEN = 16


def check_class(path: str | None, options: str | None = None, modes: str | None = None) -> int:
    """Train a small network with an optimizer class in each mode and in one process, and compare after every step.

    Collective. Half-way the state is saved by ``full_state_dict`` and goes on in a new optimizer. Prints on rank 0 one
    line a mode.

    Parameters
    ----------
    path : str
        ``package.module:Class``; an error if None.
    options : str or None
        The arguments of the class but its parameters, as ``lr=0.1, betas=(0.9, 0.99)`` or as a JSON object.
    modes : str or None
        Which of :data:`MODES`, with commas between; all by default.

    Returns
    -------
    int
        0 if no mode differs: each is equal, or stays replicated and says so, or is refused with an error; 1 if one
        differs; 2 if the class can't be had or doesn't train in one process. The same on every rank.
    """
    roll_call = RollCall.of(None)
    communicator = roll_call.communicator
    say = print if communicator.rank == 0 else _say_nothing
    try:
        chosen, subject = run_together(
            roll_call, "reading the arguments", lambda: (_chosen(modes), _Subject.of(path, options))
        )
    except (TypeError, ValueError, RuntimeError) as error:
        if communicator.rank == 0:
            print(f"python -m dpoptim check: {error}", file=sys.stderr)
        return 2
    say(f"{subject.name}: {communicator.world_size} ranks against one process, {_NUM_STEPS} steps in float64")
    if communicator.world_size == 1:
        say("note: this is one rank, start it with mpirun to check several")
    differs = False
    for mode in chosen:
        verdict = _verdict(subject, mode, roll_call)
        differs = differs or verdict.startswith("DIFFERS")
        say(f"{mode:22}{verdict}")
    return int(differs)


@dataclass(frozen=True)
class _Subject:
    """An optimizer class with its options, and the network that it can train."""

    kind: type[Optimizer]
    options: dict[str, Any]
    with_bias: bool
    with_closure: bool

    @property
    def name(self) -> str:
        return f"{self.kind.__module__}:{self.kind.__qualname__}"

    @classmethod
    def of(cls, path: str | None, options: str | None) -> "_Subject":
        """Import the class and step it once; local.

        Raises
        ------
        TypeError, ValueError
            There is no such class, the options can't be read, or no way to construct and step it works.
        """
        kind, parsed = _imported(path), _parsed(options)
        first: Exception | None = None
        for with_bias in (True, False):  # without, all parameters are matrices, as some optimizers want them
            for with_closure in (False, True):
                subject = cls(kind, parsed, with_bias, with_closure)
                try:
                    optimizer, model = subject.make()
                    subject.step(optimizer, model, _batch(0, 2))
                except Exception as error:
                    first = first or error
                else:
                    return subject
        given = ", ".join(f"{name}={value!r}" for name, value in parsed.items()) or "no options"
        raise ValueError(
            f"{path} with {given} does not train a small network in one process (see --options): "
            f"{type(first).__name__}: {first}"
        ) from first

    def make(self) -> tuple[Optimizer, nn.Module]:
        """Return a new optimizer and its model, always the same."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            layers = nn.Linear(6, _HIDDEN, self.with_bias), nn.Tanh(), nn.Linear(_HIDDEN, 4, self.with_bias)
            model = nn.Sequential(*layers).double()
            return self.kind(model.parameters(), **self.options), model

    def step(self, optimizer: Optimizer, model: nn.Module, batch: Tensor) -> None:
        """Make a step of either kind of optimizer."""

        def closure() -> float:
            optimizer.zero_grad()
            loss = model(batch).pow(2).mean()
            loss.backward()
            return loss  # type: ignore[no-any-return]  # a tensor, as most return it

        if self.with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


class _OneProcess:
    """The steps of one process, with random numbers that are the same on all ranks."""

    def __init__(self, subject: _Subject, communicator: Communicator) -> None:
        self._random_numbers = communicator.broadcast_object(get_rng())
        self._subject = subject
        self._optimizer, self.model = subject.make()
        self.before = [parameter.detach().clone() for parameter in self.model.parameters()]

    def step(self, batch: Tensor) -> None:
        outside = get_rng()
        set_rng(self._random_numbers)
        try:
            self._subject.step(self._optimizer, self.model, batch)
        finally:
            self._random_numbers = get_rng()
            set_rng(outside)


def _verdict(subject: _Subject, mode: str, roll_call: RollCall) -> str:
    """Return what became of one mode; the same on every rank, collective."""
    communicator = roll_call.communicator
    made: list[DataParallelOptimizer] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            difference = _first_difference(subject, MODES[mode], roll_call, made)
            verdict = f"DIFFERS in {difference}" if difference else "equal"
        except Exception as error:
            verdict = f"refused: {type(error).__name__}: {error}"
        stayed = [str(warning.message) for warning in caught if "stays replicated" in str(warning.message)]
    if made:
        try:
            roll_call.check_in("the end of a check", 1.0)
            made[-1].detach()
        except RuntimeError as error:
            verdict = f"DIFFERS at the end: {error}"
    if verdict == "equal" and stayed:
        verdict = f"stays replicated, and equal: {stayed[0]}"
    return communicator.broadcast_object(" ".join(verdict.split()))  # type: ignore[no-any-return]


def _first_difference(
    subject: _Subject, mode: dict[str, Any], roll_call: RollCall, made: list[DataParallelOptimizer]
) -> str | None:
    """Return in which step, and where, N ranks part from one process; collective."""
    communicator = roll_call.communicator
    plain, rounded = _OneProcess(subject, communicator), _OneProcess(subject, communicator)
    optimizer, model = subject.make()
    made.append(DataParallelOptimizer(optimizer, **mode))
    sizes = [2 + rank for rank in range(communicator.world_size)]
    for step in range(_NUM_STEPS):
        if step == _SAVED_AFTER:
            model = _resumed(subject, mode, model, made)
        batch = _batch(step, sum(sizes))
        made[-1].batch_weight = sizes[communicator.rank]
        own = batch.split(sizes)[communicator.rank]
        run_together(roll_call, f"step {step}", partial(subject.step, made[-1], model, own))
        run_together(roll_call, f"step {step} of one process", partial(plain.step, batch))
        run_together(roll_call, f"step {step} of rounded batches", partial(rounded.step, batch * _ROUNDED_BY))
        found = next(_differences(model, plain, rounded, communicator), None)
        if found is not None:
            return f"step {step}{', after resuming' * (step >= _SAVED_AFTER)}: {found}"
    return None


def _resumed(subject: _Subject, mode: dict[str, Any], model: nn.Module, made: list[DataParallelOptimizer]) -> nn.Module:
    """Go on with a new optimizer that loads the state of the last one; collective."""
    state = made[-1].full_state_dict()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    made[-1].detach()
    made.pop()
    optimizer, resumed = subject.make()
    resumed.load_state_dict(weights)
    made.append(DataParallelOptimizer(optimizer, **mode))
    made[-1].load_full_state_dict(state)
    return resumed


def _differences(
    model: nn.Module, plain: _OneProcess, rounded: _OneProcess, communicator: Communicator
) -> Iterator[str]:
    """Yield what differs between ranks, or from one process; collective."""
    own = []
    for parameter, expected, other, old in zip(
        model.parameters(), plain.model.parameters(), rounded.model.parameters(), plain.before, strict=True
    ):
        error, change, moved = (float((expected - each).detach().abs().max()) for each in (parameter, other, old))
        own.append((error - _ALLOWED_CHANGES * change, error, moved, digest(parameter)))
    for (name, _), *of_ranks in zip(model.named_parameters(), *communicator.all_gather_object(own), strict=True):
        if len({bits for *_, bits in of_ranks}) > 1:
            yield f"ranks hold different bits of '{name}'"
        excess, error, moved, _ = max(of_ranks)
        if not excess <= _TOLERANCE * moved:
            share = f", {100 * error / moved:.2g} % of its way" if moved else ""
            yield f"'{name}' is off by {error:.1e}{share}"


def _imported(path: str | None) -> type[Optimizer]:
    if path is None:
        raise ValueError("--options and --modes need --optimizer package.module:Class")
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(f"--optimizer must be package.module:Class, got {path!r}")
    try:
        kind: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"--optimizer {path}: can't import {module_name}: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        kind = getattr(kind, part, None)
    if not isinstance(kind, type) or not issubclass(kind, Optimizer):
        what = f"{module_name} has no {name}" if kind is None else f"{name} is no subclass of torch.optim.Optimizer"
        raise ValueError(f"--optimizer {path}: {what}")
    return kind


def _chosen(modes: str | None) -> list[str]:
    chosen = list(MODES) if modes is None else modes.split(",")
    for mode in chosen:
        if mode not in MODES:
            raise ValueError(f"--modes must be of {','.join(MODES)}, got {mode!r}")
    return chosen


def _parsed(options: str | None) -> dict[str, Any]:
    """Return keyword arguments from JSON, or from the text of a call."""
    text = (options or "").strip()
    try:
        if text.startswith("{"):
            return dict(json.loads(text))
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("each option needs a name")
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (ValueError, SyntaxError, AssertionError) as error:
        raise ValueError(
            f"--options must be as 'lr=0.1, betas=(0.9, 0.99)' or a JSON object, got {text!r}: {error}"
        ) from error


def _batch(step: int, num_samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(num_samples, 6, generator=generator, dtype=torch.float64)


def _say_nothing(_: str) -> None:
    pass
