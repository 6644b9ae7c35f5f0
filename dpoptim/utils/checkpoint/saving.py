"""Save a checkpoint: all ranks write at once, in the foreground or in the background.

Tests: ``tests/utils/test_checkpoint_kill.py``.

Note [Commit]
-------------
Every rank writes one file into a temporary directory and flushes it. Rank 0 reads the headers of all files, writes the
index, flushes it, and renames the directory: only then is the checkpoint complete. In the background the threads use
no MPI: rank 0's waits until the files of all ranks have their names, which they get when they are flushed. The
next call of all ranks compares errors, so that an error on one is raised on all.
"""

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpoptim.comm.errors import heard_if_left
from dpoptim.utils.checkpoint.directory import complete, file_name, publish, start
from dpoptim.utils.checkpoint.error import CheckpointError
from dpoptim.utils.checkpoint.files import Source, shard_entries, write_shard
from dpoptim.utils.checkpoint.gathering import Contents, gather
from dpoptim.utils.checkpoint.index import Index, StoredTensor, dump_index
from dpoptim.utils.checkpoint.ranks import ONE_PROCESS, Ranks, attempt, hold, let_go, meet, meet_again, together

__all__ = ["save", "save_contents", "wait", "wait_for"]

logger = logging.getLogger(__name__)

# A rank that is gone when the program ends would keep rank 0's thread waiting for its file.
_GIVE_UP_AFTER_S = 60.0


@heard_if_left("checkpoint.save()")
def save(
    path: str | Path,
    *,
    model: Any = None,
    optimizer: Any = None,
    scheduler: Any = None,
    ema: Any = None,
    sampler: Any = None,
    keep: int | None = 3,
    blocking: bool = True,
    comm: Any = None,
    **extra: Any,
) -> None:
    """Save a checkpoint into the directory ``path``; collective.

    Parameters
    ----------
    path : str or Path
        Directory of the run, on a file system that all ranks see; made if need be. Checkpoints are numbered in it:
        ``checkpoint-00000001`` and so on. One job at a time may save to it.
    model, ema : torch.nn.Module, optional
        Parameters, alike on all ranks, and buffers, which may differ.
    optimizer : torch.optim.Optimizer, optional
        Plain or data-parallel. Every element of its state is written once, by a rank that holds it.
    scheduler, sampler : optional
        Objects with ``state_dict()``, alike on all ranks: rank 0's counts. Of a ``DistributedSampler`` the epoch.
    keep : int or None
        How many complete checkpoints stay in ``path``, this one included; None keeps all.
    blocking : bool
        Whether to return when the checkpoint is complete. If False, return when what this rank writes is copied
        to host memory; it is written while training goes on, and an error is raised by the next :func:`save`,
        :func:`wait` or :func:`load` of all ranks. The copy's memory is kept for the next time.
    comm : mpi4py.MPI.Comm or heat MPICommunication, optional
        The ranks; by default the optimizer's, if it is data-parallel, else all.
    **extra
        Under their names: further modules, optimizers or objects with ``state_dict()``, and values (numbers, strings,
        lists, dicts, tensors), of which rank 0's count.

    Raises
    ------
    TypeError
        A value can't be held without pickle; an argument is of the wrong kind.
    ValueError
        ``keep < 1``; ``path`` or the parts differ between ranks.
    CheckpointError
        A rank could not write. The checkpoints that were complete stay as they are.

    Notes
    -----
    All errors are raised on all ranks. The states of the global random number generators of torch, NumPy and Python
    are saved, for each rank. What is on the disk when this returns (with ``blocking=False``: when :func:`wait` does)
    has been flushed and survives a crash of the machine.
    """
    named = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "ema": ema, "sampler": sampler}
    parts = {**{name: part for name, part in named.items() if part is not None}, **extra}
    ranks = meet(comm, parts.values(), "saving a checkpoint")
    wait_for(ranks)
    together(ranks, _argument_error(path, keep, blocking))
    contents = gather(ranks, Path(path), parts)
    temporary, error = attempt(lambda: start(Path(path)) if ranks.rank == 0 else None)
    together(ranks, error and _described(error, Path(path)))
    name = ranks.broadcast_object(temporary and temporary.name)
    saving = _Saving(ranks, Path(path) / name, contents, keep)
    if blocking:
        saving.write()
        saving.finish()
        return
    _, error = attempt(saving.copy)
    together(ranks, error)
    hold(ranks)
    _under_way[id(ranks)] = saving
    saving.begin()


