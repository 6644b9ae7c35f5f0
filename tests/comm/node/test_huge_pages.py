"""Huge pages: memory keeps its contents, and what was tried is not tried again."""

import mmap
import re
from pathlib import Path

import pytest
import torch

from dpoptim.comm.node import huge_pages
from dpoptim.comm.node.huge_pages import HugePages

PAGE_BYTES = 1 << 21


def _place(tensor):
    return tensor.data_ptr(), tensor.nbytes


def _huge_bytes(tensor):
    """Return how much of the mapping that holds a tensor lies on huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= tensor.data_ptr() < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    raise AssertionError("not mapped")


def test_memory_moves_onto_huge_pages_with_its_contents():
    memory = mmap.mmap(-1, 5 * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    tensor.copy_(torch.arange(len(tensor)) % 251)
    expected, before = tensor.clone(), _huge_bytes(tensor)
    HugePages().want([_place(tensor)])
    assert torch.equal(tensor, expected)
    if huge_pages._madvise(tensor.data_ptr(), PAGE_BYTES, huge_pages._MADV_COLLAPSE) != 0:
        pytest.skip("this system has no huge pages for memory that is in use, or not now")
    assert before == 0
    assert _huge_bytes(tensor) >= 4 * PAGE_BYTES


@pytest.fixture
def tried(monkeypatch):
    """Return the numbers of the pages that are tried, without trying them."""
    pages = []
    monkeypatch.setattr(
        huge_pages,
        "_madvise",
        lambda address, num_bytes, _: pages.append((address // PAGE_BYTES, num_bytes)),
    )
    return pages


def test_a_page_is_tried_once_and_few_at_a_time(tried):
    pages = HugePages()
    everything = [(0, 20 * PAGE_BYTES), (30 * PAGE_BYTES, 20 * PAGE_BYTES)]
    numbers = []
    for _ in range(5):
        pages.want(everything)
        numbers.append(len(tried))
    assert numbers == [16, 32, 40, 40, 40]
    assert sorted(tried) == [(page, PAGE_BYTES) for page in (*range(20), *range(30, 50))]
    pages.want([(19 * PAGE_BYTES, 2 * PAGE_BYTES)])
    assert tried[40:] == [(20, PAGE_BYTES)]


def test_a_page_that_is_hardly_used_is_left_alone(tried):
    quarter = PAGE_BYTES // 4
    HugePages().want([(PAGE_BYTES - quarter, 2 * quarter - 1), (3 * PAGE_BYTES, 100), (4 * PAGE_BYTES, quarter - 50)])
    assert tried == [(0, PAGE_BYTES)]
    tried.clear()
    HugePages().want([(4 * PAGE_BYTES, quarter - 50), (5 * PAGE_BYTES - 50, 50)])  # together they are enough
    assert tried == [(4, PAGE_BYTES)]


def test_places_that_never_settle_are_given_up(tried):
    pages = HugePages()
    for step in range(1000):
        pages.want([(step * PAGE_BYTES, PAGE_BYTES)])
    assert len(tried) == 64


def test_nothing_happens_where_there_is_no_madvise(monkeypatch):
    monkeypatch.setattr(huge_pages, "_madvise", None)
    HugePages().want([(0, PAGE_BYTES)])
