"""Are the ranks still alike? Comparisons across ranks, and errors that all ranks raise together."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.comm.roll_call import RollCall

__all__ = ["ParameterFacts", "check_optimizers_agree", "check_replicas", "digest", "raise_together", "run_together"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class ParameterFacts:
    """What must be equal on all ranks about one parameter, in the words of the error messages."""

    name: str
    group: int
    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool


def raise_together(communicator: Communicator, error: Exception | None) -> None:
    """Raise on every rank if any rank has an error; collective, blocks.

    Parameters
    ----------
    communicator : Communicator
        Of the ranks that agree.
    error : Exception or None
        This rank's own error, which it raises itself. A rank without one raises an error of the same kind as the
        lowest rank that has one, and names that rank.
    """
    described = None if error is None else (_kind(error), str(error))
    for rank, other in enumerate(communicator.all_gather_object(described)):
        if other is not None:
            kind, message = other
            raise raised_on_all_ranks(kind(f"on rank {rank}: {message}") if error is None else error)


def run_together(roll_call: RollCall, purpose: str, function: Callable[[], _T]) -> _T:
    """Call a function, meet, and raise on every rank what it raises on any; collective, blocks.

    Parameters
    ----------
    roll_call : RollCall
        Where ranks meet. A rank that others wait for within the function, since it has raised, is found there.
    purpose : str
        What the function is for, in the words of the roll call; the same on all ranks.
    function : callable
        Local or collective.
    """
    error: Exception | None = None
    try:
        result = function()
    except Exception as caught:
        if getattr(caught, "raised_on_all_ranks", False):
            raise
        error = caught
    try:
        roll_call.check_in(purpose, 1.0)
    except RuntimeError:
        if error is None:
            raise
        raise raised_on_all_ranks(error) from None
    raise_together(roll_call.communicator, error)
    return result


def check_optimizers_agree(
    communicator: Communicator,
    parameters: Sequence[ParameterFacts],
    hyper_parameters: Sequence[dict[str, str]],
    settings: dict[str, str],
) -> None:
    """Raise ``ValueError`` on every rank if the optimizers of the ranks differ; collective, blocks.

    Parameters
    ----------
    communicator : Communicator
        Of the ranks to compare.
    parameters : sequence of ParameterFacts
        All parameters of this rank's optimizer, in order.
    hyper_parameters : sequence of dict
        For each parameter group of this rank, every hyper-parameter as text.
    settings : dict
        Everything else that must be equal, as text by its name.
    """
    own = (settings, list(parameters), list(hyper_parameters))
    if len(set(communicator.all_gather_object(hashlib.sha256(repr(own).encode()).digest()))) == 1:
        return
    everybody = communicator.all_gather_object(own)
    for rank, other in enumerate(everybody):
        difference = _first_difference(everybody[0], other, rank)
        if difference:
            raise raised_on_all_ranks(ValueError(f"{difference}: every rank must construct the same optimizer"))


def check_replicas(communicator: Communicator, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ``RuntimeError`` on every rank unless all ranks hold the same bits; collective, blocks.

    Parameters
    ----------
    communicator : Communicator
        Of the ranks to compare.
    tensors : iterable of (str, Tensor)
        Names and tensors, for example ``model.state_dict().items()``, in the same order on all ranks.
    """
    digests = [(name, digest(tensor)) for name, tensor in tensors]
    roll_call = RollCall.near(communicator)
    if roll_call is not None:
        roll_call.check_in("comparing replicas", 1.0)
    everybody = communicator.all_gather_object(digests)
    for index, entries in enumerate(zip(*everybody, strict=False)):
        different = [rank for rank, entry in enumerate(entries) if entry != entries[0]]
        if different:
            name = digests[index][0]
            raise raised_on_all_ranks(
                RuntimeError(f"'{name}' differs between rank 0 and ranks {', '.join(map(str, different))}")
            )
    counts = [len(entries) for entries in everybody]
    if len(set(counts)) > 1:
        raise raised_on_all_ranks(RuntimeError(f"the ranks compare different numbers of tensors: {counts}"))


def digest(tensor: Tensor) -> bytes:
    """Return a hash of a tensor's bits, shape and dtype; equal bits, equal hash."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    bits = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    bits.update(values.numpy().tobytes())
    return bits.digest()


def _kind(error: Exception) -> type[Exception]:
    return next((kind for kind in (TypeError, ValueError) if isinstance(error, kind)), RuntimeError)


def _first_difference(first: Any, other: Any, rank: int) -> str | None:
    """Say in words where rank ``rank`` differs from rank 0."""
    (settings_0, parameters_0, groups_0), (settings_r, parameters_r, groups_r) = first, other
    for index, (a, b) in enumerate(zip(parameters_0, parameters_r, strict=False)):
        if a.name != b.name:
            return f"parameter {index} is '{a.name}' on rank 0 but '{b.name}' on rank {rank}"
        for what in ("shape", "dtype", "group", "requires_grad"):
            if getattr(a, what) != getattr(b, what):
                return (
                    f"parameter '{a.name}' has {what} {getattr(a, what)} on rank 0 but {getattr(b, what)} "
                    f"on rank {rank}"
                )
    if len(parameters_0) != len(parameters_r):
        longer, holder = max((parameters_0, "0"), (parameters_r, str(rank)), key=lambda pair: len(pair[0]))
        extra = longer[min(len(parameters_0), len(parameters_r))].name
        return (
            f"the optimizer has {len(parameters_0)} parameters on rank 0 but {len(parameters_r)} on rank {rank} "
            f"(the first that only rank {holder} has is '{extra}')"
        )
    for index, (group_0, group_r) in enumerate(zip(groups_0, groups_r, strict=False)):
        for key in sorted(group_0.keys() | group_r.keys()):
            if group_0.get(key) != group_r.get(key):
                values = f"{group_0.get(key)} on rank 0 but {group_r.get(key)} on rank {rank}"
                return f"parameter group {index} has {key} = {values}"
    for key in sorted(settings_0.keys() | settings_r.keys()):
        if settings_0.get(key) != settings_r.get(key):
            return f"{key} is {settings_0.get(key)} on rank 0 but {settings_r.get(key)} on rank {rank}"
    return None
