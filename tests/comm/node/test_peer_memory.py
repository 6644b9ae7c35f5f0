"""PeerMemory: sums and gathered parts, in batches, by reading other ranks' memory; and what happens where one can't."""

import logging
import re
from types import SimpleNamespace

import pytest
import torch

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.node import peer_memory, process_memory
from dpoptim.comm.node.peer_memory import PeerMemory
from dpoptim.partition import even_counts, start_offsets

pytestmark = pytest.mark.parallel


@pytest.fixture
def node(world):
    if world.size == 1:
        pytest.skip("one rank reads nobody's memory")
    communicator = Communicator(world)
    if (why_not := communicator.why_no_peer_memory()) is not None:
        communicator.free()
        pytest.skip(f"this system does not let ranks read each other's memory: {why_not}")
    yield communicator
    communicator.free()


def _own(rank, number, numel=1000):
    return torch.arange(numel, dtype=torch.float64) % 17 + 100 * rank + number


def _total(size, number):
    return sum(_own(rank, number) * (rank + 1) for rank in range(size))


def test_nothing_is_done_before_a_wait_and_everything_then(node):
    rank, size = node.rank, node.world_size
    peers = PeerMemory(node, node.barrier)
    counts = even_counts(1000, size)
    reduced, scattered, gathered = _own(rank, 0), _own(rank, 1), torch.zeros(1000, dtype=torch.float64)
    part = torch.zeros(counts[rank], dtype=torch.float64)
    gathered.split(counts)[rank].copy_(_own(0, 2).split(counts)[rank])
    peers.all_reduce(reduced, rank + 1.0)
    peers.reduce_scatter(part, scattered, counts, rank + 1.0)
    peers.all_gather(gathered, counts)
    early = bool(part.any()) or not torch.equal(reduced, _own(rank, 0))
    peers.wait()
    peers.wait()  # nothing is left
    assert not early
    assert torch.equal(reduced, _total(size, 0))
    assert torch.equal(part, _total(size, 1).split(counts)[rank])
    assert torch.equal(scattered, _own(rank, 1))
    assert torch.equal(gathered, _own(0, 2))


def test_a_factor_that_all_have_is_that_of_the_sum(node):
    peers = PeerMemory(node, node.barrier)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensor = torch.full((1001,), 3.0, dtype=dtype)
        peers.all_reduce(tensor, 0.25)
        peers.wait()
        assert torch.equal(tensor, torch.full((1001,), 0.75 * node.world_size, dtype=dtype))


def test_windows_hold_parts_of_several_tensors(node, monkeypatch):
    monkeypatch.setattr(peer_memory, "_WINDOW_BYTES", 960)
    rank, size = node.rank, node.world_size
    peers = PeerMemory(node, node.barrier)
    kinds = [(torch.float32, 0.5), (torch.bfloat16, 0.5), (torch.float32, 0.5), (torch.float64, 2.0 + rank)]
    kinds += [(torch.bfloat16, 1.0), (torch.float32, 1.0), (torch.int64, 1.0)]
    numels = [1, 1000, 37, 501, 3, 258, 4]
    tensors = [
        _own(rank, number, numel).to(kind[0]) for number, (numel, kind) in enumerate(zip(numels, kinds, strict=True))
    ]
    starts = [start_offsets(even_counts(numel, size)) for numel in numels]
    own = [
        torch.zeros(even_counts(numel, size)[rank], dtype=kind[0]) for numel, kind in zip(numels, kinds, strict=True)
    ]
    for tensor, output, start, (_, scale) in zip(tensors, own, starts, kinds, strict=True):
        peers.reduce_scatter(output, tensor, even_counts(len(tensor), size), scale, starts=start)
    peers.wait()
    for number, (numel, (dtype, scale)) in enumerate(zip(numels, kinds, strict=True)):
        scales = [2.0 + other if dtype == torch.float64 else scale for other in range(size)]
        values = [_own(other, number, numel).to(dtype).double() for other in range(size)]
        total = sum(value * factor for value, factor in zip(values, scales, strict=True)).to(dtype)
        start = starts[number][rank]
        assert torch.equal(own[number], total[start : start + len(own[number])]), (number, dtype)


def test_more_than_a_batch_holds(node, monkeypatch):
    monkeypatch.setattr(peer_memory, "MAX_COLLECTIVES", 3)
    peers = PeerMemory(node, node.barrier)
    tensors = [_own(node.rank, number) for number in range(7)]
    for tensor in tensors:
        peers.all_reduce(tensor, node.rank + 1.0)
    peers.all_reduce(torch.empty(0))
    peers.wait()
    assert all(torch.equal(tensor, _total(node.world_size, number)) for number, tensor in enumerate(tensors))


