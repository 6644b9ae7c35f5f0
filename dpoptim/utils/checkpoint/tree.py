"""Trees of plain values as JSON, their tensors by name: nothing that would need pickle.

Lists, dicts with string keys, strings, integers, finite numbers, booleans and None are JSON's own. Everything else is
an object with one key that begins with ``$`` and names the type.

Tests: ``tests/utils/test_checkpoint.py``.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpoptim.utils.checkpoint.error import CheckpointError

__all__ = ["decode", "encode", "tensor_names"]


def encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON, and put its tensors into ``tensors``, under names that begin with ``path``.

    Raises
    ------
    TypeError
        It holds something that is no plain value; the message says where.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, Tensor):
        return {"$tensor": _add(value, path, tensors)}
    if isinstance(value, np.generic):
        return encode(value.item(), path, tensors)
    if isinstance(value, np.ndarray):
        return {"$ndarray": _add(torch.from_numpy(np.array(value, order="C")), path, tensors)}
    if type(value) is list:
        return _items(value, path, tensors)
    if type(value) in _SEQUENCES:
        return {f"${type(value).__name__}": _items(list(value), path, tensors)}
    if isinstance(value, dict):
        tag = f"${type(value).__name__}" if type(value) in (OrderedDict, Counter) else "$dict"
        if tag == "$dict" and all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: encode(item, f"{path}.{key}", tensors) for key, item in value.items()}
        return {tag: [[encode(k, path, tensors), encode(v, f"{path}.{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, complex):
        return {"$complex": [repr(value.real), repr(value.imag)]}
    if isinstance(value, bytes):
        return {"$bytes": value.hex()}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    raise TypeError(
        f"'{path}' is of type {type(value).__name__}, which a checkpoint can't hold: give numbers, strings, lists, "
        "dicts, tensors, or an object with state_dict()"
    )


def decode(tree: Any, fetch: Callable[[str], Tensor]) -> Any:
    """Return the value that was encoded; ``fetch`` gives the tensor of a name.

    Raises
    ------
    CheckpointError
        The tree is none that :func:`encode` makes.
    """
    if isinstance(tree, list):
        return [decode(item, fetch) for item in tree]
    if not isinstance(tree, dict):
        return tree
    tag = next(iter(tree), "")
    if len(tree) != 1 or not tag.startswith("$"):
        return {key: decode(item, fetch) for key, item in tree.items()}
    content = tree[tag]
    try:
        if tag in ("$tensor", "$ndarray") and isinstance(content, str):
            tensor = fetch(content)
            return tensor.numpy() if tag == "$ndarray" else tensor
        if tag in _PLAIN_TAGS:
            return _PLAIN_TAGS[tag](content)
        if tag in ("$dict", "$OrderedDict", "$Counter"):
            pairs = [(decode(key, fetch), decode(item, fetch)) for key, item in content]
            return (
                Counter(dict(pairs))
                if tag == "$Counter"
                else OrderedDict(pairs)
                if tag == "$OrderedDict"
                else dict(pairs)
            )
        for kind in _SEQUENCES:
            if tag == f"${kind.__name__}":
                return kind(decode(item, fetch) for item in content)
    except (TypeError, AttributeError, KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"the index has a value {tag} of {str(content)[:50]!r}, which is none") from error
    raise CheckpointError(f"the index has a value of a kind {tag[:50]!r} that is unknown")


def tensor_names(tree: Any) -> list[str]:
    """Return the names of all tensors in a tree."""
    if isinstance(tree, list):
        return [name for item in tree for name in tensor_names(item)]
    if not isinstance(tree, dict):
        return []
    if len(tree) == 1 and isinstance(name := tree.get("$tensor", tree.get("$ndarray")), str):
        return [name]
    return [name for item in tree.values() for name in tensor_names(item)]


_SEQUENCES = (tuple, set, frozenset, torch.Size)
_PLAIN_TAGS: dict[str, Callable[[Any], Any]] = {
    "$float": lambda text: {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[text],
    "$complex": lambda parts: complex(float(parts[0]), float(parts[1])),
    "$bytes": bytes.fromhex,
    "$dtype": lambda name: {str(kind).removeprefix("torch."): kind for kind in _all_dtypes()}[name],
}


def _all_dtypes() -> list[torch.dtype]:
    return [value for value in vars(torch).values() if isinstance(value, torch.dtype)]


def _items(values: list[Any], path: str, tensors: dict[str, Tensor]) -> list[Any]:
    return [encode(item, f"{path}.{index}", tensors) for index, item in enumerate(values)]


def _add(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> str:
    if tensor.layout != torch.strided:
        raise TypeError(f"'{path}' is a tensor of layout {tensor.layout}, a checkpoint holds dense ones: to_dense() it")
    name, number = path, 2
    while name in tensors:  # {"a.b": x} beside {"a": {"b": y}}
        name, number = f"{path}~{number}", number + 1
    tensors[name] = tensor.detach()
    return name
