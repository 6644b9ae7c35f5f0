"""Which transport carries what: rows of the table, when a node's memory is set up, and what there is between ranks."""

import pytest
import torch

import dpoptim.comm.router
import dpoptim.comm.selection
from dpoptim.comm.communicator import Communicator
from dpoptim.comm.node.alone import Alone
from dpoptim.comm.node.staging import StagingArea
from dpoptim.comm.selection import Found, Route, calls_for_memory
from dpoptim.partition import even_counts

ALL, SUM = ("all_reduce", "reduce_scatter", "all_gather"), "all_reduce"


def _tensor(num_bytes, dtype=torch.uint8):
    return torch.empty(num_bytes // dtype.itemsize, dtype=dtype)


def test_a_route_has_sizes():
    route = Route(Alone(), least_bytes=8, most_bytes=16)
    assert [n for n in range(0, 32, 4) if route.carries(SUM, _tensor(n), may_wait=False)] == [8, 12, 16]


def test_a_route_has_collectives():
    route = Route(Alone(), frozenset({SUM, "all_gather"}))
    assert [name for name in ALL if route.carries(name, _tensor(8), may_wait=False)] == [SUM, "all_gather"]


def test_a_route_may_be_for_what_may_wait():
    route = Route(Alone(), if_it_may_wait=True)
    assert [route.carries(SUM, _tensor(8), may_wait=may_wait) for may_wait in (False, True)] == [False, True]


def test_memory_sums_what_torch_adds_and_gathers_anything():
    route = Route(Alone(), in_memory=True)
    carried = {
        dtype: [name for name in ALL if route.carries(name, _tensor(8, dtype), may_wait=False)]
        for dtype in (torch.float32, torch.bfloat16, torch.uint16, torch.bool)
    }
    gathered = ["all_gather"]
    assert list(carried.values()) == [list(ALL), list(ALL), gathered, gathered]
    assert not route.carries(SUM, torch.empty(3, device="meta"), may_wait=False)


def test_the_first_route_that_carries_it_is_taken():
    small, large, rest = Alone(), Alone(), Alone()
    found = Found([Route(large, least_bytes=100, in_memory=True), Route(small, most_bytes=10), Route(rest)])
    taken = [found.transport(SUM, _tensor(n), may_wait=False) for n in (0, 10, 11, 100)]
    assert [[small, large, rest].index(transport) for transport in taken] == [0, 0, 2, 1]
    assert found.transport(SUM, torch.empty(100, dtype=torch.bool), may_wait=False) is rest


@pytest.mark.parametrize(
    ("collective", "num_bytes", "dtype", "may_wait", "sleeps", "expected"),
    [
        (SUM, 1 << 20, torch.float32, False, False, True),
        (SUM, 16, torch.float32, False, False, False),
        (SUM, 16, torch.float32, True, False, True),
        (SUM, 16, torch.float32, False, True, True),
        ("all_gather", 16, torch.float32, False, True, False),
        (SUM, 1 << 20, torch.uint16, False, False, False),
        ("all_gather", 1 << 20, torch.uint16, False, False, True),
    ],
)
def test_memory_is_set_up_for_what_may_go_through_it(collective, num_bytes, dtype, may_wait, sleeps, expected):
    tensor = _tensor(num_bytes, dtype)
    assert calls_for_memory(collective, tensor, may_wait=may_wait, sleeps=sleeps) == expected


@pytest.mark.parallel
def test_gathers_that_are_prepared_go_by_the_same_transports_as_others(world, monkeypatch):
    staged, sizes = StagingArea.all_gather, []

    def all_gather(area, tensor, counts, **options):
        sizes.append(tensor.numel())
        return staged(area, tensor, counts, **options)

    def refuse(*_):
        raise OSError("not allowed")

    monkeypatch.setattr(StagingArea, "all_gather", all_gather)
    monkeypatch.setattr(dpoptim.comm.selection, "PeerMemory", refuse)
    communicator = Communicator(world)
    tensors = [torch.full((num_bytes,), world.rank, dtype=torch.uint8) for num_bytes in (1 << 20, 64, 1 << 20)]
    for _ in range(2):  # the first sets up the staging area
        works = communicator.prepare_all_gathers([(t, even_counts(len(t), world.size)) for t in tensors])()
        for work in works:
            work.wait()
    ranks = [tensor.unique().tolist() for tensor in tensors]
    communicator.free()
    assert ranks == [list(range(world.size))] * 3
    assert sizes == [1 << 20] * (4 if world.size > 1 else 0)


@pytest.mark.parallel
@pytest.mark.parametrize("collective", ["all_reduce", "reduce_scatter"])
def test_sums_have_the_same_bits_whatever_came_before(world, monkeypatch, collective):
    monkeypatch.setattr(dpoptim.comm.router, "available_cores", lambda: {0})  # where small ones go through slots
    communicator = Communicator(world)
    counts = even_counts(6000, world.size)
    generator = torch.Generator().manual_seed(world.rank)
    values, sums = torch.randn(6000, generator=generator).exp().mul(3), []
    for num_large in (0, 1):
        for _ in range(num_large):
            communicator.all_reduce(torch.ones(1 << 18))  # sets up the node's memory
        if collective == "all_reduce":
            communicator.all_reduce(total := values.clone())
        else:
            communicator.reduce_scatter(total := torch.empty(counts[world.rank]), values, counts=counts)
        sums.append(total)
    communicator.free()
    assert torch.equal(*sums)


@pytest.mark.parallel
def test_why_there_is_no_memory_is_a_reason_or_none(world):
    everybody = Communicator(world)
    alone = everybody.split(world.rank)
    reasons = everybody.why_no_node_memory(), everybody.why_no_peer_memory()
    of_one = alone.why_no_node_memory(), alone.why_no_peer_memory()
    everybody.free()
    alone.free()
    assert of_one == ("every rank is alone on its node",) * 2
    assert (reasons[0] == of_one[0]) == (world.size == 1)
    assert len(set(world.allgather(reasons))) == 1
