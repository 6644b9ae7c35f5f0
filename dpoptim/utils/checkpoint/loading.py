"""Load a checkpoint, or what of it this rank needs.

Tests: ``tests/utils/test_checkpoint.py``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpoptim.comm.errors import heard_if_left
from dpoptim.utils.checkpoint.directory import INDEX, complete, find, offer
from dpoptim.utils.checkpoint.error import CheckpointError
from dpoptim.utils.checkpoint.files import Reader, read_text
from dpoptim.utils.checkpoint.index import Index, parse_index
from dpoptim.utils.checkpoint.parts import (
    kind_of,
    load_module,
    load_object,
    load_optimizer,
    module_misfit,
    optimizer_misfit,
)
from dpoptim.utils.checkpoint.ranks import Ranks, attempt, meet, together
from dpoptim.utils.checkpoint.rng import derive_rng, set_rng
from dpoptim.utils.checkpoint.saving import wait_for
from dpoptim.utils.checkpoint.tree import decode

__all__ = ["latest", "load", "open_checkpoint"]


def latest(path: str | Path) -> Path | None:
    """Return the newest complete checkpoint in a directory, or None; local.

    Ranks may see the directory of a network file system differently: to load, give :func:`load` the directory.
    """
    found = complete(Path(path))
    return found[-1] if found else None


@heard_if_left("checkpoint.load()")
def load(
    path: str | Path,
    *,
    model: Any = None,
    optimizer: Any = None,
    scheduler: Any = None,
    ema: Any = None,
    sampler: Any = None,
    rng: bool = True,
    missing_ok: bool = False,
    comm: Any = None,
    **extra: Any,
) -> dict[str, Any] | None:
    """Load a checkpoint into these objects; collective.

    The number of ranks, the mode of the optimizer, its buckets and the MPI may be others than those that saved. Each
    rank reads from the files what it holds, and checks it. Nothing is unpickled.

    Parameters
    ----------
    path : str or Path
        A checkpoint, or the directory that was saved to, of which the newest complete checkpoint is taken.
    model, optimizer, scheduler, ema, sampler, **extra
        Objects as given to :func:`save`, constructed as then. Those that are absent are not loaded. Parameters of an
        optimizer are found by name; where a side has no names, by their order.
    rng : bool
        Whether to set the global random number generators of torch, NumPy and Python: as they were on this rank where
        the number of ranks is the same, else seeded from the saved ones, differently on each rank.
    missing_ok : bool
        Whether to return None where ``path`` has no complete checkpoint, rather than to raise: for a script that
        starts or resumes.
    comm : mpi4py.MPI.Comm or heat MPICommunication, optional
        The ranks; by default the optimizer's, if it is data-parallel, else all.

    Returns
    -------
    dict or None
        The values that were saved, by name.

    Raises
    ------
    CheckpointError
        There is none; a file is missing, damaged, no regular file or of a newer version; names, shapes or dtypes do not
        fit. The message names the file and says which other checkpoint is complete.

    Notes
    -----
    All errors are raised on all ranks. Whether everything fits is checked before anything is changed. A file may prove
    to be damaged later: model and optimizer are partly loaded then, so load another checkpoint or stop.
    """
    named = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "ema": ema, "sampler": sampler}
    parts = {**{name: part for name, part in named.items() if part is not None}, **extra}
    ranks = meet(comm, parts.values(), "loading a checkpoint")
    wait_for(ranks)
    together(ranks, _argument_error(path, parts, extra))
    found, error = attempt(lambda: _find(Path(path), missing_ok) if ranks.rank == 0 else None)
    together(ranks, error)
    found = ranks.broadcast_object(found)
    if found is None:
        return None
    directory, text = found
    values, error = attempt(lambda: _load(directory, text, parts, ranks, rng))
    if error is not None and not isinstance(error, (TypeError, ValueError)):
        error = CheckpointError(f"{error}{offer(directory)}")
    together(ranks, error)
    return values


def open_checkpoint(path: Path) -> tuple[Path, Index, Reader]:
    """Return where a checkpoint is, its index, and a reader of its tensors; local."""
    directory = find(path)
    index = parse_index(read_text(directory / INDEX), str(directory / INDEX))
    return directory, index, Reader(directory, index.files, index.tensors)


def _find(path: Path, missing_ok: bool) -> tuple[Path, str] | None:
    try:
        if missing_ok and not complete(path) and not (path / INDEX).exists():
            return None
        directory = find(path).resolve()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    try:
        return directory, read_text(directory / INDEX)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{offer(directory)}") from error


def _load(directory: Path, text: str, parts: Mapping[str, Any], ranks: Ranks, rng: bool) -> dict[str, Any]:
    where = directory / INDEX
    index = parse_index(text, str(where))
    model = parts.get("model")
    for name, part in parts.items():
        stored = index.parts.get(name)
        if stored is None:
            raise CheckpointError(f"{where} has no part '{name}', it has {', '.join(index.parts) or 'none'}")
        if stored["kind"] != kind_of(part) and (stored["kind"], kind_of(part)) != ("value", "object"):
            raise CheckpointError(f"{where} has '{name}' as {stored['kind']}, the program as {kind_of(part)}")
        misfit = None
        if stored["kind"] == "module":
            misfit = module_misfit(name, part, index.tensors, stored["names"])
        elif stored["kind"] == "optimizer":
            misfit = optimizer_misfit(name, part, model, stored)
        if misfit:
            raise CheckpointError(f"{where} does not fit the program: {misfit}")
    is_same = index.about["world_size"] == ranks.world_size
    with Reader(directory, index.files, index.tensors) as reader:
        for name, part in parts.items():
            stored = index.parts[name]
            if stored["kind"] == "module":
                buffers = index.ranks[ranks.rank]["buffers"].get(name, []) if is_same and index.ranks else []
                own = {buffer: f"rank-{ranks.rank}.{name}.{buffer}" for buffer in buffers}
                load_module(name, part, reader, stored["others"], own)
            elif stored["kind"] == "optimizer":
                load_optimizer(part, model, reader, stored)
            else:
                load_object(name, part, stored["tree"], reader.read)
        values = {
            name: decode(stored["tree"], reader.read)
            for name, stored in index.parts.items()
            if stored["kind"] == "value"
        }
        if rng and index.ranks:
            saved_rank = ranks.rank if is_same else 0
            state = decode(index.ranks[saved_rank]["rng"], reader.read)
            try:
                if is_same:
                    set_rng(state)
                else:
                    derive_rng(state, ranks.rank, ranks.world_size)
            except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
                raise CheckpointError(f"{where} has random numbers of rank {saved_rank} that are none") from error
    return values


def _argument_error(path: object, parts: Mapping[str, Any], extra: Mapping[str, Any]) -> Exception | None:
    if not isinstance(path, (str, Path)):
        return TypeError(f"path must be a str or a Path, got {type(path).__name__}")
    for name, part in parts.items():
        if kind_of(part) == "value":
            what = "is returned, not loaded into" if name in extra else "needs load_state_dict()"
            return TypeError(f"'{name}' of type {type(part).__name__} {what}: leave it out, or give an object")
    return None
