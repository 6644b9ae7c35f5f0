"""Optimizer state by parameter name and by interval: shard it, put it together, move it to another number of ranks.

Pure functions, without MPI. A *form* is what one rank holds::

    {"param_groups": [{hyper-parameters, "params": [names]}],    all groups
     "slices": {name: (start, stop)},                            every parameter; start == stop: nothing of it here
     "shapes": {name: shape},                                    every parameter's own, whole shape
     "state":  {name: {key: value}},                             of the parameters that this rank holds something of
     "whole":  {name: [keys]},                                   only if needed, see below
     "unnamed": {key: value}}                                    only if needed: entries that are no parameter's

A tensor of its parameter's shape, such as Adam's ``exp_avg``, is in a form as the 1-d tensor of the elements from
``start`` to ``stop`` of its flattened self. Everything else (``step``, Adafactor's row and column factors, LBFGS' past,
numbers, None) is there as it is, on every rank that holds something of the parameter. Where such a tensor could be
taken for a slice by its shape, ``whole`` lists its key. Other entries at the top are kept as they are.

A full form has the slices ``(0, numel)``. Nothing here copies a tensor unless it must: values may share memory with
what was given.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dpoptim.partition import even_counts, owners_by_size, start_offsets

__all__ = [
    "NamedState",
    "Slices",
    "from_named",
    "full_slices",
    "groups_of",
    "is_slice",
    "load_full_form",
    "reshard",
    "shard",
    "slices_by_element",
    "slices_by_parameter",
    "to_named",
    "unique_names",
    "unshard",
]

NamedState = dict[str, Any]
Slices = dict[str, tuple[int, int]]
_Shapes = Mapping[str, Sequence[int]]

_OWN_ENTRIES = ("param_groups", "slices", "shapes", "state", "whole", "unnamed")


# ------------------------------------------------------------------------------------------ who holds what


def full_slices(shapes: _Shapes) -> Slices:
    """Return the slices of one that holds everything."""
    return {name: (0, math.prod(shape)) for name, shape in shapes.items()}


def slices_by_element(shapes: _Shapes, world_size: int) -> list[Slices]:
    """Divide all elements among ranks as equally as possible; return each rank's slices.

    Parameters are thought of as lying one after another in the order of ``shapes``, and cut into ``world_size`` parts
    of which the first are larger by at most one element. For optimizers that treat each element by itself.
    """
    numels = {name: math.prod(shape) for name, shape in shapes.items()}
    begins = dict(zip(numels, start_offsets(list(numels.values())), strict=True))
    counts = even_counts(sum(numels.values()), world_size)
    return [
        {name: _overlap((0, numel), (low - begins[name], low + count - begins[name])) for name, numel in numels.items()}
        for low, count in zip(start_offsets(counts), counts, strict=True)
    ]


def slices_by_parameter(shapes: _Shapes, world_size: int) -> list[Slices]:
    """Give every parameter whole to one rank, the largest first to who has least; return each rank's slices."""
    numels = {name: math.prod(shape) for name, shape in shapes.items()}
    if world_size < 1:
        raise ValueError(f"world_size must be >= 1, got {world_size}")
    slices: list[Slices] = [dict.fromkeys(shapes, (0, 0)) for _ in range(world_size)]
    for name, owner in zip(numels, owners_by_size(list(numels.values()), [0] * world_size), strict=True):
        slices[owner][name] = (0, numels[name])
    return slices


def is_slice(form: NamedState, name: str, key: str) -> bool:
    """Whether a value of a form's state is a slice of a tensor of the parameter's shape."""
    value = form["state"][name][key]
    start, stop = form["slices"][name]
    return _looks_like_slice(value, stop - start) and key not in form.get("whole", {}).get(name, ())


# ------------------------------------------------------------------------------------------ torch's form


