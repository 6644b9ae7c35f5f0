"""Random number generators of this process: their states, and new ones derived from another rank's.

Tests: ``tests/utils/test_checkpoint.py``.
"""

import hashlib
import json
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpoptim.utils.checkpoint.tree import encode

__all__ = ["derive_rng", "get_rng", "set_rng"]


def get_rng() -> dict[str, Any]:
    """Return the states of the global generators of torch (CPU, and CUDA if it is in use), NumPy and Python."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "python": [version, torch.tensor(words, dtype=torch.int64, device="cpu"), gauss],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng(state: dict[str, Any]) -> None:
    """Put the generators back into a state of :func:`get_rng`."""
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def derive_rng(state: dict[str, Any], rank: int, world_size: int) -> None:
    """Seed the generators from another rank's state: differently on each rank, and the same each time."""
    tensors: dict[str, Tensor] = {}
    tree = encode({key: state[key] for key in ("torch", "numpy", "python")}, "rng", tensors)
    bits = hashlib.sha256(json.dumps([tree, rank, world_size]).encode())
    for name in sorted(tensors):
        bits.update(tensors[name].numpy().tobytes())
    seed = int.from_bytes(bits.digest()[:8], "little")
    torch.manual_seed(seed >> 1)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)
