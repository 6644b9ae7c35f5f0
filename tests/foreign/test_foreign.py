"""No optimizer of another package trains wrongly in silence, in any mode: it is right, or says why not.

Runs alone, by ``make test-foreign``: the sweep starts its ranks itself.
"""

import pytest
import table
from catalogue import KNOWN, entries
from drive import MODES, run_sweep
from drive import table as counts

RANKS = (2, 3)
# What must not be. "error" is a message on every rank, "fails without dpoptim" is the class's own.
SILENT = ("WRONG", "replicas differ", "hang", "crash", "error on some ranks", "replicated without a word")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    found = run_sweep(tmp_path_factory.mktemp("foreign"), RANKS)
    print(*counts(found), sep="\n")
    return found


@pytest.mark.timeout(1800)  # hundreds of classes; the sweep itself has a limit for each
def test_every_entry_has_a_verdict_in_every_mode(results):
    found = {(result["name"], result["mode"], result["ranks"]) for result in results}
    assert found == {(entry.name, mode, ranks) for entry in entries() for mode in MODES for ranks in RANKS}
    assert sum(result["verdict"] == "right" for result in results) > len(results) / 2


@pytest.mark.parametrize("verdict", SILENT)
def test_none_is(results, verdict):
    found = [
        f"{r['name']}, {r['mode']}, {r['ranks']} ranks: {r.get('off', '')} {r.get('errors', '')} {r.get('text', '')}"
        for r in results
        if r["verdict"] == verdict and (r["name"], verdict) not in KNOWN
    ]
    assert not found, "\n".join(found)


def test_what_is_known_is_still_so(results):
    assert {(r["name"], r["verdict"]) for r in results} >= KNOWN.keys()


def test_errors_say_more_than_python_does(results):
    """A missing attribute or key of ours is no message."""
    found = [
        f"{r['name']}, {r['mode']}, {stage}: {text}"
        for r in results
        for stage, text in r.get("errors", {}).items()
        if text.startswith(("AttributeError: 'DataParallel", "KeyError", "AssertionError"))
        and r["its own resuming"] is None
    ]
    assert not found, "\n".join(found)


def test_the_table_is_not_stale(results, request):
    if request.config.getoption("--write-table"):
        table.replaced(results)
    assert table.written() == table.render(results), "run: make test-foreign WRITE=--write-table"
