"""Whether data parallelism is right on this machine: every optimizer on all ranks against one process."""

from typing import Any

import torch
from torch import Tensor, nn

import dpoptim.torch_optim as optimizers
from dpoptim.comm.communicator import Communicator
from dpoptim.optimizer import DataParallelOptimizer
from dpoptim.step.facts import FACTS
from dpoptim.utils.consistency import digest

__all__ = ["check"]

_NUM_STEPS = 10
# Sums over ranks round in another order than sums over the joined batch: 2^-53 a step, amplified by the training.
_TOLERANCE = 1e-9


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
