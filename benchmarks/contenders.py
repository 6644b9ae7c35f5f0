"""Ways to train one model on all ranks: torch's, Heat's and dpoptim's, with AdamW.

:data:`CONTENDERS` holds every way by its name. Those of torch and of dpoptim have the fused step unless the name says
*default*: what the library's user gets who asks for nothing. Those of Heat are there where Heat can be imported.
"""

import importlib.util
import os
import socket
import warnings
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from models import Task
from mpi4py import MPI
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import dpoptim

__all__ = ["CONTENDERS", "Program", "start_gloo", "stop_gloo"]

comm = MPI.COMM_WORLD
OPTIONS = {"lr": 1e-4}
# Modules with fewer parameters are no FSDP unit of their own: 300 all-gathers of 5 KB would take seconds a step.
_FSDP_UNIT_NUMEL = 100_000


class Program:
    """A training program of one contender; every method is collective.

    Parameters
    ----------
    task : Task
        The model as it came, and the batch.
    model : nn.Module
        What computes; the model of ``task`` or what wraps it.
    optimizer : torch.optim.Optimizer or Heat's
        What has ``zero_grad`` and ``step``.
    """

    def __init__(self, task: Task, model: nn.Module, optimizer: Any) -> None:
        self._task, self._model, self._optimizer = task, model, optimizer

    def step(self) -> None:
        """Train one batch."""
        self._optimizer.zero_grad()
        self._model(self._task.batch).pow(2).mean().backward()
        self._optimizer.step()

    def held_bytes(self) -> dict[str, float]:
        """Return how many bytes this rank holds, of shared memory its share; not collective."""
        parameters, optimizer = list(self._model.parameters()), self._optimizer
        num_holders = 1
        if isinstance(optimizer, dpoptim.DataParallelOptimizer):
            entries = optimizer.local_state_dict()["state"].values()
            if optimizer.mode == "node-shared":
                num_holders = optimizer.communicator.topology.local_size
        else:
            for name in ("torch_optimizer", "optim"):  # Heat's and ZeRO's name of what they wrap
                optimizer = getattr(optimizer, name, optimizer)
            entries = optimizer.state.values()
        return {
            "parameters": _num_bytes(parameters) / num_holders,
            "gradients": _num_bytes(parameter.grad for parameter in parameters),
            "state": _num_bytes(value for entry in entries for value in entry.values()),
        }

    def close(self) -> None:
        """End it."""
        if isinstance(self._optimizer, dpoptim.DataParallelOptimizer):
            self._optimizer.detach()


def _num_bytes(tensors: Iterable[Any]) -> int:
    """Sum the bytes of the different memories that tensors of this rank lie in."""
    storages = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()  # of FSDP's DTensor
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


# ---------------------------------------------------------------- torch's


def _adamw(model: nn.Module, *, default: bool = False) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), fused=None if default else True, **OPTIONS)


def _local(task: Task, *, default: bool = False) -> Program:
    return Program(task, task.model, _adamw(task.model, default=default))


def _ddp(task: Task, *, default: bool = False) -> Program:
    return Program(task, DistributedDataParallel(task.model), _adamw(task.model, default=default))


def _zero(task: Task) -> Program:
    model = DistributedDataParallel(task.model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, fused=True, **OPTIONS)
    return Program(task, model, optimizer)


def _fsdp2(task: Task) -> Program:
    mesh = init_device_mesh("cpu", (comm.size,))
    for module in getattr(task.model, "layers", task.model.children()):
        if sum(parameter.numel() for parameter in module.parameters()) >= _FSDP_UNIT_NUMEL:
            fully_shard(module, mesh=mesh)
    model = fully_shard(task.model, mesh=mesh)
    return Program(task, model, _adamw(model))


# ---------------------------------------------------------------- dpoptim's


def _dpoptim(task: Task, **options: bool) -> Program:
    inner = dpoptim.AdamW(task.model.parameters(), **OPTIONS)
    return Program(task, task.model, dpoptim.DataParallelOptimizer(inner, **options))


# ---------------------------------------------------------------- Heat's, and those of the same names in dpoptim.heat


def _heat_program(task: Task, library: Any, optimizer: torch.optim.Optimizer, *, blocking: bool) -> Program:
    import heat as ht

    optim, neural = (ht.optim, ht.nn) if library is ht else (library, library)
    dp_optimizer = optim.DataParallelOptimizer(optimizer, blocking)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = neural.DataParallel(task.model, ht.MPI_WORLD, dp_optimizer, blocking)
    return Program(task, model, dp_optimizer)


def _heat(task: Task, *, blocking: bool, default: bool = True) -> Program:
    import heat as ht

    return _heat_program(task, ht, _adamw(task.model, default=default), blocking=blocking)


def _dpoptim_heat(task: Task, *, blocking: bool) -> Program:
    import dpoptim.heat

    optimizer = dpoptim.heat.AdamW(task.model.parameters(), **OPTIONS)
    return _heat_program(task, dpoptim.heat, optimizer, blocking=blocking)


CONTENDERS: dict[str, Callable[[Task], Program]] = {
    "local": _local,
    "local, default": lambda task: _local(task, default=True),
    "DDP": _ddp,
    "DDP, default": lambda task: _ddp(task, default=True),
    "DDP + ZeRO": _zero,
    "FSDP2": _fsdp2,
    "replicated": _dpoptim,
    "replicated, overlap": lambda task: _dpoptim(task, overlap=True),
    "sharded": lambda task: _dpoptim(task, shard=True),
    "node-shared": lambda task: _dpoptim(task, node_shared=True),
}
if importlib.util.find_spec("heat") is not None:
    CONTENDERS |= {
        "Heat, blocking": lambda task: _heat(task, blocking=True),
        "Heat, blocking, fused": lambda task: _heat(task, blocking=True, default=False),
        "Heat, non-blocking": lambda task: _heat(task, blocking=False),
        "dpoptim.heat, blocking": lambda task: _dpoptim_heat(task, blocking=True),
        "dpoptim.heat, non-blocking": lambda task: _dpoptim_heat(task, blocking=False),
    }


def start_gloo() -> None:
    """Make the process group that torch's ways need, on the host of rank 0; collective."""
    place = None
    if comm.rank == 0:
        host = os.environ.get("DPOPTIM_FIRST_HOST", "127.0.0.1")
        with socket.socket() as probe:
            probe.bind((host, 0))
            place = f"tcp://{host}:{probe.getsockname()[1]}"
    patience = timedelta(minutes=2)
    dist.init_process_group("gloo", comm.bcast(place), patience, rank=comm.rank, world_size=comm.size)


def stop_gloo() -> None:
    """End the process group; collective."""
    dist.destroy_process_group()
