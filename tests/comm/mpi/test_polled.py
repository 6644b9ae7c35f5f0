"""PolledMessages: the sums of any other way, on ranks that look after them at different times."""

import pytest
import torch

import dpoptim.comm.mpi.messages
import dpoptim.comm.mpi.pieces
from dpoptim.comm.mpi.messages import Messages
from dpoptim.comm.mpi.polled import PolledMessages
from dpoptim.partition import even_counts, start_offsets

pytestmark = pytest.mark.parallel

NUMELS = [0, 1, 7, 1000, 30, 500]


@pytest.fixture(params=[False, True], ids=["whole", "in pieces"])
def messages(world, request, monkeypatch):
    monkeypatch.setattr(dpoptim.comm.mpi.pieces, "_BETWEEN_LOOKS_S", 0.0)
    monkeypatch.setattr(dpoptim.comm.mpi.messages, "_IN_PIECES_BYTES", 8)
    monkeypatch.setattr(dpoptim.comm.mpi.messages, "_PIECE_BYTES", 100)
    monkeypatch.setattr(dpoptim.comm.mpi.messages, "_SHARE_BYTES", 1)
    made = Messages(world, 1 << 30)
    made.in_pieces = request.param
    yield made
    made.free()


def _values(rank, numel, dtype, seed):
    return torch.randint(-9, 9, [numel], generator=torch.Generator().manual_seed(100 * seed + rank)).to(dtype)


def _sum(world_size, numel, dtype, seed):
    return sum(_values(rank, numel, torch.int64, seed) for rank in range(world_size)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_sums_under_way_at_once_are_those_of_all_ranks(world, messages, dtype):
    """Each rank looks after them at times of its own, so that pieces end in another order on each."""
    rank, size, scale = world.rank, world.size, 2.0 if dtype.is_floating_point else 1.0
    polled = PolledMessages(messages)
    wrong = []
    for turn in range(3):
        transfers, results, expected = [], [], []
        for seed, numel in enumerate(NUMELS, 10 * turn):
            tensor = _values(rank, numel, dtype, seed)
            counts = even_counts(numel, size)
            start, count = start_offsets(counts)[rank], counts[rank]
            part = torch.empty(count, dtype=dtype)
            transfers.append(polled.all_reduce(tensor))
            transfers.append(polled.reduce_scatter(part, _values(rank, numel, dtype, seed), counts, scale))
            whole = _values(0, numel, dtype, seed)
            others = torch.ones(numel, dtype=torch.bool)
            others[start : start + count] = False
            transfers.append(polled.all_gather(gathered := whole.masked_fill(others, 0), counts))
            results += [tensor, part, gathered]
            total = _sum(size, numel, dtype, seed)
            expected += [total, (scale * total[start : start + count]).to(dtype), whole]
            for _ in range((rank * 7 + turn * 3 + seed) % 5):
                polled.poll()
        for transfer in reversed(transfers) if rank % 2 else transfers:
            transfer.wait()
        wrong += [(turn, i) for i, (a, b) in enumerate(zip(results, expected, strict=True)) if not torch.equal(a, b)]
    polled.free()
    assert wrong == []


def test_freeing_ends_what_is_under_way(world, messages):
    polled = PolledMessages(messages)
    tensor = torch.ones(1000)
    polled.all_reduce(tensor)
    polled.free()
    assert torch.equal(tensor, torch.full((1000,), float(world.size)))
