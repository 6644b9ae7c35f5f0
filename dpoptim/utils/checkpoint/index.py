"""The index of a checkpoint: which tensors there are, and where their elements lie. Text from a file is not trusted.

``index.json``::

    {"format": "dpoptim-checkpoint", "version": 1, "xxh3_64": "...", "content": {
        "about":   {"created", "world_size", "dpoptim", "torch"},
        "files":   [[name, size_bytes, header_bytes, header_checksum], ...],
        "tensors": {name: [dtype, shape, [[file, offset, start, stop, checksums], ...]], ...},
        "parts":   {name: {"kind": "module" | "optimizer" | "object" | "value", ...}},
        "ranks":   [{"rng": ..., "buffers": {module: [names]}}, ...]}}

``offset`` counts bytes from the beginning of the file; ``start`` and ``stop`` are elements of the flattened tensor.
Checksums are XXH3, of 64 bits; ``checksums`` has one, of sixteen hexadecimal digits, for every ``CHUNK_BYTES`` of a
piece, so that a slice can be read and checked without the rest. The index's own checksum is that of its content,
written without spaces and with sorted keys.

Tests: ``tests/utils/test_checkpoint_damage.py``.
"""

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import xxhash

from dpoptim.utils.checkpoint.error import CheckpointError
from dpoptim.utils.checkpoint.tree import tensor_names

__all__ = [
    "CHECKSUM_DIGITS",
    "CHUNK_BYTES",
    "DTYPES",
    "VERSION",
    "File",
    "Index",
    "Piece",
    "StoredTensor",
    "checksum",
    "dump_index",
    "parse_index",
]

VERSION = 1
FORMAT = "dpoptim-checkpoint"
CHUNK_BYTES = 1 << 22
CHECKSUM_DIGITS = 16

# What safetensors calls each dtype; it has no complex128, which is stored as pairs of float64.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.complex128: "F64",
}
_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_KINDS = ("module", "optimizer", "object", "value")
_MAX_DIMS = 64


@dataclass(frozen=True)
class File:
    """A safetensors file; its header is the bytes before the data."""

    name: str
    size_bytes: int
    header_bytes: int
    header_checksum: str


@dataclass(frozen=True)
class Piece:
    """Where elements ``start`` to ``stop`` of a flattened tensor lie."""

    file: int
    offset: int
    start: int
    stop: int
    checksums: str


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and its pieces, in the order of elements, without gap or overlap."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass
class Index:
    """What a checkpoint holds."""

    about: dict[str, Any]
    files: list[File] = field(default_factory=list)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    ranks: list[dict[str, Any]] = field(default_factory=list)


def dump_index(index: Index) -> str:
    """Return the text of ``index.json``."""
    content = {
        "about": index.about,
        "files": [[file.name, file.size_bytes, file.header_bytes, file.header_checksum] for file in index.files],
        "tensors": {
            name: [
                str(tensor.dtype).removeprefix("torch."),
                list(tensor.shape),
                [[p.file, p.offset, p.start, p.stop, p.checksums] for p in tensor.pieces],
            ]
            for name, tensor in index.tensors.items()
        },
        "parts": index.parts,
        "ranks": index.ranks,
    }
    head = {"format": FORMAT, "version": VERSION, "xxh3_64": _checksum_of(content), "content": content}
    return json.dumps(head, allow_nan=False) + "\n"


def parse_index(text: str, where: str) -> Index:
    """Return what ``index.json`` says, after checking every word of it.

    Raises
    ------
    CheckpointError
        It is damaged, of a newer version, or not an index; ``where`` is its path, for the message.
    """
    try:
        head = json.loads(text)
        _expect(isinstance(head, dict) and head.get("format") == FORMAT, f'has no "format": "{FORMAT}"')
        version = head.get("version")
        _expect(_is_count(version) and version >= 1, f"has version {version!r}")
        if version > VERSION:
            _fail(f"is of format version {version}, and this dpoptim reads up to {VERSION}: use a newer dpoptim")
        content = head.get("content")
        _expect(isinstance(content, dict), "has no content")
        _expect(head.get("xxh3_64") == _checksum_of(content), "is damaged: its content does not have its checksum")
        return _parse_content(content)
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where} is damaged or no index of a checkpoint: it {error}") from error


