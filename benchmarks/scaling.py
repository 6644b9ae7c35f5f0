"""A cost model of a training step on many nodes: fitted to few, checked on points it has not seen, asked about 1024.

    python benchmarks/scaling.py                             # fit to what was measured, check, predict
    python benchmarks/scaling.py --measure scaling.json      # measure anew: as root, with the mpich wheel

The model and what follows from it are in docs/scaling.md. Needs nothing but numpy, unless it measures.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpoptim.tuning import TUNING

__all__ = ["Costs", "Place", "Workload", "fit", "overhead_s"]

MODES = ("replicated", "sharded", "node-shared")
_MEASURED = Path(__file__).with_name("scaling.json")

# (hosts, ranks on each, bandwidth of a link): what is fitted, and what is held out to check.
_FITTED = [(1, 2, None), (1, 3, None), (2, 1, "1gbit"), (2, 1, "300mbit"), (2, 2, "1gbit")]
_HELD_OUT = [(1, 4, None), (2, 1, "600mbit"), (2, 2, "300mbit"), (3, 1, "1gbit"), (4, 1, "1gbit")]
# A model of which no measurement is fitted, not even those of the places above.
_HELD_OUT_MODEL = "transformer"

_LOCAL_STEPS = 16
# On one node a step is short, so that there is time for more rounds.
_ROUNDS_WITHOUT_LINK = 5
# Assumed, not measured: what a message between real hosts takes; and that a fast network reads memory by itself.
_ETHERNET = {"message_s": 3e-5}
_FAST_NETWORK = {"network_s": 0.0, "message_s": 2e-6, "meeting_s": 4e-6}


@dataclass(frozen=True)
class Place:
    """Where it runs.

    Attributes
    ----------
    nodes, ranks : int
        How many nodes, and ranks on each.
    link : float
        Bytes a second of a node's link in each direction.
    crowding : float
        How many ranks share a core; 1 or more.
    """

    nodes: int
    ranks: int
    link: float
    crowding: float = 1.0


@dataclass(frozen=True)
class Workload:
    """What a rank trains.

    Attributes
    ----------
    gradient_bytes : float
        Of all parameters together.
    calls : int
        In how many tensors they travel: large ones alone, small ones together.
    """

    gradient_bytes: float
    calls: int


@dataclass(frozen=True)
class Costs:
    """What the model is made of, each a time; :func:`fit` finds them.

    Attributes
    ----------
    memory_s : float
        Of a byte that a rank reads from its neighbours' memory.
    step_s : float
        Of AdamW's step for a byte of gradient.
    wire : float
        Of a byte on the link, in units of what the link's bandwidth says: 1 is a perfect link.
    network_s : float
        Of a byte that a rank's core passes to the network or takes from it.
    node_call_s : float
        Of a batch of collectives in a node, whatever its size: of all buckets, or with several nodes of one.
    message_s : float
        Of a message that waits for the one before it, between nodes.
    meeting_s : float
        Of a small collective of all ranks, for each doubling of their number.
    """

    memory_s: float
    step_s: float
    wire: float
    network_s: float
    node_call_s: float
    message_s: float
    meeting_s: float


def amounts(mode: str, place: Place, work: Workload) -> list[float]:
    """Return how much of each of :class:`Costs` a step takes beyond the local step, in the order of its fields."""
    nodes, ranks, size = place.nodes, place.ranks, work.gradient_bytes
    num_ranks = nodes * ranks
    in_node = 0.0
    if ranks > 1:
        in_node = (1 - 1 / ranks) * size * (1 if mode == "node-shared" else 2)
    on_link = 2 * size * (nodes - 1) / nodes
    owners = {"replicated": 1, "sharded": num_ranks, "node-shared": ranks}[mode]
    # A reduce-scatter and an all-gather of large tensors take n - 1 messages each, an all-reduce in one 2 log2 n.
    in_pieces = size / work.calls / ranks >= max(TUNING.in_pieces_bytes, TUNING.share_bytes * nodes)
    in_a_row = 2 * (nodes - 1) if in_pieces or mode == "sharded" else 2 * math.ceil(math.log2(nodes))
    halves = 1 if mode == "node-shared" else 2
    meetings = {"replicated": 2, "sharded": 3, "node-shared": 4}[mode]
    return [
        in_node * place.crowding,
        -size * (1 - 1 / owners) * place.crowding,
        on_link / place.link,
        on_link / ranks * place.crowding,
        halves * (work.calls if nodes > 1 else 1) * (ranks > 1) * place.crowding,
        work.calls * in_a_row * place.crowding,
        meetings * math.log2(num_ranks) * place.crowding,
    ]


def overhead_s(costs: Costs, mode: str, place: Place, work: Workload) -> float:
    """Return how much longer than the local step a step takes."""
    return float(np.dot(list(vars(costs).values()), amounts(mode, place, work)))


def fit(points: Sequence[dict[str, Any]]) -> Costs:
    """Return the costs, all >= 0, with the least squares of the relative errors of steps."""
    rows, targets = [], []
    for point in points:
        for mode in MODES:
            step_ms = point["ms"][mode]
            rows.append(np.array(amounts(mode, _place(point), _work(point))) * 1e3 / step_ms)
            targets.append((step_ms - point["ms"]["local"]) / step_ms)
    matrix, target = np.array(rows), np.array(targets)
    units = np.abs(matrix).max(axis=0)  # bytes and calls differ by many orders of magnitude
    active = np.flatnonzero(units)
    while True:
        found = np.linalg.lstsq(matrix[:, active] / units[active], target, rcond=None)[0]
        if (found >= 0).all():
            break
        active = np.delete(active, found.argmin())
    costs = np.zeros(len(units))
    costs[active] = found / units[active]
    return Costs(*costs.tolist())


# ---------------------------------------------------------------- measured points


def _place(point: dict[str, Any]) -> Place:
    num_ranks = point["hosts"] * point["ranks"]
    return Place(point["hosts"], point["ranks"], _bytes_a_second(point["rate"]), max(1.0, num_ranks / point["cores"]))


def _work(point: dict[str, Any]) -> Workload:
    return Workload(point["gradient_bytes"], point["calls"])


def _bytes_a_second(rate: str | None) -> float:
    """Turn tc's words into a number; one host alone has no link."""
    units = {"mbit": 1e6 / 8, "gbit": 1e9 / 8}
    return math.inf if rate is None else float(rate[:-4]) * units[rate[-4:]]