@pytest.mark.parametrize(("part", "phase"), [("_sums", "sum"), ("_gathers", "gather")])
def test_a_rank_that_cannot_read_is_an_error_on_all(node, monkeypatch, part, phase):
    peers = PeerMemory(node, node.barrier)
    tensor = torch.ones(1000)
    if node.rank == node.world_size - 1:
        monkeypatch.setattr(getattr(peers, part), phase, _fail)
    peers.all_reduce(tensor)
    with pytest.raises(RuntimeError, match=f"rank {node.world_size - 1} of the node could not read") as caught:
        peers.wait()
    monkeypatch.undo()
    again = torch.ones(1000)
    peers.all_reduce(again)
    peers.wait()
    assert torch.equal(again, torch.full((1000,), float(node.world_size)))
    assert ("gone" in str(caught.value)) == (node.rank == node.world_size - 1)


def _fail(*_):
    raise ProcessLookupError("gone")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("platform", SimpleNamespace(system=lambda: "Plan 9"), "this is not Linux"),
        ("torch", 2, "it has several threads"),
        ("os", SimpleNamespace(getpid=lambda: 1), "in a namespace of processes|of process 1: "),
        ("read_memory", _fail, "gone"),
    ],
)
def test_where_one_rank_may_not_read_all_use_the_staging_area(world, monkeypatch, caplog, name, value, reason):
    if world.size == 1:
        pytest.skip("one rank reads nobody's memory")
    if world.rank == 0 and name == "torch":
        torch.set_num_threads(value)
    elif world.rank == 0:
        monkeypatch.setattr(peer_memory if name == "os" else process_memory, name, value)
    communicator = Communicator(world)
    tensor = _own(world.rank, 0, 200_000)
    with caplog.at_level(logging.INFO):
        communicator.all_reduce(tensor)
    why_no_memory, why_no_reading = communicator.why_no_node_memory(), communicator.why_no_peer_memory()
    communicator.free()
    torch.set_num_threads(1)
    messages = [record.getMessage() for record in caplog.records if "staging area" in record.getMessage()]
    assert why_no_memory is None
    assert torch.equal(tensor, sum(_own(rank, 0, 200_000) for rank in range(world.size)))
    assert len(messages) == 1
    assert re.search(reason, messages[0])
    assert why_no_reading.startswith("rank 0 of the node: ")


def test_a_batch_left_open_ends_with_a_meeting_of_another_kind(node, monkeypatch):
    meetings = []

    def meet():
        meetings.append(None)
        node.barrier()

    peers = PeerMemory(node, meet)
    tensors = [_own(node.rank, number) for number in range(3)]

    def reduce_two():
        for tensor in tensors[:2]:
            peers.all_reduce(tensor, node.rank + 1.0)
            peers.wait()
        node.barrier()

    peers.close_with(reduce_two)
    num_open = len(meetings)
    peers.all_reduce(tensors[2], node.rank + 1.0)
    peers.wait()
    if node.rank == 0:
        monkeypatch.setattr(process_memory, "read_memory", _fail)

    def fail():
        peers.all_reduce(torch.ones(1000))
        peers.wait()
        node.barrier()

    with pytest.raises(RuntimeError, match="rank 0 of the node could not read"):
        peers.close_with(fail)
    assert all(torch.equal(tensor, _total(node.world_size, number)) for number, tensor in enumerate(tensors))
    assert num_open == 5, "three for the first, which the second ends, and two for the second"
    assert len(meetings) == 5 + 3 + 2


def test_an_announced_batch_begins_with_a_meeting_of_another_kind(node):
    meetings = []

    def meet():
        meetings.append(None)
        node.barrier()

    peers = PeerMemory(node, meet)
    tensor = _own(node.rank, 0)
    peers.all_reduce(tensor, node.rank + 1.0)

    def divide_and_meet():
        peers.divide(4.0)
        node.barrier()

    peers.open_with(divide_and_meet)
    peers.wait()
    num_meetings = len(meetings)
    given_up, again = _own(node.rank, 1), _own(node.rank, 2)
    peers.all_reduce(given_up)

    def fail():
        raise LookupError("a rank is elsewhere")

    with pytest.raises(LookupError):
        peers.open_with(fail)
    peers.wait()  # nothing is left
    peers.all_reduce(torch.empty(0))
    peers.open_with(node.barrier)  # nothing at all
    peers.all_reduce(again, node.rank + 1.0)
    peers.wait()
    assert torch.equal(tensor, _total(node.world_size, 0) / 4)
    assert torch.equal(given_up, _own(node.rank, 1))
    assert torch.equal(again, _total(node.world_size, 2))
    assert num_meetings == 2
    assert len(meetings) == 2 + 3
