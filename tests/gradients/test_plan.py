"""Plan: every gradient is in one bucket, at one position, in an order that follows from that of the gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reducing import FakeCommunicator

from dpoptim.gradients.bucket import Bucket, Division
from dpoptim.gradients.homes import is_large
from dpoptim.gradients.plan import Plan, divide, largest_bucket_bytes
from dpoptim.tuning import TUNING

_LARGE = (600, 600)


@given(
    numels=st.lists(st.integers(0, 300), min_size=1, max_size=12),
    bucket_bytes=st.integers(1, 2000),
    num_dtypes=st.integers(1, 2),
)
@settings(max_examples=60, deadline=None)
def test_every_gradient_has_one_position(numels, bucket_bytes, num_dtypes):
    dtypes = [torch.float32, torch.float64][:num_dtypes]
    gradients = {
        10 * i: torch.zeros(numel, dtype=dtypes[i % num_dtypes]) for i, numel in reversed(list(enumerate(numels)))
    }
    buckets = divide(gradients, bucket_bytes, have_homes=False)
    assert sorted(index for bucket in buckets for index in bucket.indices) == sorted(gradients)
    for bucket in buckets:
        assert {gradients[index].dtype for index in bucket.indices} == {bucket.dtype}
        assert len(bucket.indices) == 1 or bucket.numel * bucket.dtype.itemsize <= bucket_bytes
    when = list(gradients)
    last = [when.index(bucket.indices[-1]) for bucket in buckets]
    assert last == sorted(last), "in the order in which they are full"


def test_a_large_gradient_is_alone_unless_it_has_a_home():
    gradients = {0: torch.zeros(7), 1: torch.zeros(_LARGE), 2: torch.zeros(5)}
    assert is_large(gradients[1])
    alone = divide(gradients, 1 << 25, have_homes=False)
    assert [bucket.indices for bucket in alone] == [(1,), (0, 2)]
    together = divide(gradients, 1 << 25, have_homes=True)
    assert [bucket.indices for bucket in together] == [(0, 1, 2)]


def test_a_plan_that_is_replaced_forgets_the_one_before():
    tensors = [torch.zeros(3), torch.zeros(4), torch.zeros(5)]
    plan = Plan(100)
    plan.replace([Bucket([0, 2], [tensors[0], tensors[2]])])
    held = plan.buckets
    assert {index: position for index, (_, position) in plan.positions.items()} == {0: 0, 2: 1}
    plan.replace([Bucket([1], [tensors[1]])])
    assert list(plan.positions) == [1]
    assert [bucket.indices for bucket in plan.buckets] == [(1,)]
    assert [bucket.indices for bucket in held] == [(0, 2)], "who goes through the buckets is not disturbed"


def test_frozen_buckets_are_in_the_plan_but_have_no_positions():
    plan = Plan(100)
    trained, frozen = Bucket([0], [torch.zeros(3)]), Bucket([1], [torch.zeros(3)])
    plan.activate(trained)
    plan.frozen_buckets.append(frozen)
    assert plan.buckets == [trained]
    assert plan.all_buckets == [trained, frozen]
    assert list(plan.positions) == [0]
    plan.activate(plan.frozen_buckets.pop())
    assert plan.buckets == plan.all_buckets == [trained, frozen]
    assert plan.positions[1] == (frozen, 0)


def test_own_piece():
    plan = Plan(100)
    plan.activate(Bucket([3, 1], [torch.zeros(4), torch.zeros(6)], Division((5, 5), 1, in_node=False)))
    assert plan.own_piece(3) is None
    assert plan.own_piece(2) is None, "which is in no bucket"
    piece = plan.own_piece(1)
    assert (piece.start, piece.stop) == (1, 6)


@pytest.mark.parametrize(
    ("overlap", "is_polled", "expected"),
    [
        (False, False, 1 << 30),
        (False, True, 1 << 30),
        (True, False, TUNING.overlapped_bucket_bytes),
        (True, True, TUNING.polled_bucket_bytes),
    ],
)
def test_the_largest_bucket(overlap, is_polled, expected):
    communicator = FakeCommunicator(overlap=overlap)
    communicator.is_polled = is_polled
    assert largest_bucket_bytes(communicator, 1 << 30) == expected
    assert largest_bucket_bytes(communicator, 1000) == 1000
