"""Which mode an optimizer gets, from what was asked for, its class, its parameters and the nodes."""

import logging

import pytest
import torch
from torch import nn

from dpoptim.comm.topology import Topology
from dpoptim.modes import choose
from dpoptim.modes.choose import choose_mode
from dpoptim.modes.sharded_stepping import Stepped


class Ranks:
    """Stands for a communicator: all ranks say what this one says, but for one that may have something of its own."""

    def __init__(self, nodes=((0, 1), (2, 3)), other=None):
        self.world_size, self.rank = sum(map(len, nodes)), 0
        self.topology = Topology(nodes, 0, 0)
        self._other = other

    def all_gather_object(self, own):
        return [own] * (self.world_size - 1) + [self._other or own]

    def start_sum(self, numbers):
        class Sum:
            wait = staticmethod(lambda: [number * self.world_size for number in numbers])

        return Sum()

    def broadcast_object(self, item):
        return item

    def why_no_node_memory(self):
        return "there is none today"


def _choose(ranks, optimizer=None, *, shard=False, node_shared=False):
    optimizer = optimizer or torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1)
    stepped = Stepped(optimizer, ranks, None, None, lambda: ["weight", "bias"])
    return choose_mode(stepped, shard=shard, node_shared=node_shared)


@pytest.mark.parametrize(
    ("nodes", "asked", "name"),
    [
        (((0, 1),), {}, "replicated"),
        (((0,),), {"shard": True}, "replicated"),
        (((0,),), {"node_shared": True}, "replicated"),
        (((0, 1),), {"shard": True}, "sharded"),
        (((0,), (1,)), {"shard": True}, "sharded"),
        (((0,), (1,)), {"node_shared": True}, "replicated"),
        (((0, 1), (2,)), {"node_shared": True}, "node-shared"),
    ],
)
def test_what_was_asked_for_is_taken_where_ranks_can_share(monkeypatch, nodes, asked, name):
    monkeypatch.setattr(choose, "NodeMemory", lambda *_: "memory")
    assert _choose(Ranks(nodes), **asked).name == name


@pytest.mark.parametrize(
    ("asked", "owners", "is_in_node"), [({"shard": True}, (5, 5), False), ({"node_shared": True}, (2, 3), True)]
)
def test_who_owns_what(monkeypatch, asked, owners, is_in_node):
    monkeypatch.setattr(choose, "NodeMemory", lambda *_: "memory")
    sharding = _choose(Ranks(((0, 1, 2), (3, 4))), **asked).sharding
    assert (sharding.num_owners, sharding.num_ranks) == owners
    assert (sharding.in_node, sharding.owner) == (is_in_node, 0)


@pytest.mark.parametrize(("kind", "by_element"), [(torch.optim.AdamW, True), (torch.optim.Adafactor, False)])
def test_by_what_it_is_sharded(kind, by_element):
    mode = _choose(Ranks(), kind(nn.Linear(3, 2).parameters()), shard=True)
    assert mode.sharding.by_element is by_element


def test_what_needs_a_closure_stays_replicated_with_a_warning():
    with pytest.warns(UserWarning, match="LBFGS can't be sharded among ranks, since it needs a closure: it stays"):
        assert _choose(Ranks(), torch.optim.LBFGS(nn.Linear(3, 2).parameters()), shard=True).name == "replicated"


def test_parameters_that_share_memory_on_any_rank_stay_replicated_with_a_warning():
    ranks = Ranks(other="parameters 'a', 'b' share memory")
    with pytest.warns(UserWarning, match="SGD can't be sharded among ranks, since parameters 'a', 'b' share memory"):
        assert _choose(ranks, shard=True).name == "replicated"


def test_without_node_memory_it_is_sharded_and_says_so(caplog):
    with caplog.at_level(logging.WARNING, "dpoptim"):
        assert _choose(Ranks(), node_shared=True).name == "sharded"
    assert "as shard=True: there is none today (rank 0)" in caplog.text


def test_a_part_of_a_larger_tensor_is_not_moved_to_node_memory(monkeypatch, caplog):
    monkeypatch.setattr(choose, "NodeMemory", lambda *_: "memory")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(10)[:4])], lr=0.1)
    with caplog.at_level(logging.WARNING, "dpoptim"):
        assert _choose(Ranks(), optimizer, node_shared=True).name == "sharded"
    assert "a parameter is a part of a larger tensor" in caplog.text
