"""What every rank has a copy of, made the same on all: rank 0's values, or the mean over ranks."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpoptim.comm.communicator import Communicator
from dpoptim.step.classes import parameters_of

__all__ = ["average_buffers", "broadcast_replicas", "broadcast_tensors"]


def broadcast_replicas(communicator: Communicator, optimizer: Optimizer, module: nn.Module | None) -> None:
    """Give all ranks rank 0's parameters and state of an optimizer, and what else a module has; collective, blocks."""
    parameters = parameters_of(optimizer)
    broadcast_tensors(communicator, parameters)
    broadcast_tensors(communicator, [value for entry in optimizer.state.values() for value in _tensors_in(entry)])
    if module is not None:
        own = {id(parameter) for parameter in parameters}
        rest = [tensor for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in own]
        broadcast_tensors(communicator, rest)


@torch.no_grad()
def broadcast_tensors(communicator: Communicator, tensors: Sequence[Tensor]) -> None:
    """Give all ranks rank 0's values of these tensors, in place and whatever their strides; collective, blocks."""
    for tensor in tensors:
        if tensor.is_contiguous():
            communicator.broadcast(tensor)
        else:
            values = tensor.contiguous()
            communicator.broadcast(values)
            tensor.copy_(values)


def average_buffers(communicator: Communicator, module: nn.Module) -> None:
    """Replace floating point buffers by their mean over ranks, and the others by rank 0's; collective, blocks."""
    for buffer in module.buffers():
        if buffer.is_floating_point():
            mean = buffer.detach().contiguous().clone().div_(communicator.world_size)
            communicator.all_reduce(mean)
            buffer.detach().copy_(mean)
        else:
            broadcast_tensors(communicator, [buffer])


def _tensors_in(entry: Any) -> Iterator[Tensor]:
    """Yield the tensors in one parameter's optimizer state."""
    values = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, (list, tuple)) else [entry]
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)):
            yield from _tensors_in(value)