def _parse_content(content: dict[str, Any]) -> Index:
    about, files, tensors = (content.get(key) for key in ("about", "files", "tensors"))
    parts, ranks = content.get("parts"), content.get("ranks")
    _expect(isinstance(about, dict), "has no about")
    _expect(isinstance(files, list) and isinstance(tensors, dict), "has no files or tensors")
    _expect(isinstance(parts, dict) and isinstance(ranks, list), "has no parts or ranks")
    assert isinstance(about, dict)
    index = Index(about, [_parse_file(row) for row in files or []])
    names = [file.name for file in index.files]
    _expect(len(set(names)) == len(names), "names a file twice")
    for name, row in (tensors or {}).items():
        index.tensors[name] = _parse_tensor(name, row, index.files)
    for name, part in (parts or {}).items():
        _expect(isinstance(part, dict) and part.get("kind") in _KINDS, f"has no kind of part '{name}'")
        _check_part(name, part, index.tensors)
        index.parts[name] = part
    num_ranks = (about or {}).get("world_size")
    _expect(_is_count(num_ranks), f"was saved by {num_ranks!r} ranks")
    _expect(len(ranks or []) in (0, num_ranks), f"has {len(ranks or [])} ranks of {num_ranks}")
    for number, rank in enumerate(ranks or []):
        _expect(isinstance(rank, dict) and "rng" in rank, f"has no random numbers of rank {number}")
        _expect(_is_names_by_name(rank.get("buffers")), f"has no buffers of rank {number}")
        _check_tensors(rank["rng"], index.tensors)
        for part, buffers in rank["buffers"].items():
            for buffer in buffers:
                own, first = (index.tensors.get(f"{prefix}{part}.{buffer}") for prefix in (f"rank-{number}.", ""))
                is_alike = (
                    own is not None and first is not None and (own.shape, own.dtype) == (first.shape, first.dtype)
                )
                _expect(is_alike, f"has a buffer '{buffer}' of rank {number} that is unlike rank 0's")
        index.ranks.append(rank)
    return index


def _check_part(name: str, part: dict[str, Any], tensors: dict[str, StoredTensor]) -> None:
    """Check that a part has what its kind has, and that its tensors are there."""
    if part["kind"] in ("object", "value"):
        _expect("tree" in part, f"has no tree of '{name}'")
        _check_tensors(part["tree"], tensors)
    elif part["kind"] == "module":
        names, others = part.get("names"), part.get("others")
        _expect(_is_names(names) and isinstance(others, dict), f"has no names in '{name}'")
        for own in names or []:
            _expect(f"{name}.{own}" in tensors, f"has no tensor '{name}.{own}'")
        _check_tensors(list((others or {}).values()), tensors)
    else:
        _check_optimizer(name, part, tensors)


def _check_optimizer(name: str, part: dict[str, Any], tensors: dict[str, StoredTensor]) -> None:
    groups, shapes, state, sliced = (part.get(key) for key in ("param_groups", "shapes", "state", "sliced"))
    _expect(part.get("class") is None or isinstance(part["class"], str), f"has no class of '{name}'")
    _expect(isinstance(part.get("others"), dict), f"has no others of '{name}'")
    _expect(isinstance(part.get("dtypes"), dict), f"has no dtypes of '{name}'")
    is_grouped = isinstance(groups, list) and all(isinstance(g, dict) and _is_names(g.get("params")) for g in groups)
    _expect(is_grouped and isinstance(shapes, dict), f"has no groups of '{name}'")
    parameters = [parameter for group in groups or [] for parameter in group["params"]]
    _expect(sorted(parameters) == sorted(shapes or {}), f"has groups of '{name}' that are not its parameters")
    _expect(all(_is_shape(shape) for shape in (shapes or {}).values()), f"has no shapes of '{name}'")
    _expect(isinstance(state, dict) and _is_names_by_name(sliced), f"has no state of '{name}'")
    _check_tensors([groups, part["others"]], tensors)
    assert isinstance(shapes, dict) and isinstance(state, dict) and isinstance(sliced, dict)  # noqa: PT018
    for parameter, entry in state.items():
        _expect(parameter in shapes and isinstance(entry, dict), f"has state of '{parameter}' in '{name}'")
        _check_tensors(list(entry.values()), tensors)
    for parameter, keys in sliced.items():
        for key in keys:
            tree = state.get(parameter, {}).get(key)
            stored = tensors.get(tree.get("$tensor", "")) if isinstance(tree, dict) else None
            _expect(
                stored is not None and list(stored.shape) == shapes[parameter],
                f"has no tensor of the shape of '{parameter}' for '{key}' of '{name}'",
            )


