"""Sums in the order of ranks: the same bits by whatever way, those of a loop in the order of ranks."""

import pytest
import torch

import dpoptim.comm.mpi.messages
import dpoptim.comm.node.peer_memory
import dpoptim.comm.node.process_memory
import dpoptim.comm.selection
from dpoptim.comm.communicator import Communicator
from dpoptim.comm.mpi.messages import Messages
from dpoptim.comm.summing import add_others_in_order, sum_in_order

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8]
NUMELS = [1, 7, 1000, 3001]


def _values(rank, numel, dtype):
    """Return numbers whose sums are rounded, other ones on every rank."""
    generator = torch.Generator().manual_seed(rank)
    values = torch.randn(numel, generator=generator, dtype=torch.float64).exp().mul(3)
    return values.to(dtype)


def _expected(num_ranks, numel, dtype):
    """Add one after the other, the obvious way."""
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = _values(0, numel, dtype).to(wide)
    for rank in range(1, num_ranks):
        total = total + _values(rank, numel, dtype).to(wide)
    return total.to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_rows_are_added_in_their_order(dtype):
    for num_rows in range(1, 6):
        rows = [_values(rank, 50, dtype) for rank in range(num_rows)]
        out = torch.empty(50, dtype=dtype)
        assert sum_in_order(rows, out) is out
        wide = out.to(torch.float64), _exact(rows)
        if dtype in DTYPES:
            assert torch.equal(out, _expected(num_rows, 50, dtype))
        else:
            assert torch.equal(*wide)


def _exact(rows):
    return sum(row.to(torch.float64) for row in rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_sum_may_be_taken_in_the_place_of_one(dtype):
    for num_rows in range(2, 6):
        for place in range(num_rows):
            rows = [_values(rank, 50, dtype) for rank in range(num_rows)]
            add_others_in_order(rows, place, torch.empty(60, dtype=dtype))
            assert torch.equal(rows[place], _expected(num_rows, 50, dtype))
            others = [rank for rank in range(num_rows) if rank != place]
            assert all(torch.equal(rows[rank], _values(rank, 50, dtype)) for rank in others)


# On which node a rank seems to be, and what serves there.
WAYS = ["messages in pieces", "polled messages in pieces", "reading", "staging", "lent memory"]


@pytest.fixture(params=WAYS)
def way(request, world, monkeypatch):
    one_node = request.param in ("reading", "staging", "lent memory")
    monkeypatch.setattr(Messages, "split_node", lambda self: self.split(0 if one_node else self.rank, self.rank))
    monkeypatch.setattr(dpoptim.comm.selection, "_SHARED_MEMORY_BYTES", 1)
    monkeypatch.setattr(dpoptim.comm.node.peer_memory, "_WINDOW_BYTES", 960)
    for name, value in (("_IN_PIECES_BYTES", 1), ("_PIECE_BYTES", 1000), ("_SHARE_BYTES", 1)):
        monkeypatch.setattr(dpoptim.comm.mpi.messages, name, value)
    if request.param == "staging":
        monkeypatch.setattr(dpoptim.comm.node.process_memory, "read_memory", _refuse)
    communicator = Communicator(world)
    if request.param == "polled messages in pieces":
        first, communicator = communicator, communicator.duplicate(overlap=True, polled=True)
        first.free()
    yield request.param, communicator
    communicator.free()


def _refuse(*_):
    raise PermissionError("not allowed")


@pytest.mark.parallel
def test_every_way_gives_the_bits_of_the_loop(way):
    name, communicator = way
    lent = communicator.allocate(1 << 16) if name == "lent memory" else None
    wrong = []
    for dtype in DTYPES:
        for numel in NUMELS:
            tensor = _values(communicator.rank, numel, dtype)
            if lent is not None:
                tensor = lent.tensor(0, dtype, [numel], 0).copy_(tensor)
            communicator.all_reduce(tensor, async_op=True).wait()
            if not torch.equal(tensor, _expected(communicator.world_size, numel, dtype)):
                wrong.append((dtype, numel))
    assert not wrong
