"""The parts of a program that go into a checkpoint, as trees and tensors, and back.

A part is one of four kinds: a ``torch.nn.Module``; a ``torch.optim.Optimizer``, plain or data-parallel; any other
*object* with ``state_dict()`` and ``load_state_dict()``, or with an ``epoch`` and ``set_epoch()`` as torch's
``DistributedSampler`` has; a *value* made of plain values and tensors.

Tests: ``tests/utils/test_checkpoint.py``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dpoptim.utils.checkpoint.error import CheckpointError
from dpoptim.utils.checkpoint.files import Reader
from dpoptim.utils.checkpoint.index import StoredTensor
from dpoptim.utils.checkpoint.tree import decode, encode
from dpoptim.utils.consistency import digest
from dpoptim.utils.state_dict import NamedState, Slices, full_slices, is_slice, load_full_form, to_named, unique_names

__all__ = [
    "ModuleState",
    "OptimizerState",
    "collect_form",
    "collect_module",
    "collect_object",
    "collect_optimizer",
    "kind_of",
    "load_module",
    "load_object",
    "load_optimizer",
    "module_misfit",
    "optimizer_misfit",
]


def kind_of(part: Any) -> str:
    """Return which of the four kinds a part is."""
    if isinstance(part, nn.Module):
        return "module"
    if isinstance(part, Optimizer):
        return "optimizer"
    if hasattr(part, "state_dict") and hasattr(part, "load_state_dict"):
        return "object"
    return "object" if hasattr(part, "epoch") and hasattr(part, "set_epoch") else "value"


# ------------------------------------------------------------------------------------------ modules


@dataclass
class ModuleState:
    """What a module's ``state_dict()`` holds: parameters, alike on all ranks; buffers, perhaps not; other things."""

    parameters: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)

    def digest(self) -> dict[str, bytes]:
        """Return a hash of every buffer."""
        return {name: digest(buffer) for name, buffer in self.buffers.items()}


def collect_module(module: nn.Module) -> ModuleState:
    """Sort the entries of a module's state."""
    state = ModuleState()
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            state.others[name] = value
        elif isinstance(value, nn.Parameter):
            state.parameters[name] = value.detach()
        else:
            state.buffers[name] = value.detach()
    return state


def module_misfit(part: str, module: nn.Module, stored: Mapping[str, StoredTensor], names: Sequence[str]) -> str | None:
    """Say why a module can't take the tensors of a checkpoint, if it can't; ``names`` are those without ``part.``."""
    own = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    if own.keys() != set(names):
        return f"{part}: {_differing_names(own, names)}"
    for name, tensor in own.items():
        there = stored[f"{part}.{name}"]
        for what, theirs, ours in (
            ("shape", there.shape, tuple(tensor.shape)),
            ("dtype", str(there.dtype), str(tensor.dtype)),
        ):
            if theirs != ours:
                return f"{part}: '{name}' has {what} {theirs} in the checkpoint but {ours} in the program"
    return None


def load_module(
    part: str, module: nn.Module, reader: Reader, others: Mapping[str, Any], own: Mapping[str, str]
) -> None:
    """Read every tensor of a module into its own memory.

    Parameters
    ----------
    others : mapping
        The trees of the entries that are no tensors.
    own : mapping
        Where this rank's own buffers are stored, where ranks differ.
    """
    state = module.state_dict(keep_vars=True)
    for name, value in state.items():
        if isinstance(value, Tensor):
            reader.read_into(value, own.get(name, f"{part}.{name}"))
    if others:
        module.load_state_dict({**state, **{name: decode(tree, reader.read) for name, tree in others.items()}})


# ------------------------------------------------------------------------------------------ optimizers


@dataclass
class OptimizerState:
    """What this rank holds of an optimizer's state.

    Attributes
    ----------
    about : dict
        Alike on all ranks: class, groups and other entries as trees, shapes.
    held : dict
        Interval of each parameter of which this rank holds something.
    state : dict
        The tree of each parameter's state, where tensors are names.
    sliced : dict
        Keys of the tensors that are slices, and their dtypes, of each parameter.
    slices, whole : dict
        The tensors themselves: slices by (parameter, key), others by their name.
    """

    about: dict[str, Any]
    held: Slices
    state: dict[str, dict[str, Any]]
    sliced: dict[str, dict[str, str]]
    slices: dict[tuple[str, str], Tensor]
    whole: dict[str, Tensor]


