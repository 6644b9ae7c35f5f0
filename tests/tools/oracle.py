"""The obvious slow thing that everything is compared with: one process on the joined batch."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import dpoptim
from dpoptim.utils.consistency import digest

__all__ = [
    "ELEMENTWISE",
    "EVERY_OPTIMIZER",
    "MODES",
    "NAMES_AND_MODES",
    "OPTIMIZERS",
    "Matrices",
    "Net",
    "Words",
    "assert_replicas",
    "assert_same",
    "assert_same_parameters",
    "joined_batch",
    "local_part",
    "make_plain",
    "model_for",
    "part_sizes",
    "same_implementation",
    "seeded",
    "train",
    "twin",
]

# One or more configurations of every optimizer; those of the first table act on each element by itself.
ELEMENTWISE: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("Adam", {"lr": 0.01, "amsgrad": True}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.01, "maximize": True, "foreach": True}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.01}),
    ("Adadelta", {"lr": 1.0}),
    ("Adamax", {"lr": 0.01}),
    ("ASGD", {"lr": 0.05, "t0": 5}),
    ("NAdam", {"lr": 0.01, "decoupled_weight_decay": True, "weight_decay": 0.01}),
    ("RAdam", {"lr": 0.01}),
    ("RMSprop", {"lr": 0.01, "centered": True, "momentum": 0.9}),
    ("Rprop", {"lr": 0.01}),
]
OPTIMIZERS = [*ELEMENTWISE, ("Adafactor", {"lr": 0.01}), ("LBFGS", {"lr": 0.5, "max_iter": 4})]

# Each optimizer of this torch once, with the options under which it keeps the most state.
EVERY_OPTIMIZER: dict[str, dict[str, Any]] = {
    name: options
    for name, options in {
        "ASGD": {"lr": 0.05, "t0": 2},
        "Adadelta": {"lr": 1.0},
        "Adafactor": {"lr": 0.01},
        "Adagrad": {"lr": 0.1},
        "Adam": {"lr": 0.01, "amsgrad": True},
        "AdamW": {"lr": 0.01, "amsgrad": True},
        "Adamax": {"lr": 0.01},
        "LBFGS": {"lr": 0.5, "max_iter": 4, "line_search_fn": "strong_wolfe"},
        "Muon": {"lr": 0.01},
        "NAdam": {"lr": 0.01},
        "RAdam": {"lr": 0.01},
        "RMSprop": {"lr": 0.01, "centered": True, "momentum": 0.9},
        "Rprop": {"lr": 0.01},
        "SGD": {"lr": 0.1, "momentum": 0.9},
        "SparseAdam": {"lr": 0.01},
    }.items()
    if hasattr(torch.optim, name)
}

# How the ranks share the work of a step.
MODES: dict[str, dict[str, Any]] = {
    "replicated": {},
    "sharded": {"shard": True},
    "node-shared": {"node_shared": True},
}

# Every optimizer in every mode that it has.
NAMES_AND_MODES = [
    (name, mode)
    for mode in MODES
    for name in EVERY_OPTIMIZER
    if mode == "replicated" or name not in ("LBFGS", "SparseAdam")  # which stay replicated
]

# float64: twenty steps of rounding errors of 1e-16, amplified by the training itself.
RTOL, ATOL = 1e-9, 1e-11


class Net(nn.Module):
    """Three layers, the first and last tied to each other, one frozen, one unused."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.middle = nn.Linear(width, width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.last = nn.Linear(width, width)
        self.last.weight = self.first.weight  # tied

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.middle(x)) + self.frozen(x)
        return self.last(x)


class Matrices(nn.Module):
    """Two matrices alone, for Muon."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 5, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Words(nn.Module):
    """An embedding with sparse gradients alone, for SparseAdam."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 4, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.words((x * 3).long() % 11)


def model_for(name: str) -> Callable[[], nn.Module]:
    """Return what makes a model that an optimizer can train."""
    return {"Muon": Matrices, "SparseAdam": Words}.get(name, Net)


def seeded(make: Callable[[], nn.Module] = Net, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Make a model from a seed, without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed keeps a traceback of each call
        return make().to(dtype)


def joined_batch(step: int, sizes: Sequence[int], width: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the batch of all ranks together in this step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(sum(sizes), width, generator=generator, dtype=torch.float64).to(dtype)


def part_sizes(world_size: int, *, equal: bool) -> list[int]:
    """Return how many samples each rank has."""
    return [4] * world_size if equal else [3 + 2 * rank for rank in range(world_size)]


def local_part(batch: Tensor, sizes: Sequence[int], rank: int) -> Tensor:
    """Return this rank's part of the joined batch."""
    return batch.split(list(sizes))[rank]


def make_plain(opt: dpoptim.DataParallelOptimizer, options: dict[str, Any], parameters: Any) -> torch.optim.Optimizer:
    """Construct torch's own optimizer like the wrapped one.

    With the same implementation too: torch's differ from each other by more than rounding in float64, since some
    keep scalars (ASGD its eta and mu) in float32.
    """
    kind = next(kind for kind in type(opt.optimizer).__mro__ if kind.__module__.startswith("torch."))
    optimizer: torch.optim.Optimizer = kind(parameters, **{**options, **same_implementation(opt)})  # type: ignore[call-arg]
    return optimizer


def same_implementation(opt: dpoptim.DataParallelOptimizer) -> dict[str, bool]:
    """Return the options with which torch's own class steps as the wrapped one does."""
    how = dpoptim.torch_optim.implementation(opt)
    return {how: True} if how in ("fused", "foreach") else {}


def train(optimizer: torch.optim.Optimizer, model: nn.Module, batch: Tensor) -> float | Tensor | None:
    """Make one step of either kind of optimizer with the mean square of the model's output as loss."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(batch).pow(2).mean()
        loss.backward()
        return loss

    if isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.LBFGS):
        return optimizer.step(closure)
    closure()
    optimizer.step()
    return None


def assert_replicas(opt: dpoptim.DataParallelOptimizer, model: nn.Module) -> None:
    """Assert that every rank holds the same bits of the model and of the optimizer's state."""
    states = [value for entry in opt.state.values() for value in entry.values() if isinstance(value, Tensor)]
    digests = [digest(tensor) for tensor in [*model.parameters(), *states]]
    everybody = opt.communicator.all_gather_object(digests)
    assert all(other == everybody[0] for other in everybody), "replicas differ"


def assert_same_parameters(model: nn.Module, expected: nn.Module, step: int | None = None) -> None:
    """Assert that two models are equal to rounding."""
    for (name, value), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(
            value, other, rtol=RTOL, atol=ATOL, msg=lambda text, name=name: f"step {step}, {name}: {text}"
        )


def assert_same(a: Any, b: Any, path: str = "") -> None:
    """Assert that two trees are equal, bit for bit and type for type."""
    assert type(a) is type(b), f"{path}: {type(a)} and {type(b)}"
    if isinstance(a, Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        a, b = (t.resolve_conj().reshape(-1) for t in (a, b))
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}.{index}")
    else:
        assert repr(a) == repr(b), f"{path}: {a} and {b}"  # NaN equals itself here


def twin(model: nn.Module) -> nn.Module:
    """Return a copy for the oracle."""
    return copy.deepcopy(model)
