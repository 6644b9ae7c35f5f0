"""Tuning: the sizes and times that suit the machines of the benchmarks, and may be others on yours. Local.

``DPOPTIM_TUNING="piece_bytes=1048576,longest_nap_s=1e-3"`` in the environment of all ranks sets others.
``python -m dpoptim info`` prints them all, ``python -m dpoptim bench`` shows what they do.
"""

import os
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["TUNING", "Tuning"]

_VARIABLE = "DPOPTIM_TUNING"


@dataclass(frozen=True)
class Tuning:
    """Tuned sizes and times; a name ends with its unit, where it has one. ``numel`` are elements of a tensor.

    Messages; ``make bench-links`` shows what these do.

    Attributes
    ----------
    in_pieces_bytes : int
        Between nodes a tensor of so many bytes goes in pieces; latency counts for smaller ones.
    share_bytes : int
        So does one of which each rank has at least so many.
    piece_bytes : int
        A piece. From half a MiB on MPICH's reduce-scatter sends no byte more than it must, for any number of ranks.
    num_in_flight : int
        How many pieces are under way at a time.
    polled_in_flight_bytes : int
        How much is under way where hooks look after it: the network must not run out between two looks.
    between_looks_s : float
        How often hooks look, at most. A look takes some microseconds.
    shortest_nap_s, longest_nap_s : float
        How long a rank sleeps between two looks at a message. At 10 Gbit/s 250 KB arrive in 0.2 ms.
    patience_bytes : int
        Ranks that share cores sleep while they wait for messages up to this size.

    One node; ``make bench`` shows what these do.

    shared_memory_bytes : int
        A tensor of so many bytes goes through a node's memory; below, a message is faster than two meetings.
    window_bytes : int
        What is summed at a time of memory that others have: it must stay in a cache.
    huge_pages_bytes : int
        Tensors of so many bytes are worth huge pages.
    staging_awake_bytes, staging_asleep_bytes : int
        What a rank copies into the staging area between two meetings, with a core of its own and without.
    num_looks : int
        How often a rank looks before it falls asleep at a meeting.

    Gradients; ``make bench`` and ``make bench-links`` show what these do.

    large_gradient_bytes : int
        A gradient of so many bytes has a home on one node, and travels alone between nodes.
    overlapped_bucket_bytes, polled_bucket_bytes : int
        A bucket's largest size where it is sent beside backward, by a thread or by hooks.
    overlap_gain : float
        What overlap must hide of a trial exchange, as a share, to be chosen.
    average_group_bytes : int
        How much memory averaging states takes beside them.

    The step on CPU; ``benchmarks/optimizers.py`` shows what these do, with ``--groups`` those of groups.

    block_numel, part_numel : int
        What small tensors fill together, and into what large ones are cut.
    min_rate_groups, rate_group_numel : int
        So many groups with rates of their own, each of fewer elements than this, are stepped together.
    alone_numel : int
        A tensor of fewer elements that is stepped alone is stepped as fast by torch's loop.
    """

    in_pieces_bytes: int = 1 << 19
    share_bytes: int = 1 << 15
    piece_bytes: int = 3 << 18
    num_in_flight: int = 6
    polled_in_flight_bytes: int = 12 << 20
    between_looks_s: float = 1e-4
    shortest_nap_s: float = 5e-5
    longest_nap_s: float = 2e-4
    patience_bytes: int = 1024
    shared_memory_bytes: int = 1 << 18
    window_bytes: int = 1 << 20
    huge_pages_bytes: int = 1 << 18
    staging_awake_bytes: int = 1 << 20
    staging_asleep_bytes: int = 1 << 22
    num_looks: int = 4
    large_gradient_bytes: int = 1 << 19
    overlapped_bucket_bytes: int = 1 << 19
    polled_bucket_bytes: int = 1 << 18
    overlap_gain: float = 0.25
    average_group_bytes: int = 25 << 20
    block_numel: int = 1 << 17
    part_numel: int = 1 << 18
    min_rate_groups: int = 4
    rate_group_numel: int = 1 << 15
    alone_numel: int = 1 << 15

    @classmethod
    def of(cls, text: str) -> "Tuning":
        """Return what a text such as ``"piece_bytes=1048576"`` sets, the rest by default.

        Raises
        ------
        ValueError
            There is no such name, or the value is not a positive number of its type.
        """
        types: dict[str, Any] = {field.name: field.type for field in fields(cls)}
        values: dict[str, Any] = {}
        for entry in filter(None, map(str.strip, text.split(","))):
            name, _, value = (part.strip() for part in entry.partition("="))
            if name not in types:
                raise ValueError(f"{_VARIABLE}: {name!r} must be one of {', '.join(types)}")
            try:
                values[name] = types[name](value)
            except ValueError:
                values[name] = 0
            if not 0 < values[name] < float("inf"):
                raise ValueError(f"{_VARIABLE}: {name} must be a positive {types[name].__name__}, got {value!r}")
        return cls(**values)

    def rows(self) -> dict[str, str]:
        """Return each value in words, with a star where it is not the default."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: f"{value}{' *' if value != default else ''}" for name, (value, default) in values.items()}


TUNING = Tuning.of(os.environ.get(_VARIABLE, ""))