def collect_optimizer(part: str, optimizer: Optimizer, module: nn.Module | None) -> OptimizerState:
    """Collect what this rank holds, under the names that a checkpoint uses."""
    names = _names(optimizer, module)
    dtypes = {name: _dtype_name(p) for name, p in zip(names, _parameters(optimizer), strict=True)}
    return collect_form(part, _local_form(optimizer, names), _class_name(optimizer), dtypes)


def collect_form(part: str, form: NamedState, class_name: str | None, dtypes: Mapping[str, str]) -> OptimizerState:
    """Collect a form; class and dtypes of the parameters are None and empty where they are not known."""
    names = [name for group in form["param_groups"] for name in group["params"]]
    whole: dict[str, Tensor] = {}
    groups = [{key: value for key, value in group.items() if key != "param_names"} for group in form["param_groups"]]
    others = {k: v for k, v in form.items() if k not in ("param_groups", "slices", "shapes", "state", "whole")}
    about = {
        "class": class_name,
        "param_groups": encode(groups, f"{part}.param_groups", whole),
        "others": encode(others, f"{part}.others", whole),
        "shapes": {name: list(form["shapes"][name]) for name in names},
        "dtypes": dict(dtypes),
    }
    result = OptimizerState(about, {}, {}, {}, {}, whole)
    for name, entry in form["state"].items():
        result.held[name] = form["slices"][name]
        result.state[name], result.sliced[name] = {}, {}
        for key, value in entry.items():
            if is_slice(form, name, key):
                result.slices[name, key] = value.detach()
                result.sliced[name][key] = _dtype_name(value)
                result.state[name][key] = {"$tensor": f"{part}.{name}.{key}"}
            else:
                result.state[name][key] = encode(value, f"{part}.{name}.{key}", whole)
    return result


def optimizer_misfit(
    part: str, optimizer: Optimizer, module: nn.Module | None, stored: Mapping[str, Any]
) -> str | None:
    """Say why an optimizer can't take the state in a checkpoint, if it can't."""
    if stored["class"] not in (None, _class_name(optimizer)):
        return f"{part} is of class {stored['class']} in the checkpoint but of {_class_name(optimizer)} in the program"
    names = _names(optimizer, module)
    own = {name: (tuple(p.shape), _dtype_name(p)) for name, p in zip(names, _parameters(optimizer), strict=True)}
    theirs = {name: (tuple(shape), stored["dtypes"].get(name)) for name, shape in stored["shapes"].items()}
    groups = [group["params"] for group in stored["param_groups"]]
    own_groups = _names_by_group(names, optimizer)
    counts, own_counts = [len(group) for group in groups], [len(group) for group in own_groups]
    if counts != own_counts:
        return f"{part} has groups of {counts} parameters in the checkpoint but of {own_counts} in the program"
    to_own = _renaming(groups, own_groups)
    if to_own is None:
        return f"{part}: {_differing_names(own, theirs)}"
    for number, (group, own_group) in enumerate(zip(groups, own_groups, strict=True)):
        strangers = {to_own[name] for name in group} - set(own_group)
        if strangers:
            return f"{part}: parameter '{min(strangers)}' is in group {number} in the checkpoint but not in the program"
    for name, facts in theirs.items():
        for what, there, here in zip(("shape", "dtype"), facts, own[to_own[name]], strict=True):
            if there not in (None, here):
                return (
                    f"{part}: parameter '{to_own[name]}' has {what} {there} in the checkpoint but {here} in the program"
                )
    return None


def load_optimizer(optimizer: Optimizer, module: nn.Module | None, reader: Reader, stored: Mapping[str, Any]) -> None:
    """Read the slices that this rank holds and give them to the optimizer."""
    names = _names(optimizer, module)
    own_groups = _names_by_group(names, optimizer)
    groups = decode(stored["param_groups"], reader.read)
    to_own = _renaming([group["params"] for group in groups], own_groups)
    assert to_own is not None, "checked by optimizer_misfit"
    shapes = {name: tuple(p.shape) for name, p in zip(names, _parameters(optimizer), strict=True)}
    slices = _local_slices(optimizer, names) or full_slices(shapes)
    state: dict[str, dict[str, Any]] = {}
    whole: dict[str, list[str]] = {}
    for stored_name, entry in stored["state"].items():
        name = to_own[stored_name]
        start, stop = slices[name]
        if start == stop and shapes[name].count(0) == 0:
            continue
        state[name] = {}
        for key, tree in entry.items():
            if key in stored["sliced"].get(stored_name, ()):
                state[name][key] = reader.read(tree["$tensor"], start, stop)
                continue
            value = state[name][key] = decode(tree, reader.read)
            if isinstance(value, Tensor) and tuple(value.shape) == (stop - start,):
                whole.setdefault(name, []).append(key)
    form: NamedState = {
        **decode(stored["others"], reader.read),
        "param_groups": [{**g, "params": own} for g, own in zip(groups, own_groups, strict=True)],
        "slices": slices,
        "shapes": shapes,
        "state": state,
        **({"whole": whole} if whole else {}),
    }
    _load_local_form(optimizer, names, form)


