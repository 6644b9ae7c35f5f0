"""The tables and the plot of what `step.py` has measured.

    python benchmarks/report.py runs/bench/*.json

prints the tables; with `--plot step.png` it draws them, which needs matplotlib.
"""

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw", "error", "overhead", "tables"]

_REFERENCE = "DDP"
_NUM_RESAMPLINGS = 400


def median_ms(result: dict[str, Any], model: str, contender: str) -> float | None:
    """Return the median milliseconds of a step, None if the contender failed or was not there."""
    times = result["models"][model].get(contender, {}).get("ms")
    return statistics.median(times) if times else None


def overhead(result: dict[str, Any], model: str, contender: str) -> float | None:
    """Return a contender's overhead over `local` as a ratio to DDP's; None on one rank, which exchanges nothing."""
    if result["configuration"]["ranks"] == 1:
        return None
    return _ratio([median_ms(result, model, name) for name in (contender, "local", _REFERENCE)])


def error(result: dict[str, Any], model: str, contender: str) -> float | None:
    """Return how far the overhead may be off as far as the rounds tell: half of what two thirds of resamplings span.

    Rounds are drawn anew, with replacement (the bootstrap; Efron 1979), the same ones for all contenders, since they
    were measured side by side. What is the same in all rounds, such as where a program's memory lies, it does not know.
    None where there is no overhead, or no error: `local` and DDP.
    """
    if contender in ("local", _REFERENCE) or overhead(result, model, contender) is None:
        return None
    times = [result["models"][model][name]["ms"] for name in (contender, "local", _REFERENCE)]
    rounds, chance = range(len(times[0])), random.Random(0)  # noqa: S311  the same table each time
    drawn = [chance.choices(rounds, k=len(rounds)) for _ in range(_NUM_RESAMPLINGS)]
    ratios = [_ratio([statistics.median(row[number] for number in numbers) for row in times]) for numbers in drawn]
    found = sorted(ratio for ratio in ratios if ratio is not None)
    return (found[len(found) * 5 // 6] - found[len(found) // 6]) / 2 if found else None


def _ratio(medians_ms: Sequence[float | None]) -> float | None:
    own, local, ddp = medians_ms
    return None if own is None or local is None or ddp is None or ddp == local else (own - local) / (ddp - local)


def tables(result: dict[str, Any]) -> list[str]:
    """Return the lines of two tables: milliseconds a step with overheads, and memory."""
    models = list(result["models"])
    contenders = list(result["models"][models[0]])
    reasons: list[str] = []
    header = [f"| | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]

    def row(contender: str, cell: Any) -> str:
        return f"| {contender} | " + " | ".join(cell(model, contender) for model in models) + " |"

    def time_cell(model: str, contender: str) -> str:
        median, ratio = median_ms(result, model, contender), overhead(result, model, contender)
        if median is None:
            reasons.append(f"{contender}, {model}: {result['models'][model][contender]['fails']}")
            return f"fails: {reasons[-1].split(': ')[1]}"
        spread = error(result, model, contender)
        overheads = "" if ratio is None else f" ({ratio:.2f})" if spread is None else f" ({ratio:.2f} ± {spread:.2f})"
        return f"{median:.1f}{overheads}"

    def memory_cell(model: str, contender: str) -> str:
        measured = result["models"][model][contender]
        if "fails" in measured:
            return ""
        held = measured["held_mb"]
        return f"{held['parameters']:.1f} + {held['gradients']:.1f} + {held['state']:.1f}, {measured['peak_mb']:.0f}"

    conf = result["configuration"]
    heat = f", Heat {conf['heat']}" if conf["heat"] else ""
    place = f"{conf['nodes']} nodes joined by {conf['link']}" if "link" in conf else "one node"
    return [
        f"{conf['ranks']} rank{'s' * (conf['ranks'] > 1)} of {conf['threads']} thread on {place} ({conf['processor']}, "
        f"{conf['cores']} cores), torch {conf['torch']}, {conf['mpi']}{heat}.",
        f"Median ms a step over {conf['rounds']} rounds of {conf['steps']} steps; in brackets the overhead over local, "
        "DDP = 1, and how far it may be off as far as the rounds tell:",
        "",
        *header,
        *(row(contender, time_cell) for contender in contenders),
        "",
        *dict.fromkeys(reasons),
        *([""] if reasons else []),
        "Memory a rank, MB: parameters + gradients + optimizer state held after a step, peak of all memory:",
        "",
        *header,
        *(row(contender, memory_cell) for contender in contenders),
        "",
    ]


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw each contender's step against `local` and its peak memory, for the results of 2 and 4 ranks."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    several = [result for result in results if result["configuration"]["ranks"] in (2, 4)]
    models = list(several[0]["models"])
    contenders = list(several[0]["models"][models[0]])
    figure, axes = plt.subplots(1, len(several) + 1, figsize=(3.6 * (len(several) + 1), 3.4), sharey=True, dpi=110)
    places = range(len(contenders))
    for axis, result in zip(axes, several, strict=False):
        for model, marker in zip(models, "os^D", strict=False):
            ratios = [_against_local(result, model, contender) for contender in contenders]
            axis.plot(ratios, places, marker, markersize=5, alpha=0.8, linestyle="none", label=model)
        axis.axvline(1, color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_title(f"{result['configuration']['ranks']} ranks: a step, local = 1", fontsize=10)
        axis.grid(axis="x", linewidth=0.3)
    last, model = several[-1], models[0]
    peaks = [last["models"][model].get(contender, {}).get("peak_mb", 0) for contender in contenders]
    axes[-1].barh(places, peaks, color="#7f9fbf")
    axes[-1].set_title(f"{last['configuration']['ranks']} ranks: peak MB a rank, {model}", fontsize=10)
    axes[0].set_yticks(places, contenders)
    axes[0].invert_yaxis()
    marks = axes[0].get_legend_handles_labels()
    figure.legend(*marks, loc="lower center", ncols=len(models), fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path)


def _against_local(result: dict[str, Any], model: str, contender: str) -> float:
    own, local = median_ms(result, model, contender), median_ms(result, model, "local")
    return float("nan") if own is None or local is None else own / local


def main() -> None:
    """Print the tables of all results, or draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="written by step.py --json")
    parser.add_argument("--plot", type=Path, help="draw into this PNG file instead of printing")
    args = parser.parse_args()
    results = [json.loads(path.read_text()) for path in args.results]
    if args.plot:
        draw(results, args.plot)
    else:
        print("\n".join(line for result in results for line in tables(result)))


if __name__ == "__main__":
    main()
