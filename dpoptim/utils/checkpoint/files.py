"""Files of a checkpoint: safetensors with checksums, written and read piece by piece.

The format is safetensors' own, so that any of its readers takes the files: eight bytes with the length of the header,
the header in JSON, the data. They are written here because the checksums, known only when all data has passed by,
stand in the header: its room is kept free and filled at the end. They are read here because a slice is to be read
into memory that is there already, and because a mapped file that another process truncates ends a program.
"""

import contextlib
import json
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpoptim.utils.checkpoint.error import CheckpointError
from dpoptim.utils.checkpoint.index import CHECKSUM_DIGITS, CHUNK_BYTES, DTYPES, File, Piece, StoredTensor, checksum

__all__ = ["Reader", "Source", "fsync_directory", "read_text", "shard_entries", "write_shard", "write_text"]


@dataclass(frozen=True)
class Source:
    """Elements ``start`` to ``stop`` of a flattened tensor that this rank writes.

    ``values`` has these elements, in any shape; ``dtype`` and ``shape`` are those of the whole tensor.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    values: Tensor

    @property
    def size_bytes(self) -> int:
        """What it takes in the file."""
        return (self.stop - self.start) * self.values.dtype.itemsize

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the tensor."""
        return self.values.dim() == len(self.shape) and tuple(self.values.shape) == self.shape


