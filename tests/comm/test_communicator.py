"""Communicator: every collective, dtype, size and kind of communicator, against sums made of gathered objects."""

import pytest
import torch

import dpoptim.comm.mpi.messages
import dpoptim.comm.node.peer_memory
import dpoptim.comm.node.process_memory
import dpoptim.comm.router
import dpoptim.comm.selection
from dpoptim.comm.communicator import Communicator
from dpoptim.comm.mpi.messages import Messages
from dpoptim.comm.node.staging import StagingArea
from dpoptim.partition import even_counts, start_offsets

pytestmark = pytest.mark.parallel

SUMMED = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]
MOVED_ONLY = [torch.bool, torch.float8_e4m3fn]
NUMELS = [0, 1, 7, 1000]
LIBC = dpoptim.comm.node.process_memory._libc


class TinyStagingArea(StagingArea):
    """One that needs many chunks for a few numbers."""

    def __init__(self, node, meet, chunk_bytes):
        super().__init__(node, meet, 192)


# Which node a rank seems to be on, or None for messages alone. With three ranks the nodes of both kinds are uneven.
NODES = {
    "messages": None,
    "a node each": lambda rank: rank,
    "one node": lambda rank: 0,
    "blocks": lambda rank: rank // 2,
    "round robin": lambda rank: rank % 2,
}
# By which way, with a thread, polled or neither, and whether ranks of a node may read each other's memory.
WAYS = [
    ("messages", False, True),
    ("messages", True, True),
    ("a node each", False, True),
    ("a node each", True, True),
    ("a node each", "polled", True),
    ("one node", True, False),
    ("one node", False, True),
    ("blocks", False, True),
    ("round robin", False, False),
]


@pytest.fixture(
    params=WAYS,
    ids=lambda way: (
        f"{way[0]}{', thread' * (way[1] is True)}{', polled' * (way[1] == 'polled')}{', no reading' * (not way[2])}"
    ),
)
def communicator(request, any_comm, monkeypatch):
    nodes, overlap, reading = request.param
    if not reading:
        monkeypatch.setattr(dpoptim.comm.node.process_memory, "read_memory", _refuse)
    if nodes == "blocks":  # whose ranks share a core, and so wait asleep
        monkeypatch.setattr(dpoptim.comm.router, "available_cores", lambda: {0})
    if NODES[nodes] is not None:
        monkeypatch.setattr(dpoptim.comm.selection, "_SHARED_MEMORY_BYTES", 0)
        monkeypatch.setattr(dpoptim.comm.selection, "StagingArea", TinyStagingArea)
        monkeypatch.setattr(dpoptim.comm.node.peer_memory, "_WINDOW_BYTES", 192)
        monkeypatch.setattr(dpoptim.comm.node.process_memory, "_libc", ReadsALittle)
        monkeypatch.setattr(Messages, "split_node", lambda self: self.split(NODES[nodes](self.rank), self.rank))
    if nodes != "messages":  # between nodes, in pieces of a few numbers
        monkeypatch.setattr(dpoptim.comm.mpi.messages, "_IN_PIECES_BYTES", 8)
        monkeypatch.setattr(dpoptim.comm.mpi.messages, "_PIECE_BYTES", 100)
        monkeypatch.setattr(dpoptim.comm.mpi.messages, "_SHARE_BYTES", 1)
    made = Communicator(any_comm, overlap=overlap is True)
    if overlap == "polled":
        first, made = made, made.duplicate(overlap=True, polled=True)
        first.free()
    yield made
    made.free()


class ReadsALittle:
    """The C library, but a call reads at most 100 bytes and stops early."""

    @staticmethod
    def process_vm_readv(pid, here, num_here, there, num_there, flags):
        here[0].num_bytes = min(100, here[0].num_bytes)
        return LIBC.process_vm_readv(pid, here, 1, there, num_there, flags)


def _refuse(*_):
    raise PermissionError("not allowed")