def _local_form(optimizer: Any, names: Sequence[str]) -> NamedState:
    """Return the optimizer's form under these names."""
    if not hasattr(optimizer, "local_state_dict"):
        return to_named(optimizer.state_dict(), [p.shape for p in _parameters(optimizer)], names)
    form: NamedState = optimizer.local_state_dict()
    theirs = [name for group in form["param_groups"] for name in group["params"]]
    return _renamed(form, dict(zip(theirs, names, strict=True)))


def _local_slices(optimizer: Any, names: Sequence[str]) -> Slices | None:
    """Return what this rank holds under these names, if the optimizer is one that divides its state."""
    if not hasattr(optimizer, "local_slices"):
        return None
    slices: Slices = optimizer.local_slices()
    return dict(zip(names, (slices[name] for name in _own_names(optimizer)), strict=True))


def _load_local_form(optimizer: Any, names: Sequence[str], form: NamedState) -> None:
    if hasattr(optimizer, "load_local_state_dict"):
        optimizer.load_local_state_dict(_renamed(form, dict(zip(names, _own_names(optimizer), strict=True))))
        return
    load_full_form(optimizer, form)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _own_names(optimizer: Any) -> list[str]:
    """Return the names in an optimizer's local form, in the order of its parameters."""
    return [name for group in optimizer.local_state_dict()["param_groups"] for name in group["params"]]


def _renamed(form: NamedState, new: Mapping[str, str]) -> NamedState:
    by_name = {key: {new[name]: v for name, v in form[key].items()} for key in ("slices", "shapes", "state")}
    if "whole" in form:
        by_name["whole"] = {new[name]: keys for name, keys in form["whole"].items()}
    groups = [{**group, "params": [new[name] for name in group["params"]]} for group in form["param_groups"]]
    return {**form, **by_name, "param_groups": groups}


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _names(optimizer: Optimizer, module: nn.Module | None) -> list[str]:
    """Return the optimizer's own names of its parameters, else the model's, else their positions."""
    by_identity = {} if module is None else {id(p): name for name, p in module.named_parameters()}
    named = [
        {**group, "param_names": group.get("param_names") or [by_identity.get(id(p)) for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    return unique_names(named)


def _names_by_group(names: Sequence[str], optimizer: Optimizer) -> list[list[str]]:
    rest = iter(names)
    return [[next(rest) for _ in group["params"]] for group in optimizer.param_groups]


def _renaming(groups: Sequence[Sequence[str]], own_groups: Sequence[Sequence[str]]) -> dict[str, str] | None:
    """Return which parameter of the program each one in the checkpoint is; by position where a side has no names."""
    theirs, own = ([name for group in side for name in group] for side in (groups, own_groups))
    if set(theirs) == set(own):
        return {name: name for name in theirs}
    positions = unique_names([{"params": list(group)} for group in own_groups])
    if positions in (theirs, own):
        return dict(zip(theirs, own, strict=True))
    return None


def _class_name(optimizer: Any) -> str:
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def _differing_names(own: Any, theirs: Any) -> str:
    missing, unexpected = sorted(set(own) - set(theirs)), sorted(set(theirs) - set(own))
    return (
        f"the checkpoint has no '{missing[0]}', which the program has ({len(missing)} such names)"
        if missing
        else f"the program has no '{unexpected[0]}', which the checkpoint has ({len(unexpected)} such names)"
    )


# ------------------------------------------------------------------------------------------ anything else


def collect_object(part: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return an object's state, or a value, as a tree."""
    if kind_of(value) == "value":
        return encode(value, part, tensors)
    state = value.state_dict() if hasattr(value, "state_dict") else {"epoch": value.epoch}
    return encode(state, part, tensors)


def load_object(part: str, value: Any, tree: Any, fetch: Callable[[str], Tensor]) -> None:
    """Give an object the state that was saved."""
    state = decode(tree, fetch)
    if hasattr(value, "load_state_dict"):
        value.load_state_dict(state)
    elif isinstance(state, dict) and "epoch" in state:
        value.set_epoch(state["epoch"])
    else:
        raise CheckpointError(f"{part} has no epoch in the checkpoint")