def measure(path: Path, rounds: int) -> None:
    """Measure all places and write the medians; goes on after the places that are in the file, if there is one."""
    from hosts import missing
    from links import measure_on_hosts
    from models import MODELS

    reason = missing()
    if reason is not None:
        sys.exit(f"no hosts to be had: {reason}")
    measured: dict[str, Any] = {"rounds": rounds, "points": []}
    if path.exists():
        measured = json.loads(path.read_text())
    for hosts, ranks, rate in [*_FITTED, *_HELD_OUT]:
        if any((point["hosts"], point["ranks"], point["rate"]) == (hosts, ranks, rate) for point in measured["points"]):
            continue
        num_rounds = rounds if rate else rounds * _ROUNDS_WITHOUT_LINK
        options = ("--rounds", str(num_rounds), "--steps", "1", "--contenders", "local", *MODES)
        result = measure_on_hosts(hosts, ranks, rate, options)
        measured["machine"] = {key: result["configuration"][key] for key in ("processor", "cores", "torch", "mpi")}
        for name, contenders in result["models"].items():
            sizes = [parameter.nbytes for parameter in MODELS[name]().model.parameters()]
            measured["points"].append(
                {
                    "hosts": hosts,
                    "ranks": ranks,
                    "rate": rate,
                    "cores": measured["machine"]["cores"],
                    "model": name,
                    "gradient_bytes": sum(sizes),
                    "calls": sum(size >= TUNING.large_gradient_bytes for size in sizes)
                    + any(size < TUNING.large_gradient_bytes for size in sizes),
                    "ms": {mode: round(statistics.median(contenders[mode]["ms"]), 3) for mode in ("local", *MODES)},
                }
            )
        path.write_text(json.dumps(measured, indent=1))
        print(f"{hosts} x {ranks}, {rate or 'no link'}: done", flush=True)


def _is_held_out(point: dict[str, Any]) -> bool:
    here = (point["hosts"], point["ranks"], point["rate"])
    return here in _HELD_OUT or point["model"].startswith(_HELD_OUT_MODEL)


# ---------------------------------------------------------------- what it says


def _print_costs(costs: Costs) -> None:
    def bandwidth(seconds: float) -> str:
        return f"{1e-9 / seconds:.2f} GB/s a rank" if seconds else "nothing that could be told from the rest"

    def latency(seconds: float) -> str:
        return f"{seconds * 1e6:.0f} us" if seconds else "nothing that could be told from the rest"

    rows = {
        "memory: a byte of a neighbour's": bandwidth(costs.memory_s),
        "step: AdamW, a byte of gradient": bandwidth(costs.step_s),
        "wire: a byte on the link": f"{costs.wire:.2f} of what its bandwidth says",
        "network: a byte between core and network": bandwidth(costs.network_s),
        "node call: a batch of collectives in a node": latency(costs.node_call_s),
        "message: between nodes, waiting for the last": latency(costs.message_s),
        "meeting: of all ranks, a doubling of them": latency(costs.meeting_s),
    }
    print("| cost of | |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")


