"""What a process reads of another one's memory, by the kernel (``process_vm_readv``). Nothing collective.

Tests: ``tests/comm/node/test_peer_memory.py``.
"""

import ctypes
import itertools
import os
import platform
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["SECRET_BYTES", "Reading", "Span", "error_of_reading", "read_memory"]


SECRET_BYTES = 16


# An address and a number of bytes.
Span = tuple[int, int]


class _CSpan(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("num_bytes", ctypes.c_size_t))


class Reading:
    """What this rank gathers from another: bytes to read there, or to copy from what it lends."""

    def __init__(self) -> None:
        self._sources: list[Span] = []
        self._targets: list[Span] = []
        self._lent_sources: list[Tensor] = []
        self._lent_targets: list[Tensor] = []
        self._spans: tuple[ctypes.Array[_CSpan], ctypes.Array[_CSpan]] | None = None

    def add(self, source: Span, target: Span) -> None:
        """Note bytes to read there, and where they go."""
        self._sources.append(source)
        self._targets.append(target)

    def add_lent(self, source: Tensor, target: Tensor) -> None:
        """Note what it lends, and where that is copied."""
        self._lent_sources.append(source)
        self._lent_targets.append(target)

    def do(self, pid: int) -> None:
        """Read; raises OSError."""
        if self._lent_sources:
            torch._foreach_copy_(self._lent_targets, self._lent_sources)
        if self._spans is None:
            self._spans = spans_of(self._sources), spans_of(self._targets)
        read_memory(pid, self._sources, self._targets, self._spans)


def error_of_reading(secrets: Sequence[tuple[int, int, bytes]]) -> str | None:
    """Try to read what every rank has there, and return why not."""
    if platform.system() != "Linux":
        return "this is not Linux"
    if torch.get_num_threads() > 1:
        return "it has several threads, and reading has one"
    found = torch.zeros(SECRET_BYTES, dtype=torch.uint8, device="cpu")
    try:
        for pid, address, expected in secrets:
            read_memory(pid, [(address, SECRET_BYTES)], [(found.data_ptr(), SECRET_BYTES)])
            if bytes(found.tolist()) != expected:
                return "process numbers mean others, in a namespace of processes"
    except OSError as error:
        return str(error)
    return None


def read_memory(
    pid: int,
    sources: Sequence[Span],
    targets: Sequence[Span],
    spans: "tuple[ctypes.Array[_CSpan], ctypes.Array[_CSpan]] | None" = None,
) -> None:
    """Copy these bytes of another process, one after another, to those of this one; raises OSError.

    ``spans`` are those of sources and targets, if they were made before.
    """
    num_bytes = sum(size for _, size in sources)
    while num_bytes:
        there, here = spans or (spans_of(sources), spans_of(targets))
        count = _libc.process_vm_readv(pid, here, len(here), there, len(there), 0)
        if count <= 0:
            number = ctypes.get_errno()
            raise OSError(number, f"process_vm_readv of process {pid}: {os.strerror(number)}")
        num_bytes -= count
        if num_bytes:  # a call may stop early
            sources, targets, spans = _rest(sources, count), _rest(targets, count), None


def spans_of(spans: Sequence[Span]) -> "ctypes.Array[_CSpan]":
    return (_CSpan * len(spans))(*itertools.starmap(_CSpan, spans))


def _rest(spans: Sequence[Span], count: int) -> list[Span]:
    """Return what is left of these spans after so many bytes."""
    rest = []
    for address, num_bytes in spans:
        done = min(count, num_bytes)
        count -= done
        if done < num_bytes:
            rest.append((address + done, num_bytes - done))
    return rest


_libc = ctypes.CDLL(None, use_errno=True)
if hasattr(_libc, "process_vm_readv"):
    _libc.process_vm_readv.restype = ctypes.c_ssize_t
    _libc.process_vm_readv.argtypes = (
        ctypes.c_int,
        ctypes.POINTER(_CSpan),
        ctypes.c_ulong,
        ctypes.POINTER(_CSpan),
        ctypes.c_ulong,
        ctypes.c_ulong,
    )
