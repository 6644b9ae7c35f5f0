"""Names in a directory of checkpoints, and the rename that makes one complete.

``checkpoint-00000012`` is complete: the name comes into being in one step, when all that is in it is on the disk.
``.saving-00000012`` is being written, ``.removing-00000012`` being deleted; either may be left behind by a
killed job, is never taken for a checkpoint, and goes when the next one is saved.

Tests: ``tests/utils/test_checkpoint_damage.py``.
"""

import logging
import re
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from dpoptim.utils.checkpoint.error import CheckpointError
from dpoptim.utils.checkpoint.files import fsync_directory, write_text

__all__ = ["INDEX", "complete", "file_name", "find", "offer", "publish", "remove", "remove_leftovers", "start"]

logger = logging.getLogger(__name__)

INDEX = "index.json"
_COMPLETE = re.compile(r"checkpoint-(\d{8,})")
_LEFTOVER = re.compile(r"\.(saving|removing)-\d{8,}")


def complete(directory: Path) -> list[Path]:
    """Return the complete checkpoints in a directory, the oldest first."""
    try:
        found = [(int(match[1]), path) for path in directory.iterdir() if (match := _COMPLETE.fullmatch(path.name))]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path for _, path in sorted(found) if path.is_dir() and not path.is_symlink() and (path / INDEX).exists()]


def find(path: Path) -> Path:
    """Return the checkpoint that ``path`` is, or the newest complete one in it.

    Raises
    ------
    CheckpointError
        There is none.
    """
    if (path / INDEX).exists() or (path / INDEX).is_symlink():
        return path
    if _COMPLETE.fullmatch(path.name) and path.is_dir():
        raise CheckpointError(f"{path / INDEX} is missing{offer(path)}")
    if found := complete(path):
        return found[-1]
    what = "has no complete checkpoint" if path.is_dir() else "is no directory" if path.exists() else "does not exist"
    raise CheckpointError(f"{path} {what}: give the directory that was saved to, or a checkpoint in it")


def offer(path: Path) -> str:
    """Say which other complete checkpoint there is beside a bad one."""
    others = [other for other in complete(path.parent) if other != path]
    older = [other for other in others if _number(other) < _number(path)] or others
    return f"; {older[-1]} is complete" if older else "; there is no other complete checkpoint beside it"


def file_name(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def start(directory: Path) -> Path:
    """Make the temporary directory of the next checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory)
    numbers = [_number(path) for path in directory.iterdir() if _COMPLETE.fullmatch(path.name)]
    temporary = directory / f".saving-{max(numbers, default=0) + 1:08d}"
    temporary.mkdir()
    return temporary


def publish(temporary: Path, index_text: str, keep: int | None) -> Path:
    """Complete a checkpoint whose files are on the disk, and remove all but the newest ``keep``."""
    write_text(temporary / INDEX, index_text)
    fsync_directory(temporary)
    target = temporary.with_name(temporary.name.replace(".saving-", "checkpoint-"))
    temporary.rename(target)
    fsync_directory(target.parent)
    try:
        remove(complete(target.parent)[: -keep if keep is not None else 0])
    except OSError as error:
        logger.warning("an old checkpoint can't be removed: %s", error)
    return target


def remove(checkpoints: Sequence[Path]) -> None:
    """Remove checkpoints, in the background; one that is removed halfway is no longer named like one."""
    for path in checkpoints:
        doomed = path.with_name(path.name.replace("checkpoint-", ".removing-"))
        path.rename(doomed)
        # Freeing a gigabyte takes a tenth of a second. The interpreter waits for the thread at its end.
        threading.Thread(target=shutil.rmtree, args=(doomed, True), name="dpoptim-removal").start()


def remove_leftovers(directory: Path) -> None:
    """Remove what killed jobs have left."""
    for path in directory.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _number(path: Path) -> int:
    match = _COMPLETE.fullmatch(path.name)
    return int(match[1]) if match else 1 << 62
