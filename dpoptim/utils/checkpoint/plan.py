"""Who writes what: every element once, every rank about as many bytes. Pure arithmetic, the same on all ranks.

Tests: ``tests/utils/test_checkpoint.py``.

Note [Writers]
--------------
An element of the optimizer's state is written by a rank that holds it: the only one in sharded mode, any of several in
replicated and node-shared mode. The weights are the same on all ranks and are not cut, so that a script without
dpoptim finds them whole. First count what one rank alone holds, then give the weights, largest first, to who has least,
then level the ranks with the optimizer state that several hold, which can be cut anywhere.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

__all__ = ["Holding", "Intervals", "divide_held", "divide_whole", "holdings"]

Intervals = dict[str, list[tuple[int, int]]]
# The ranks that hold something, and what: (name, start, stop) in order.
Holding = dict[tuple[int, ...], list[tuple[str, int, int]]]


def holdings(held: Sequence[Mapping[str, tuple[int, int]]]) -> Holding:
    """Return, for each set of ranks, the intervals that exactly these ranks hold.

    Parameters
    ----------
    held : sequence of mapping
        For each rank, the interval of each name that it holds; intervals of different ranks may overlap.
    """
    by_name: dict[str, list[tuple[int, int, int]]] = {}
    for rank, intervals in enumerate(held):
        for name, (start, stop) in intervals.items():
            if start < stop:
                by_name.setdefault(name, []).append((start, stop, rank))
    found: Holding = {}
    for name, intervals_of_ranks in by_name.items():
        intervals_of_ranks.sort()
        if all(one[1] <= other[0] for one, other in pairwise(intervals_of_ranks)):  # one rank each
            for start, stop, rank in intervals_of_ranks:
                found.setdefault((rank,), []).append((name, start, stop))
            continue
        cuts = sorted({cut for start, stop, _ in intervals_of_ranks for cut in (start, stop)})
        for start, stop in pairwise(cuts):
            ranks = tuple(sorted(rank for a, b, rank in intervals_of_ranks if a <= start and stop <= b))
            if ranks:
                found.setdefault(ranks, []).append((name, start, stop))
    return found


def divide_whole(sizes_bytes: Mapping[str, int], loads_bytes: list[int]) -> dict[str, int]:
    """Give each name to the rank with the least load, the largest first; loads grow. Return the rank of each name."""
    writers = {}
    for name in sorted(sizes_bytes, key=lambda name: -sizes_bytes[name]):
        writers[name] = loads_bytes.index(min(loads_bytes))
        loads_bytes[writers[name]] += sizes_bytes[name]
    return writers


def divide_held(
    ranks: Sequence[int],
    intervals: Sequence[tuple[str, int, int]],
    element_bytes: Mapping[str, int],
    loads_bytes: list[int],
) -> dict[int, Intervals]:
    """Divide what several ranks hold among them so that their loads become level; loads grow.

    Parameters
    ----------
    ranks : sequence of int
        Those that hold all of it.
    intervals : sequence of (name, start, stop)
        What to divide, in this order.
    element_bytes : mapping
        What one element of each name takes.
    loads_bytes : list of int
        What each rank of all has to write so far.
    """
    total = sum((stop - start) * element_bytes[name] for name, start, stop in intervals)
    quotas = _level(total, [loads_bytes[rank] for rank in ranks])
    result: dict[int, Intervals] = {rank: {} for rank in ranks}
    index, left = 0, quotas[0]
    for name, begin, stop in intervals:
        start, size = begin, element_bytes[name]
        while start < stop:
            is_last = index == len(ranks) - 1
            count = stop - start if is_last else min(stop - start, left // size)
            if count:
                result[ranks[index]].setdefault(name, []).append((start, start + count))
                loads_bytes[ranks[index]] += count * size
                left -= count * size
                start += count
            if start < stop:
                index += 1
                left += quotas[index]  # what was too little for one element goes to the next
    return result


def _level(total: int, loads: Sequence[int]) -> list[int]:
    """Return how much of ``total`` each gets so that all end as level as they can."""
    order = sorted(range(len(loads)), key=lambda index: loads[index])
    quotas = [0] * len(loads)
    for count in range(len(loads), 0, -1):
        lowest = order[:count]
        level, extra = divmod(total + sum(loads[index] for index in lowest), count)
        if level >= loads[lowest[-1]]:
            for number, index in enumerate(lowest):
                quotas[index] = level - loads[index] + (number < extra)
            break
    return quotas