def save_contents(path: Path, contents: Contents) -> None:
    """Save what was converted as the next checkpoint in ``path``; local."""
    saving = _Saving(ONE_PROCESS, start(path), contents, None)
    saving.write()
    saving.finish()


@heard_if_left("checkpoint.wait()")
def wait() -> None:
    """Wait until checkpoints that are saved in the background are complete; collective, if there are any.

    Raises
    ------
    CheckpointError
        One could not be written; raised on all ranks.
    """
    for saving in list(_under_way.values()):
        meet_again(saving.ranks, "waiting for a checkpoint")
        wait_for(saving.ranks)


def wait_for(ranks: Ranks) -> None:
    """Wait for these ranks' save in the background, and raise its errors; collective."""
    saving = _under_way.pop(id(ranks), None)
    if saving is not None:
        try:
            saving.finish()
        finally:
            let_go(ranks)


class _Saving:
    """One checkpoint on its way to the disk."""

    def __init__(self, ranks: Ranks, temporary: Path, contents: Contents, keep: int | None) -> None:
        self.ranks = ranks
        self._temporary = temporary
        self._sources: Sequence[Source] = contents.sources
        self._index = contents.index
        self._keep = keep
        self._write_error: Exception | None = None
        self._commit_error: Exception | None = None
        self._is_in_background = False
        self._written, self._committed, self._cancelled = (threading.Event() for _ in range(3))

    def copy(self) -> None:
        """Copy what this rank writes to host memory."""
        self._sources = _copied(self._sources)

    def begin(self) -> None:
        """Write in the background."""
        self._is_in_background = True
        threading.Thread(target=self._run, name="dpoptim-checkpoint", daemon=False).start()

    def write(self) -> None:
        """Write this rank's file; its name appears when it is flushed."""
        path = self._temporary / file_name(self.ranks.rank)
        partial = path.with_suffix(".partial")

        def write_and_name() -> None:
            write_shard(partial, self._sources)
            partial.rename(path)

        _, error = attempt(write_and_name)
        if error is not None:
            self._write_error = _described(error, path)
            with contextlib.suppress(OSError):
                path.with_suffix(".failed").touch()
        self._sources = ()
        self._written.set()

    def finish(self) -> None:
        """Complete the checkpoint, or raise on all ranks; collective."""
        self._written.wait()
        try:
            together(self.ranks, self._write_error)
        except Exception:
            if self.ranks.rank == 0:
                self._cancelled.set()
                if self._is_in_background:
                    self._committed.wait()
                shutil.rmtree(self._temporary, ignore_errors=True)
            raise
        if self.ranks.rank == 0:
            if not self._is_in_background:
                self._commit()
            self._committed.wait()
        together(self.ranks, self._commit_error)

    def _run(self) -> None:
        self.write()
        if self.ranks.rank == 0 and self._all_are_there():
            self._commit()
        self._committed.set()
        error = self._write_error or self._commit_error
        if error is not None:
            logger.error("rank %d: saving in the background failed: %s", self.ranks.rank, error)

    def _all_are_there(self) -> bool:
        """Wait until every rank's file has its name; return whether all came to have it."""
        expected = {file_name(rank) for rank in range(self.ranks.world_size)}
        last_change_s, last_seen = time.monotonic(), None
        while not self._cancelled.is_set():
            try:
                seen = {path.name: path.stat().st_size for path in self._temporary.iterdir()}
            except FileNotFoundError:  # renamed while we looked
                continue
            if expected <= seen.keys():
                return True
            if any(name.endswith(".failed") for name in seen):
                return False
            if seen != last_seen or threading.main_thread().is_alive():
                last_change_s, last_seen = time.monotonic(), seen
            elif time.monotonic() - last_change_s > _GIVE_UP_AFTER_S:
                missing = sorted(expected - seen.keys())
                self._commit_error = CheckpointError(f"{self._temporary}: {', '.join(missing)} did not come")
                return False
            self._cancelled.wait(0.02)
        return False

    def _commit(self) -> None:
        """Describe all files in the index and give the directory its name."""
        index = self._index
        assert index is not None
        _, error = attempt(lambda: publish(self._temporary, dump_index(self._described_by(index)), self._keep))
        if error is not None:
            self._commit_error = _described(error, self._temporary)
            shutil.rmtree(self._temporary, ignore_errors=True)
        self._committed.set()

    def _described_by(self, index: Index) -> Index:
        pieces: dict[str, list[Any]] = {}
        for rank in range(self.ranks.world_size):
            file, entries = shard_entries(self._temporary / file_name(rank), rank)
            index.files.append(file)
            for name, dtype, shape, piece in entries:
                pieces.setdefault(name, []).append((dtype, shape, piece))
        for name, found in sorted(pieces.items()):
            found.sort(key=lambda entry: entry[2].start)
            dtype, shape, _ = found[0]
            index.tensors[name] = StoredTensor(dtype, shape, tuple(piece for _, _, piece in found))
        return index


