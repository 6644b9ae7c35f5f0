"""docs/support.md says what the tests show, no less and no more."""

import pytest
import support
import torch


def test_the_table_is_not_stale(request):
    if request.config.args != request.config.getini("testpaths"):
        pytest.skip("the table is compared when the whole suite is collected")
    here = {name for name in support.OPTIMIZERS if hasattr(torch.optim, name)}
    shown = request.config.pluginmanager.get_plugin("support").collected
    written = support.parse(support.FILE.read_text())
    missing_here = set(support.OPTIMIZERS) - here  # no test of them runs with this version of torch
    for what, cells in (("shown by a test but not in", shown - written), ("shown by no test but in", written - shown)):
        stale = sorted(cell for cell in cells if not {cell[0], cell[2]} & missing_here)
        assert not stale, f"{stale}: {what} docs/support.md; run make support"


def test_what_is_written_can_be_read():
    cells = {("AdamW", "dtypes", "float32"), ("AdamW", "dtypes", "float64"), ("step", "replicated", "SGD")}
    cells |= {("zero_grad", "replicated", name) for name in support.OPTIMIZERS}
    cells |= {("SGD", "limits", "one thing (a, b) of it"), ("AveragedModel: SWA", "sharded", "shard")}
    text = support.render(cells)
    assert support.parse(text) == cells
    assert "| `AdamW` |  |  | float64, float32 |" in text
    assert "| `zero_grad` | all 15 optimizers |  |" in text
    assert support.parse(support.render([])) == set()
