"""Whether overlap pays: what follows from the times, and that all ranks decide alike."""

import math
import threading

import pytest
import torch

import dpoptim
from dpoptim.comm import overlap as overlap_module
from dpoptim.comm.communicator import Communicator
from dpoptim.comm.mpi import library
from dpoptim.comm.mpi.messages import Messages
from dpoptim.comm.mpi.polled import PolledMessages
from dpoptim.comm.overlap import Trial, duplicate_overlapping, try_overlap
from dpoptim.comm.topology import Topology


@pytest.mark.parametrize(
    ("awake_s", "asleep_s", "polled_s", "hidden", "pays", "way"),
    [
        (0.02, math.inf, math.inf, 0.0, False, "a computation hides"),
        (0.012, math.inf, math.inf, 0.8, True, "a computation hides"),
        (0.012, 0.015, 0.015, 0.8, True, "a computation hides"),
        (0.012, 0.015, 0.014, 0.6, True, "looks after it"),
        (0.025, 0.011, 0.014, 0.9, True, "asleep"),
        (0.03, 0.025, math.inf, -0.5, False, "asleep"),
        (0.012, 0.015, 0.011, 0.9, True, "looks after it"),
        (math.inf, math.inf, 0.019, 0.1, False, "looks after it"),
    ],
)
def test_the_better_way_to_wait_decides(awake_s, asleep_s, polled_s, hidden, pays, way):
    trial = Trial(1 << 20, 0.01, 0.01, awake_s, asleep_s, polled_s)
    assert trial.hidden == pytest.approx(hidden)
    assert (trial.pays, trial.sleeps, trial.polls) == (pays, way == "asleep", way == "looks after it")
    assert str(trial).startswith("yes" if pays else "no")
    assert way in str(trial)
    assert ("asleep" in str(trial), "looks after" in str(trial)) == (trial.sleeps, trial.polls)


def test_nothing_tried_is_no():
    trial = Trial(why_not="one rank exchanges nothing")
    assert not trial.pays
    assert not trial.sleeps
    assert not trial.polls
    assert str(trial) == "no (one rank exchanges nothing)"


@pytest.mark.parallel
@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("num_cores", [1, 64])
def test_one_node_tries_where_it_has_cores_to_spare(world, monkeypatch, num_cores):
    if world.size == 1 or not library.takes_threads():
        pytest.skip("one rank exchanges nothing, or this MPI takes no threads")
    monkeypatch.setattr(dpoptim.comm.overlap, "available_cores", lambda: set(range(num_cores)))
    communicator = Communicator(world)
    trial = try_overlap(communicator)
    communicator.free()
    assert (trial.why_not is None) == (trial.exchange_s > 0) == (num_cores == 64)
    assert ("the ranks' threads fill them" in str(trial)) == (num_cores == 1)


@pytest.mark.parallel
@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("nodes", ["one node", "a node each"])
def test_ranks_decide_alike(world, monkeypatch, nodes):
    if world.size == 1 or not library.takes_threads():
        pytest.skip("one rank exchanges nothing, or this MPI takes no threads")
    if nodes == "a node each":
        monkeypatch.setattr(Messages, "split_node", lambda self: self.split(self.rank, 0))
    own = world.Dup()  # or the trial of another test would be found
    communicator = Communicator.shared(own)
    trial = try_overlap(communicator)
    trials = communicator.all_gather_object(trial)
    parameter = torch.nn.Parameter(torch.ones(3))
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD([parameter], lr=0.1), comm=own, overlap="auto")
    overlaps, is_polled = opt.communicator.overlap, opt.communicator.is_polled
    parameter.sum().backward()
    opt.step()
    assert trials == [trial] * world.size
    assert (overlaps, is_polled) == (trial.pays, trial.pays and trial.polls)
    assert math.isfinite(trial.asleep_s) == math.isfinite(trial.polled_s) == (nodes == "a node each")
    assert torch.equal(parameter.detach(), torch.full((3,), 0.9))


