"""Infinities: found wherever they are, and shown where this rank has nothing of its own."""

import pytest
import torch
from reducing import made

from dpoptim.gradients.bucket import Bucket, Division
from dpoptim.gradients.infinities import are_finite, share_infinity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_what_is_finite(dtype):
    finite = torch.ones(3, dtype=dtype)
    assert are_finite([])
    assert are_finite([finite, finite])
    for value in (float("inf"), float("-inf"), float("nan")):
        broken = finite.clone()
        broken[1] = value
        assert not are_finite([finite, broken])


def test_a_sum_that_overflows_is_finite():
    assert are_finite([torch.full((4,), 3e38)])


@pytest.mark.parametrize(
    ("counts", "owner", "expected"),
    [
        ((6, 4), 0, (1, 2)),  # owns the first and two elements of the second
        ((6, 4), 1, (0, 0)),  # nothing of the first
        ((4, 6), 0, (1, 0)),  # all of the first alone
        ((2, 8), 1, (0, 0)),  # of the first all but its beginning
    ],
)
def test_an_infinity_is_put_where_the_rank_owns_nothing(counts, owner, expected):
    tensors = made((4,), (2, 3), grads=[1.0, 1.0])
    bucket = Bucket([0, 1], tensors, Division(counts, owner, in_node=False))
    share_infinity([bucket], tensors)
    found = [(i, e) for i, p in enumerate(tensors) for e, v in enumerate(p.grad.view(-1).tolist()) if v == float("inf")]
    assert found == [expected]
    owned = {(p.position, e) for p in bucket.own_pieces for e in range(p.start, p.stop)}
    assert owned.isdisjoint(found)


def test_who_owns_everything_shows_nothing():
    tensors = made((4,), (0,), grads=[1.0, 1.0])
    share_infinity([Bucket([0, 1], tensors, Division((4, 0), 0, in_node=False))], tensors)
    assert torch.equal(tensors[0].grad, torch.ones(4))
