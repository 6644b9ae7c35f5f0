"""LentMemory: the sums of what lies there are those of any other way, to the bit."""

import pytest
import torch

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.node.lent_memory import LentMemory
from dpoptim.comm.node.peer_memory import PeerMemory
from dpoptim.partition import even_counts, start_offsets

pytestmark = pytest.mark.parallel


@pytest.fixture
def node(world):
    communicator = Communicator(world)
    yield communicator
    communicator.free()


def _values(rank, numel, dtype):
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_have_the_bits_of_sums_in_private_memory(node, dtype):
    rank, size, numel = node.rank, node.world_size, 1003
    if size == 1 or node.why_no_peer_memory() is not None:
        pytest.skip("no rank reads another's memory here")
    lent = LentMemory(node, 64 + numel * dtype.itemsize, window_bytes=400)
    tensor = lent.tensor(48, dtype, [numel], 16).copy_(_values(rank, numel, dtype))
    private = tensor.clone()
    counts = even_counts(numel, size)
    starts = start_offsets(counts)
    peers = PeerMemory(node, node.barrier)
    peers.reduce_scatter(private[starts[rank] : starts[rank] + counts[rank]], private, counts, 1 / 3)
    peers.wait()
    places = tuple(node.all_gather_object(tensor.data_ptr()))
    found = []
    for _ in range(2):  # the second time from what was found out at first
        tensor.copy_(_values(rank, numel, dtype))
        node.barrier()
        found.append(lent.sum_part(places, dtype, starts[rank], counts[rank], 1 / 3))
        node.barrier()
        found.append(torch.equal(tensor, private))
    assert found == [True] * 4


def test_what_does_not_lie_there_is_not_summed(node):
    lent = LentMemory(node, 4000, window_bytes=400)
    inside, outside = lent.tensor(0, torch.float32, [1000], 0), torch.ones(1000)
    places = node.all_gather_object(inside.data_ptr())
    elsewhere = tuple(outside.data_ptr() if rank == 0 else place for rank, place in enumerate(places))
    assert not lent.sum_part(elsewhere, torch.float32, 0, 10, 1.0)
    end = lent.view(node.rank, inside.data_ptr() + 4096 - 8, 8)  # an area is of whole pages
    assert end is not None
    assert lent.view(node.rank, inside.data_ptr() + 4096 - 8, 9) is None
    assert lent.view(node.rank, inside.data_ptr() - 1, 1) is None
    node.barrier()


def test_every_rank_sees_what_lies_there(node):
    lent = LentMemory(node, 800, window_bytes=400)
    lent.tensor(0, torch.float64, [100], 0).fill_(node.rank + 1.0)
    places = node.all_gather_object(lent.tensor(0, torch.float64, [100], 0).data_ptr())
    views = [lent.view(rank, place, 800) for rank, place in enumerate(places)]
    assert [view.view(torch.float64).unique().tolist() for view in views] == [
        [rank + 1.0] for rank in range(node.world_size)
    ]
    node.barrier()
