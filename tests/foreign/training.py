"""What is trained, how a step is made, and the obvious slow thing: the class itself, in one process.

A run trains ``STEPS`` steps, saves, and trains ``STEPS`` more. Losses have scales that differ from step to step, the
learning rate is changed as a scheduler would, and the generators of random numbers are seeded before an optimizer is
made, so that those that draw numbers can be compared.
"""

import contextlib
import copy
import math
import random
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from catalogue import Entry
from torch import Tensor, nn

__all__ = ["STEPS", "WAYS", "Net", "Oracle", "Trained", "difference", "make_groups", "oracle", "seed_all", "train"]

STEPS = 5  # before and after saving
BATCH = 12  # samples of all ranks together
_SCALES = (1.0, 0.03, 5.0, 0.3, 20.0, 1.0)


class Net(nn.Module):
    """Tensors of 1, 2 and 4 dims, one of them larger than what optimizers take for small."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(130, 40)
        self.conv = nn.Conv2d(2, 3, 2)
        self.last = nn.Linear(36, 5)
        self.norm = nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x)).view(-1, 2, 5, 4)
        x = torch.tanh(self.conv(x)).flatten(1)
        return self.norm(self.last(x))


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of all ranks together, which can be learnt: the same in every step."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(BATCH, 135, generator=generator, dtype=torch.float64).to(dtype)
    return values[:, :130], values[:, 130:]


def seed_all(seed: int) -> None:
    """Seed every generator that an optimizer may draw from."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def make_net(dtype: torch.dtype) -> Net:
    """Return the net as it is before training."""
    seed_all(0)
    return Net().to(dtype)


def make_groups(model: Net, *, num_groups: int) -> list[dict[str, Any]]:
    """Return the parameters in one group or two."""
    parameters = list(model.parameters())
    return [{"params": parameters}] if num_groups == 1 else [{"params": parameters[:3]}, {"params": parameters[3:]}]


def halve_last_rate(optimizer: Any) -> None:
    """Give the last of several groups half of the learning rate, where there is one."""
    groups = optimizer.param_groups
    if len(groups) > 1 and isinstance(groups[-1].get("lr"), float):
        groups[-1]["lr"] *= 0.5


# ---------------------------------------------------------------- steps


@dataclass
class _Batch:
    """What a step needs: the model, this rank's samples, and the scale of the loss."""

    model: Net
    x: Tensor
    y: Tensor
    scale: float
    noise: float = 0.0  # relative, put into gradients by the oracle to see what rounding alone does

    def loss(self) -> Tensor:
        return self.scale * (self.model(self.x) - self.y).square().mean()

    def backward(self, loss: Tensor, **options: Any) -> None:
        loss.backward(**options)
        self.disturb()

    def disturb(self) -> None:
        if self.noise:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    if parameter.grad is not None:
                        shape = parameter.grad.shape
                        noise = torch.randn(shape, generator=_NOISE, dtype=torch.float64).to(parameter.dtype)
                        parameter.grad.mul_(1 + self.noise * noise)


_NOISE = torch.Generator().manual_seed(7)


def _plain(opt: Any, b: _Batch) -> None:
    opt.zero_grad()
    b.backward(b.loss())
    opt.step()


def _graph(opt: Any, b: _Batch) -> None:
    opt.zero_grad()
    b.backward(b.loss(), create_graph=True)
    opt.step()


def _closure_of(opt: Any, b: _Batch) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        with torch.enable_grad():  # not all steps do it
            opt.zero_grad()
            loss = b.loss()
            b.backward(loss)
        return loss

    return closure


def _closure(opt: Any, b: _Batch) -> None:
    opt.step(_closure_of(opt, b))


def _sam(opt: Any, b: _Batch) -> None:
    opt.zero_grad()
    b.backward(b.loss())
    opt.step(_closure_of(opt, b))


def _set_closure(opt: Any, b: _Batch) -> None:
    def loss_function(output: Tensor, target: Tensor) -> Tensor:
        return b.scale * (output - target).square().mean()

    opt.zero_grad()
    opt.set_closure(loss_function, b.x, b.y)
    opt.step()


def _its_backward(opt: Any, b: _Batch) -> None:
    opt.zero_grad()
    opt.backward(b.loss())
    b.disturb()
    opt.step()


def _backward_alone(opt: Any, b: _Batch) -> None:
    b.loss().backward()  # which steps, too


def _pc_backward(opt: Any, b: _Batch) -> None:
    opt.zero_grad()
    error = (b.model(b.x) - b.y).square()
    opt.pc_backward([b.scale * error[:, :2].mean(), b.scale * error[:, 2:].mean()])
    b.disturb()
    opt.step()


WAYS: dict[str, Callable[[Any, _Batch], None]] = {
    "plain": _plain,
    "closure": _closure,
    "graph": _graph,
    "sam": _sam,
    "set_closure": _set_closure,
    "its backward": _its_backward,
    "backward alone": _backward_alone,
    "pc_backward": _pc_backward,
}
_TRIED = ("plain", "closure", "graph")


def call_if_there(opt: Any, inner: Any, method: str) -> None:
    """Call ``train()`` or ``eval()`` on what the user holds, if the optimizer has it."""
    if callable(getattr(inner, method, None)):
        getattr(opt, method)()


