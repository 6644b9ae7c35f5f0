"""The memory that a piece of a program takes on one rank, at its peak, and an allocator that keeps what is freed.

Note [glibc]
------------
glibc gives the memory of freed gradients back to the system and takes it anew in the next backward: a page fault for
every 4 KiB, which can take longer than the computation, and costs all ways to train alike. :func:`keep_freed_memory`
ends that in this process; users have it by environment variables (docs/performance.md).

Note [Peak]
-----------
Linux keeps the highest resident size of a process (``VmHWM``; writing 5 to ``clear_refs`` starts it anew), but counts
memory that N processes share N times. ``Pss_Shmem`` is this process's share of such memory (each page divided by the
processes that have it), without a peak. Files (libraries) and shared memory only grow while something is set up, so the
peak of private memory is ``VmHWM - RssFile - RssShmem`` as they stand at the end, to which the share is added. What was
there before is taken off. Free memory that the allocator still holds is given back first, or it would be used unseen,
and meanwhile every tensor of 64 KiB or more is taken from the system and given back to it: what the allocator wastes is
not the program's.
"""

import ctypes
import gc
from pathlib import Path
from types import TracebackType

__all__ = ["PeakMemory", "give_back_freed_memory", "keep_freed_memory"]

_glibc = ctypes.CDLL(None)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def keep_freed_memory() -> None:
    """Let this process keep memory that is freed (Note [glibc])."""
    _glibc.mallopt(_M_TRIM_THRESHOLD, 1_000_000_000)
    _glibc.mallopt(_M_TOP_PAD, 200_000_000)
    _glibc.mallopt(_M_MMAP_THRESHOLD, 1_000_000_000)


def give_back_freed_memory() -> None:
    """Let this process give the memory of tensors back as soon as they are freed, and all free memory it has now."""
    _glibc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    _glibc.malloc_trim(0)


class PeakMemory:
    """What is within the ``with`` statement, measured (Note [Peak]); local, but ranks that share memory go in step.

    Use it before :func:`keep_freed_memory`, not after.

    Attributes
    ----------
    peak_bytes : int
        The most memory that this rank had within, above what it had before.
    """

    peak_bytes = 0

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        give_back_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _bytes("status", "RssAnon") + _bytes("smaps_rollup", "Pss_Shmem")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        private = _bytes("status", "VmHWM") - _bytes("status", "RssFile") - _bytes("status", "RssShmem")
        self.peak_bytes = private + _bytes("smaps_rollup", "Pss_Shmem") - self._before


def _bytes(file: str, name: str) -> int:
    """Read one line, in KiB, of a file about this process."""
    lines = Path("/proc/self", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
