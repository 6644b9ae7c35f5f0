"""Collectives of the ranks of a node that read each other's private memory. No MPI here.

Note [Reading each other's memory]
----------------------------------
Linux copies from the memory of another process of the same user (process_vm_readv(2), "cross-memory attach"; what MPIs
do for large messages). Where the ranks of a node may do that, nothing passes through memory that they share but
addresses: each rank reads its part of the others' tensors, in pieces that fit a cache, and sums as it reads; of a
result each reads the others' parts to where they belong. That is one copy less than through a staging area
(:mod:`dpoptim.staging_area`), and ranks meet a few times a batch of tensors rather than at every chunk: with
more ranks than cores each meeting costs a turn of all of them.

A rank may be forbidden to read (Yama, seccomp, another user or process namespace), so that it is tried: each reads
a secret of each other. All agree on what came of it. Reading has one thread; ranks of several threads copy through a
staging area, with all of them.

Note [Batches]
--------------
A collective is noted first, and done with all others that were noted when the first one is waited for: all ranks
write down where their tensors are, meet, read, and meet again before anybody writes to them. So one meeting serves
all buckets of a step.
"""

import ctypes
import os
import platform
import secrets
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dpoptim.errors import raised_on_all_ranks
from dpoptim.partition import even_counts
from dpoptim.shared_memory import SUMMED_IN_FLOAT32, Node, SharedMemory

__all__ = ["PeerMemory"]

# What is summed at once: two such pieces, what was read and the sum, stay in a cache; system calls hardly count.
_PIECE_BYTES = 1 << 20
# The kernel reads at most 2^31 - 4096 bytes a call.
_READ_BYTES = 1 << 30
_MAX_NOTED = 512
_SECRET_BYTES = 16


class _Span(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("num_bytes", ctypes.c_size_t))


class _Row(ctypes.Structure):
    """What a rank tells the others of a batch, in memory that they share."""

    _fields_ = (
        ("anchors", ctypes.c_int64 * _MAX_NOTED),
        ("scales", ctypes.c_double * _MAX_NOTED),
        ("failed", ctypes.c_int64),
        ("_padding", ctypes.c_int64 * 7),
    )


class _Noted:
    """A collective of a batch: this rank's tensors, and where they lie on each rank."""

    def __init__(self, parts: Sequence[Tensor], output: Tensor | None, scale: float, *, gathers: bool) -> None:
        self.parts = parts
        self.output = output  # where this rank's sum goes, if there is one
        self.scale = scale
        self.gathers = gathers
        # The same part on all ranks, of an address that is not null.
        self.anchor = next(part for part in parts if part.numel()).data_ptr()
        self.anchors: Sequence[int] = ()  # of all ranks
        self.scales: Sequence[float] = ()


