"""Tuned sizes and times: what sets others, what is refused, and what they set."""

import re

import pytest

from dpoptim.tuning import Tuning


def test_a_text_sets_some_and_leaves_the_rest():
    tuning = Tuning.of(" piece_bytes=1048576, longest_nap_s = 1e-3,")
    assert (tuning.piece_bytes, tuning.longest_nap_s) == (1 << 20, 1e-3)
    assert tuning == Tuning(piece_bytes=1 << 20, longest_nap_s=1e-3)
    assert Tuning.of("") == Tuning()
    changed = {name: row for name, row in tuning.rows().items() if row.endswith(" *")}
    assert changed == {"piece_bytes": "1048576 *", "longest_nap_s": "0.001 *"}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("pieces=1", "DPOPTIM_TUNING: 'pieces' must be one of in_pieces_bytes, share_bytes, "),
        ("piece_bytes", "DPOPTIM_TUNING: piece_bytes must be a positive int, got ''"),
        ("piece_bytes=1e6", "DPOPTIM_TUNING: piece_bytes must be a positive int, got '1e6'"),
        ("num_in_flight=-1", "DPOPTIM_TUNING: num_in_flight must be a positive int, got '-1'"),
        ("longest_nap_s=nan", "DPOPTIM_TUNING: longest_nap_s must be a positive float, got 'nan'"),
    ],
)
def test_what_is_no_setting_is_an_error(text, match):
    with pytest.raises(ValueError, match=f"^{re.escape(match)}"):
        Tuning.of(text)


PROGRAM = """
import os
import torch
from mpi4py import MPI
os.environ["DPOPTIM_TUNING"] = ("large_gradient_bytes=%s," + "block_numel=9") % {sizes}[MPI.COMM_WORLD.rank]
import dpoptim
from dpoptim.gradients import homes
from dpoptim.step import step_blocks
try:
    opt = dpoptim.DataParallelOptimizer(dpoptim.AdamW([torch.nn.Parameter(torch.ones(3))]))
    print(homes._LARGE_BYTES, step_blocks._TOGETHER_NUMEL)
except ValueError as error:
    print(error)
"""


def test_all_ranks_set_the_same(mpirun):
    job = mpirun(2, "-c", PROGRAM.format(sizes=[10, 10]))
    assert (job.returncode, sorted(job.stdout.splitlines())) == (0, ["10 9", "10 9"]), job.stderr
    job = mpirun(2, "-c", PROGRAM.format(sizes=[10, 11]))
    different = "DPOPTIM_TUNING must be the same on all ranks, not so on ranks 0 and 1"
    assert (job.returncode, job.stdout.splitlines()) == (0, [different] * 2), job.stderr
