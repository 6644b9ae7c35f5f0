"""Who owns which slice."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpoptim.partition import aligned, even_counts, group_by_size, owners_by_size, pieces_within, start_offsets


@given(st.integers(0, 10**12), st.integers(1, 2000))
def test_even_counts_differ_by_at_most_one(numel, num_parts):
    counts = even_counts(numel, num_parts)
    assert len(counts) == num_parts
    assert sum(counts) == numel
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


@given(st.lists(st.integers(0, 100), max_size=20))
def test_offsets_are_the_sums_before(counts):
    assert start_offsets(counts) == [sum(counts[:part]) for part in range(len(counts))]


@given(st.lists(st.integers(0, 100), max_size=50), st.integers(1, 150))
def test_groups_keep_the_order_and_the_limit(sizes, limit):
    groups = group_by_size(sizes, limit)
    assert [item for group in groups for item in group] == list(range(len(sizes)))
    filled = [sum(sizes[item] for item in group) for group in groups]
    assert all(len(group) == 1 or size <= limit for group, size in zip(groups, filled, strict=True))
    for size, (_, following) in zip(filled, pairwise(groups), strict=False):
        assert size + sizes[following[0]] > limit, "a group is as full as the order allows"


@given(st.lists(st.integers(0, 30), max_size=12), st.data())
def test_pieces_are_what_is_within(sizes, data):
    begin = data.draw(st.integers(0, sum(sizes)))
    end = data.draw(st.integers(begin, sum(sizes)))
    elements = [(position, element) for position, size in enumerate(sizes) for element in range(size)]
    found = pieces_within(sizes, begin, end)
    assert [(p.position, element) for p in found for element in range(p.start, p.stop)] == elements[begin:end]
    assert [p.offset for p in found] == start_offsets([p.numel for p in found])


def test_the_largest_go_first_to_who_has_least():
    loads = [5, 0, 0]
    assert owners_by_size([1, 9, 4, 4], loads) == [0, 1, 2, 2]
    assert loads == [6, 9, 8]


def test_bad_numbers():
    with pytest.raises(ValueError, match="numel must be >= 0, got -1"):
        even_counts(-1, 2)
    with pytest.raises(ValueError, match="num_parts must be >= 1, got 0"):
        even_counts(3, 0)


@pytest.mark.parametrize(("num_bytes", "expected"), [(0, 0), (1, 64), (64, 64), (65, 128)])
def test_sizes_are_rounded_up_to_whole_units(num_bytes, expected):
    assert aligned(num_bytes) == expected
    assert aligned(num_bytes, 4096) == min(num_bytes, 1) * 4096
