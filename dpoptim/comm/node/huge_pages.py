"""Huge pages under memory that others read. Local, no MPI here.

Note [Huge pages]
-----------------
To read another process's memory the kernel looks up every page of it; with pages of 4 KiB that takes a good part of
the time.
``madvise(2)`` with MADV_COLLAPSE (Linux 6.1) moves memory onto pages of 2 MiB, with the same addresses and contents.
That copies them, so that few are tried at a time, and each is tried once. Memory that was given back to the
system and taken anew has small pages again: a second try, which would come at every step, is not worth it.

Only pages are tried that the wanted tensors fill for a good part, since what is not used of them is taken as well.
"""

import ctypes
import platform
from collections import Counter
from collections.abc import Iterable

__all__ = ["HugePages"]

_PAGE_BYTES = 1 << 21
# How much of a page must be wanted.
_WANTED_BYTES = _PAGE_BYTES // 4
# More would hold up one step for long.
_MAX_PAGES_AT_ONCE = 16
# Places of tensors that change with every step, without end, are not followed.
_MAX_SETS = 64
_MADV_COLLAPSE = 25  # linux/mman.h


class HugePages:
    """Puts memory onto huge pages where the system can (Note [Huge pages]); nothing happens where it can't."""

    def __init__(self) -> None:
        self._tried: set[int] = set()
        self._settled: set[tuple[tuple[int, int], ...]] = set()  # spans whose pages were all tried

    def want(self, tensors: Iterable[tuple[int, int]]) -> None:
        """Try some pages of these tensors that were not tried before.

        Parameters
        ----------
        tensors : iterable of (int, int)
            The address of each, and its size in bytes.
        """
        spans = tuple(tensors)
        if spans in self._settled or len(self._settled) == _MAX_SETS or _madvise is None:
            return
        wanted_bytes = Counter[int]()
        for start, num_bytes in spans:
            stop = start + num_bytes
            for page in range(start // _PAGE_BYTES, -(-stop // _PAGE_BYTES)):
                wanted_bytes[page] += min(stop, (page + 1) * _PAGE_BYTES) - max(start, page * _PAGE_BYTES)
        pages = [page for page, num_bytes in wanted_bytes.items() if num_bytes >= _WANTED_BYTES]
        untried = [page for page in pages if page not in self._tried]
        for page in untried[:_MAX_PAGES_AT_ONCE]:
            _madvise(page * _PAGE_BYTES, _PAGE_BYTES, _MADV_COLLAPSE)
            self._tried.add(page)
        if len(untried) <= _MAX_PAGES_AT_ONCE:
            self._settled.add(spans)


_libc = ctypes.CDLL(None)
_madvise = _libc.madvise if platform.system() == "Linux" and hasattr(_libc, "madvise") else None
if _madvise is not None:
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
