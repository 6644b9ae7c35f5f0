"""What this machine is: MPI, nodes and ranks, torch, and how each optimizer is stepped."""

import platform

import torch
from torch import nn

import dpoptim.torch_optim as optimizers
from dpoptim.comm.communicator import Communicator
from dpoptim.comm.topology import available_cores
from dpoptim.tuning import TUNING
from dpoptim.version import __version__

__all__ = ["info"]


def info() -> int:
    """Print on rank 0 what MPI, nodes, ranks, torch and optimizers are here; collective. Return 0."""
    communicator = Communicator.shared()
    nodes = communicator.topology.nodes
    sizes = sorted({len(node) for node in nodes})
    threads = sorted(set(communicator.all_gather_object(torch.get_num_threads())))
    cores = sorted({len(available) for available in communicator.all_gather_object(available_cores())})
    rows = {
        "dpoptim": __version__,
        "MPI": communicator.library()["library"],
        "MPI standard": communicator.library()["standard"],
        "MPI thread level": communicator.library()["thread level"],
        "MPI reads GPU memory": communicator.library()["GPU-aware"],
        "shared memory": _yes_or(communicator.why_no_node_memory()),
        "reads others' memory": _yes_or(communicator.why_no_peer_memory()),
        "ranks": str(communicator.world_size),
        "nodes": f"{len(nodes)}, {_either(sizes)} ranks a node",
        "torch": f"{torch.__version__}, Python {platform.python_version()}",
        "threads a rank": f"{_either(threads)} on {_either(cores)} cores (set OMP_NUM_THREADS)",
        "accelerator": _accelerator(),
    }
    if communicator.rank == 0:
        for name, value in rows.items():
            print(f"{name:22}{value}")
        print("\noptimizer             implementation of the step on " + ", ".join(_devices()))
        for name in optimizers.__all__:
            if isinstance(getattr(optimizers, name), type):
                print(f"{name:22}{'; '.join(_implementation(name, device) for device in _devices())}")
        print("\ntuning                set others by DPOPTIM_TUNING=name=value,...; a star marks those that are set")
        for name, value in TUNING.rows().items():
            print(f"{name:28}{value}")
    return 0


def _implementation(name: str, device: str) -> str:
    """Say how an optimizer steps real parameters on a device, as constructed now."""
    parameter = nn.Parameter(torch.zeros(1, 1, device=device))
    kind = optimizers.implementation(getattr(optimizers, name)([parameter], lr=0.1))
    choice = optimizers.CHOICES.get(device, {}).get(name)
    if choice is not None and choice.foreach_below is not None:
        return f"{kind}, for-loop if parameters have {choice.foreach_below} elements or more in the mean"
    if choice is None or not choice.flat_below:
        return kind
    parts = ", large ones in parts" if choice.cut_large else ""
    return f"{kind}, those below {choice.flat_below} elements together{parts}"


def _devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _accelerator() -> str:
    if torch.accelerator.is_available():
        return f"{torch.accelerator.device_count()} x {torch.accelerator.current_accelerator()}"
    return "none"


def _yes_or(why_not: str | None) -> str:
    return "yes" if why_not is None else f"no ({why_not})"


def _either(values: list[int]) -> str:
    return " or ".join(map(str, values))
