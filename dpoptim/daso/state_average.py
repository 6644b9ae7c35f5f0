"""The average of optimizers' states over nodes, a group of tensors at a time.

Tests: ``tests/daso/test_daso.py``.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dpoptim.comm.communicator import Communicator
from dpoptim.partition import group_by_size
from dpoptim.tuning import TUNING

__all__ = ["average_state", "reals"]


@torch.no_grad()
def average_state(communicator: Communicator, states: Sequence[dict[str, Any]], share: float) -> None:
    """Replace tensors of optimizer state by their mean over ranks, in place; collective, blocks.

    Scalars (counts of steps) become rank 0's. What a parameter has on some ranks only becomes that of the lowest such
    rank on all. All ranks hold the same bits afterwards.

    Parameters
    ----------
    communicator : Communicator
        Of all ranks.
    states : sequence of dict
        The state of each parameter, in the same order on all ranks.
    share : float
        This rank's share in the mean; the shares of all ranks sum to one.
    """
    own = [{key: _layout(value) for key, value in sorted(state.items())} for state in states]
    fingerprint = zlib.crc32(repr(own).encode())
    if len(set(communicator.all_gather_object(fingerprint))) > 1:
        for state, *here in zip(states, *communicator.all_gather_object(own), strict=True):
            if any(layout != here[0] for layout in here):
                owner = next(rank for rank, layout in enumerate(here) if layout)
                state.update(communicator.broadcast_object(dict(state), root=owner))
    scalars = [{key: value for key, value in state.items() if not _is_array(value)} for state in states]
    for state, of_rank_0 in zip(states, communicator.broadcast_object(scalars), strict=True):
        for key, value in of_rank_0.items():
            if isinstance(state[key], Tensor):
                state[key].copy_(value)
            else:
                state[key] = value
    for tensors in _groups(list(_arrays(states))):
        dtype = torch.float32 if tensors[0].element_size() < 4 else reals(tensors[0]).dtype
        mean = torch.cat([reals(tensor).reshape(-1).to(dtype) for tensor in tensors]).mul_(share)
        communicator.all_reduce(mean)
        parts = torch.split(mean, [reals(tensor).numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            reals(tensor).copy_(part.view(reals(tensor).shape))


# So much memory beside the state itself.
_GROUP_BYTES = TUNING.average_group_bytes


def _groups(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one dtype and device that are to travel together."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for alike in kinds.values():
        for indices in group_by_size([tensor.nbytes for tensor in alike], _GROUP_BYTES):
            yield [alike[index] for index in indices]


def _arrays(states: Sequence[dict[str, Any]]) -> Iterator[Tensor]:
    return (value for state in states for _, value in sorted(state.items()) if _is_array(value))


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() != 1 and (value.is_floating_point() or value.is_complex())


def _layout(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def reals(tensor: Tensor) -> Tensor:
    """Return a view on a tensor's numbers; complex ones as pairs of reals."""
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
