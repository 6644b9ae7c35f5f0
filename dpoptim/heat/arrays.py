"""From DNDarrays to this rank's tensors, and from parameters and gradients to DNDarrays; no data is sent.

Tests: ``tests/heat/test_heat_arrays.py``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import heat
import torch
from heat import DNDarray
from torch import Tensor, nn

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.roll_call import RollCall
from dpoptim.utils.consistency import raise_together

__all__ = ["LocalPart", "batches", "gradients", "local_part", "parameters"]


@dataclass(frozen=True)
class LocalPart:
    """The rows of some DNDarrays that this rank has.

    Attributes
    ----------
    tensors : tuple of Tensor
        The rows of each array; views of its memory.
    weight : float
        How many rows they are: what ``opt.batch_weight`` must be for a step on all of them, to give the exact mean
        over the rows of all ranks.
    row_counts : tuple of int
        How many rows each rank has.
    """

    tensors: tuple[Tensor, ...]
    weight: float
    row_counts: tuple[int, ...]


def local_part(*arrays: DNDarray) -> LocalPart:
    """Return this rank's rows of arrays that are split along their rows; collective, the result differs between ranks.

    No data is sent or copied. The parts may be of different sizes.

    Parameters
    ----------
    *arrays : DNDarray
        With ``split=0``, balanced or not, of one communicator, divided alike: samples and their labels.

    Raises
    ------
    TypeError, ValueError
        On all ranks: no DNDarray; another split; arrays that are divided differently; a rank without rows.
    """
    error = _array_error(arrays)
    known = next((array for array in arrays if isinstance(array, DNDarray)), None)
    if known is None:
        assert error is not None
        raise error
    communicator = RollCall.of(known.comm).communicator
    raise_together(communicator, error)
    tensors = tuple(array.larray for array in arrays)
    counts = communicator.all_gather_object([len(tensor) for tensor in tensors])
    raise_together(communicator, _division_error(counts, communicator.rank))
    return LocalPart(tensors, float(len(tensors[0])), tuple(rows[0] for rows in counts))


def batches(*arrays: DNDarray, batch_size: int, seed: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Go through this rank's rows in as many batches as every other rank; collective when it begins.

    Every row comes once. Where ranks have different numbers of rows, their batches differ in size: set
    ``opt.batch_weight = len(x)`` for each, which gives the exact mean over the joined batch.

    Parameters
    ----------
    *arrays : DNDarray
        As for :func:`local_part`.
    batch_size : int
        Rows in a batch, of all ranks together, at most; >= the number of ranks.
    seed : int, optional
        Of the order of rows, which changes neither torch's nor Heat's generator: give each epoch its own. By default
        rows come in their order, as views.

    Yields
    ------
    tuple of Tensor
        The rows of each array.

    Raises
    ------
    TypeError, ValueError
        On all ranks: see :func:`local_part`; ``batch_size`` too small; a rank with fewer rows than there are batches.
    """
    part = local_part(*arrays)
    communicator = RollCall.of(arrays[0].comm).communicator
    raise_together(communicator, _batch_error(part, batch_size, communicator))
    return _batches(part, _num_batches(part, batch_size), seed)


def parameters(module: nn.Module, comm: Any = None) -> dict[str, DNDarray]:
    """Return a model's parameters by name as DNDarrays that share their memory; local.

    They are whole on every rank (``split=None``), as replicas are.

    Parameters
    ----------
    module : torch.nn.Module
        Whose parameters Heat has a type for: not bfloat16.
    comm : heat.MPICommunication, optional
        The ranks that hold the replicas; by default ``ht.MPI_WORLD``.

    Raises
    ------
    TypeError
        Heat has no such dtype.
    """
    return {name: _replicated(name, value.detach(), comm) for name, value in module.named_parameters()}


def gradients(module: nn.Module, comm: Any = None) -> dict[str, DNDarray]:
    """Return a model's gradients by name as DNDarrays that share their memory; local.

    After ``backward()`` they are the global means, the same on every rank. A parameter without one is left out. See
    :func:`parameters`.
    """
    return {name: _replicated(name, p.grad, comm) for name, p in module.named_parameters() if p.grad is not None}


def _replicated(name: str, tensor: Tensor, comm: Any) -> DNDarray:
    try:
        kind = heat.types.canonical_heat_type(tensor.dtype)
    except TypeError:
        raise TypeError(f"parameter '{name}' is {tensor.dtype}, which Heat has no type for: convert it first") from None
    comm = heat.MPI_WORLD if comm is None else comm
    device = heat.devices.sanitize_device("cpu" if tensor.device.type == "cpu" else "gpu")
    return DNDarray(tensor, tuple(tensor.shape), kind, None, device, comm, True)


def _array_error(arrays: tuple[Any, ...]) -> Exception | None:
    if not arrays:
        return ValueError("arrays must be one or more DNDarrays, got none")
    for number, array in enumerate(arrays):
        if not isinstance(array, DNDarray):
            return TypeError(f"array {number} must be a DNDarray, got {type(array).__name__}")
        if array.split != 0:
            return ValueError(
                f"array {number} must have split=0, one part of its rows on each rank, got split={array.split}: "
                "use ht.resplit(array, 0)"
            )
        if array.comm.handle != arrays[0].comm.handle:
            return ValueError(f"array {number} must have the communicator of array 0: make both with the same comm=")
    return None


def _division_error(counts: list[list[int]], rank: int) -> Exception | None:
    own = counts[rank]
    for number, num_rows in enumerate(own):
        if num_rows != own[0]:
            return ValueError(
                f"arrays must be divided alike, but array 0 has {own[0]} rows and array {number} has {num_rows}: "
                "balance_() them, or redistribute_() one like the other"
            )
    if own[0] == 0:
        rows = [others[0] for others in counts]
        return ValueError(
            f"every rank must have rows, got {rows} rows on the ranks: balance_() the arrays or use fewer ranks"
        )
    return None


def _num_batches(part: LocalPart, batch_size: int) -> int:
    return -(-sum(part.row_counts) // batch_size)


def _batch_error(part: LocalPart, batch_size: Any, communicator: Communicator) -> Exception | None:
    sizes = communicator.all_gather_object(batch_size)
    if not isinstance(batch_size, int):
        return TypeError(f"batch_size must be an int, got {type(batch_size).__name__}")
    if any(size != batch_size for size in sizes):
        return ValueError(f"batch_size must be the same on all ranks, got {sizes}")
    if batch_size < communicator.world_size:
        return ValueError(f"batch_size must be >= the number of ranks ({communicator.world_size}), got {batch_size}")
    num_batches = _num_batches(part, batch_size)
    if min(part.row_counts) < num_batches:
        return ValueError(
            f"every rank must have a row for each of {num_batches} batches, got {list(part.row_counts)} rows on the "
            "ranks: balance_() the arrays or take a larger batch_size"
        )
    return None


def _batches(part: LocalPart, num_batches: int, seed: int | None) -> Iterator[tuple[Tensor, ...]]:
    tensors = part.tensors
    if seed is None:
        yield from zip(*(tensor.tensor_split(num_batches) for tensor in tensors), strict=True)
        return
    order = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(seed)).to(tensors[0].device)
    for rows in order.tensor_split(num_batches):
        yield tuple(tensor[rows] for tensor in tensors)
