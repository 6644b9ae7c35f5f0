"""The step of every optimizer alone: dpoptim's choice of implementation against torch's default.

    python benchmarks/optimizers.py

Both step equal parameters with equal gradients, in turn, round by round, in one process, on many small tensors and on
few large ones. What counts is the ratio of the medians: 1 is as fast as torch, smaller is faster. With ``--compile``
compiled steps are measured too. With ``--groups`` 200 small tensors are stepped, each in a group of its own, with equal
rates, with different ones, and with different ones that change at each step. Set OMP_NUM_THREADS, and leave the machine
alone meanwhile.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import dpoptim
from dpoptim.torch_optim import CHOICES, compile_step, implementation

# Shapes of the parameters: 0.4 M elements in 400, 10.5 M in 4.
MODELS = {
    "many small": [(40, 25)] * 400,
    "few large": [(1620, 1620)] * 4,
}
# 200 tensors of 1000 elements, each in a group of its own.
GROUPS = ("equal rates", "different rates", "changing rates")
OPTIONS = {"LBFGS": {"max_iter": 1}, "SGD": {"momentum": 0.9}}
Step = Callable[[], object]


def parameters(name: str, shapes: list[tuple[int, int]]) -> list[nn.Parameter]:
    """Make parameters with gradients; sparse ones, of every tenth row, for SparseAdam."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in shapes:
        parameter = nn.Parameter(torch.randn(shape, generator=generator))
        gradient = torch.randn(shape, generator=generator)
        if name == "SparseAdam":
            rows = torch.arange(0, shape[0], 10)
            with torch.sparse.check_sparse_tensor_invariants():
                gradient = torch.sparse_coo_tensor(rows[None], gradient[rows], shape).coalesce()
        parameter.grad = gradient
        made.append(parameter)
    return made


def step_of(optimizer: torch.optim.Optimizer) -> Step:
    """Return a function that makes a step with the gradients that are there."""
    if isinstance(optimizer, torch.optim.LBFGS):
        return lambda: optimizer.step(lambda: torch.ones(()))
    return optimizer.step


def contenders(name: str, shapes: list[tuple[int, int]], *, compiled: bool) -> dict[str, Step]:
    """Return the steps to be compared, on parameters of their own."""
    options = {"lr": 1e-4, **OPTIONS.get(name, {})}
    made = {
        "torch": getattr(torch.optim, name)(parameters(name, shapes), **options),
        "dpoptim": getattr(dpoptim, name)(parameters(name, shapes), **options),
    }
    if compiled and CHOICES["cpu"][name].kind == "flat":
        made["compiled"] = getattr(dpoptim, name)(parameters(name, shapes), **options)
        compile_step(made["compiled"])
    return {label: step_of(optimizer) for label, optimizer in made.items()}


def contenders_in_groups(name: str, rates: str) -> dict[str, Step]:
    """Return the steps to be compared, on 200 tensors with a group for each."""
    made: dict[str, Step] = {}
    for label, package in (("torch", torch.optim), ("dpoptim", dpoptim)):
        groups = [
            {"params": [parameter], "lr": 1e-4 * (1 + (number if rates != "equal rates" else 0))}
            for number, parameter in enumerate(parameters(name, [(40, 25)] * 200))
        ]
        optimizer = getattr(package, name)(groups, lr=1e-4, **OPTIONS.get(name, {}))
        made[label] = with_schedule(optimizer) if rates == "changing rates" else step_of(optimizer)
    return made


def with_schedule(optimizer: torch.optim.Optimizer) -> Step:
    """Return a function that changes all rates, as a scheduler does, and makes a step."""

    def step() -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 0.9999
        optimizer.step()

    return step


def measure(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """Return the milliseconds of a step in every round, of every contender, in about so many seconds."""
    for step in steps.values():
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {label: [] for label in steps}
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s or len(times["torch"]) < 5:
        for label, step in steps.items():
            start_s = time.perf_counter()
            step()
            times[label].append((time.perf_counter() - start_s) * 1e3)
    return times


def main() -> None:
    """Measure every optimizer and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3, help="for each optimizer and model")
    parser.add_argument("--optimizers", default="", help="names, separated by commas; all by default")
    parser.add_argument("--compile", action="store_true", help="also the compiled steps")
    parser.add_argument("--groups", action="store_true", help="a group for each tensor, instead")
    parser.add_argument("--json", type=Path, help="write every round's times here")
    args = parser.parse_args()
    models = GROUPS if args.groups else tuple(MODELS)
    names = args.optimizers.split(",") if args.optimizers else sorted(set(CHOICES["cpu"]) & set(dpoptim.__all__))
    if args.groups:
        names = [name for name in names if name != "LBFGS"]  # which takes one group alone
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; median ms a step, ratio to torch's default\n")
    columns = [
        f"{model}: {label}" for model in models for label in ("torch", "dpoptim", "compiled")[: 2 + args.compile]
    ]
    print(f"| optimizer | implementation | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 2) + "|")
    raw: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name in names:
        cells = []
        raw[name] = {}
        for model in models:
            if args.groups:
                steps = contenders_in_groups(name, model)
            else:
                steps = contenders(name, MODELS[model], compiled=args.compile)
            raw[name][model] = times = measure(steps, args.seconds)
            medians = {label: statistics.median(values) for label, values in times.items()}
            for label in ("torch", "dpoptim", "compiled")[: 2 + args.compile]:
                if label not in medians:
                    cells.append("")
                elif label == "torch":
                    cells.append(f"{medians[label]:.2f}")
                else:
                    cells.append(f"{medians[label]:.2f} ({medians[label] / medians['torch']:.2f})")
        chosen = implementation(getattr(dpoptim, name)(parameters(name, [(2, 2)]), lr=0.1))
        print(f"| {name} | {chosen} | {' | '.join(cells)} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "ms": raw}))


if __name__ == "__main__":
    main()
