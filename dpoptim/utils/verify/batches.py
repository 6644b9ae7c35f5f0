"""The batches of all ranks as one, as one process would have it.

Tests: ``tests/utils/test_verify.py``.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.utils.consistency import raise_together

__all__ = ["join_batches"]

_CONSTANTS = (str, bytes, bool, int, float, complex, type(None))


def join_batches(communicator: Communicator, batch: Any) -> tuple[Any, list[int]]:
    """Put the batches of all ranks together along dim 0; collective, blocks, the same result on all ranks.

    Parameters
    ----------
    communicator : Communicator
        All ranks.
    batch : Tensor, or tuples, lists and dicts of tensors
        This rank's. All of its tensors have the batch in dim 0, but those without dims, which, as numbers and strings,
        must be the same on all ranks.

    Returns
    -------
    object, list of int
        The joined batch, of this rank's devices, and the number of samples of each rank.

    Raises
    ------
    TypeError, ValueError
        On every rank, if a batch holds something else on any, or the ranks' batches do not go together.
    """
    parts = dict(_walk(batch, "batch"))
    raise_together(communicator, _error_of(parts))
    tensors = {path: value for path, value in parts.items() if _has_samples(value)}
    layout = {
        path: f"{value.dtype} of shape (*, {', '.join(map(str, value.shape[1:]))})"
        if path in tensors
        else repr(value.tolist() if isinstance(value, Tensor) else value)
        for path, value in parts.items()
    }
    for rank, (other, _) in enumerate(everybody := communicator.all_gather_object((layout, len(tensors)))):
        for path in sorted(everybody[0][0].keys() | other.keys()):
            here, there = everybody[0][0].get(path, "missing"), other.get(path, "missing")
            if here != there:
                raise raised_on_all_ranks(
                    ValueError(
                        f"{path} is {here} on rank 0 but {there} on rank {rank}: batches are joined along dim 0, and "
                        "all else must be equal"
                    )
                )
    gathered = communicator.all_gather_object([value.detach().cpu() for value in tensors.values()])
    joined = {
        path: torch.cat(list(own)).to(tensors[path].device)
        for path, own in zip(tensors, zip(*gathered, strict=True), strict=True)
    }
    return _rebuilt(batch, "batch", joined), [len(rank_tensors[0]) for rank_tensors in gathered]


def _has_samples(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield everything that is no container, with where it is."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _walk(item, f"{path}[{index}]")
    else:
        yield path, value


def _rebuilt(value: Any, path: str, joined: Mapping[str, Tensor]) -> Any:
    """Return the same containers with the joined tensors."""
    if isinstance(value, Mapping):
        return {key: _rebuilt(item, f"{path}[{key!r}]", joined) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_rebuilt(item, f"{path}[{index}]", joined) for index, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return joined.get(path, value)


def _error_of(parts: Mapping[str, Any]) -> Exception | None:
    for path, value in parts.items():
        if not isinstance(value, (Tensor, *_CONSTANTS)):
            return TypeError(
                f"batch must be a tensor, or tuples, lists and dicts of tensors, got {type(value).__name__} as {path}"
            )
    lengths = {path: len(value) for path, value in parts.items() if _has_samples(value)}
    if not lengths:
        return ValueError("batch must hold a tensor whose dim 0 is the batch, got none")
    first = next(iter(lengths))
    for path, length in lengths.items():
        if length != lengths[first]:
            return ValueError(
                f"every tensor of batch must have the samples in dim 0, but {first} has {lengths[first]} and {path} "
                f"has {length}: what is no batch belongs into loss_fn"
            )
    return None
