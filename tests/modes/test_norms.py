"""The norm of gradients of which each rank has a part, and clipping: this rank's part beside what the others say."""

import math
from types import SimpleNamespace

import pytest
import torch

from dpoptim.modes.norms import GradientNorm
from dpoptim.partition import Piece


class Ranks:
    """Stands for a communicator of three ranks, of which this is the second."""

    world_size, rank = 3, 1

    def __init__(self, *others):
        self.others = torch.tensor([others[0], 0.0, others[1]], dtype=torch.float64)

    def all_reduce(self, tensor):
        tensor += self.others


def _part(*gradients, pieces, dtype=torch.float32):
    parameters = [SimpleNamespace(grad=gradient) for gradient in gradients]
    own = [Piece(position, start, stop, 0) for position, start, stop in pieces]
    return SimpleNamespace(bucket=SimpleNamespace(own_pieces=own, dtype=dtype), parameters=parameters)


def _parts():
    """Two buckets, of which the elements of value 2 and 3 are this rank's; there is a parameter without a gradient."""
    first = torch.tensor([[100.0, 2.0], [2.0, 100.0]])
    second = torch.tensor([[3.0, 100.0], [3.0, 100.0]]).t()  # not contiguous: flat it begins with 3, 3
    return [_part(first, None, pieces=[(0, 1, 3), (1, 0, 5)]), _part(second, pieces=[(0, 0, 2)])], first, second


@pytest.mark.parametrize(
    ("norm_type", "expected"), [(1.0, 10 + 7 + 5), (2.0, math.sqrt(8 + 18 + 49 + 25)), (math.inf, 7.0)]
)
def test_the_norm_is_that_of_all_parts(norm_type, expected):
    parts, *_ = _parts()
    total = GradientNorm(Ranks(7.0, 5.0), range(3)).total(parts, norm_type)
    assert total.dtype == torch.float64
    assert total.item() == pytest.approx(expected, rel=1e-7)


def test_each_element_counts_once_where_every_node_has_all():
    parts, *_ = _parts()
    assert GradientNorm(Ranks(7.0, 5.0), [0, 1]).total(parts, 1.0).item() == pytest.approx(17.0)


def test_the_norm_of_some_gradients():
    parts, first, second = _parts()
    norm = GradientNorm(Ranks(0.0, 0.0), range(3))
    assert norm.total(parts, 1.0, [first]).item() == 4.0
    assert norm.total(parts, 1.0, [second]).item() == 6.0
    assert norm.total(parts, 1.0, []).item() == 0.0


def test_a_rank_that_owns_nothing_has_the_same_norm():
    assert GradientNorm(Ranks(3.0, 4.0), range(3)).total([], 2.0).item() == pytest.approx(5.0)


def test_clipping_scales_what_this_rank_owns():
    parts, first, second = _parts()
    total = GradientNorm(Ranks(7.0, 5.0), range(3)).clip(parts, 2.2, 1.0, error_if_nonfinite=True)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(22.0)
    torch.testing.assert_close(first, torch.tensor([[100.0, 0.2], [0.2, 100.0]]))
    torch.testing.assert_close(second.reshape(-1)[:2], torch.tensor([0.3, 0.3]))


def test_a_norm_below_the_limit_changes_nothing():
    parts, first, second = _parts()
    before = first.clone(), second.clone()
    assert GradientNorm(Ranks(0.0, 0.0), range(3)).clip(parts, 11.0, 1.0, error_if_nonfinite=False).item() == 10.0
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1])


def test_a_norm_that_is_not_finite_is_an_error_on_all_ranks_if_wanted():
    parts, first, _ = _parts()
    before = first.clone()
    norm = GradientNorm(Ranks(math.inf, 1.0), range(3))
    with pytest.raises(RuntimeError, match=r"the total norm of order 2.0 of the gradients is inf") as caught:
        norm.clip(parts, 1.0, 2.0, error_if_nonfinite=True)
    assert caught.value.raised_on_all_ranks
    assert torch.equal(first, before)
    assert norm.clip(parts, 1.0, 2.0, error_if_nonfinite=False).item() == math.inf


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float64, torch.float64], torch.float64),
        ([torch.complex64], torch.float32),
        ([torch.bfloat16, torch.float64], torch.float32),
    ],
)
def test_the_dtype_of_the_norm_is_that_of_the_gradients(dtypes, expected):
    parts = [_part(pieces=[], dtype=dtype) for dtype in dtypes]
    assert GradientNorm(Ranks(1.0, 1.0), range(3)).clip(parts, 1.0, 2.0, error_if_nonfinite=False).dtype == expected
