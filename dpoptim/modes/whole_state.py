"""A divided optimizer state as a whole: gathered to one rank, or sent out from it, a tensor at a time."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.step.facts import NUMBERS
from dpoptim.utils.state_dict import NamedState, Slices, full_slices, is_slice

__all__ = ["gather_state", "scatter_state"]


class _Slice:
    """Stands for a slice of a tensor of the parameter's shape, where only what there is is told."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def gather_state(
    communicator: Communicator,
    form: NamedState,
    devices: Mapping[str, torch.device],
    *,
    rank0_only: bool,
    drops_torn: bool = False,
) -> NamedState | None:
    """Put the forms of all ranks together; collective, blocks.

    One tensor is collected at a time, so that a rank that keeps nothing needs memory for one.

    Parameters
    ----------
    communicator : Communicator
        Of the ranks that hold the parts.
    form : NamedState
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
        The full form; None on ranks that keep nothing.
    """
    keep = communicator.rank == 0 or not rank0_only
    everybody = communicator.all_gather_object((form["slices"], _outline(form), form.get("whole", {})))
    torn: list[str] = []
    full: NamedState = {**form, "slices": full_slices(form["shapes"]), "state": {}, "whole": {}}
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
            own = form["state"][name][key] if counts[communicator.rank] else whole[:0]
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
        warnings.warn(f"{what}, since a step has failed: their state is dropped", stacklevel=3)
    return full if keep else None


def scatter_state(
    communicator: Communicator, form: NamedState | None, slices: Slices, devices: Mapping[str, torch.device]
) -> NamedState:
    """Give every rank its slices of rank 0's full form; collective, blocks.

    Parameters
    ----------
    communicator : Communicator
        All ranks.
    form : NamedState or None
        The full form on rank 0; not looked at elsewhere.
    slices : Slices
        What this rank is to hold.
    devices : mapping
        Where to, by parameter's name.

    Returns
    -------
    NamedState
        This rank's, with memory of its own.
    """
    outline = None if form is None else {**form, "state": _outline(form)}
    shared: NamedState = communicator.broadcast_object(outline)
    numels = {name: stop for name, (_, stop) in full_slices(shared["shapes"]).items()}
    state: dict[str, dict[str, Any]] = {}
    for name, entry in shared["state"].items():
        start, stop = slices[name]
        mine: dict[str, Any] = {}
        for key, value in entry.items():
            if isinstance(value, _Slice):
                if communicator.rank == 0:
                    assert form is not None
                    whole = form["state"][name][key].to(devices[name]).contiguous()
                else:
                    whole = torch.empty(numels[name], dtype=value.dtype, device=devices[name])
                communicator.broadcast(whole)
                mine[key] = whole[start:stop].clone()
            else:
                mine[key] = value.to(devices[name]) if isinstance(value, Tensor) and key != "step" else value
        if start < stop or not numels[name]:
            state[name] = mine
    return {**shared, "slices": dict(slices), "state": state}


def _outline(form: NamedState) -> dict[str, dict[str, Any]]:
    """Return a form's state without its large tensors."""
    return {
        name: {key: _Slice(value.dtype) if is_slice(form, name, key) else value for key, value in entry.items()}
        for name, entry in form["state"].items()
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
