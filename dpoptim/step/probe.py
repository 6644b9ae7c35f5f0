"""Probe: an optimizer tried out on a few small parameters (Note [Probing] in divisibility.py). Local.

Tests: ``tests/step/test_divisibility.py``.
"""

import contextlib
import copy
import io
import math
import random
import sys
import time
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpoptim.step.classes import knows, parameters_of, slots_of

__all__ = ["Divisibility", "Probe", "described", "nothing_disturbed"]

# Enough for what begins late, such as a slow average or a preconditioner.
_NUM_STEPS = 24
# Of one step, in s: with a hundred of them construction would take a while.
_MAX_STEP_S = 0.5
# Of gradients, in turn: small and large ones, since some classes clip.
_SCALES = (1.0, 1e-3, 30.0, 0.5)
# What is wider behaves as it did here: classes that factor large matrices alone begin at 128 at most.
_MAX_WIDTH = 144
_MAX_DEEP_WIDTH = 8
_MAX_TOYS = 12
_MAX_GROUPS = 4
# In float64, of the largest movement: a sum in another order is right, a coupling is not.
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Divisibility:
    """What the parameters of an optimizer may be divided by.

    Attributes
    ----------
    by : str
        ``"element"``, ``"parameter"`` or ``"nothing"``.
    why_not : str
        If by nothing: why, as the rest of a sentence about the class.
    is_tried : bool
        Whether the class could be tried out, or need not be.
    """

    by: str
    why_not: str = ""
    is_tried: bool = True


