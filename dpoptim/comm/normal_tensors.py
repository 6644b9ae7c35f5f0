"""Tensors that outlive a call are made outside of inference mode, whoever makes the call. Local.

Tests: ``tests/behaviour/test_default_device.py``.
"""

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["normal_tensors"]


@contextlib.contextmanager
def normal_tensors() -> Iterator[None]:
    """Leave ``torch.inference_mode`` within: what is made there can't be written to outside of it."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
