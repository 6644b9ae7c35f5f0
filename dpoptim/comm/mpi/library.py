"""The MPI library itself: what it is, what it can do, what is attached to its communicators.

Tests: ``tests/comm/test_overlap.py``.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any, Protocol

__all__ = [
    "Attached",
    "abort",
    "attach",
    "attached",
    "before_finalizing",
    "checked",
    "library",
    "reads_device_memory",
    "takes_threads",
]


def takes_threads() -> bool:
    """Whether several threads may call this MPI at once."""
    from mpi4py import MPI

    return bool(MPI.Query_thread() >= MPI.THREAD_MULTIPLE)


def library() -> dict[str, str]:
    """Describe the MPI library: name and version, standard, thread level, reads device memory or not."""
    from mpi4py import MPI

    levels = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
        MPI.THREAD_MULTIPLE: "multiple",
    }
    aware = [device for device in ("cuda", "rocm") if reads_device_memory(device)]
    return {
        "library": " ".join(MPI.Get_library_version().replace("\x00", "").splitlines()[0].split(",")[0].split()),
        "standard": ".".join(map(str, MPI.Get_version())),
        "thread level": levels[MPI.Query_thread()],
        "GPU-aware": ", ".join(aware) or "no (device tensors go through pinned host memory)",
    }


@functools.cache
def reads_device_memory(device_type: str) -> bool:
    """Ask the loaded MPI library whether it takes pointers to this kind of device memory."""
    from mpi4py import MPI

    name = {"cuda": "MPIX_Query_cuda_support", "rocm": "MPIX_Query_rocm_support"}.get(device_type)
    query = getattr(ctypes.CDLL(MPI.__file__), name, None) if name else None
    return bool(query()) if query is not None else False


def abort() -> None:
    """End every rank of the job."""
    from mpi4py import MPI

    if not MPI.Is_finalized():
        MPI.COMM_WORLD.Abort(1)


class Attached(Protocol):
    """What is left at a communicator."""

    def orphan(self) -> None:
        """Take note that the communicator is being freed; collective."""


def attached(comm: Any) -> Any:
    """Return what :func:`attach` has left at this communicator, or None; not collective."""
    from mpi4py import MPI

    return checked(comm, MPI).Get_attr(_key())


def attach(comm: Any, item: Attached) -> None:
    """Leave something at a communicator, to be found as long as it lives, and told when it is freed; not collective."""
    from mpi4py import MPI

    before_finalizing(_note_finalizing)  # which frees COMM_WORLD too, when nothing else can be
    checked(comm, MPI).Set_attr(_key(), item)


@functools.cache
def before_finalizing(act: Callable[[], None]) -> None:
    """Call this once when the program finalises MPI itself, while MPI still works; not collective.

    MPI deletes what is attached to ``COMM_SELF`` first. Where mpi4py finalises MPI after the end of Python nothing is
    called.
    """
    from mpi4py import MPI

    MPI.COMM_SELF.Set_attr(MPI.Comm.Create_keyval(delete_fn=lambda *_: act()), True)


_finalizing: list[bool] = []


def _note_finalizing() -> None:
    _finalizing.append(True)


@functools.cache
def _key() -> int:
    """Return the MPI attribute under which things are attached."""
    from mpi4py import MPI

    return int(MPI.Comm.Create_keyval(delete_fn=_orphan))


def _orphan(_: Any, __: int, item: Attached) -> None:
    if not _finalizing:
        item.orphan()


def checked(comm: Any, mpi: Any) -> Any:
    """Return the mpi4py intracommunicator that ``comm`` is or holds."""
    if comm is None:
        return mpi.COMM_WORLD
    if not isinstance(comm, mpi.Comm):
        comm = getattr(comm, "handle", comm)  # Heat's MPICommunication holds mpi4py's
    if not isinstance(comm, mpi.Comm):
        raise TypeError(f"comm must be an mpi4py communicator, a Heat communicator or None, got {type(comm).__name__}")
    if comm == mpi.COMM_NULL:
        raise ValueError("comm must be a live communicator, got MPI.COMM_NULL (never made, or already freed)")
    if comm.Is_inter():
        raise ValueError("comm must be an intracommunicator, got an intercommunicator: Merge() it first")
    return comm