def _values(rank, numel, dtype):
    """Return small integers that any dtype holds, and whose sums it holds too; other ones on every rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    values = torch.randint(0, 8, (numel,), generator=generator)
    return values.to(torch.complex128).mul(1 + 2j).to(dtype) if dtype.is_complex else values.to(dtype)


def _sum(communicator, numel, dtype):
    wide = torch.complex128 if dtype.is_complex else torch.float64
    total = sum(_values(rank, numel, dtype).to(wide) for rank in range(communicator.world_size))
    return total.to(dtype)


# Dtypes and sizes are gone through within a test: making a communicator takes longer than using it. What is wrong is
# collected, so that a rank that finds it does not leave the others in the next collective.


def test_all_reduce(communicator):
    wrong = []
    for dtype in SUMMED:
        for numel in NUMELS:
            tensor = _values(communicator.rank, numel, dtype)
            communicator.all_reduce(tensor, async_op=True).wait()
            if not torch.equal(tensor, _sum(communicator, numel, dtype)):
                wrong.append((dtype, numel, tensor))
    assert not wrong


@pytest.mark.parametrize("even", [True, False])
def test_reduce_scatter_and_all_gather(communicator, even):
    numel = 11
    counts = even_counts(numel, communicator.world_size)
    if not even:  # one rank has all
        counts = [0] * (communicator.world_size - 1) + [numel]
    given = None if even else counts
    offset, count = start_offsets(counts)[communicator.rank], counts[communicator.rank]
    wrong = []
    for dtype in SUMMED:
        source = _values(communicator.rank, numel, dtype)
        before, total = source.clone(), _sum(communicator, numel, dtype)
        part, whole = torch.empty(count, dtype=dtype), torch.empty(numel, dtype=dtype)
        communicator.reduce_scatter(part, source, counts=given, async_op=True).wait()
        communicator.all_gather(whole, total[offset : offset + count], counts=given, async_op=True).wait()
        if not torch.equal(part, total[offset : offset + count]):
            wrong.append((dtype, "reduce_scatter", part))
        if not torch.equal(source, before):
            wrong.append((dtype, "the input is left unchanged", source))
        if not torch.equal(whole, total):
            wrong.append((dtype, "all_gather", whole))
    assert not wrong


def test_broadcast_and_all_gather_move_any_dtype(communicator):
    root = communicator.world_size - 1
    wrong = []
    for dtype in SUMMED + MOVED_ONLY:
        tensor = _values(communicator.rank, 9, dtype)
        communicator.broadcast(tensor, root=root, async_op=True).wait()
        if not torch.equal(tensor.view(torch.uint8), _values(root, 9, dtype).view(torch.uint8)):
            wrong.append((dtype, "broadcast", tensor))
        part = _values(communicator.rank, 3, dtype)
        whole = torch.empty(3 * communicator.world_size, dtype=dtype)
        communicator.all_gather(whole, part)
        expected = torch.cat([_values(rank, 3, dtype) for rank in range(communicator.world_size)])
        if not torch.equal(whole.view(torch.uint8), expected.view(torch.uint8)):
            wrong.append((dtype, "all_gather", whole))
    assert not wrong


@pytest.mark.parametrize("is_given", [True, False])
def test_all_gather_in_place(communicator, is_given):
    whole = torch.zeros(2 * communicator.world_size)
    own = whole[2 * communicator.rank :][:2].fill_(communicator.rank)
    communicator.all_gather(whole, own if is_given else None)
    assert whole.tolist() == [float(rank) for rank in range(communicator.world_size) for _ in range(2)]


def test_prepared_gathers_may_be_started_again_and_again(communicator):
    rank, size = communicator.rank, communicator.world_size
    communicator.why_no_node_memory()
    numels = [23, 1, 3 * size]
    counts = [even_counts(numel, size) for numel in numels]
    counts[2] = [0] * (size - 1) + [3 * size]  # one rank has it all
    wholes = [torch.zeros(numel, dtype=torch.float64) for numel in numels]
    start = communicator.prepare_all_gathers(list(zip(wholes, counts, strict=True)))
    wrong = []
    for turn in range(3):
        for whole, each in zip(wholes, counts, strict=True):
            whole.zero_().split(each)[rank].fill_(10.0 * rank + turn)
        for work in start():
            work.wait()
        for whole, each in zip(wholes, counts, strict=True):
            expected = [10.0 * owner + turn for owner, count in enumerate(each) for _ in range(count)]
            if whole.tolist() != expected:
                wrong.append((turn, whole))
    assert not wrong
    with pytest.raises(ValueError, match="counts must have one entry a rank"):
        communicator.prepare_all_gathers([(wholes[0], [1] * size)])


def test_messages_cut_small_give_the_same(communicator, monkeypatch):
    numel = 23
    counts = even_counts(numel, communicator.world_size)
    wrong = []
    for max_bytes in (1, 8, 40):
        monkeypatch.setattr(communicator._messages, "max_message_bytes", max_bytes)
        for dtype in (torch.float32, torch.bfloat16, torch.complex64):
            total = _sum(communicator, numel, dtype)
            tensor = _values(communicator.rank, numel, dtype)
            communicator.all_reduce(tensor)
            part, whole = torch.empty(counts[communicator.rank], dtype=dtype), torch.empty(numel, dtype=dtype)
            communicator.reduce_scatter(part, _values(communicator.rank, numel, dtype))
            communicator.all_gather(whole, part)
            sent = _values(communicator.rank, numel, dtype)
            communicator.broadcast(sent)
            for what, found, expected in (
                ("all_reduce", tensor, total),
                ("reduce_scatter and all_gather", whole, total),
                ("broadcast", sent, _values(0, numel, dtype)),
            ):
                if not torch.equal(found, expected):
                    wrong.append((max_bytes, dtype, what, found))
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_sums_are_accumulated_in_float32(world, dtype):
    """One large number and many small ones, each of which alone vanishes beside it in 16 bits."""
    communicator = Communicator(world)
    large = 2.0 ** (11 if dtype == torch.float16 else 8)
    tensor = torch.tensor([large if communicator.rank == 0 else 1.0], dtype=dtype)
    communicator.all_reduce(tensor)
    exact = torch.tensor(large + communicator.world_size - 1, dtype=torch.float64)
    assert torch.equal(tensor[0], exact.to(dtype))
    communicator.free()


def test_results_are_the_same_bits_on_all_ranks(communicator):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(communicator.rank)
        tensor = torch.randn(3001, generator=generator, dtype=torch.float64).to(dtype)
        communicator.all_reduce(tensor)
        bits = communicator.all_gather_object(tensor.view(torch.uint8).numpy().tobytes())
        assert len(set(bits)) == 1


def test_more_than_2_31_elements(world):
    if world.size != 2:
        pytest.skip("5 GB a rank: on two ranks only")
    numel = 2**31 + 9
    communicator = Communicator(world)
    tensor = torch.ones(numel, dtype=torch.int8)
    tensor[-1] = world.rank
    communicator.all_reduce(tensor)
    assert tensor[-1] == 1
    assert tensor[0] == tensor[2**31] == 2
    communicator.broadcast(tensor)
    communicator.free()


def test_two_communicators_do_not_mix(world):
    first, second = Communicator(world, overlap=True), Communicator(world, overlap=True)
    a, b = torch.full((1000,), 1.0), torch.full((1000,), 10.0)
    order = [(first, a), (second, b)]
    works = [made.all_reduce(tensor, async_op=True) for made, tensor in order[:: 1 if world.rank % 2 else -1]]
    for work in works:
        work.wait()
    assert a[0] == world.size
    assert b[0] == 10 * world.size
    first.free()
    second.free()


def test_objects(communicator):
    assert communicator.all_gather_object({"rank": communicator.rank}) == [
        {"rank": rank} for rank in range(communicator.world_size)
    ]
    assert communicator.broadcast_object(communicator.rank, root=communicator.world_size - 1) == (
        communicator.world_size - 1
    )
    communicator.barrier()


def test_shared_duplicates_belong_to_their_communicator(world):
    shared = Communicator.shared(world)
    assert Communicator.shared(None) is shared
    other = world.Dup()
    assert Communicator.shared(other) is not shared
    assert Communicator.shared(other) is Communicator.shared(other)
    Communicator.shared(other).free()
    other.Free()


def test_the_part_in_a_node_is_the_sum_over_all_nodes(communicator):
    topology = communicator.topology
    counts = even_counts(23, min(len(node) for node in topology.nodes))
    counts += [0] * (topology.local_size - len(counts))
    start, count = start_offsets(counts)[topology.local_rank], counts[topology.local_rank]
    for dtype in (torch.float64, torch.bfloat16, torch.complex64):
        source = _values(communicator.rank, 23, dtype)
        part = torch.empty(count, dtype=dtype)
        if communicator.why_no_node_memory() is None:
            communicator.reduce_scatter_in_node(part, source, counts=counts)
            assert torch.equal(part, _sum(communicator, 23, dtype)[start : start + count])
        else:
            with pytest.raises(RuntimeError, match="needs shared memory on every node"):
                communicator.reduce_scatter_in_node(part, source, counts=counts)


def test_several_may_be_started_before_the_first_is_waited_for(communicator):
    rank, size, topology = communicator.rank, communicator.world_size, communicator.topology
    counts, numel = even_counts(23, size), 23
    start = start_offsets(counts)[rank]
    own = slice(start, start + counts[rank])
    in_node = even_counts(numel, min(len(node) for node in topology.nodes))
    in_node += [0] * (topology.local_size - len(in_node))
    in_node_start = start_offsets(in_node)[topology.local_rank]
    total = _sum(communicator, numel, torch.float64)
    has_node_memory = communicator.why_no_node_memory() is None
    started, results = [], []
    for _ in range(2):
        reduced, part = _values(rank, numel, torch.float64), torch.empty(counts[rank], dtype=torch.float64)
        whole, of_node = torch.zeros(numel, dtype=torch.float64), torch.empty(in_node[topology.local_rank]).double()
        source = _values(rank, numel, torch.float64)
        started.append(communicator.all_reduce(reduced, async_op=True))
        started.append(communicator.reduce_scatter(part, source, counts=counts, async_op=True))
        started.append(communicator.all_gather(whole, total[own].clone(), counts=counts, async_op=True))
        if has_node_memory:
            started.append(communicator.reduce_scatter_in_node(of_node, source, counts=in_node, async_op=True))
            results.append((of_node, total[in_node_start : in_node_start + len(of_node)]))
        results += [(reduced, total), (part, total[own]), (whole, total)]
    for work in started:
        work.wait()
    assert all(torch.equal(found, expected) for found, expected in results)


def test_memory_shared_in_a_node(communicator):
    memory = communicator.share_in_node(80)
    numbers = memory.tensor(torch.float64, [10])
    if communicator.topology.local_rank == 0:
        numbers.copy_(torch.arange(10.0))
    communicator.barrier()
    assert numbers.tolist() == list(range(10))
    assert memory.tensor(torch.float64, [2, 2], offset_bytes=48).tolist() == [[6, 7], [8, 9]]
    communicator.barrier()


def test_topology(communicator):
    topology = communicator.topology
    assert sorted(rank for node in topology.nodes for rank in node) == list(range(communicator.world_size))
    assert topology.nodes[topology.node][topology.local_rank] == communicator.rank
    assert topology.local_size == len(topology.nodes[topology.node])


def test_heat_communicators(world):
    heat = pytest.importorskip("heat", reason="Heat is not installed in this environment")
    for comm in (heat.MPI_WORLD, heat.MPI_SELF, heat.MPI_WORLD.Split(color=world.rank % 2)):
        communicator = Communicator(comm)
        tensor = torch.ones(3)
        communicator.all_reduce(tensor)
        assert tensor[0] == comm.size == communicator.world_size
        communicator.free()


# ---------------------------------------------------------------- bad input


def test_what_has_no_sum(communicator):
    for dtype in MOVED_ONLY:
        with pytest.raises(TypeError, match=f"tensors of {dtype} have no sum over ranks"):
            communicator.all_reduce(torch.zeros(2).to(dtype))
        with pytest.raises(TypeError, match="have no sum"):
            communicator.reduce_scatter(torch.zeros(2).to(dtype), torch.zeros(2).to(dtype))


def test_strided_tensors_are_refused(communicator):
    with pytest.raises(ValueError, match=r"must be contiguous, got strides \(1, 3\) for shape \(3, 2\)"):
        communicator.all_reduce(torch.zeros(2, 3).t())


def test_wrong_roots_and_counts(communicator):
    with pytest.raises(ValueError, match=f"root must be a rank, 0 to {communicator.world_size - 1}, got 9"):
        communicator.broadcast(torch.zeros(2), root=9)
    with pytest.raises(ValueError, match="counts must have one entry a rank"):
        communicator.all_gather(torch.zeros(5), torch.zeros(3), counts=[3])
    with pytest.raises(ValueError, match="the part must have the dtype and device of the whole"):
        communicator.all_gather(torch.zeros(communicator.world_size), torch.zeros(1, dtype=torch.float64))
