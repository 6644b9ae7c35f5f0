"""How fast this machine exchanges and trains, what dpoptim chose on it, and why: ``python -m dpoptim bench``."""

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import dpoptim.torch_optim as optimizers
from dpoptim.comm.communicator import Communicator
from dpoptim.comm.overlap import try_overlap
from dpoptim.comm.topology import available_cores
from dpoptim.optimizer import DataParallelOptimizer
from dpoptim.partition import even_counts
from dpoptim.version import __version__

__all__ = ["bench"]

_SMALL_BYTES = 4
_SIZES_BYTES = (1 << 16, 1 << 20, 1 << 24, 1 << 26)
_WIDTH, _NUM_LAYERS, _BATCH = 1024, 4, 8
_LABEL_WIDTH = 28
Action = Callable[[], object]


def bench(seconds: float = 10) -> int:
    """Print on rank 0 how fast collectives and training steps are here, what was chosen and why; collective.

    Measures tensors in main memory. Leave the machine alone meanwhile, and start it as your program is started: with
    the same launcher, ranks a node and ``OMP_NUM_THREADS``.

    Parameters
    ----------
    seconds : float
        About how long, > 0; half for the collectives, half for the steps.

    Returns
    -------
    int
        0.
    """
    communicator = Communicator.shared()

    def write(line: str = "") -> None:
        if communicator.rank == 0:
            print(line, flush=True)

    topology = communicator.topology
    write(f"dpoptim {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    where = f"{_several(communicator.world_size, 'rank')} on {_several(topology.num_nodes, 'node')}"
    write(f"{communicator.library()['library']}: {where}, {_several(torch.get_num_threads(), 'thread')} each")
    if communicator.world_size == 1:
        write("note: this is one rank, start it with mpirun to measure an exchange")
    sizes = (_SMALL_BYTES, *_SIZES_BYTES)
    columns = [_seconds_of_calls(communicator, size, seconds / 2 / len(sizes)) for size in sizes]
    write("\nmicroseconds of a call on one number; GB/s of calls on larger tensors, all ranks at once")
    write(_row("", ["us", *(f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB" for size in _SIZES_BYTES)]))
    for name in columns[0]:
        bandwidths = (size / column[name] / 1e9 for size, column in zip(_SIZES_BYTES, columns[1:], strict=True))
        write(_row(name, [f"{columns[0][name] * 1e6:.0f}", *(f"{bandwidth:.3g}" for bandwidth in bandwidths)]))

    num_parameters = sum(parameter.numel() for parameter in _model().parameters())
    write(f"\nA training step of {num_parameters / 1e6:.1f} M parameters with AdamW, median ms")
    times = _steps(communicator, seconds / 2)
    local_ms = times["local"]
    assert isinstance(local_ms, float)
    for name, result in times.items():
        text = f"not here: {result}" if isinstance(result, str) else f"{result:8.2f}  {result / local_ms:.2f} x local"
        write(f"{name:{_LABEL_WIDTH}}{text}")

    write("\nWhat was chosen, and why")
    for name, reason in _choices(communicator, times).items():
        write(f"{name:{_LABEL_WIDTH}}{reason}")
    return 0


# ---------------------------------------------------------------- collectives


def _seconds_of_calls(communicator: Communicator, num_bytes: int, budget_s: float) -> dict[str, float]:
    """Return the seconds of a copy in memory and of each collective on a tensor of so many bytes; collective."""
    whole = torch.ones(num_bytes // 4, dtype=torch.float32, device="cpu")
    other = torch.empty_like(whole)
    part = torch.ones(even_counts(whole.numel(), communicator.world_size)[communicator.rank])
    actions: dict[str, Action] = {"memcpy": lambda: other.copy_(whole)}
    if communicator.world_size > 1:
        actions |= {
            "all_reduce": lambda: communicator.all_reduce(other, scale=1 / communicator.world_size),
            "reduce_scatter": lambda: communicator.reduce_scatter(part, whole),
            "all_gather": lambda: communicator.all_gather(other, part),
            "broadcast": lambda: communicator.broadcast(other),
        }
    return {name: _seconds(communicator, action, budget_s / len(actions)) for name, action in actions.items()}


def _seconds(communicator: Communicator, action: Action, budget_s: float) -> float:
    """Return the seconds of one of many calls, the median of five batches; collective."""
    _batch_s(communicator, action, 1)  # sets up what is set up once
    slowest_s = max(communicator.all_gather_object(_batch_s(communicator, action, 1)))
    num_calls = max(1, min(1000, int(budget_s / 5 / slowest_s)))
    return statistics.median(_batch_s(communicator, action, num_calls) for _ in range(5)) / num_calls


def _batch_s(communicator: Communicator, action: Action, num_calls: int) -> float:
    communicator.barrier()
    start_s = time.perf_counter()
    for _ in range(num_calls):
        action()
    communicator.barrier()
    return time.perf_counter() - start_s


# ---------------------------------------------------------------- steps


def _steps(communicator: Communicator, budget_s: float) -> dict[str, float | str]:
    """Return the median ms of a step in every mode, or why it is not here.

    Collective. The steps are made in turn, round by round.
    """
    results: dict[str, float | str] = {}
    programs: dict[str, Action] = {}
    for name, kind in (("local", optimizers.AdamW), ("local, torch's AdamW", torch.optim.AdamW)):
        model = _model()
        programs[name] = _training(model, kind(model.parameters(), lr=1e-4))
    model = _model()
    made = [DataParallelOptimizer(optimizers.AdamW(model.parameters(), lr=1e-4))]
    programs["replicated"] = _training(model, made[0])
    overlap = made[0].communicator.overlap
    further: dict[str, dict[str, Any]] = {
        f"replicated, overlap={not overlap}": {"overlap": not overlap},
        "shard=True": {"shard": True},
        "node_shared=True": {"node_shared": True},
    }
    for name, options in further.items():
        model = _model()
        try:
            made.append(DataParallelOptimizer(optimizers.AdamW(model.parameters(), lr=1e-4), **options))
        except (OSError, RuntimeError, ValueError) as error:  # raised on all ranks
            results[name] = str(error)
        else:
            programs[name] = _training(model, made[-1])
    for _ in range(2):  # the first steps make the plan of buckets
        for program in programs.values():
            program()
    round_s = _batch_s(communicator, lambda: [program() for program in programs.values()], 1)
    num_rounds = max(3, min(50, int(budget_s / max(communicator.all_gather_object(round_s)))))
    rounds = [
        {name: _batch_s(communicator, program, 1) * 1e3 for name, program in programs.items()}
        for _ in range(num_rounds)
    ]
    for opt in made:
        opt.detach()
    return {name: statistics.median(times[name] for times in rounds) for name in programs} | results


def _model() -> nn.Module:
    layers = [layer for _ in range(_NUM_LAYERS) for layer in (nn.Linear(_WIDTH, _WIDTH), nn.ReLU())]
    return nn.Sequential(*layers)


def _training(model: nn.Module, optimizer: torch.optim.Optimizer) -> Action:
    batch = torch.ones(_BATCH, _WIDTH)

    def step() -> None:
        optimizer.zero_grad()
        model(batch).pow(2).mean().backward()
        optimizer.step()

    return step


# ---------------------------------------------------------------- what was chosen


def _choices(communicator: Communicator, times: dict[str, float | str]) -> dict[str, str]:
    """Say what dpoptim does here, each with the fact it was decided by; collective."""
    topology = communicator.topology
    available = communicator.all_gather_object(available_cores())
    cores = [len(set[int]().union(*(available[rank] for rank in node))) for node in topology.nodes]
    why_no_memory, why_no_reading = communicator.why_no_node_memory(), communicator.why_no_peer_memory()
    large = "read from each other's memory" if why_no_reading is None else f"through a staging area: {why_no_reading}"
    shares = any(num_cores < len(node) for num_cores, node in zip(cores, topology.nodes, strict=True))
    small = "through memory that they share" if shares and topology.num_nodes == 1 else "by messages"
    exchange = f"large tensors {large}; small ones {small}"
    if why_no_memory is not None:
        exchange = f"by messages, not through shared memory: {why_no_memory}"
    elif topology.num_nodes > 1:
        exchange += "; with other nodes by messages, all ranks of a node at once, several pieces in flight"
    step = optimizers.implementation(optimizers.AdamW([nn.Parameter(torch.zeros(1))], lr=0.1))
    modes = {name: ms for name, ms in times.items() if not name.startswith("local") and isinstance(ms, float)}
    return {
        "exchange in a node": exchange,
        "overlap": str(try_overlap(communicator)),
        "waiting": "asleep: the node has more ranks than cores" if shares else "awake: every rank has a core",
        "step of AdamW": f"{step}, where torch's default is the loop over parameters",
        "fastest mode": min(modes, key=lambda name: modes[name]),
    }


def _row(name: str, cells: list[str]) -> str:
    return f"{name:{_LABEL_WIDTH}}" + "".join(f"{cell:>10}" for cell in cells)


def _several(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
