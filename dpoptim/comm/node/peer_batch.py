"""A batch of collectives among ranks that read each other's memory: what is noted of each, and how it is cut."""

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from dpoptim.comm.node.process_memory import Place

__all__ = ["MAX_NOTED", "Cut", "Noted", "Row", "windows"]


# The kernel takes at most 1024 spans a call.
MAX_NOTED = 512


class Row(ctypes.Structure):
    """What a rank tells the others of a batch, in memory that they share."""

    _fields_ = (
        ("places", ctypes.c_int64 * MAX_NOTED),
        ("scales", ctypes.c_double * MAX_NOTED),
        ("failed", ctypes.c_int64),
        ("_padding", ctypes.c_int64 * 7),
    )


@dataclass(eq=False)
class Noted:
    """A collective of a batch: this rank's tensor, which part of it each rank owns, and where it lies on each."""

    tensor: Tensor
    starts: Sequence[int]
    counts: Sequence[int]
    output: Tensor | None  # where this rank's sum goes, if there is one
    scale: float
    gathers: bool
    is_kept: bool = False  # to be noted again
    divisor: float = 1.0
    places: Sequence[int] = ()
    scales: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Cut:
    """A piece of a tensor that is summed: this rank's values, where the sum goes, and where it lies on each rank."""

    own: Tensor
    target: Tensor
    places: Sequence[int]
    offset_bytes: int

    def source(self, rank: int) -> Place:
        """Return where it lies on a rank."""
        return self.places[rank] + self.offset_bytes, self.own.nbytes


def windows(batch: Sequence[Noted], rank: int, numel: int) -> Iterator[list[Cut]]:
    """Cut this rank's parts of tensors of one dtype into windows of so many elements; only the last may have less."""
    window: list[Cut] = []
    room = numel
    for noted in batch:
        assert noted.output is not None
        start, count, done = noted.starts[rank], noted.counts[rank], 0
        while done < count:
            size = min(room, count - done)
            own, target = noted.tensor.narrow(0, start + done, size), noted.output.narrow(0, done, size)
            window.append(Cut(own, target, noted.places, (start + done) * own.itemsize))
            done += size
            room -= size
            if not room:
                yield window
                window, room = [], numel
    if window:
        yield window