def _print_errors(points: Sequence[dict[str, Any]], costs: Costs) -> None:
    print(f"| hosts x ranks, link | model | {' | '.join(MODES)} |")
    print("|---" * (len(MODES) + 2) + "|")
    errors = []
    for point in points:
        cells = []
        for mode in MODES:
            step_ms = point["ms"][mode]
            predicted_ms = point["ms"]["local"] + overhead_s(costs, mode, _place(point), _work(point)) * 1e3
            errors.append(predicted_ms / step_ms - 1)
            cells.append(f"{step_ms:.0f}, {predicted_ms:.0f} ({errors[-1] * 100:+.0f} %)")
        where = f"{point['hosts']} x {point['ranks']}" + (f", {point['rate']}" if point["rate"] else "")
        print(f"| {where} | {point['model']} | {' | '.join(cells)} |")
    sizes = sorted(abs(error) for error in errors)
    print(
        f"\n{len(errors)} steps: median error {statistics.median(sizes) * 100:.0f} %, nine of ten within "
        f"{sizes[int(0.9 * (len(sizes) - 1))] * 100:.0f} %, worst {sizes[-1] * 100:.0f} %."
    )


def _print_predictions(costs: Costs, scenario: "Scenario") -> None:
    """Print a step on many nodes in every mode, and by LocalSGD: the average of all parameters every so many steps."""
    costs, work = replace(costs, **scenario.known), scenario.work
    columns = [*MODES, f"LocalSGD, every {_LOCAL_STEPS}", "its steps may be"]
    print(f"\n{scenario.title}, {scenario.ranks} ranks a node; local step {scenario.local_s * 1e3:.0f} ms\n")
    print(f"| nodes | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for nodes in (1, 16, 64, 256, 1024):
        place = Place(nodes, scenario.ranks, scenario.link)
        steps_ms = [(scenario.local_s + overhead_s(costs, mode, place, work)) * 1e3 for mode in MODES]
        local_sgd_ms = (scenario.local_s + overhead_s(costs, "replicated", place, work) / _LOCAL_STEPS) * 1e3
        cells = [f"**{ms:.0f}**" if ms == min(steps_ms) else f"{ms:.0f}" for ms in steps_ms]
        print(f"| {nodes} | {' | '.join(cells)} | {local_sgd_ms:.0f} | {min(steps_ms) / local_sgd_ms:.2f} x as many |")


@dataclass(frozen=True)
class Scenario:
    """What is predicted.

    Attributes
    ----------
    title : str
        Model and network.
    work : Workload
        The model.
    local_s : float
        Its local step.
    link : float
        Bytes a second of a node's link.
    known : dict
        Costs that are not those measured here.
    ranks : int
        On a node.
    """

    title: str
    work: Workload
    local_s: float
    link: float
    known: dict[str, float]
    ranks: int = 2


def _scenarios(points: Sequence[dict[str, Any]]) -> list[Scenario]:
    """Return a model as measured on one node, and one a hundred times as large, on a slow and on a fast network."""
    point = next(p for p in points if (p["hosts"], p["ranks"]) == (1, 2) and p["model"].startswith("transformer"))
    work, local_s = _work(point), point["ms"]["local"] / 1e3
    large = Workload(100 * work.gradient_bytes, work.calls)
    ethernet, infiniband = _bytes_a_second("1gbit"), _bytes_a_second("100gbit")
    return [
        Scenario(f"{point['model']}, 1 Gbit/s", work, local_s, ethernet, _ETHERNET),
        Scenario(f"{point['model']}, 100 Gbit/s", work, local_s, infiniband, _FAST_NETWORK),
        Scenario("a hundred times as large, 1 Gbit/s", large, 100 * local_s, ethernet, _ETHERNET),
        Scenario("a hundred times as large, 100 Gbit/s", large, 100 * local_s, infiniband, _FAST_NETWORK),
    ]


def main() -> None:
    """Measure, or fit, check and predict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, metavar="JSON", help="measure into this file instead")
    what = f"of one step, when measuring; {_ROUNDS_WITHOUT_LINK} times as many on one node"
    parser.add_argument("--rounds", type=int, default=6, help=what)
    parser.add_argument("--measured", type=Path, default=_MEASURED, help="what was measured (default: %(default)s)")
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.rounds)
        return
    measured = json.loads(args.measured.read_text())
    fitted = [point for point in measured["points"] if not _is_held_out(point)]
    costs = fit(fitted)
    machine = measured["machine"]
    print(f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, {machine['mpi']}; medians of")
    more = f"{_ROUNDS_WITHOUT_LINK} times as many on one node"
    print(f"{measured['rounds']} interleaved rounds of a step, {more}.\n\n### Costs\n")
    _print_costs(costs)
    print("\n### Held out: measured ms, predicted ms, error\n")
    _print_errors([point for point in measured["points"] if _is_held_out(point)], costs)
    print("\n### Fitted: measured ms, ms of the model, error\n")
    _print_errors(fitted, costs)
    print("\n### Predicted, ms a step")
    for scenario in _scenarios(measured["points"]):
        _print_predictions(costs, scenario)


if __name__ == "__main__":
    main()
