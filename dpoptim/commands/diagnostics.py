"""What this machine is, and whether data parallelism is right on it."""

import platform
from typing import Any

import torch
from torch import Tensor, nn

import dpoptim.torch_optim as optimizers
from dpoptim.comm.communicator import Communicator
from dpoptim.comm.topology import available_cores
from dpoptim.optimizer import DataParallelOptimizer
from dpoptim.step.facts import FACTS
from dpoptim.tuning import TUNING
from dpoptim.utils.consistency import digest
from dpoptim.version import __version__

__all__ = ["check", "info"]

_NUM_STEPS = 10
# Sums over ranks round in another order than sums over the joined batch: 2^-53 a step, amplified by the training.
_TOLERANCE = 1e-9


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
        "shared memory": communicator.node_memory(),
        "reads others' memory": communicator.peer_memory(),
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


def check() -> int:
    """Train a small network with every optimizer on all ranks and in one process, and compare after every step.

    Collective. Prints on rank 0 one line an optimizer, with the first step that differs if one does. Return 0 if all
    are equal to rounding and every rank holds the same bits, else 1.
    """
    communicator = Communicator.shared()
    if communicator.rank == 0:
        print(f"{communicator.world_size} ranks against one process, {_NUM_STEPS} steps in float64")
        if communicator.world_size == 1:
            print("note: this is one rank, start it with mpirun to check several")
    failed = False
    for name in optimizers.__all__:
        if not isinstance(getattr(optimizers, name), type):
            continue
        verdict = _first_difference(name, communicator)
        failed = failed or verdict is not None
        if communicator.rank == 0:
            print(f"{name:22}{verdict or 'equal'}")
    return int(failed)


def _first_difference(name: str, communicator: Communicator) -> str | None:
    """Return in which step N ranks part from one process, or None; the same on every rank, collective."""
    model, expected = _model(name), _model(name)
    options: dict[str, Any] = {"lr": 0.5, "max_iter": 4} if name == "LBFGS" else {"lr": 0.01}
    opt = DataParallelOptimizer(getattr(optimizers, name)(model.parameters(), **options))
    plain = getattr(optimizers, name)(expected.parameters(), **options)
    verdict = None
    for step in range(_NUM_STEPS):
        sizes = [2 + rank for rank in range(communicator.world_size)]
        batch = _batch(name, step, sum(sizes))
        opt.batch_weight = sizes[communicator.rank]
        _step(opt, model, torch.split(batch, sizes)[communicator.rank])
        _step(plain, expected, batch)
        own = [digest(parameter) for parameter in model.parameters()]
        replicas_differ = any(other != own for other in communicator.all_gather_object(own))
        pairs = zip(model.parameters(), expected.parameters(), strict=True)
        error = max((a - b).abs().max().item() for a, b in pairs)
        worst = max(communicator.all_gather_object(error))
        if replicas_differ or not worst <= _TOLERANCE:
            what = "ranks hold different bits" if replicas_differ else f"off by {worst:.1e}"
            verdict = f"DIFFERS in step {step}: {what}"
            break
    opt.detach()
    return verdict


def _model(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if FACTS[name].takes == "sparse":
            return nn.Sequential(nn.Embedding(20, 6, sparse=True)).double()
        bias = FACTS[name].takes != "matrices"
        return nn.Sequential(nn.Linear(6, 16, bias), nn.Tanh(), nn.Linear(16, 3, bias)).double()


def _batch(name: str, step: int, num_samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    if FACTS[name].takes == "sparse":
        return torch.randint(0, 20, (num_samples,), generator=generator)
    return torch.randn(num_samples, 6, generator=generator, dtype=torch.float64)


def _step(optimizer: torch.optim.Optimizer, model: nn.Module, batch: Tensor) -> None:
    def closure() -> float:
        optimizer.zero_grad()
        loss = model(batch).pow(2).mean()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)


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


def _either(values: list[int]) -> str:
    return " or ".join(map(str, values))