def _check_tensors(tree: Any, tensors: dict[str, StoredTensor]) -> None:
    for name in tensor_names(tree):
        _expect(name in tensors, f"has no tensor '{name}'")


def _parse_file(row: Any) -> File:
    _expect(isinstance(row, list) and len(row) == 4, f"lists a file as {str(row)[:50]}")
    name, size_bytes, header_bytes, header_checksum = row
    _expect(isinstance(name, str) and _FILE_NAME.fullmatch(name) is not None, f"names a file {str(name)[:200]!r}")
    _expect(_is_count(size_bytes) and _is_count(header_bytes), f"has sizes of '{name}' that are no numbers")
    _expect(8 <= header_bytes <= size_bytes and isinstance(header_checksum, str), f"has no header of '{name}'")
    return File(name, size_bytes, header_bytes, header_checksum)


def _parse_tensor(name: str, row: Any, files: list[File]) -> StoredTensor:
    _expect(isinstance(row, list) and len(row) == 3, f"lists tensor '{name}' as {str(row)[:50]}")
    dtype_name, shape, pieces = row
    _expect(isinstance(dtype_name, str) and dtype_name in _DTYPE_NAMES, f"gives '{name}' the dtype {dtype_name!r}")
    _expect(_is_shape(shape), f"gives '{name}' the shape {str(shape)[:50]}")
    _expect(isinstance(pieces, list) and len(pieces) >= 1, f"gives '{name}' no pieces")
    dtype = _DTYPE_NAMES[dtype_name]
    parsed, reached = [], 0
    for piece in pieces:
        _expect(isinstance(piece, list) and len(piece) == 5, f"lists a piece of '{name}' as {str(piece)[:50]}")
        file, offset, start, stop, checksums = piece
        _expect(all(_is_count(n) for n in (file, offset, start, stop)), f"has a piece of '{name}' without numbers")
        _expect(start == reached and stop >= start, f"has elements {start} to {stop} of '{name}' after {reached}")
        _expect(file < len(files), f"has '{name}' in file {file} of {len(files)}")
        size_bytes = (stop - start) * dtype.itemsize
        inside = files[file].header_bytes <= offset and offset + size_bytes <= files[file].size_bytes
        _expect(inside, f"has '{name}' outside of '{files[file].name}'")
        num_chunks = -(-size_bytes // CHUNK_BYTES)
        is_complete = isinstance(checksums, str) and len(checksums) == CHECKSUM_DIGITS * num_chunks
        _expect(is_complete, f"has no checksums of '{name}'")
        parsed.append(Piece(file, offset, start, stop, checksums))
        reached = stop
    numel = math.prod(shape)
    _expect(reached == numel, f"has {reached} of the {numel} elements of '{name}'")
    return StoredTensor(dtype, tuple(shape), tuple(parsed))


def checksum(data: bytes | bytearray | memoryview) -> str:
    """Return the checksum of bytes, in hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def _checksum_of(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return checksum(text.encode())


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_DIMS and all(_is_count(size) for size in value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_names_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_names(names) for names in value.values())


def _expect(condition: bool, what: str) -> None:
    if not condition:
        _fail(what)


def _fail(what: str) -> NoReturn:
    raise ValueError(what)
