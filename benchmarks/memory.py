"""The memory that a piece of a program takes on one rank, exactly at its peak, shared memory counted once a node.

Note [Peak]
-----------
Linux keeps the highest resident size of a process (``VmHWM``; writing 5 to ``clear_refs`` starts it anew), but counts
memory that N processes share N times. ``Pss_Shmem`` is this process's share of such memory (each page divided by the
processes that have it), without a peak. Files (libraries) and shared memory only grow while something is set up, so the
peak of private memory is ``VmHWM - RssFile - RssShmem`` as they stand at the end, to which the share is added. What was
there before is taken off; free memory that the allocator still holds is given back first, or it would be used unseen.
"""

import ctypes
import gc
from pathlib import Path
from types import TracebackType

__all__ = ["PeakMemory"]


class PeakMemory:
    """What is within the ``with`` statement, measured (Note [Peak]); local, but ranks that share memory go in step.

    Attributes
    ----------
    peak_bytes : int
        The most memory that this rank had within, above what it had before.
    """

    peak_bytes = 0

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
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
