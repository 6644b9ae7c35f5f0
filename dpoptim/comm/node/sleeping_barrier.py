"""A barrier of the ranks of a node that sleeps, for ranks that share cores.

MPI's barrier asks again and again whether the others are there, which is fastest where every rank has a core. Where
ranks share cores the one that asks holds up the one it asks for. Here each rank counts its arrivals in a word of shared
memory and sleeps in the kernel (futex(2)) until the last one to come wakes all.
"""

import ctypes
import itertools
import platform
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from dpoptim.tuning import TUNING

__all__ = ["SleepingBarrier"]

_SYSCALL_NUMBERS = {"x86_64": 202, "aarch64": 98}
_WAIT, _WAKE = 0, 1
_EVERYBODY = 2**31 - 1
# A rank that is about to come is there sooner than one can fall asleep.
_NUM_LOOKS = TUNING.num_looks
# How long a rank sleeps before it looks after MPI: what it holds up goes on at once, and a long wait costs little.
_NAPS_MS = (1, 2, 4, 8)
_WORDS_BETWEEN = 16  # each rank's word has a cache line of its own


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class SleepingBarrier:
    """A barrier over words of shared memory.

    Parameters
    ----------
    words : Tensor, int32, numel at least ``words_needed(world_size)``
        Zero-filled memory that all ranks map; this object's as long as it lives.
    rank, world_size : int
        This rank's number, and how many there are.
    meanwhile : callable, optional
        Called every few milliseconds while others are waited for: what lets MPI go on with what they may wait for
        before they can come here.
    """

    def __init__(
        self, words: Tensor, rank: int, world_size: int, meanwhile: Callable[[], object] | None = None
    ) -> None:
        assert words.dtype == torch.int32
        self._memory = words  # keeps the mapping alive
        start, gate = words.data_ptr(), words.data_ptr() + 4 * _WORDS_BETWEEN * world_size
        self._arrivals = (ctypes.c_int32 * (_WORDS_BETWEEN * world_size)).from_address(start)
        self._own = ctypes.c_int32.from_address(start + 4 * _WORDS_BETWEEN * rank)
        self._gate, self._gate_address = ctypes.c_int32.from_address(gate), ctypes.c_void_p(gate)
        self._count, self._last_count = 0, 0
        self._meanwhile = meanwhile
        self._naps = [ctypes.byref(_TimeSpec(0, nap * 1_000_000)) for nap in (_NAPS_MS if meanwhile else (100,))]
        self._fence = threading.Lock()
        self._number = _SYSCALL_NUMBERS[platform.machine()]
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._syscall.restype = ctypes.c_long

    @staticmethod
    def is_here() -> bool:
        """Whether this system has what it needs."""
        return platform.system() == "Linux" and platform.machine() in _SYSCALL_NUMBERS

    @staticmethod
    def words_needed(world_size: int) -> int:
        """Return how many int32 words the barrier of so many ranks needs."""
        return _WORDS_BETWEEN * (world_size + 1)

    def wait(self) -> None:
        """Wait until all ranks have called this as often as this rank."""
        self.arrive()
        self.wait_for_others()

    def arrive(self) -> None:
        """Tell the others that this rank is here, the first half of :meth:`wait`; does not block."""
        self._last_count, self._count = self._count, self._count % _EVERYBODY + 1
        self._order_memory()
        self._own.value = self._count
        if self.are_all_here():  # so is whoever comes at the same time: one of them sees the other
            self._gate.value = self._count
            self._futex(_WAKE, _EVERYBODY, None)

    def are_all_here(self) -> bool:
        """Whether all others have arrived as often as this rank; once true, the second half of :meth:`wait`."""
        self._order_memory()
        # Nobody is ever more than one arrival ahead or behind, so that "not one behind" means there.
        is_here = self._last_count not in self._arrivals[::_WORDS_BETWEEN]
        self._order_memory()
        return is_here

    def wait_for_others(self) -> None:
        """Wait until :meth:`are_all_here`."""
        for _ in range(_NUM_LOOKS):
            if self.are_all_here():
                return
        for nap in itertools.chain(self._naps, itertools.repeat(self._naps[-1])):
            if (seen := self._gate.value) != self._count:
                self._futex(_WAIT, seen, nap)
            if self.are_all_here():
                return
            if self._meanwhile is not None:
                self._meanwhile()

    def _futex(self, operation: int, value: int, timeout: object) -> None:
        # Wakes by another cause and vanished waits are all the same: the caller looks again.
        self._syscall(self._number, self._gate_address, operation, value, timeout, None, 0)

    def _order_memory(self) -> None:
        """Keep reads and writes on their side of the barrier, on processors that would move them."""
        with self._fence:
            pass