@pytest.mark.parallel
@pytest.mark.ranks(2, 3)
def test_hooks_look_after_what_is_under_way(world, looked_after, monkeypatch):
    """One small parameter a bucket: the first is under way while the hooks of the others run, without a thread."""
    if world.size == 1:
        pytest.skip("one rank exchanges nothing")
    looks = []
    monkeypatch.setattr(PolledMessages, "poll", lambda self: looks.append(len(begun)))
    begun = []
    begin = PolledMessages.all_reduce
    monkeypatch.setattr(PolledMessages, "all_reduce", lambda self, *args: begun.append(args) or begin(self, *args))
    model = torch.nn.Sequential(*[torch.nn.Linear(3, 3, bias=False) for _ in range(4)])
    threads = set(threading.enumerate())
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.parameters(), lr=0.1), overlap=True, bucket_mb=1e-6)
    for _ in range(2):  # the first backward finds out in which order gradients come
        looks.clear()
        begun.clear()
        opt.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        opt.step()
    names = [thread.name for thread in set(threading.enumerate()) - threads]
    opt.detach()
    assert not names
    assert looks == [1, 2, 3, 4]


@pytest.mark.parallel
@pytest.mark.ranks(2, 3)
def test_hooks_need_no_mpi_for_threads(world, monkeypatch):
    if world.size == 1:
        pytest.skip("one rank exchanges nothing")
    monkeypatch.setattr(Messages, "split_node", lambda self: self.split(self.rank, 0))
    monkeypatch.setattr(library, "takes_threads", lambda: False)
    own = world.Dup()  # or the trial of another test would be found
    parameter = torch.nn.Parameter(torch.ones(3))
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD([parameter], lr=0.1), comm=own, overlap=True)
    is_polled = opt.communicator.is_polled
    for _ in range(2):
        opt.zero_grad()
        (parameter.sum() * (world.rank + 1)).backward()
    mean = parameter.grad.clone()
    opt.detach()
    assert is_polled
    assert torch.equal(mean, torch.full((3,), (world.size + 1) / 2))


class Ranks:
    """Stands for a communicator of ranks on so many nodes, and notes how it is duplicated."""

    def __init__(self, num_nodes):
        self.topology = Topology(tuple((2 * node, 2 * node + 1) for node in range(num_nodes)), 0, 0)

    def duplicate(self, **how):
        return how


@pytest.mark.parametrize(
    ("overlap", "on_host", "num_nodes", "how"),
    [
        (False, True, 2, {"overlap": False}),
        (True, True, 1, {"overlap": True}),
        (True, True, 2, {"overlap": True, "patient": True, "polled": False}),
        (True, False, 2, {"overlap": True}),
        ("auto", True, 1, {"overlap": True}),
        ("auto", True, 2, {"overlap": True, "patient": True, "polled": False}),
        ("auto", False, 2, {"overlap": False}),
    ],
)
def test_a_duplicate_overlaps_as_was_asked_for_in_the_way_that_was_best(monkeypatch, overlap, on_host, num_nodes, how):
    monkeypatch.setattr(overlap_module, "try_overlap", lambda _: Trial(1, 0.01, 0.01, 0.025, 0.011))
    monkeypatch.setattr(overlap_module, "has_spare_cores", lambda _: False)
    found = duplicate_overlapping(Ranks(num_nodes), overlap, on_host=on_host)
    assert {"patient": False, "polled": False} | found == {"patient": False, "polled": False} | how


def test_nothing_is_tried_where_no_overlap_was_asked_for(monkeypatch):
    monkeypatch.setattr(overlap_module, "try_overlap", None)
    monkeypatch.setattr(overlap_module, "has_spare_cores", None)
    assert duplicate_overlapping(Ranks(2), False, on_host=True) == {"overlap": False}
    assert duplicate_overlapping(Ranks(1), True, on_host=True) == {"overlap": True}