# Saves in the background, by their ranks. One process has few communicators, and none of them is ever replaced.
_under_way: dict[int, _Saving] = {}
# Host memory of the last copy: pages that are there already are copied to several times as fast as new ones.
_host_memory: list[Tensor] = []


def _copied(sources: Sequence[Source]) -> list[Source]:
    """Copy tensors to host memory, one after another in one buffer."""
    offsets, total = [], 0
    for source in sources:
        offsets.append(total)
        total += -(-source.size_bytes // 16) * 16
    if not _host_memory or _host_memory[0].numel() < total:
        _host_memory[:] = [torch.empty(total, dtype=torch.uint8, device="cpu")]
    copies = []
    for source, offset in zip(sources, offsets, strict=True):
        flat = _host_memory[0][offset : offset + source.size_bytes].view(source.values.dtype)
        copy = flat.view(source.values.shape)
        copy.copy_(source.values)
        copies.append(Source(source.name, source.shape, source.start, source.stop, copy))
    return copies


def _argument_error(path: object, keep: object, blocking: object) -> Exception | None:
    if not isinstance(path, (str, Path)):
        return TypeError(f"path must be a str or a Path, got {type(path).__name__}")
    if keep is not None and (not isinstance(keep, int) or isinstance(keep, bool)):
        return TypeError(f"keep must be an int or None, got {keep!r}")
    if keep is not None and keep < 1:
        return ValueError(f"keep must be >= 1, got {keep}: None keeps all")
    if not isinstance(blocking, bool):
        return TypeError(f"blocking must be True or False, got {blocking!r}")
    return None


def _described(error: Exception, path: Path) -> Exception:
    """Say which file could not be written, and what is left."""
    if not isinstance(error, OSError):
        return error
    where = error.filename or path
    directory = path.parent if path.name.startswith((".saving", "rank-")) else path
    directory = directory.parent if directory.name.startswith(".saving") else directory
    left: list[Path] = []
    with contextlib.suppress(OSError):
        left = complete(directory)
    rest = f"{left[-1]} is complete" if left else "there is no complete checkpoint yet"
    return CheckpointError(f"{where} can't be written: {error.strerror or error}; {rest}")
