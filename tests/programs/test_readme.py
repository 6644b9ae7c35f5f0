"""The README's code runs, on one rank and under mpirun, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.once
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_python_blocks_run(mpirun, num_ranks, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        done = mpirun(num_ranks, "-W", "error", "-c", block, quick_start=False, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_links_point_to_files():
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