class PeerMemory:
    """The collectives of one node by reading each other's memory; construction is collective in the node.

    Every method is collective among the ranks of the node and gives the same bits on all. Tensors are flat,
    contiguous host tensors of one dtype; the parts of a collective are pieces of one tensor, divided alike on all
    ranks. They belong to this object until :meth:`wait` returns.

    Parameters
    ----------
    node : Node
        The ranks.
    meet : callable
        Waits until all ranks of the node are there.

    Raises
    ------
    OSError
        On every rank of the node, if one may not read another's memory.
    """

    def __init__(self, node: Node, meet: Callable[[], None]) -> None:
        self._rank, self._size, self._meet = node.rank, node.world_size, meet
        secret = torch.frombuffer(bytearray(secrets.token_bytes(_SECRET_BYTES)), dtype=torch.uint8)
        places = node.all_gather_object((os.getpid(), secret.data_ptr(), bytes(secret.tolist())))
        error = _error_of_reading(places)
        # Also keeps every secret in its place until all have read it.
        errors = node.all_gather_object(None if error is None else f"rank {node.rank} of the node: {error}")
        reason = next((text for text in errors if text is not None), None)
        if reason is not None:
            raise OSError(reason)
        self._pids = [pid for pid, _, _ in places]
        num_bytes = ctypes.sizeof(_Row)
        self._memory = SharedMemory(node, num_bytes * self._size).tensor(torch.uint8, [num_bytes * self._size])
        start = self._memory.data_ptr()
        self._rows = [_Row.from_address(start + num_bytes * rank) for rank in range(self._size)]
        self._noted: list[_Noted] = []
        self._scratch = [torch.empty(_PIECE_BYTES, dtype=torch.uint8) for _ in range(2)]

    # ---------------------------------------------------------------- what to do

    def all_reduce(self, tensor: Tensor, scale: float = 1.0) -> None:
        """Note: sum ``scale`` times the tensor over the ranks, in place; every rank has a scale of its own."""
        parts = torch.split(tensor, even_counts(tensor.numel(), self._size))
        self._note(parts, parts[self._rank], scale, gathers=True)

    def reduce_scatter(self, output: Tensor, parts: Sequence[Tensor], scale: float = 1.0) -> None:
        """Note: sum ``scale`` times the parts over the ranks; each keeps its part in ``output``.

        ``output`` may be ``parts[rank]`` itself; the parts of other ranks are left unchanged.
        """
        self._note(parts, output, scale, gathers=False)

    def all_gather(self, parts: Sequence[Tensor]) -> None:
        """Note: collect every rank's part in ``parts``, where its own already has the values. Any dtype."""
        self._note(parts, None, 1.0, gathers=True)

    def _note(self, parts: Sequence[Tensor], output: Tensor | None, scale: float, *, gathers: bool) -> None:
        if not any(part.numel() for part in parts):
            return
        self._noted.append(_Noted(parts, output, scale, gathers=gathers))
        if len(self._noted) == _MAX_NOTED:
            self.wait()

    # ---------------------------------------------------------------- how

    @torch.no_grad()
    def wait(self) -> None:
        """Do all that was noted (Note [Batches]); blocks.

        Raises
        ------
        RuntimeError
            On every rank, if one could not read.
        """
        if not self._noted:
            return
        batch, self._noted = self._noted, []
        summed = [noted for noted in batch if noted.output is not None]
        gathered = [noted for noted in batch if noted.gathers]
        self._exchange_places(batch)
        error = self._attempt(self._sum, summed)
        if summed and gathered:
            self._meet()
        error = self._attempt(self._gather, gathered) or error
        self._rows[self._rank].failed = error is not None
        self._meet()
        failed = next((rank for rank, row in enumerate(self._rows) if row.failed), None)
        if failed is not None:
            text = f"rank {failed} of the node could not read another's memory" + (f": {error}" if error else "")
            raise raised_on_all_ranks(RuntimeError(text))

    def _attempt(self, do: Callable[[_Noted], None], batch: Sequence[_Noted]) -> OSError | None:
        try:
            for noted in batch:
                do(noted)
        except OSError as error:
            return error
        return None

    def _exchange_places(self, batch: Sequence[_Noted]) -> None:
        number = len(batch)
        own = self._rows[self._rank]
        own.anchors[:number] = [noted.anchor for noted in batch]
        own.scales[:number] = [noted.scale for noted in batch]
        self._meet()
        all_anchors = [row.anchors[:number] for row in self._rows]
        all_scales = [row.scales[:number] for row in self._rows]
        for place, noted in enumerate(batch):
            noted.anchors = [anchors[place] for anchors in all_anchors]
            noted.scales = [scales[place] for scales in all_scales]

    def _sum(self, noted: _Noted) -> None:
        """Sum this rank's part over all ranks, piece by piece (Note [Order of sums] in shared_memory.py)."""
        own, output = noted.parts[self._rank], noted.output
        assert output is not None
        if not own.numel():
            return
        is_wide = own.dtype in SUMMED_IN_FLOAT32
        numel = _PIECE_BYTES // own.element_size()
        scratch = [memory.view(own.dtype) for memory in self._scratch]
        # A factor that all have in common is one pass over the sum rather than over what is summed.
        common = noted.scales[0] if len(set(noted.scales)) == 1 else None
        scales = noted.scales if common is None else (1.0,) * self._size
        offset_bytes = own.data_ptr() - noted.anchor
        for piece, target in zip(torch.split(own, numel), torch.split(output, numel), strict=True):
            read = scratch if len(piece) == numel else [memory[: len(piece)] for memory in scratch]
            total = piece
            for rank in range(self._size):
                values = read[1 if rank else 0]
                if rank != self._rank:
                    self._read(rank, noted.anchors[rank] + offset_bytes, values)
                    if scales[rank] != 1.0:
                        values.mul_(scales[rank])
                else:
                    # The own values may be the target, which is written last.
                    values = piece if scales[rank] == 1.0 else torch.mul(piece, scales[rank], out=target)
                if rank == 0:
                    total = values.float() if is_wide else values
                elif is_wide:
                    total += values
                else:
                    total = torch.add(total, values, out=target if rank == self._size - 1 else read[0])
            if is_wide:
                target.copy_(total if common is None or common == 1.0 else total.mul_(common))
            elif common is not None and common != 1.0:
                target.mul_(common)
            offset_bytes += piece.nbytes

    def _gather(self, noted: _Noted) -> None:
        for step in range(1, self._size):  # not all from the same rank at once
            owner = (self._rank + step) % self._size
            part = noted.parts[owner]
            if part.numel():
                self._read(owner, noted.anchors[owner] + part.data_ptr() - noted.anchor, part)

    def _read(self, rank: int, address: int, target: Tensor) -> None:
        _read_memory(self._pids[rank], address, target)


def _error_of_reading(places: Sequence[tuple[int, int, bytes]]) -> str | None:
    """Try to read what every rank has there, and return why not."""
    if platform.system() != "Linux":
        return "this is not Linux"
    if torch.get_num_threads() > 1:
        return "it has several threads, and reading has one"
    found = torch.zeros(_SECRET_BYTES, dtype=torch.uint8)
    try:
        for pid, address, expected in places:
            _read_memory(pid, address, found)
            if bytes(found.tolist()) != expected:
                return "process numbers mean others, in a namespace of processes"
    except OSError as error:
        return str(error)
    return None


def _read_memory(pid: int, address: int, target: Tensor) -> None:
    """Copy from the memory of another process; raises OSError."""
    here, num_bytes = target.data_ptr(), target.nbytes
    while num_bytes:
        size = min(num_bytes, _READ_BYTES)
        count = _libc.process_vm_readv(
            pid, ctypes.byref(_Span(here, size)), 1, ctypes.byref(_Span(address, size)), 1, 0
        )
        if count <= 0:
            number = ctypes.get_errno()
            raise OSError(number, f"process_vm_readv of process {pid}: {os.strerror(number)}")
        here, address, num_bytes = here + count, address + count, num_bytes - count


_libc = ctypes.CDLL(None, use_errno=True)
if hasattr(_libc, "process_vm_readv"):
    _libc.process_vm_readv.restype = ctypes.c_ssize_t
    _libc.process_vm_readv.argtypes = (
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    )
