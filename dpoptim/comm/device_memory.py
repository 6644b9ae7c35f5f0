"""Device tensors for collectives that read host memory.

Tests: ``tests/behaviour/test_cuda.py``.

Note [Device tensors]
---------------------
Device memory is handed to MPI only where the MPI library itself answers that it can read it. Everywhere else it
is copied through a pinned host buffer. MPI knows nothing of streams: the current stream is synchronised before MPI
reads device memory.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["host_memory", "on_same_stream"]

_T = TypeVar("_T")


@contextlib.contextmanager
def host_memory(*tensors: Tensor, direct: Callable[[str], bool]) -> Iterator[tuple[Tensor, ...]]:
    """Yield tensors that MPI may read and write in place of these (Note [Device tensors])."""
    device = tensors[0].device
    if device.type == "cpu":
        yield tensors
        return
    stream = torch.accelerator.current_stream(device)
    device_type = "rocm" if torch.version.hip else device.type
    if direct(device_type):
        stream.synchronize()
        yield tensors
        return
    hosts = tuple(torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors)
    for host, tensor in zip(hosts, tensors, strict=True):
        host.copy_(tensor, non_blocking=True)
    stream.synchronize()
    yield hosts
    for host, tensor in zip(hosts, tensors, strict=True):
        tensor.copy_(host, non_blocking=True)
    stream.synchronize()  # torch's pinned allocator would keep the buffer alive, MPI's next call would not


def on_same_stream(collective: Callable[..., _T], device: torch.device) -> Callable[..., _T]:
    """Let a collective on another thread wait for, and continue, the caller's current stream."""
    if device.type == "cpu":
        return collective
    stream = torch.accelerator.current_stream(device)

    def run(*args: Any) -> _T:
        torch.accelerator.set_stream(stream)
        return collective(*args)

    return run