class Probe:
    """Steps copies of an optimizer on a few parameters; in float64, if the comparison is to be sharp."""

    def __init__(self, optimizer: Optimizer, *, is_sharp: bool) -> None:
        self._optimizer = optimizer
        self._is_sharp = is_sharp
        self._groups = self._choose_groups()
        self._places = [(g, i) for g, chosen in self._groups.items() for i in chosen][:_MAX_TOYS]
        self._groups = {g: chosen for g, chosen in self._groups.items() if any(g == h for h, _ in self._places)}
        self._shapes = [_toy_shape(optimizer.param_groups[g]["params"][i].shape) for g, i in self._places]

    def verdict(self) -> Divisibility:
        """Step them together, each alone, and in halves, and say what follows."""
        everywhere = range(len(self._places))
        together = self._twin()
        before = self._values(together)
        generators = _generator_states()
        for step in range(_NUM_STEPS):
            begin_s = time.perf_counter()
            self._step(together, step, everywhere)
            if time.perf_counter() - begin_s > _MAX_STEP_S:
                return Divisibility("nothing", "takes too long to be tried out (set is_elementwise in the class)")
        if _generator_states() != generators:
            return Divisibility("nothing", "draws random numbers in its step")
        expected = self._values(together)
        movement = [(a - b).abs().max().item() if a.numel() else 0.0 for a, b in zip(expected, before, strict=True)]
        if not max(movement, default=0.0) > 0 or not all(map(math.isfinite, movement)):
            return Divisibility("nothing", "does nothing that can be compared when it is tried out")
        for index in everywhere:
            try:
                alone = self._twin()
                for step in range(_NUM_STEPS):
                    self._step(alone, step, [index])
            except Exception as error:
                return Divisibility("nothing", f"can't step one parameter without the others ({described(error)})")
            number = list(self._groups).index(self._places[index][0])
            if (
                not _equal(self._values(alone)[index], expected[index], movement[index])
                or not _alike(_options(alone, number), _options(together, number))
                or not _alike(_attributes(alone), _attributes(together))
                or not _alike(_entries_of_nobody(alone), _entries_of_nobody(together))
            ):
                return Divisibility("nothing", "couples parameters: each is stepped otherwise without the others")
        return Divisibility("element" if self._is_elementwise(together, expected, max(movement)) else "parameter")

    def _is_elementwise(self, together: Any, expected: Sequence[Tensor], movement: float) -> bool:
        """Whether flat halves end as the parameters do (Note [Units] in units.py)."""
        parameters = [together.param_groups[g]["params"][i] for g, i in self._toy_places()]
        entries = [(p, value) for p in parameters for value in together.state.get(p, {}).values()]
        own = parameters_of(self._optimizer)
        if any(vars(p) for p in own) or not all(_is_of_element(p, v) for p, v in entries):
            return False
        if knows(self._optimizer, {id(p) for p in own}):
            return False
        try:
            return all(self._is_stepped_as_a_half(half, together, expected, movement) for half in (0, 1))
        except Exception:  # whatever it does not take: it may be divided by parameter
            return False

    def _is_stepped_as_a_half(self, half: int, together: Any, expected: Sequence[Tensor], movement: float) -> bool:
        """Whether this flat half of each group ends as the parameters do, without the other one."""
        twin = self._twin()
        spans: list[slice] = []
        flats: list[Tensor] = []
        for number in range(len(twin.param_groups)):
            members = [toy for (g, _), toy in zip(self._toy_places(), self._toys(twin), strict=True) if g == number]
            whole = torch.cat([toy.detach().reshape(-1) for toy in members])
            cut = whole.numel() // 2 + 1
            spans.append(slice(cut, None) if half else slice(0, cut))
            flats.append(nn.Parameter(whole[spans[-1]].clone()))
            if twin.state.get(members[0]):
                twin.state[flats[-1]] = _like_state(twin.state[members[0]], members[0], flats[-1])
        for group, flat in zip(twin.param_groups, flats, strict=True):
            group["params"] = [flat]
        for step in range(_NUM_STEPS):
            for number, (span, flat) in enumerate(zip(spans, flats, strict=True)):
                gradients = [self._gradient(step, k) for k, (g, _) in enumerate(self._toy_places()) if g == number]
                flat.grad = torch.cat([gradient.reshape(-1) for gradient in gradients])[span].clone()
            _call_step(twin)
        for number, (span, flat) in enumerate(zip(spans, flats, strict=True)):
            theirs = [e.reshape(-1) for (g, _), e in zip(self._toy_places(), expected, strict=True) if g == number]
            if not _equal(flat.detach(), torch.cat(theirs)[span], movement):
                return False
            if not _alike(_options(twin, number), _options(together, number)):
                return False
        return True

    def _choose_groups(self) -> dict[int, list[int]]:
        """Return which groups to try, and which parameters of each: some of each dimensionality, and the widest."""
        chosen: dict[int, list[int]] = {}
        kinds: set[str] = set()
        for number, group in enumerate(self._optimizer.param_groups):
            trained = [(i, p) for i, p in enumerate(group["params"]) if p.is_floating_point() or p.is_complex()]
            options = {key: value for key, value in group.items() if key not in ("params", "param_names", "lr")}
            kind = repr((sorted(map(str, options.items())), sorted({p.dim() for _, p in trained})))
            if not trained or (kind in kinds and len(chosen) > 1) or len(chosen) == _MAX_GROUPS:
                continue
            kinds.add(kind)
            by_dim: dict[int, list[tuple[int, Tensor]]] = {}
            for i, p in trained:
                by_dim.setdefault(p.dim(), []).append((i, p))
            widest = [max(some, key=lambda each: min(each[1].shape, default=0))[0] for some in by_dim.values()]
            chosen[number] = sorted({*widest, *(i for some in by_dim.values() for i, _ in (some[0], some[-1]))})
        return chosen

    def _twin(self) -> Any:
        """Return a copy of the optimizer that has the toys alone, without state."""
        optimizer = self._optimizer
        toys: dict[int, Tensor] = {}
        for parameter in parameters_of(optimizer):
            toys[id(parameter)] = nn.Parameter(torch.zeros([1] * parameter.dim(), device=parameter.device))
        for k, (g, i) in enumerate(self._places):
            parameter = optimizer.param_groups[g]["params"][i]
            values = _values(self._shapes[k], k, self._toy_dtype(parameter)).to(parameter.device)
            toys[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            vars(toys[id(parameter)]).update(vars(parameter))
        twin: Any = object.__new__(type(optimizer))
        left_out = ("state", "param_groups", "step")
        attributes = {
            key: OrderedDict() if key.startswith("_optimizer_") else value
            for key, value in vars(optimizer).items()
            if key not in left_out
        }
        groups = [optimizer.param_groups[g] for g in self._groups]
        memo: dict[int, Any] = dict(toys)
        vars(twin).update(copy.deepcopy(attributes, memo))
        for name in slots_of(optimizer):
            setattr(twin, name, copy.deepcopy(getattr(optimizer, name), memo))
        twin.param_groups = copy.deepcopy(groups, memo)
        twin.state = defaultdict(
            dict, {k: copy.deepcopy(v) for k, v in optimizer.state.items() if not isinstance(k, Tensor)}
        )
        for g, i in self._places:
            parameter = optimizer.param_groups[g]["params"][i]
            if optimizer.state.get(parameter):  # some classes make it in their constructor
                twin.state[toys[id(parameter)]] = _like_state(
                    optimizer.state[parameter], parameter, toys[id(parameter)]
                )
        for g, group in zip(self._groups, twin.param_groups, strict=True):
            group["params"] = [toys[id(optimizer.param_groups[g]["params"][i])] for h, i in self._places if h == g]
            for key, value in (("lr", 1e-3), ("weight_decay", 1e-2)):
                if isinstance(group.get(key), (int, float)) and group[key] == 0:
                    group[key] = value  # as it may become: with none nothing would be seen
        if callable(getattr(type(optimizer), "train", None)):
            twin.train()  # schedule-free classes refuse to step before
        return twin

    def _toy_dtype(self, parameter: Tensor) -> torch.dtype:
        """Return float64, or the parameter's own dtype; of 16 bits always, since a class may see to their rounding."""
        if not self._is_sharp or parameter.itemsize < 4:
            return parameter.dtype
        return torch.complex128 if parameter.is_complex() else torch.float64

    def _toy_places(self) -> list[tuple[int, int]]:
        """Return group and position of each toy in a twin."""
        numbers = {g: number for number, g in enumerate(self._groups)}
        seen: dict[int, int] = {}
        positions = []
        for g, _ in self._places:
            positions.append((numbers[g], seen.get(g, 0)))
            seen[g] = seen.get(g, 0) + 1
        return positions

    def _toys(self, twin: Any) -> list[Tensor]:
        return [twin.param_groups[g]["params"][i] for g, i in self._toy_places()]

    def _values(self, twin: Any) -> list[Tensor]:
        return [toy.detach().clone() for toy in self._toys(twin)]

    def _gradient(self, step: int, k: int) -> Tensor:
        g, i = self._places[k]
        parameter = self._optimizer.param_groups[g]["params"][i]
        scale = _SCALES[step % len(_SCALES)]
        return (_values(self._shapes[k], 100 + 10 * step + k, self._toy_dtype(parameter)) * scale).to(parameter.device)

    def _step(self, twin: Any, step: int, indices: Iterable[int]) -> None:
        """Step these toys, which stand in the groups alone."""
        toys = self._toys(twin)
        groups = [group["params"] for group in twin.param_groups]
        wanted = set(indices)
        for number, group in enumerate(twin.param_groups):
            group["params"] = [
                toy
                for k, ((g, _), toy) in enumerate(zip(self._toy_places(), toys, strict=True))
                if g == number and k in wanted
            ]
        for k in wanted:
            toys[k].grad = self._gradient(step, k)
        _call_step(twin)
        for group, members in zip(twin.param_groups, groups, strict=True):
            group["params"] = members


def _call_step(twin: Any) -> None:
    step = type(twin).step
    (step.__wrapped__ if getattr(step, "hooked", False) else step)(twin)


def _toy_shape(shape: Sequence[int]) -> tuple[int, ...]:
    width = _MAX_WIDTH if len(shape) <= 2 else _MAX_DEEP_WIDTH
    return tuple(min(length, width) for length in shape)


def _values(shape: Sequence[int], seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(list(shape), generator=generator, dtype=wide, device="cpu").to(dtype)


def _equal(mine: Tensor, theirs: Tensor, movement: float) -> bool:
    if mine.dtype not in (torch.float64, torch.complex128):
        return torch.equal(mine, theirs)  # the same operations round alike
    return bool(((mine - theirs).abs() <= _TOLERANCE * movement + 1e-15).all())


def _like_state(entry: Mapping[str, Any], parameter: Tensor, toy: Tensor) -> dict[str, Any]:
    """Return an entry of the state for a toy: of its shape where the parameter's is of the parameter's."""
    return {
        key: torch.full_like(toy, value.flatten()[0].item() if value.numel() else 0.0).detach()
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0
        else copy.deepcopy(value)
        for key, value in entry.items()
    }


def _is_of_element(parameter: Tensor, value: Any) -> bool:
    """Whether a value in the state of a parameter is a number, or one for each element."""
    if isinstance(value, Tensor):
        return value.shape == parameter.shape or value.dim() == 0
    return value is None or isinstance(value, (int, float, str))


def _options(twin: Any, number: int) -> dict[str, Any]:
    return {key: value for key, value in twin.param_groups[number].items() if key not in ("params", "param_names")}


def _attributes(twin: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(twin).items() if key not in ("param_groups", "state", "defaults")}


def _entries_of_nobody(twin: Any) -> dict[Any, Any]:
    return {key: value for key, value in twin.state.items() if not isinstance(key, Tensor)}


def _alike(mine: Any, theirs: Any) -> bool:
    """Whether numbers and tensors of numbers, in whatever they are kept, are equal; all else is passed over."""
    if isinstance(mine, Tensor) or isinstance(theirs, Tensor):
        return (
            isinstance(mine, Tensor)
            and isinstance(theirs, Tensor)
            and mine.shape == theirs.shape
            and torch.equal(mine.nan_to_num(), theirs.nan_to_num())
        )
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        keys = [key for key in mine if not isinstance(key, Tensor)]
        return len(mine) == len(theirs) and all(key in theirs and _alike(mine[key], theirs[key]) for key in keys)
    if isinstance(mine, (list, tuple)) and isinstance(theirs, (list, tuple)):
        return len(mine) == len(theirs) and all(map(_alike, mine, theirs))
    if isinstance(mine, (int, float)) and isinstance(theirs, (int, float)):
        return mine == theirs or (mine != mine and theirs != theirs)  # noqa: PLR0124  NaN
    return True


def described(error: Exception) -> str:
    """Return an error's class and the beginning of what it says."""
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line[:120]}"


def _generator_states() -> tuple[Any, ...]:
    numpy = cast("Any", sys.modules.get("numpy"))
    numpys = repr(numpy.random.get_state()) if numpy else None
    return torch.get_rng_state().tolist(), random.getstate(), numpys


@contextlib.contextmanager
def nothing_disturbed() -> Iterator[None]:
    """Leave generators as they are, and let nothing that a class says be heard."""
    numpy = cast("Any", sys.modules.get("numpy"))
    pythons, numpys = random.getstate(), numpy and numpy.random.get_state()
    try:
        with (
            torch.random.fork_rng(devices=[]),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            torch.enable_grad(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(pythons)
        if numpys:
            numpy.random.set_state(numpys)
