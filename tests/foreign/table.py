"""The table "Optimizers from outside torch" of docs/support.md, from what the sweep has found."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from catalogue import KNOWN, NOT_TRIED, versions
from drive import MODES

__all__ = ["HEADING", "render", "replaced", "written"]

HEADING = "## Optimizers from outside torch"
FILE = Path(__file__).parent.parent.parent / "docs" / "support.md"
_CLASSES = {"class": "classes", "ours around theirs": "around another optimizer", "theirs around ours": "around ours"}
_FINE = ("right", "replicated with a warning")


def render(results: Sequence[dict[str, Any]]) -> str:
    """Return the section."""
    lines = [
        HEADING,
        "",
        "Written by `make test-foreign WRITE=--write-table`; do not edit. Every class of these packages that can be",
        "built with defaults, or few arguments, is trained on 2 and 3 ranks, saved, and resumed in the middle, and",
        "compared with itself in one process. *Right*: equal to rounding, and what is saved resumes as the class's own",
        "state does. *Replicated*: the same, but it stays replicated, with a warning that says why. *Refused*: an",
        "error on every rank.",
        "",
        f"| | {' | '.join(map(_title, MODES))} |",
        "|---" * (1 + len(MODES)) + "|",
    ]
    for package, version in versions().items():
        for kind, title in _CLASSES.items():
            chosen = [r for r in results if (r["package"], r["kind"]) == (package, kind)]
            if chosen:
                cells = [_counts(chosen, mode) for mode in MODES]
                row = f"{package} {version}" if kind == "class" else f"{package}: {title}"
                lines.append(f"| {row} | {' | '.join(cells)} |")
    lines += ["", "Stay replicated with `shard` or `node_shared`, with a warning:", ""]
    lines += _listed((_short(r), _reason(r)) for r in results if r["verdict"] == _FINE[1])
    lines += ["", "Refused:", ""]
    lines += _listed((_short(r), _error(r)) for r in results if r["verdict"] == "error")
    lines += ["", "Trained, but not saved in some mode:", ""]
    lines += _listed((_short(r), _unsaved(r)) for r in results if r["verdict"] in _FINE and _unsaved(r))
    lines += ["", "Known limits:", ""]
    lines += _listed((f"`{name}`", f"{verdict}: {reason}") for (name, verdict), reason in KNOWN.items())
    lines += ["", "Fail in one process too, or are not tried:", ""]
    lines += _listed((_short(r), _own_error(r)) for r in results if r["verdict"] == "fails without dpoptim")
    lines += [f"- {name}: {reason}" for name, reason in NOT_TRIED.items()]
    return "\n".join(lines) + "\n"


def _title(mode: str) -> str:
    return f"{mode}: right, {'replicated, ' * (mode != 'replicated')}refused"


def written() -> str:
    """Return the section that the file has."""
    _, heading, section = FILE.read_text().partition(HEADING)
    return heading + section


def replaced(results: Sequence[dict[str, Any]]) -> None:
    """Write the section, at the end of the file."""
    before, _, _ = FILE.read_text().partition(HEADING)
    FILE.write_text(before.rstrip("\n") + "\n\n" + render(results))


def _counts(results: Iterable[dict[str, Any]], mode: str) -> str:
    """Count an optimizer once, as the worse of what it is on two and on three ranks."""
    order = ("right", "replicated with a warning", "error", "fails without dpoptim")
    worst: dict[str, int] = {}
    for result in results:
        if result["mode"] == mode:
            place = order.index(result["verdict"]) if result["verdict"] in order else len(order)
            worst[result["name"]] = max(place, worst.get(result["name"], 0))
    counts = Counter(worst.values())
    numbers = [counts[0], counts[1], counts[2]] if mode != "replicated" else [counts[0], counts[2]]
    return ", ".join(map(str, numbers))


def _short(result: dict[str, Any]) -> str:
    return f"`{result['name']}`"


def _reason(result: dict[str, Any]) -> str:
    text = next(iter(result["warnings"]), "")
    found = re.search(r"can't be sharded among ranks, since it (.*?)(: it stays replicated.*)?$", text)
    return _plain(found[1] if found else text)


def _own_error(result: dict[str, Any]) -> str:
    return _plain(result["text"].partition(";")[0].rpartition("torch.float64: ")[2])


def _error(result: dict[str, Any]) -> str:
    return _plain(next(iter(result["errors"].values()), result.get("text", "")))


def _unsaved(result: dict[str, Any]) -> str:
    stages = ("state_dict", "checkpoint", "resuming")
    return next((_plain(text) for stage, text in result["errors"].items() if stage in stages), "")


def _plain(text: str) -> str:
    """Leave out what differs from run to run and class to class."""
    text = re.sub(r" \[[\w.]+:\d+\]$", "", text)
    text = re.sub(r"optimizer \d+, step \d+", "a step", text)
    return re.sub(r"^\w+ (can't be stepped)", r"\1", re.sub(r"^(\w*Error): ", "", text))


def _listed(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield a line a reason, with the names it holds for."""
    names: dict[str, list[str]] = {}
    for name, reason in pairs:
        if name not in names.setdefault(reason, []):
            names[reason].append(name)
    for reason, some in names.items():
        yield f"- {reason}: {', '.join(some)}"
