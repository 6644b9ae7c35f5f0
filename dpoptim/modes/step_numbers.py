"""What a step writes elsewhere than into parameters and their state: the same numbers on all ranks, whoever steps what.

Tests: ``tests/behaviour/test_other_classes.py``.

Note [Numbers of a step]
------------------------
Most optimizers outside of torch count steps, or keep other numbers, in their groups (``group["step"] += 1``), some in
the optimizer itself or in ``state`` under a key of its own. A rank that owns nothing of a group that has a gradient may
come to other numbers there than those that step it. Ranks compare a fingerprint of all such numbers after each step of
such a class; where it differs, those that have stepped a group tell the others. If they themselves differ, the numbers
depend on the values of parameters, of which each rank has others: the optimizer can't be sharded, and that is an error.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.errors import raised_on_all_ranks

__all__ = ["agree_on_numbers"]

# Squares of fingerprints are summed in float64, exactly up to 2^53: 20 bits leave room for 2^13 ranks.
_FINGERPRINT_BITS = 20
# Larger tensors are no numbers of a step.
_MAX_NUMEL = 1024
_NOT_NUMBERS = ("params", "param_names")


def agree_on_numbers(optimizer: Optimizer, communicator: Communicator, groups: frozenset[int]) -> None:
    """Bring the numbers of a step to ranks that have not made it (Note [Numbers of a step]); collective.

    Parameters
    ----------
    optimizer : Optimizer
        In which numbers are read and written.
    communicator : Communicator
        Of the ranks that step its parts.
    groups : frozenset of int
        The groups of which this rank has stepped something.

    Raises
    ------
    RuntimeError
        On all ranks: those that have stepped a group have come to different numbers.
    """
    holders = _holders(optimizer)
    own = [{key: _plain(value) for key, value in holder.items() if _is_plain(value)} for holder in holders]
    fingerprint = zlib.crc32(repr([_fingerprint(numbers) for numbers in own]).encode()) % (1 << _FINGERPRINT_BITS)
    total, total_of_squares = communicator.start_sum([fingerprint, fingerprint**2]).wait()
    # By Cauchy and Schwarz equality holds only if all are equal.
    if communicator.world_size * int(total_of_squares) == int(total) ** 2:
        return
    everybody = communicator.all_gather_object((groups, own))
    for number, holder in enumerate(holders):
        stepped = [
            (rank, numbers[number])
            for rank, (others, numbers) in enumerate(everybody)
            if (number in others if number < len(optimizer.param_groups) else others)
        ]
        if not stepped:
            continue
        (first, numbers), *rest = stepped
        for rank, others in rest:
            _check_equal(optimizer, number, (first, numbers), (rank, others))
        _write(holder, numbers)


def _holders(optimizer: Optimizer) -> list[Any]:
    """Return what may hold numbers: the groups, the state, the optimizer's attributes."""
    groups = [_Items(group, _NOT_NUMBERS) for group in optimizer.param_groups]
    state = _Items(optimizer.state, ())
    return [*groups, state, _Items(vars(optimizer), ("param_groups", "state", "defaults"))]


class _Items:
    """The entries of a mapping but for some."""

    def __init__(self, mapping: Any, left_out: tuple[str, ...]) -> None:
        self._mapping, self._left_out = mapping, left_out

    def items(self) -> list[tuple[Any, Any]]:
        return [(k, v) for k, v in self._mapping.items() if isinstance(k, str) and k not in self._left_out]

    def write(self, key: str, value: Any) -> None:
        there = self._mapping.get(key)
        if isinstance(there, Tensor) and isinstance(value, Tensor) and there.shape == value.shape:
            with torch.no_grad():
                there.copy_(value)
        else:
            self._mapping[key] = value


def _write(holder: _Items, numbers: Mapping[str, Any]) -> None:
    own = dict(holder.items())
    for key, value in numbers.items():
        if key not in own or _fingerprint({key: _plain(own[key])}) != _fingerprint({key: value}):
            holder.write(key, value)


def _check_equal(
    optimizer: Optimizer, number: int, first: tuple[int, dict[str, Any]], other: tuple[int, dict[str, Any]]
) -> None:
    (rank_0, numbers_0), (rank_1, numbers_1) = first, other
    for key in sorted(numbers_0.keys() | numbers_1.keys()):
        here, there = (_fingerprint({key: numbers.get(key)}) for numbers in (numbers_0, numbers_1))
        if here == there:
            continue
        where = f"parameter group {number}" if number < len(optimizer.param_groups) else "the optimizer"
        name = type(optimizer).__name__
        message = (
            f"after a step of {name} {where} has {key} = {numbers_0.get(key)} on rank {rank_0} but "
            f"{numbers_1.get(key)} on rank {rank_1}: it depends on the parameters that each rank steps, so that {name} "
            "can't be sharded: leave out shard and node_shared, or set is_divisible = False in the class"
        )
        raise raised_on_all_ranks(RuntimeError(message))


def _is_plain(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.layout == torch.strided and value.numel() <= _MAX_NUMEL and value.device.type != "meta"
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, complex, str))


def _plain(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _fingerprint(numbers: Mapping[str, Any]) -> list[Any]:
    return [(key, _text(value)) for key, value in sorted(numbers.items())]


def _text(value: Any) -> Any:
    if isinstance(value, Tensor):
        return str(value.dtype), value.tolist()
    return [_text(one) for one in value] if isinstance(value, (list, tuple)) else repr(value)
