"""Checkpoints to and from a single ``torch.save`` file, a safetensors file, and ``torch.distributed.checkpoint``.

One process converts, and holds everything in memory. In the other formats a checkpoint is a dict: ``"model"`` and
``"ema"`` are state dicts, ``"optimizer"`` is torch's ``state_dict()``, values are as they were saved. In
``torch.distributed.checkpoint`` an optimizer's parameters are called by name, as that package does it.

torch's own formats are pickles. They are read with what torch has for files that are not trusted: ``weights_only``, and
for the metadata of ``torch.distributed.checkpoint`` an unpickler that makes nothing but the classes of that metadata.

Tests: ``tests/utils/test_checkpoint_convert.py``.
"""

import pickle
import warnings
from collections.abc import Mapping
from enum import Enum, EnumType
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

from dpoptim.utils.checkpoint.error import CheckpointError
from dpoptim.utils.checkpoint.files import Reader
from dpoptim.utils.checkpoint.gathering import gather_converted
from dpoptim.utils.checkpoint.index import Index
from dpoptim.utils.checkpoint.loading import open_checkpoint
from dpoptim.utils.checkpoint.saving import save_contents
from dpoptim.utils.checkpoint.tree import decode
from dpoptim.utils.state_dict import NamedState, to_named

__all__ = ["export_checkpoint", "import_checkpoint"]


def export_checkpoint(source: Path, target: Path, kind: str) -> None:
    """Write a checkpoint in another format; the target must not exist."""
    if target.exists():
        raise CheckpointError(f"{target} exists already: give a new name")
    _, index, reader = open_checkpoint(source)
    with reader:
        if kind == "safetensors":
            names = index.parts.get("model", {}).get("names", [])
            weights = {name: reader.read(f"model.{name}") for name in names}
            safetensors.torch.save_file(weights, target, {"format": "pt"})
            return
        everything = _read_all(index, reader, by_name=kind == "dcp")
    if kind == "torch":
        torch.save(everything, target)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_dcp(everything, checkpoint_id=target, no_dist=True)


def import_checkpoint(source: Path, target: Path) -> None:
    """Save what a file or directory of another format holds as a new checkpoint in ``target``."""
    if source.is_dir():
        everything = _read_dcp(source)
    elif source.suffix == ".safetensors":
        everything = {"model": safetensors.torch.load_file(source)}
    else:
        try:
            everything = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{source} can't be read by torch.load(weights_only=True): {error}") from error
    if not isinstance(everything, dict) or not all(isinstance(name, str) for name in everything):
        raise CheckpointError(f"{source} must hold a dict such as {{'model': ..., 'optimizer': ...}}")
    modules: dict[str, dict[str, Any]] = {}
    optimizers: dict[str, NamedState] = {}
    values: dict[str, Any] = {}
    for name, part in everything.items():
        if isinstance(part, Mapping) and {"state", "param_groups"} <= part.keys():
            optimizers[name] = _form(part, everything.get("model", {}))
        elif name in ("model", "ema") and isinstance(part, Mapping):
            modules[name] = dict(part)
        else:
            values[name] = part
    save_contents(target, gather_converted(modules, optimizers, values))


def _read_all(index: Index, reader: Reader, *, by_name: bool) -> dict[str, Any]:
    everything: dict[str, Any] = {}
    for part, stored in index.parts.items():
        if stored["kind"] == "module":
            everything[part] = {name: reader.read(f"{part}.{name}") for name in stored["names"]}
            everything[part] |= {name: decode(tree, reader.read) for name, tree in stored["others"].items()}
        elif stored["kind"] == "optimizer":
            everything[part] = _optimizer_state(stored, reader, by_name=by_name)
        else:
            everything[part] = decode(stored["tree"], reader.read)
    return everything


def _optimizer_state(stored: Mapping[str, Any], reader: Reader, *, by_name: bool) -> dict[str, Any]:
    groups = decode(stored["param_groups"], reader.read)
    state = {
        name: {key: decode(tree, reader.read) for key, tree in entry.items()} for name, entry in stored["state"].items()
    }
    if by_name:
        return {"state": state, "param_groups": groups}
    names = [name for group in groups for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    own = [{**g, "param_names": g["params"], "params": [numbers[name] for name in g["params"]]} for g in groups]
    return {"state": {numbers[name]: entry for name, entry in state.items()}, "param_groups": own}


def _form(part: Mapping[str, Any], model: Mapping[str, Any]) -> NamedState:
    """Turn an optimizer's state of either format into a form; shapes are the model's, else those of its state."""
    groups = part["param_groups"]
    parameters = [parameter for group in groups for parameter in group["params"]]
    own = [name for group in groups for name in group.get("param_names") or group["params"]]
    is_named = all(isinstance(name, str) for name in own)
    names = own if is_named else None
    numbers = {parameter: number for number, parameter in enumerate(parameters)}
    state = {numbers[parameter]: entry for parameter, entry in part["state"].items()}
    numbered = [{**group, "params": [numbers[p] for p in group["params"]]} for group in groups]
    shapes = []
    for number, name in enumerate(own):
        like = model.get(name) if is_named else None
        largest = [value for value in state.get(number, {}).values() if isinstance(value, Tensor)]
        like = like if like is not None else max(largest, key=lambda value: value.numel(), default=None)
        if like is None:
            raise CheckpointError(f"the shape of parameter {name!r} of the optimizer is unknown: add its model")
        shapes.append(tuple(like.shape))
    return to_named({**part, "state": state, "param_groups": numbered}, shapes, names)


# ------------------------------------------------------------------------------------------ torch.distributed


def _read_dcp(source: Path) -> dict[str, Any]:
    everything: dict[str, Any] = {}
    storage = _Storage(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch speaks of a process group that is not needed here
            _load_state_dict(  # what torch's own conversion calls
                everything,
                storage_reader=storage,
                planner=_Planner(),  # type: ignore[no-untyped-call]
                no_dist=True,
            )
    except (OSError, RuntimeError, pickle.UnpicklingError, CheckpointException) as error:
        reason = storage.refused or error  # some versions of torch go on without metadata
        raise CheckpointError(f"{source} can't be read as a torch.distributed.checkpoint: {reason}") from error
    return everything


class _MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but what the metadata of torch.distributed.checkpoint consists of."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member_of  # by which Python 3.11.0 to 3.11.3 pickles members of an Enum
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        is_own = module == "torch.distributed.checkpoint.metadata" and "." not in name
        if is_dtype or is_own or (module, name) in _METADATA_PARTS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its metadata holds a {module}.{name}")


def _member_of(kind: object, name: str) -> Enum:
    """Return a member of an Enum; nothing else that ``getattr`` would."""
    if isinstance(kind, EnumType) and name in kind.__members__:
        return cast("Enum", kind.__members__[name])
    raise pickle.UnpicklingError(f"its metadata holds an attribute {name} of {kind}")


_METADATA_PARTS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
}


class _Storage(FileSystemReader):
    refused: Exception | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        del args, kwargs
        with (Path(self.path) / ".metadata").open("rb") as file:
            try:
                metadata = _MetadataUnpickler(file).load()
            except Exception as error:
                self.refused = error
                raise
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = getattr(self, "storage_meta", lambda: None)()
        return cast("Metadata", metadata)


class _Planner(_EmptyStateDictLoadPlanner):
    """Takes everything that is there; unpickles no more than plain values."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        name = read_item.dest_index.fqn
        set_element(self.original_state_dict, self.mappings[name], torch.load(value, weights_only=True))
