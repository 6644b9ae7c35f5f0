"""Who owns which elements: complete, without overlap, balanced, and the same whatever is asked in between."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dpoptim.gradients.sharding import Entry, Sharding

SHAPES = st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=12)


def _shardings(num_owners, *, by_element, num_ranks=None):
    num_ranks = num_ranks or num_owners
    return [Sharding(num_owners, num_ranks, number, by_element, in_node=False) for number in range(num_ranks)]


def _entries(shapes, dtypes=(torch.float32,), num_groups=1):
    return [
        Entry(index, nn.Parameter(torch.empty(shape, dtype=dtypes[index % len(dtypes)])), index % num_groups)
        for index, shape in enumerate(shapes)
    ]


def _owned(buckets):
    """Return what a rank owns, as (parameter, start, stop)."""
    return [(b.indices[p.position], p.start, p.stop) for b in buckets for p in b.own_pieces]


@pytest.mark.parametrize("by_element", [True, False])
@given(shapes=SHAPES, num_owners=st.integers(1, 5), bucket_bytes=st.integers(1, 4000))
@settings(max_examples=60, deadline=None)
def test_every_element_has_one_owner(by_element, shapes, num_owners, bucket_bytes):
    entries = _entries(shapes, (torch.float32, torch.float64), num_groups=2)
    plans = [s.divide(entries, bucket_bytes) for s in _shardings(num_owners, by_element=by_element)]
    assert all([b.indices for b in plan] == [b.indices for b in plans[0]] for plan in plans)
    covered = {entry.index: torch.zeros(entry.parameter.numel()) for entry in entries}
    for plan in plans:
        for index, start, stop in _owned(plan):
            covered[index][start:stop] += 1
            assert by_element or (start, stop) == (0, entries[index].parameter.numel())
    assert all(bool((counts == 1).all()) for counts in covered.values())
    for bucket in plans[0]:
        members = [entries[index] for index in bucket.indices]
        assert len({(m.group, m.parameter.dtype) for m in members}) == 1
        assert len(members) == 1 or sum(m.parameter.nbytes for m in members) <= bucket_bytes


@given(shapes=SHAPES, more=SHAPES, num_owners=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_elements_are_balanced_to_one_also_with_groups_added_later(shapes, more, num_owners):
    totals = [0] * num_owners
    shardings = _shardings(num_owners, by_element=True)
    for part in (shapes, more):
        for number, sharding in enumerate(shardings):
            totals[number] += sum(stop - start for _, start, stop in _owned(sharding.divide(_entries(part), 500)))
        assert max(totals) - min(totals) <= 1


def test_whole_parameters_go_to_who_has_least():
    plans = [s.divide(_entries([[50], [10], [20], [30]]), 1 << 20) for s in _shardings(2, by_element=False)]
    assert [sorted(_owned(plan)) for plan in plans] == [[(0, 0, 50), (1, 0, 10)], [(2, 0, 20), (3, 0, 30)]]


def test_ranks_beyond_the_owners_own_nothing():
    plans = [s.divide(_entries([[7], [600, 600]]), 100) for s in _shardings(2, by_element=True, num_ranks=3)]
    assert _owned(plans[2]) == []
    assert all(len(bucket.division.counts) == 3 for bucket in plans[2])


def test_a_large_tensor_is_a_bucket_of_its_own_and_is_not_copied():
    buckets = _shardings(2, by_element=True)[0].divide(_entries([[600, 600], [7]]), 1 << 25)
    assert sorted(bucket.indices for bucket in buckets) == [(0,), (1,)]
    alone = next(bucket for bucket in buckets if bucket.indices == (0,))
    gradient = torch.ones(600, 600)
    alone.pack([gradient], 1.0)
    assert alone.flat.data_ptr() == gradient.data_ptr()
    assert alone.own.numel() == 180_000


def test_large_tensors_whose_gradients_lie_together_are_one_bucket():
    entries = _entries([[600, 600], [7], [512, 512], [600, 600], [9]])
    buckets = _shardings(2, by_element=True)[0].divide(entries, 3 << 20, have_homes=True)
    assert sorted(bucket.indices for bucket in buckets) == [(0, 2), (1, 4), (3,)]
    large = next(bucket for bucket in buckets if bucket.indices == (0, 2))
    assert [piece.numel for piece in large.own_pieces] == [(360_000 + 2**18) // 2]
    strided = [Entry(0, torch.zeros(600, 600).t(), 0), Entry(1, torch.zeros(600, 600), 0)]
    buckets = _shardings(2, by_element=True)[0].divide(strided, 25 << 20, have_homes=True)
    assert sorted(bucket.indices for bucket in buckets) == [(0,), (1,)]
