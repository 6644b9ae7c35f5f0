"""What ranks have copies of is made the same on all."""

import pytest
import torch
from torch import nn

from dpoptim.comm.communicator import Communicator
from dpoptim.modes.replicas import average_buffers, broadcast_replicas, broadcast_tensors

pytestmark = pytest.mark.parallel


@pytest.fixture
def communicator(world):
    made = Communicator(world)
    yield made
    made.free()


def test_tensors_become_rank_0s_whatever_their_strides(world, communicator):
    value = float(world.rank + 1)
    tensors = [torch.full((2, 3), value), torch.full((2, 3), value).t(), torch.full((4, 6), value)[::2, 1::2]]
    addresses = [tensor.data_ptr() for tensor in tensors]
    broadcast_tensors(communicator, tensors)
    for tensor, address in zip(tensors, addresses, strict=True):
        assert tensor.data_ptr() == address
        assert torch.equal(tensor, torch.ones_like(tensor))


def test_an_optimizer_its_state_and_the_rest_of_a_module(world, communicator):
    value = float(world.rank + 1)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    module[1].weight.requires_grad_(False)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(value)
    optimizer = torch.optim.SGD(module[0].parameters(), lr=0.1)
    nested = {"numbers": [torch.tensor(value), {"deep": torch.tensor([value])}], "name": world.rank}
    optimizer.state[module[0].weight] = nested
    broadcast_replicas(communicator, optimizer, None)
    assert all(bool((parameter == 1).all()) for parameter in module[0].parameters())
    assert (nested["numbers"][0].item(), nested["numbers"][1]["deep"].item()) == (1.0, 1.0)
    assert nested["name"] == world.rank
    assert bool((module[1].weight == value).all())
    broadcast_replicas(communicator, optimizer, module)
    assert all(bool((tensor == 1).all()) for tensor in (*module.parameters(), *module.buffers()))


def test_buffers_become_their_mean_and_integers_rank_0s(world, communicator):
    module = nn.BatchNorm1d(2)
    module.running_mean.fill_(world.rank)
    module.num_batches_tracked.fill_(world.rank + 7)
    module.register_buffer("turned", torch.full((2, 3), float(world.rank)).t())
    average_buffers(communicator, module)
    mean = sum(range(world.size)) / world.size
    torch.testing.assert_close(module.running_mean, torch.full((2,), mean))
    torch.testing.assert_close(module.turned, torch.full((3, 2), mean))
    assert module.num_batches_tracked.item() == 7
