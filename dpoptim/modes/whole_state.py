"""A sharded optimizer state as a whole: gathered to one rank, or sent out from it, a tensor at a time."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.step.classes import parameters_of
from dpoptim.step.facts import NUMBERS
from dpoptim.utils.state_dict import NamedState, Slices, full_slices, is_slice, unique_names

__all__ = ["devices_of", "gather_state", "groups_with", "scatter_state"]


def devices_of(optimizer: Optimizer, names: Sequence[str]) -> dict[str, torch.device]:
    """Return where each parameter is, by its unique name; local."""
    unique = unique_names(optimizer.param_groups, names)
    return {name: parameter.device for name, parameter in zip(unique, parameters_of(optimizer), strict=True)}


class _Slice:
    """Stands for a slice of a tensor of the parameter's shape, where only what there is is told."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def gather_state(
    communicator: Communicator,
    named_state: NamedState,
    devices: Mapping[str, torch.device],
    *,
    rank0_only: bool,
    drops_torn: bool = False,
) -> NamedState | None:
    """Put the states of all ranks together; collective, blocks.

    One tensor is collected at a time, so that a rank that keeps nothing needs memory for one.

    Parameters
    ----------
    communicator : Communicator
        Of the ranks that hold the parts.
    named_state : NamedState
        This rank's; see :mod:`dpoptim.utils.state_dict`.
    devices : mapping
        Where each parameter is on this rank, by name.
    rank0_only : bool
        Whether rank 0 alone keeps it.
    drops_torn : bool
        Whether parameters are left out, with a warning, of which some ranks have stepped their part and others not.

    Raises
    ------
    RuntimeError
        On every rank, if there are such parameters and they are not left out.

    Returns
    -------
    NamedState or None
        The whole state; None on ranks that keep nothing.
    """
    keep = communicator.rank == 0 or not rank0_only
    everybody = communicator.all_gather_object(
        (named_state["slices"], _outline(named_state), named_state.get("whole", {}))
    )
    torn: list[str] = []
    full: NamedState = {**named_state, "slices": full_slices(named_state["shapes"]), "state": {}, "whole": {}}
    for name, (_, numel) in full["slices"].items():
        holders = _cover([slices[name] for slices, _, _ in everybody])
        if _is_torn([everybody[rank][1].get(name) for rank in holders]):
            torn.append(name)
            continue
        if not holders or name not in everybody[holders[0]][1]:
            continue
        entry: dict[str, Any] = {}
        for key, value in everybody[holders[0]][1][name].items():
            if not isinstance(value, _Slice):
                entry[key] = value
                continue
            counts = [0] * communicator.world_size
            for rank in holders:
                start, stop = everybody[rank][0][name]
                counts[rank] = stop - start
            whole = torch.empty(numel, dtype=value.dtype, device=devices[name])
            own = named_state["state"][name][key] if counts[communicator.rank] else whole[:0]
            communicator.all_gather(whole, own.contiguous(), counts=counts)
            entry[key] = whole if keep else None
        full["state"][name] = entry
        if name in everybody[holders[0]][2]:
            full["whole"][name] = everybody[holders[0]][2][name]
    if torn:
        what = f"of parameter {', '.join(map(repr, torn))} some ranks have stepped their part and others not"
        if not drops_torn:
            message = f"{what}, since a step has failed: load a checkpoint, or detach() the optimizer and wrap it anew"
            raise raised_on_all_ranks(RuntimeError(message))
        warnings.warn(f"{what}, since a step has failed: their state is dropped", stacklevel=4)
    return full if keep else None


def scatter_state(
    communicator: Communicator, named_state: NamedState | None, slices: Slices, devices: Mapping[str, torch.device]
) -> NamedState:
    """Give every rank its slices of rank 0's whole state; collective, blocks.

    Parameters
    ----------
    communicator : Communicator
        All ranks.
    named_state : NamedState or None
        The whole state on rank 0; not looked at elsewhere.
    slices : Slices
        What this rank is to hold.
    devices : mapping
        Where to, by parameter's name.

    Returns
    -------
    NamedState
        This rank's, with memory of its own.
    """
    outline = None if named_state is None else {**named_state, "state": _outline(named_state)}
    shared: NamedState = communicator.broadcast_object(outline)
    numels = {name: stop for name, (_, stop) in full_slices(shared["shapes"]).items()}
    state: dict[str, dict[str, Any]] = {}
    for name, entry in shared["state"].items():
        start, stop = slices[name]
        mine: dict[str, Any] = {}
        for key, value in entry.items():
            if isinstance(value, _Slice):
                if communicator.rank == 0:
                    assert named_state is not None
                    whole = named_state["state"][name][key].to(devices[name]).contiguous()
                else:
                    whole = torch.empty(numels[name], dtype=value.dtype, device=devices[name])
                communicator.broadcast(whole)
                mine[key] = whole[start:stop].clone()
            else:
                mine[key] = value.to(devices[name]) if isinstance(value, Tensor) and key != "step" else value
        if start < stop or not numels[name]:
            state[name] = mine
    return {**shared, "slices": dict(slices), "state": state}


def _outline(named_state: NamedState) -> dict[str, dict[str, Any]]:
    """Return the entries of parameters without their large tensors."""
    return {
        name: {key: _Slice(value.dtype) if is_slice(named_state, name, key) else value for key, value in entry.items()}
        for name, entry in named_state["state"].items()
    }


def _is_torn(entries: Sequence[dict[str, Any] | None]) -> bool:
    """Whether the parts of a parameter's state are not those of the same step."""
    first = entries[0] if entries else None
    for entry in entries[1:]:
        if (entry is None) != (first is None):
            return True
        if entry is None or first is None:
            continue
        if entry.keys() != first.keys():
            return True
        if any(_number(entry[key]) != _number(first[key]) for key in NUMBERS & entry.keys()):
            return True
    return False


def _number(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return value if isinstance(value, (int, float)) else None


def _cover(intervals: Sequence[tuple[int, int]]) -> list[int]:
    """Return ranks whose intervals, one after another, cover the whole; each node may have a copy of it."""
    ranks, reached = [], 0
    for rank, (start, stop) in enumerate(intervals):
        if start == reached and stop > start:
            ranks.append(rank)
            reached = stop
    return ranks


@contextlib.contextmanager
def groups_with(optimizer: Optimizer, parameters: Sequence[Sequence[Tensor]]) -> Iterator[None]:
    """Have these parameters, of which ranks have the state, in the groups within, whatever is there now; local.

    Parameters
    ----------
    optimizer : Optimizer
        Whose groups are replaced if they have others.
    parameters : sequence
        Those of each group.
    """
    groups = optimizer.param_groups
    now = [group["params"] for group in groups]
    if list(map(len, now)) == list(map(len, parameters)) and all(
        own is known
        for members, others in zip(now, parameters, strict=True)
        for own, known in zip(members, others, strict=True)
    ):
        yield
        return
    options = {key: value for key, value in (groups or [optimizer.defaults])[0].items() if key != "param_names"}
    optimizer.param_groups = [{**options, "params": list(members)} for members in parameters]
    try:
        yield
    finally:
        optimizer.param_groups = groups