def unique_names(param_groups: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> list[str]:
    """Return one name a parameter, in order: the given ones, else the groups' own, else their positions.

    A name that comes twice (two models in one optimizer) is followed by its position.
    """
    positions = [f"{i} of group {g}" for g, group in enumerate(param_groups) for i in range(len(group["params"]))]
    if names is None:
        own = [name for group in param_groups for name in group.get("param_names") or [None] * len(group["params"])]
        names = [name or position for name, position in zip(own, positions, strict=True)]
    if len(names) != len(positions):
        raise ValueError(f"names must have one entry a parameter ({len(positions)}), got {len(names)}")
    twice = {name for name, count in Counter(names).items() if count > 1}
    return [f"{name} ({position})" if name in twice else name for name, position in zip(names, positions, strict=True)]


def to_named(
    state_dict: Mapping[str, Any], shapes: Sequence[Sequence[int]], names: Sequence[str] | None = None
) -> NamedState:
    """Turn the ``state_dict()`` of a torch optimizer into a full form.

    Parameters
    ----------
    state_dict : mapping
        ``{"state": {index: {key: value}}, "param_groups": [{..., "params": [indices]}]}``; other entries are kept.
    shapes : sequence
        The shape of every parameter, in the order of the groups.
    names : sequence of str, optional
        The name of every parameter; by default the groups' ``param_names``, or positions such as ``"3 of group 0"``.

    Raises
    ------
    ValueError
        ``names`` or ``shapes`` have another length than there are parameters.
    """
    groups = state_dict["param_groups"]
    names = unique_names(groups, names)
    if len(shapes) != len(names):
        raise ValueError(f"shapes must have one entry a parameter ({len(names)}), got {len(shapes)}")
    by_name = dict(zip(names, (tuple(shape) for shape in shapes), strict=True))
    indices = [index for group in groups for index in group["params"]]
    named_groups, rest = [], iter(names)
    for group in groups:
        own = [next(rest) for _ in group["params"]]
        named_groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": own})
    form: NamedState = {
        **{key: value for key, value in state_dict.items() if key not in _OWN_ENTRIES},
        "param_groups": named_groups,
        "slices": full_slices(by_name),
        "shapes": by_name,
        "state": {},
    }
    for index, name in zip(indices, names, strict=True):
        if index not in state_dict["state"]:
            continue
        entry = form["state"][name] = {}
        for key, value in state_dict["state"][index].items():
            is_like = _is_like(value, by_name[name])
            entry[key] = value.reshape(-1) if is_like else value
            if not is_like and _looks_like_slice(value, form["slices"][name][1]):
                form.setdefault("whole", {}).setdefault(name, []).append(key)
    unnamed = {key: value for key, value in state_dict["state"].items() if not isinstance(key, int)}
    return {**form, "unnamed": unnamed} if unnamed else form


def from_named(form: NamedState) -> dict[str, Any]:
    """Turn a full form into the ``state_dict()`` of a torch optimizer, parameters numbered in the order of groups.

    Raises
    ------
    ValueError
        The form does not hold all of a parameter.
    """
    for name, (start, stop) in form["slices"].items():
        numel = math.prod(form["shapes"][name])
        if (start, stop) != (0, numel):
            raise ValueError(
                f"the form must hold all of every parameter, got elements {start} to {stop} of {numel} of '{name}': "
                "unshard() the forms of all ranks first"
            )
    names = [name for group in form["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    state = {
        numbers[name]: {
            key: value.view(tuple(form["shapes"][name])) if is_slice(form, name, key) else value
            for key, value in entry.items()
        }
        for name, entry in form["state"].items()
    }
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in form["param_groups"]]
    others = {key: value for key, value in form.items() if key not in _OWN_ENTRIES}
    return {**others, "state": {**dict(sorted(state.items())), **form.get("unnamed", {})}, "param_groups": groups}


def groups_of(form: NamedState, param_groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a form's groups as torch loads them: parameters by number, ``param_names`` as these groups have them."""
    start = 0
    groups = []
    for group, own in zip(form["param_groups"], param_groups, strict=True):
        numbers = list(range(start, start + len(group["params"])))
        start += len(numbers)
        names = {"param_names": own["param_names"]} if "param_names" in own else {}
        groups.append({**group, **names, "params": numbers})
    return groups


def load_full_form(optimizer: Optimizer, form: NamedState) -> None:
    """Load a full form into an optimizer that holds everything, in the dtypes that the form has.

    torch converts what it loads to the parameter's dtype, also the float32 scalars of ASGD and NAdam; that is put back,
    except for ``step``, which some implementations want otherwise than others.
    """
    optimizer.load_state_dict({**from_named(form), "param_groups": groups_of(form, optimizer.param_groups)})
    names = [name for group in form["param_groups"] for name in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        state = optimizer.state.get(parameter, {})
        for key, value in form["state"].get(name, {}).items():
            there = state.get(key)
            if key != "step" and isinstance(value, Tensor) and isinstance(there, Tensor) and there.dtype != value.dtype:
                state[key] = value.view(there.shape).to(there.device)


# ------------------------------------------------------------------------------------------ from slices to slices


def shard(form: NamedState, slices: Slices) -> NamedState:
    """Return the part of a full form that a rank with these slices holds; its tensors are copies."""
    return reshard([form], slices)


def unshard(forms: Iterable[NamedState]) -> NamedState:
    """Put the forms of all ranks together to a full one; they are taken one after another."""
    return reshard(forms, None)


def reshard(forms: Iterable[NamedState], slices: Slices | None) -> NamedState:
    """Collect what a rank with these slices holds from forms with others, of any number of ranks.

    The forms are taken one after another and none is kept, so that a generator that reads them from somewhere needs
    memory for one at a time. Where they overlap, the first counts.

    Parameters
    ----------
    forms : iterable of NamedState
        Of all ranks of the old run, in any order.
    slices : Slices or None
        What to hold; all if None.

    Raises
    ------
    ValueError
        No form was given, they are about different parameters, or together they lack elements that are wanted.
    """
    result: NamedState | None = None
    covered: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for form in forms:
        if result is None:
            slices = full_slices(form["shapes"]) if slices is None else slices
            result = _empty_like(form, slices)
        elif form["shapes"] != result["shapes"]:
            different, _ = min(set(form["shapes"].items()) ^ set(result["shapes"].items()))
            raise ValueError(f"the forms must be about the same parameters, but '{different}' differs")
        for name, entry in form["state"].items():
            if _holds(result, name):
                _take(result, form, name, entry, covered)
    if result is None:
        raise ValueError("forms must hold at least one form, got none")
    for (name, key), parts in covered.items():
        _check_covered(result["slices"][name], parts, name, key)
    return result


def _take(
    result: NamedState,
    form: NamedState,
    name: str,
    entry: dict[str, Any],
    covered: dict[tuple[str, str], list[tuple[int, int]]],
) -> None:
    """Copy what is wanted of one parameter's state."""
    (old_start, old_stop), (new_start, new_stop) = form["slices"][name], result["slices"][name]
    mine = result["state"].setdefault(name, {})
    start, stop = _overlap((old_start, old_stop), (new_start, new_stop))
    for key, value in entry.items():
        if not is_slice(form, name, key):
            if key not in mine:
                mine[key] = copy.deepcopy(value)
                if _looks_like_slice(value, new_stop - new_start):
                    result.setdefault("whole", {}).setdefault(name, []).append(key)
            continue
        if (name, key) not in covered:
            mine[key] = value.new_empty(new_stop - new_start)
            covered[name, key] = []
        if start < stop:
            mine[key][start - new_start : stop - new_start] = value[start - old_start : stop - old_start]
            covered[name, key].append((start, stop))


def _empty_like(form: NamedState, slices: Slices) -> NamedState:
    if slices.keys() != form["shapes"].keys():
        different = sorted(slices.keys() ^ form["shapes"].keys())[0]
        raise ValueError(f"slices must name the parameters of the forms, but '{different}' is in one of them only")
    for name, (start, stop) in slices.items():
        numel = math.prod(form["shapes"][name])
        if not 0 <= start <= stop <= numel:
            raise ValueError(f"slices must lie in 0 to {numel} for '{name}', got {start} to {stop}")
    others = {key: copy.deepcopy(value) for key, value in form.items() if key not in ("slices", "state", "whole")}
    return {**others, "slices": dict(slices), "state": {}}


def _check_covered(wanted: tuple[int, int], parts: list[tuple[int, int]], name: str, key: str) -> None:
    reached = wanted[0]
    for start, stop in sorted(parts):
        if start > reached:
            break
        reached = max(reached, stop)
    if reached < wanted[1]:
        raise ValueError(f"no form has element {reached} of '{key}' of parameter '{name}': give the forms of all ranks")


def _holds(form: NamedState, name: str) -> bool:
    """Whether a form is to have state of a parameter; of one without elements every form has it."""
    start, stop = form["slices"][name]
    return bool(start < stop) or math.prod(form["shapes"][name]) == 0


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """Return the interval that is in both; where there is none, an empty one within ``a``."""
    start = min(max(a[0], b[0]), a[1])
    return start, max(start, min(a[1], b[1]))


def _is_like(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether a value has its parameter's shape; of a scalar parameter, ``step`` would too, so that none has."""
    return bool(isinstance(value, Tensor) and value.layout == torch.strided and tuple(value.shape) == shape != ())


def _looks_like_slice(value: Any, numel: int) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and tuple(value.shape) == (numel,)