def write_shard(path: Path, sources: Sequence[Source]) -> None:
    """Write a safetensors file of these pieces and flush it to the disk.

    Raises
    ------
    OSError
        The disk is full, or something else is wrong with it. What was written is removed.
    """
    sources = sorted(sources, key=lambda source: -source.values.dtype.itemsize)  # keeps every tensor aligned
    checksums = ["0" * CHECKSUM_DIGITS * -(-source.size_bytes // CHUNK_BYTES) for source in sources]
    room = len(_header(sources, checksums))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(descriptor, "wb", buffering=1 << 20) as file:  # noqa: PTH123  a descriptor has no Path
            file.seek(room)
            for number, source in enumerate(sources):
                of_chunks = []
                for chunk in _host_chunks(source.values):
                    of_chunks.append(checksum(chunk))
                    file.write(chunk)
                checksums[number] = "".join(of_chunks)
            file.seek(0)
            header = _header(sources, checksums)
            assert len(header) == room
            file.write(header)
            file.flush()
            os.fsync(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def shard_entries(path: Path, number: int) -> tuple[File, list[tuple[str, torch.dtype, tuple[int, ...], Piece]]]:
    """Return what the header of a file says: itself, and its pieces; ``number`` is its position in the index."""
    with path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        start = file.read(8)
        header = file.read(struct.unpack("<Q", start)[0])
    facts = File(path.name, size_bytes, len(start + header), checksum(start + header))
    parsed = json.loads(header)
    entries, offset = [], facts.header_bytes
    for name, dtype_name, shape, first, stop, checksums in json.loads(parsed["__metadata__"]["dpoptim"]):
        dtype = getattr(torch, dtype_name)
        entries.append((name, dtype, tuple(shape), Piece(number, offset, first, stop, checksums)))
        offset += (stop - first) * dtype.itemsize
    assert offset == size_bytes, f"{path} has {size_bytes} bytes, its header describes {offset}"
    return facts, entries


class Reader:
    """Reads tensors, or slices of them, from the files of one checkpoint, and checks what it reads.

    Use it as a context manager. A file is opened when it is needed first: a regular file, in the directory itself, of
    the right size and with the right header.
    """

    def __init__(self, directory: Path, files: Sequence[File], tensors: dict[str, StoredTensor]) -> None:
        self.directory = directory
        self.tensors = tensors
        self._files = files
        self._descriptors: dict[int, int] = {}
        self._scratch = bytearray(CHUNK_BYTES)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return a whole tensor in its shape, or elements ``start`` to ``stop`` of it in a 1-d one."""
        stored = self.tensors[name]
        if stop is None:
            flat = torch.empty(stored.numel, dtype=stored.dtype, device="cpu")
            self._read_into(flat, name, 0)
            return flat.view(stored.shape)
        flat = torch.empty(stop - start, dtype=stored.dtype, device="cpu")
        self._read_into(flat, name, start)
        return flat

    @torch.no_grad()
    def read_into(self, tensor: Tensor, name: str) -> None:
        """Read a whole tensor into one of its shape and dtype that is there, on any device."""
        tensor = tensor.detach()
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            self._read_into(tensor.view(-1), name, 0)
        elif tensor.is_contiguous():
            flat, step = tensor.view(-1), 4 * CHUNK_BYTES // tensor.dtype.itemsize
            for start in range(0, flat.numel(), step):
                stop = min(start + step, flat.numel())
                flat[start:stop].copy_(self.read(name, start, stop))
        else:
            tensor.copy_(self.read(name))

    def verify(self, file: int) -> None:
        """Read all of one file and compare every checksum."""
        self._descriptor(file)
        for name, stored in self.tensors.items():
            for piece in stored.pieces:
                if piece.file == file:
                    for number in range(len(piece.checksums) // CHECKSUM_DIGITS):
                        self._chunk(name, stored, piece, number, None)

    def _read_into(self, flat: Tensor, name: str, first: int) -> None:
        stored = self.tensors[name]
        memory = _bytes_of(flat)
        last = first + flat.numel()
        for piece in stored.pieces:
            low, high = max(first, piece.start), min(last, piece.stop)
            if low < high:
                begin = (low - first) * stored.dtype.itemsize
                end = (high - first) * stored.dtype.itemsize
                self._read_piece(memory[begin:end], name, stored, piece, low)

    def _read_piece(self, memory: memoryview, name: str, stored: StoredTensor, piece: Piece, low: int) -> None:
        """Fill memory with the elements of a piece from ``low`` on, chunk by chunk."""
        skip = (low - piece.start) * stored.dtype.itemsize
        done = 0
        while done < len(memory):
            number, within = divmod(skip + done, CHUNK_BYTES)
            size_bytes = min(CHUNK_BYTES, (piece.stop - piece.start) * stored.dtype.itemsize - number * CHUNK_BYTES)
            if within == 0 and size_bytes <= len(memory) - done:
                self._chunk(name, stored, piece, number, memory[done : done + size_bytes])
                done += size_bytes
            else:
                chunk = self._chunk(name, stored, piece, number, None)
                taken = min(size_bytes - within, len(memory) - done)
                memory[done : done + taken] = chunk[within : within + taken]
                done += taken

    def _chunk(
        self, name: str, stored: StoredTensor, piece: Piece, number: int, memory: memoryview | None
    ) -> memoryview:
        """Read one chunk, into memory given or our own, and check it."""
        piece_bytes = (piece.stop - piece.start) * stored.dtype.itemsize
        size_bytes = min(CHUNK_BYTES, piece_bytes - number * CHUNK_BYTES)
        memory = memoryview(self._scratch)[:size_bytes] if memory is None else memory
        self._fill(memory, piece.file, piece.offset + number * CHUNK_BYTES)
        start = CHECKSUM_DIGITS * number
        if checksum(memory) != piece.checksums[start : start + CHECKSUM_DIGITS]:
            raise CheckpointError(
                f"{self._path(piece.file)} is damaged: tensor '{name}' does not have its checksum in elements "
                f"{piece.start} to {piece.stop}, bytes {piece.offset + number * CHUNK_BYTES} on"
            )
        return memory

    def _fill(self, memory: memoryview, file: int, offset: int) -> None:
        descriptor = self._descriptor(file)
        done = 0
        while done < len(memory):
            try:
                count = os.preadv(descriptor, [memory[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self._path(file)} can't be read: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(f"{self._path(file)} is truncated: it ends at byte {offset + done}")
            done += count

    def _descriptor(self, file: int) -> int:
        if file not in self._descriptors:
            facts, path = self._files[file], self._path(file)
            descriptor = _open_regular(path)
            self._descriptors[file] = descriptor
            size_bytes = os.fstat(descriptor).st_size
            if size_bytes != facts.size_bytes:
                what = "truncated" if size_bytes < facts.size_bytes else "not the one that was written"
                raise CheckpointError(f"{path} is {what}: it has {size_bytes} bytes, the index says {facts.size_bytes}")
            header = bytearray(facts.header_bytes)
            self._fill(memoryview(header), file, 0)
            if checksum(header) != facts.header_checksum:
                raise CheckpointError(f"{path} is damaged: its header does not have its checksum")
        return self._descriptors[file]

    def _path(self, file: int) -> Path:
        return self.directory / self._files[file].name


def read_text(path: Path) -> str:
    """Return the text of a regular file that is no symbolic link."""
    descriptor = _open_regular(path)
    with open(descriptor, "rb") as file:  # noqa: PTH123  a descriptor has no Path
        try:
            return file.read().decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is damaged: it is no text in UTF-8") from error
        except OSError as error:
            raise CheckpointError(f"{path} can't be read: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Write a new file and flush it to the disk."""
    with path.open("x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def fsync_directory(path: Path) -> None:
    """Flush the names in a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_regular(path: Path) -> int:
    try:  # not blocking: the name could be a FIFO's
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        if path.is_symlink():
            raise CheckpointError(f"{path} is a symbolic link: a checkpoint's files lie in its directory") from error
        raise CheckpointError(f"{path} can't be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is no regular file")
    return descriptor


def _header(sources: Sequence[Source], checksums: Sequence[str]) -> bytes:
    """Return the first bytes of the file, of the same length whatever the checksums."""
    header: dict[str, Any] = {}
    pieces, offset = [], 0
    for source, of_chunks in zip(sources, checksums, strict=True):
        dtype = source.values.dtype
        name = source.name if source.is_whole else f"{source.name}[{source.start}:{source.stop}]"
        shape = list(source.shape) if source.is_whole else [source.stop - source.start]
        assert name not in header, name
        header[name] = {
            "dtype": DTYPES[dtype],
            "shape": [*shape, 2] if dtype == torch.complex128 else shape,
            "data_offsets": [offset, offset + source.size_bytes],
        }
        offset += source.size_bytes
        dtype_name = str(dtype).removeprefix("torch.")
        pieces.append([source.name, dtype_name, list(source.shape), source.start, source.stop, of_chunks])
    text = json.dumps({"__metadata__": {"format": "pt", "dpoptim": json.dumps(pieces)}, **header}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _host_chunks(values: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, ``CHUNK_BYTES`` at a time."""
    flat = values.detach().resolve_conj().resolve_neg().reshape(-1)
    step = CHUNK_BYTES // flat.dtype.itemsize
    for start in range(0, flat.numel(), step):
        yield _bytes_of(flat[start : start + step].cpu())


def _bytes_of(flat: Tensor) -> memoryview:
    """Return the memory of a 1-d contiguous tensor on the CPU."""
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    memory: Any = flat.view(torch.uint8).numpy()
    return memoryview(memory)
