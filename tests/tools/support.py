"""The table in docs/support.md: what works, as shown by tests that ran.

A test says what it shows with a mark; what is in braces is filled in from its parameters::

    @pytest.mark.parametrize("name", OPTIMIZERS)
    @pytest.mark.supports("{name}", replicated="yes", dtypes="{dtype}")

The first argument is a row of :data:`SECTIONS`, each keyword a column of :data:`COLUMNS`, its value one entry of the
cell. A cell has the entries of all tests that passed; "{name}" as an entry of a row that is no optimizer lists the
optimizers.
Of a test with a parameter ``mode`` the entry of ``replicated`` counts in the replicated mode, that of ``sharded`` in
the others.

Every run of pytest leaves a record of the marks of the tests that passed in it below ``.pytest_cache``. The file is
written from the records of all runs (alone, and under mpirun with each number of ranks) by::

    make support        # or, after the runs:  python tests/tools/support.py

``test_support.py`` fails when the file lacks what a test shows, or has a cell without a test.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "support.md"
RECORDS = ROOT / ".pytest_cache" / "support"

OPTIMIZERS = [
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "Muon", "NAdam", "RAdam"),
    *("RMSprop", "Rprop", "SGD", "SparseAdam"),
]
COLUMNS = {
    "replicated": "works replicated",
    "sharded": "works sharded",
    "dtypes": "dtypes",
    "implementations": "implementations",
    "limits": "limits",
}
SECTIONS = {
    "Optimizers": OPTIMIZERS,
    "Methods of every optimizer": [
        *("add_param_group", "state_dict", "load_state_dict", "step", "step(closure)", "zero_grad"),
        *("register_step_pre_hook", "register_step_post_hook"),
        *("register_state_dict_pre_hook", "register_state_dict_post_hook"),
        *("register_load_state_dict_pre_hook", "register_load_state_dict_post_hook"),
    ],
    "Options": [
        *("lr as a Tensor", "maximize", "differentiable", "capturable", "amsgrad", "nesterov", "centered"),
        *("decoupled_weight_decay", "named parameters", "sparse gradients"),
    ],
    "Schedulers, each with get_last_lr, step, state_dict, load_state_dict": [
        *("LambdaLR", "MultiplicativeLR", "StepLR", "MultiStepLR", "ConstantLR", "LinearLR", "ExponentialLR"),
        *("PolynomialLR", "CosineAnnealingLR", "ChainedScheduler", "SequentialLR", "ReduceLROnPlateau", "CyclicLR"),
        *("OneCycleLR", "CosineAnnealingWarmRestarts", "SWALR"),
    ],
    "swa_utils": [
        *("AveragedModel: SWA", "AveragedModel: EMA", "AveragedModel: avg_fn", "AveragedModel: multi_avg_fn"),
        *("get_ema_multi_avg_fn", "update_bn"),
    ],
    "With other parts of torch": [
        *("torch.amp.autocast and GradScaler", "clip_grad_norm_", "clip_grad_value_", "torch.compile of the model"),
        *("activation checkpointing", "torch.func.functional_call", "two optimizers on one model"),
    ],
}
_FOREIGN = "## Optimizers from outside torch"  # written by tests/foreign/table.py, at the end
_ORDER = {
    "dtypes": ["float64", "float32", "bfloat16", "float16", "complex128", "complex64"],
    "implementations": ["for-loop", "foreach", "fused", "flat", "compiled"],
}
Cell = tuple[str, str, str]


def cells_of(item: pytest.Item) -> set[Cell]:
    """Return what a test shows: row, column and entry."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    texts = {key: str(value).removeprefix("torch.") for key, value in parameters.items()}
    cells = set()
    for mark in item.iter_markers("supports"):
        row = mark.args[0].format(**texts)
        if not any(row in rows for rows in SECTIONS.values()):
            raise pytest.UsageError(f"{item.nodeid}: supports(): tests/tools/support.py has no row {row!r}")
        for column, entry in mark.kwargs.items():
            if column not in COLUMNS:
                raise pytest.UsageError(f"{item.nodeid}: supports(): no column {column!r} in tests/tools/support.py")
            mode = texts.get("mode", column)
            if column not in ("replicated", "sharded") or (column == "replicated") == (mode == "replicated"):
                cells.add((row, column, entry.format(**texts)))
    return cells


