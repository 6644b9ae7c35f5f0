"""Memory that the ranks of one node share, and how they meet there. No MPI here.

Note [A mapped file]
--------------------
The memory is a file in ``/dev/shm`` that one rank makes, mode 0600, and all ranks map. It is any MPI's, needs no
one-sided component (MPI's own shared windows hang in ``MPI_Finalize`` after a rank was killed), is closed to other
users, and is gone when the last rank ends, however it ends: it never has a name, and the others open it as that rank's
descriptor in ``/proc``. Where they can't (ranks in process namespaces of their own), it has a random name until all
have opened it; only a rank that is killed in these milliseconds leaves it behind. What is as large as a model is a file
in no directory (memfd_create(2)), which is no part of ``/dev/shm``. Every rank
allocates its share of the pages: a full ``/dev/shm`` is an error then and not a SIGBUS later, and on a machine with
several memory banks the pages lie near their rank.
"""

import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dpoptim.comm.node.sleeping_barrier import SleepingBarrier
from dpoptim.comm.normal_tensors import normal_tensors
from dpoptim.partition import even_counts, start_offsets

__all__ = ["Node", "SharedMemory", "meeting"]

_DIRECTORY = "/dev/shm"  # noqa: S108 - in memory; mkstemp makes the name and the mode safe


class Node(Protocol):
    """The ranks of one node; every method but :meth:`progress` is collective among them."""

    rank: int
    world_size: int

    def progress(self) -> None:
        """Let the messages that this rank has under way go on; local."""

    def barrier(self) -> None:
        """Wait until all ranks are here."""

    def all_gather_object(self, item: Any) -> list[Any]:
        """Return every rank's item."""

    def broadcast_object(self, item: Any, root: int) -> Any:
        """Return the root's item."""


class SharedMemory:
    """Memory that all ranks of a node map (Note [A mapped file]); construction is collective among them.

    Parameters
    ----------
    node : Node
        The ranks.
    num_bytes : int
        How much, > 0; the same on all.
    counted : bool
        Whether it counts as part of ``/dev/shm``, which may be small, and is used by data loaders too. If not, the
        ranks must see each other in ``/proc``.

    Raises
    ------
    OSError
        On every rank of the node, if one could not make, allocate or map it.
    """

    def __init__(self, node: Node, num_bytes: int, *, counted: bool = True) -> None:
        if not counted:
            self._map = _mapped(node, num_bytes, _anonymous)
            return
        try:
            self._map = _mapped(node, num_bytes, _nameless)
        except OSError:
            self._map = _mapped(node, num_bytes, _named)

    @normal_tensors()
    def tensor(self, dtype: torch.dtype, shape: Sequence[int], offset_bytes: int = 0) -> Tensor:
        """Return a tensor in this memory, with a storage of its own that begins at ``offset_bytes``."""
        numel = torch.Size(shape).numel()
        if numel == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        return torch.frombuffer(self._map, dtype=dtype, count=numel, offset=offset_bytes).view(shape)


def _named() -> tuple[int, str]:
    return tempfile.mkstemp(prefix="dpoptim-", dir=_DIRECTORY)


def _nameless() -> tuple[int, str]:
    if not hasattr(os, "O_TMPFILE"):
        raise OSError("this system has no files without a name")
    descriptor = os.open(_DIRECTORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    return descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"


def _anonymous() -> tuple[int, str]:
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no files outside of all directories")
    descriptor = os.memfd_create("dpoptim")
    os.fchmod(descriptor, 0o600)
    return descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"


def _mapped(node: Node, num_bytes: int, make: Callable[[], tuple[int, str]]) -> mmap.mmap:
    """Map one file on all ranks, which rank 0 makes (Note [A mapped file]); collective, raises OSError on all."""
    descriptor, location, error, mapped = -1, None, None, None
    try:
        if node.rank == 0:
            descriptor, path = make()
            location = path, _identity(descriptor)
            os.ftruncate(descriptor, num_bytes)
    except OSError as caught:
        error = caught
    location = node.broadcast_object(location, root=0)
    try:
        if location is not None and error is None:
            if node.rank > 0:
                descriptor = os.open(location[0], os.O_RDWR | os.O_CLOEXEC)
            mapped = _allocated(node, descriptor, num_bytes, location[1])
    except OSError as caught:
        error = caught
    # Also keeps the descriptor of rank 0 until all have opened it.
    errors = node.all_gather_object(None if error is None else f"rank {node.rank} of the node: {error}")
    if descriptor >= 0:
        os.close(descriptor)
    if node.rank == 0 and make is _named and location is not None:
        Path(location[0]).unlink()
    reason = next((text for text in errors if text is not None), None)
    if reason is not None or mapped is None:
        if mapped is not None:
            mapped.close()  # gives the pages back before less is tried
        where = "" if make is _anonymous else f" in {_DIRECTORY}"
        raise OSError(f"no {num_bytes / 2**20:.1f} MiB of memory to share{where} ({reason})")
    return mapped


def _allocated(node: Node, descriptor: int, num_bytes: int, identity: tuple[int, int]) -> mmap.mmap:
    """Map the file of this identity, with this rank's share of its pages allocated; local."""
    if _identity(descriptor) != identity:
        raise OSError("process numbers mean others, in a namespace of processes")
    counts = even_counts(num_bytes, node.world_size)
    if counts[node.rank]:
        os.posix_fallocate(descriptor, start_offsets(counts)[node.rank], counts[node.rank])
    return mmap.mmap(descriptor, num_bytes)


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def meeting(node: Node, *, sleeping: bool) -> Callable[[], None]:
    """Return what waits until all ranks of the node have called it; collective in the node.

    Parameters
    ----------
    node : Node
        The ranks.
    sleeping : bool
        Whether they sleep meanwhile, as those should that share cores; where the system can't, they wait as MPI does.
    """
    if not (sleeping and SleepingBarrier.is_here()):
        return node.barrier
    numel = SleepingBarrier.words_needed(node.world_size)
    words = SharedMemory(node, 4 * numel).tensor(torch.int32, [numel])
    return SleepingBarrier(words, node.rank, node.world_size, node.progress).wait