def train(
    opt: Any,
    inner: Any,
    model: Net,
    steps: range,
    *,
    way: str,
    rank: int = 0,
    num_ranks: int = 1,
    noise: float = 0.0,
) -> None:
    """Train, then call the optimizer's ``eval()`` if it has one.

    Parameters
    ----------
    opt : optimizer
        What the user calls.
    inner : optimizer
        The class that is tried.
    steps : range
        Their numbers, which give scales of losses.
    """
    dtype = next(model.parameters()).dtype
    call_if_there(opt, inner, "train")
    for step in steps:
        if step == 3:
            for group in getattr(opt, "param_groups", ()):
                if isinstance(group.get("lr"), float):
                    group["lr"] *= 0.9
        x, y = (values.chunk(num_ranks)[rank] for values in batch(dtype))
        WAYS[way](opt, _Batch(model, x, y, _SCALES[step % len(_SCALES)], noise))
    call_if_there(opt, inner, "eval")


# ---------------------------------------------------------------- the oracle


@dataclass
class Trained:
    """Where training came to."""

    middle: list[Tensor]
    end: list[Tensor]


@dataclass
class Oracle:
    """The class itself, in one process, on the joined batch.

    Parameters
    ----------
    error : str, optional
        Why it can't be trained.
    start, whole, resumed : list of Tensor
        Parameters before training; the way of one run through; and of one that was saved and resumed by the class's
        own ``state_dict`` in the middle, or what that raised.
    noise : float
        How far rounding errors in the gradients alone move the end, relative to the movement.
    """

    error: str | None = None
    way: str = "plain"
    dtype: torch.dtype = torch.float64
    num_groups: int = 1
    start: list[Tensor] = field(default_factory=list)
    whole: Trained | None = None
    resumed: list[Tensor] | None = None
    resume_error: str | None = None
    noise: float = 0.0


def values_of(model: Net) -> list[Tensor]:
    """Return copies of the parameters."""
    return [parameter.detach().to(torch.float64, copy=True) for parameter in model.parameters()]


def difference(ours: list[Tensor], theirs: list[Tensor], start: list[Tensor]) -> float:
    """Return the largest difference of any parameter, relative to its largest movement in the oracle."""
    largest = max(float((b - s).abs().max()) for b, s in zip(theirs, start, strict=True))
    found = 0.0
    for a, b, s in zip(ours, theirs, start, strict=True):
        if torch.equal(a, b) or (torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())):
            continue
        movement = max(float((b - s).abs().max()), 1e-3 * largest, 1e-300)
        off = float((a - b).abs().max()) / movement
        found = max(found, float("inf") if math.isnan(off) else off)
    return found


def _itself(optimizer: Any) -> Any:
    return optimizer


def make(entry: Entry, model: Net, num_groups: int, wrap: Callable[[Any], Any] = _itself) -> Any:
    """Make the optimizer of an entry."""

    def with_rates(optimizer: Any) -> Any:
        if num_groups > 1:
            halve_last_rate(optimizer)
        return wrap(optimizer)

    return entry.make(model, with_rates, make_groups(model, num_groups=num_groups))


@contextlib.contextmanager
def quiet() -> Any:
    """Ignore what packages warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _run(entry: Entry, way: str, dtype: torch.dtype, num_groups: int, *, noise: float = 0.0) -> Any:
    model = make_net(dtype)
    seed_all(1)
    opt = make(entry, model, num_groups)
    train(opt, opt, model, range(STEPS), way=way, noise=noise)
    middle = values_of(model)
    saved = copy.deepcopy(model.state_dict())
    error, state = None, None
    try:
        state = copy.deepcopy(opt.state_dict())
    except Exception as caught:
        error = described(caught)
    train(opt, opt, model, range(STEPS, 2 * STEPS), way=way, noise=noise)
    end = values_of(model)
    resumed = None
    if error is None and not noise:
        try:
            other = make_net(dtype)
            other.load_state_dict(saved)
            seed_all(1)
            fresh = make(entry, other, num_groups)
            fresh.load_state_dict(state)
            train(fresh, fresh, other, range(STEPS, 2 * STEPS), way=way)
            resumed = values_of(other)
        except Exception as caught:
            error = described(caught)
    return Trained(middle, end), resumed, error


def oracle(entry: Entry, num_groups: int) -> Oracle:
    """Return the oracle of an entry: float64 if the class takes it, and as many groups as asked for if it can."""
    ways = [entry.way] if entry.way else _TRIED
    errors = []
    for groups in dict.fromkeys((num_groups, 1)):
        for dtype in (torch.float64, torch.float32):
            for way in ways:
                try:
                    with quiet():
                        whole, resumed, resume_error = _run(entry, way, dtype, groups)
                        start = values_of(make_net(dtype))
                        error = _useless(whole, start)
                        if error is not None:
                            errors.append(f"{way}, {dtype}: {error}")
                            continue
                        noisy = [_run(entry, way, dtype, groups, noise=torch.finfo(dtype).eps)[0].end for _ in range(2)]
                except Exception as caught:
                    errors.append(f"{way}, {dtype}: {described(caught)}")
                    continue
                noise = max(difference(end, whole.end, start) for end in noisy)
                return Oracle(None, way, dtype, groups, start, whole, resumed, resume_error, noise)
    return Oracle(error="; ".join(dict.fromkeys(errors)))


def _useless(trained: Trained, start: list[Tensor]) -> str | None:
    if all(torch.equal(a, b) for a, b in zip(trained.end, start, strict=True)):
        return "nothing moves"
    if any(not bool(values.isfinite().all()) for values in trained.end):
        return "values that are not finite"
    return None


def described(error: BaseException) -> str:
    """Return an error's type and text, in one line, with where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" [{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}]" if frames else ""
    return " ".join(f"{type(error).__name__}: {error}".split())[:600] + where
