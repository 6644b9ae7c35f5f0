"""Transports: each carries the same collectives, with the same bits where sums are taken in the order of ranks."""

import pytest
import torch

from dpoptim.comm.hierarchical import Hierarchical
from dpoptim.comm.mpi.messages import Messages
from dpoptim.comm.mpi.polled import PolledMessages
from dpoptim.comm.node.alone import Alone
from dpoptim.comm.node.peer_memory import PeerMemory
from dpoptim.comm.node.shared_memory import meeting
from dpoptim.comm.node.sleeping_barrier import SleepingBarrier
from dpoptim.comm.node.small_sums import SmallSums
from dpoptim.comm.node.staging import StagingArea
from dpoptim.comm.topology import Topology
from dpoptim.partition import even_counts, start_offsets

pytestmark = pytest.mark.parallel

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]
NUMELS = [0, 1, 5, 301]
# The sums of these are taken in the order of ranks. Those of the others have an order of their own: MPI's, or nodes'.
IN_ORDER = ["reading", "staging", "slots"]
OTHERS = ["messages", "polled messages", "two nodes", "nodes of one rank"]


def _peers(messages):
    try:
        return PeerMemory(messages, messages.barrier)
    except OSError as error:
        pytest.skip(f"this system does not let ranks read each other's memory: {error}")


def _slots(messages):
    if not SleepingBarrier.is_here():
        pytest.skip("this system has no futex")
    return SmallSums(messages, 301 * 8)


def _hierarchical(messages, node_of):
    """Return the transport of ranks that seem to be on these nodes, and what is to be freed."""
    nodes = {}
    for rank in range(messages.world_size):
        nodes.setdefault(node_of(rank), []).append(rank)
    mine = node_of(messages.rank)
    topology = Topology(tuple(map(tuple, nodes.values())), list(nodes).index(mine), nodes[mine].index(messages.rank))
    if not topology.is_even:
        pytest.skip("parts of nodes of different sizes go by messages")
    node, across = messages.split(mine, messages.rank), messages.split(topology.local_rank, topology.node)
    inner = Alone() if topology.local_size == 1 else StagingArea(node, node.barrier, 1 << 10)
    return Hierarchical(inner, across, topology), node


@pytest.fixture(params=[*IN_ORDER, *OTHERS])
def transport(request, world):
    messages, name = Messages(world, 1 << 20), request.param
    if world.size == 1:
        messages.free()
        pytest.skip("one rank exchanges with nobody")
    make = {
        "reading": lambda: (_peers(messages), None),
        "staging": lambda: (StagingArea(messages, meeting(messages, sleeping=False), 1 << 10), None),
        "slots": lambda: (_slots(messages), None),
        "messages": lambda: (messages, None),
        "polled messages": lambda: (PolledMessages(messages), None),
        "two nodes": lambda: _hierarchical(messages, lambda rank: rank % 2),
        "nodes of one rank": lambda: _hierarchical(messages, lambda rank: rank),
    }[name]
    try:
        made, node = make()
    except BaseException:  # a skip too
        messages.free()
        raise
    yield name, made
    made.free()
    if node is not None:
        node.free()
    messages.free()


def _values(name, rank, numel, dtype):
    """Return numbers, other ones on every rank, whose sums are rounded if their order is that of ranks."""
    generator = torch.Generator().manual_seed(rank)
    if name in IN_ORDER:
        return torch.randn(numel, generator=generator, dtype=torch.float64).exp().mul(3).to(dtype)
    return torch.randint(0, 16, (numel,), generator=generator).to(dtype)


def _expected(name, world, numel, dtype, scale):
    """Add one after the other, the obvious way."""
    values = [_values(name, rank, numel, dtype) for rank in range(world.size)]
    if scale != 1.0:
        values = [value * scale for value in values]
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = values[0].to(wide)
    for value in values[1:]:
        total = total + value.to(wide)
    return total.to(dtype)


def _cases(scales):
    return [
        (dtype, numel, scale)
        for dtype in DTYPES
        for numel in NUMELS
        for scale in (scales if dtype.is_floating_point else [1.0])
    ]


def test_sums(transport, world):
    name, carrier = transport
    wrong = []
    for dtype, numel, scale in _cases([1.0, 0.5]):  # halves are exact
        tensor = _values(name, world.rank, numel, dtype)
        carrier.all_reduce(tensor, scale).wait()
        if not torch.equal(tensor, _expected(name, world, numel, dtype, scale)):
            wrong.append((dtype, numel, scale))
    assert not wrong


@pytest.mark.parametrize("division", ["even", "all of the last", "in place"])
def test_parts_of_sums(transport, world, division):
    name, carrier = transport
    wrong = []
    for dtype, numel, scale in _cases([1.0, 0.5]):
        counts = even_counts(numel, world.size)
        if division == "all of the last":
            counts = [0] * (world.size - 1) + [numel]
        start = start_offsets(counts)[world.rank]
        source = _values(name, world.rank, numel, dtype)
        before, own = source.clone(), source[start : start + counts[world.rank]]
        output = own if division == "in place" else torch.empty_like(own)
        carrier.reduce_scatter(output, source, counts, scale).wait()
        expected = _expected(name, world, numel, dtype, scale)[start : start + len(own)]
        before[start : start + len(own)] = source[start : start + len(own)]
        if not (torch.equal(output, expected) and torch.equal(source, before)):
            wrong.append((dtype, numel, scale))
    assert not wrong


@pytest.mark.parametrize("is_prepared", [False, True])
def test_gathered_parts(transport, world, is_prepared):
    name, carrier = transport
    wrong = []
    for dtype, numel, _ in [*_cases([1.0]), (torch.bool, 7, 1.0), (torch.float8_e4m3fn, 9, 1.0)]:
        counts = even_counts(numel, world.size)
        parts = [_values(name, rank, count, torch.float32).to(dtype) for rank, count in enumerate(counts)]
        whole = torch.zeros(numel, dtype=dtype)
        if is_prepared:
            start = carrier.prepare_all_gathers([(whole, counts)])
        for _ in range(1 + is_prepared):
            whole.view(torch.uint8).zero_()
            whole.split(counts)[world.rank].copy_(parts[world.rank])
            for work in start() if is_prepared else [carrier.all_gather(whole, counts)]:
                work.wait()
            if not torch.equal(whole.view(torch.uint8), torch.cat(parts).view(torch.uint8)):
                wrong.append((dtype, numel))
    assert not wrong


def test_memory_is_where_sums_are_taken(transport):
    name, carrier = transport
    assert carrier.has_memory == (name == "reading")
    memory = carrier.allocate(1 << 12)
    assert (memory is not None) == carrier.has_memory
    if memory is not None:
        tensor = memory.tensor(64, torch.float32, [5], 16)
        carrier.all_reduce(tensor.fill_(2.0), 0.5).wait()
        assert tensor.unique().numel() == 1
    assert carrier.allocate(0) is None


def test_a_rank_alone_copies_and_scales():
    alone = Alone()
    tensor = torch.arange(6.0)
    alone.all_reduce(tensor, 0.5).wait()
    output = torch.empty(3)
    alone.reduce_scatter(output, tensor, [3], 2.0, starts=[2]).wait()
    alone.reduce_scatter(tensor[:3], tensor, [3], 2.0).wait()
    alone.all_gather(tensor, [6]).wait()
    assert output.tolist() == [2.0, 3.0, 4.0]
    assert tensor.tolist() == [0.0, 1.0, 2.0, 1.5, 2.0, 2.5]