class Recorder:
    """A plugin of pytest that knows what the collected tests show, and records it for those that pass."""

    def __init__(self, name: str | None) -> None:
        self.collected: set[Cell] = set()
        self._shown: set[Cell] = set()
        self._cells: dict[str, set[Cell]] = {}
        self._name = name  # None: this process is not the one that writes

    @pytest.hookimpl(tryfirst=True)  # before tests are deselected
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self._cells = {item.nodeid: cells_of(item) for item in items}
        self.collected = set().union(*self._cells.values())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self._shown |= self._cells.get(report.nodeid, set())

    def pytest_sessionfinish(self) -> None:
        if self._name is not None:
            RECORDS.mkdir(parents=True, exist_ok=True)
            path = RECORDS / f"{self._name}.json"
            before = {tuple(cell) for cell in json.loads(path.read_text())} if path.exists() else set()
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(sorted(before | self._shown), indent=0))
            partial.replace(path)  # whole at any time: another environment's tests may read it


def recorder(num_ranks: int, rank: int) -> Recorder:
    """Return the plugin for a rank, of which the first one writes, or for one of several workers alone."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    return Recorder(f"{num_ranks}-ranks{worker}" if rank == 0 else None)


def render(cells: Iterable[Cell]) -> str:
    """Return the file."""
    table: dict[str, dict[str, set[str]]] = {}
    for row, column, entry in cells:
        table.setdefault(row, {}).setdefault(column, set()).add(entry)
    lines = [
        "# What is supported",
        "",
        "Written by `make support` from the tests that passed, alone and under mpirun with 1 to 4 ranks; do not edit.",
        "Each entry is shown by a test that compares N ranks with one process on the joined batch, or with torch's own",
        "class; what no test shows is empty. *Replicated* is a plain `DataParallelOptimizer`; *sharded* is one",
        "with `shard=True` (`sharded`) or `node_shared=True` (`node-shared`).",
    ]
    for section, rows in SECTIONS.items():
        columns = [column for column in COLUMNS if any(column in table.get(row, {}) for row in rows)]
        for needed in ("sharded", "replicated"):
            if needed not in columns:
                columns.insert(0, needed)
        columns.sort(key=list(COLUMNS).index)
        lines += ["", f"## {section}", "", f"| | {' | '.join(COLUMNS[column] for column in columns)} |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        for row in rows:
            texts = [_text(column, table.get(row, {}).get(column, set())) for column in columns]
            title = f"`{row}`" if _is_code(row) else row
            lines.append(f"| {title} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def parse(text: str) -> set[Cell]:
    """Return the cells of a file."""
    cells = set()
    columns: list[str] = []
    titles = {title: column for column, title in COLUMNS.items()}
    for line in text.partition(_FOREIGN)[0].splitlines():
        if not line.startswith("| "):
            continue
        row, *texts = [part.strip() for part in line.strip("|").split("|")]
        if not row:
            columns = [titles[text] for text in texts]
            continue
        for column, text_of_cell in zip(columns, texts, strict=True):
            entries = OPTIMIZERS if text_of_cell == _ALL else filter(None, re.split(r", (?![^(]*\))", text_of_cell))
            cells |= {(row.strip("`"), column, entry) for entry in entries}
    return cells


_ALL = f"all {len(OPTIMIZERS)} optimizers"


def _text(column: str, entries: set[str]) -> str:
    if entries == set(OPTIMIZERS):
        return _ALL
    order = _ORDER.get(column, [])
    return ", ".join(sorted(entries, key=lambda entry: (order.index(entry) if entry in order else len(order), entry)))


def _is_code(row: str) -> bool:
    return re.fullmatch(r"[\w.]+(\(\w+\))?", row) is not None


def main() -> None:
    """Write the file from the records."""
    shown: set[Any] = set()
    for path in sorted(RECORDS.glob("*.json")):
        shown |= {tuple(cell) for cell in json.loads(path.read_text())}
    _, heading, foreign = FILE.read_text().partition(_FOREIGN)
    FILE.write_text(render(shown) + (f"\n{heading}{foreign}" if heading else ""))
    print(f"{os.path.relpath(FILE)}: {len(shown)} entries")


if __name__ == "__main__":
    main()
