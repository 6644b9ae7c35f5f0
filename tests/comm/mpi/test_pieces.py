"""InFlight: in which order collectives start, how many are under way, and who waits for what."""

import pytest

import dpoptim.comm.mpi.pieces
from dpoptim.comm.mpi.pieces import InFlight

LIMIT = 4


@pytest.fixture(autouse=True)
def _always_looks(monkeypatch):
    monkeypatch.setattr(dpoptim.comm.mpi.pieces, "_BETWEEN_LOOKS_S", 0.0)


class Collective:
    """One that ends when it is told to, or when it is waited for."""

    def __init__(self, name, log):
        self.name, self.log, self.has_ended = name, log, False
        log.append(f"start {name}")

    def wait(self):
        self.log.append(f"wait {self.name}")
        self.has_ended = True

    def test(self):
        return self.has_ended


@pytest.fixture
def network():
    return Network()


class Network:
    """Makes pieces, and knows the collectives that they have started."""

    def __init__(self):
        self.log = []
        self.started = {}

    def piece(self, name, num_phases=2):
        for phase in range(num_phases):
            self.started[f"{name}{phase}"] = collective = Collective(f"{name}{phase}", self.log)
            yield collective
        self.log.append(f"end {name}")

    def end(self, *names):
        for name in names:
            self.started[name].has_ended = True


def test_phases_start_in_the_order_of_transfers_whichever_ends_first(network):
    in_flight = InFlight(LIMIT)
    for name in "abc":
        in_flight.begin([network.piece(name, 1 if name == "b" else 2)])
    network.end("c0", "b0")
    in_flight.poll()
    assert network.log == ["start a0", "start b0", "start c0"]
    network.end("a0")
    in_flight.poll()
    assert network.log[3:] == ["start a1", "end b", "start c1"]
    network.end("c1")
    in_flight.poll()
    assert network.log[6:] == []  # a1 is not done
    network.end("a1")
    in_flight.poll()
    assert network.log[6:] == ["end a", "end c"]


def test_only_so_many_pieces_are_under_way(network):
    in_flight = InFlight(LIMIT)
    transfer = in_flight.begin(network.piece(f"{number:02}-", 1) for number in range(LIMIT + 2))
    assert len(network.started) == LIMIT
    network.end("00-0")
    in_flight.poll()
    assert len(network.started) == LIMIT + 1
    transfer.wait()
    starts = [line for line in network.log if line.startswith("start")]
    assert starts == sorted(starts)
    assert len(starts) == len([line for line in network.log if line.startswith("end")]) == LIMIT + 2


def test_who_waits_for_one_transfer_goes_on_with_all(network):
    in_flight = InFlight(LIMIT)
    first, second = (in_flight.begin([network.piece(name)]) for name in "ab")
    second.wait()
    assert network.log.index("end a") < network.log.index("end b")
    first.wait()
    assert [line for line in network.log if line.startswith("wait")] == ["wait a0", "wait b0", "wait a1", "wait b1"]


def test_nothing_to_do_is_done(network):
    in_flight = InFlight(LIMIT)
    in_flight.begin([]).wait()
    in_flight.poll()
    in_flight.wait_for_all()
    assert network.log == []


def test_the_end_waits_for_all(network):
    in_flight = InFlight(LIMIT)
    for name in "ab":
        in_flight.begin([network.piece(name)])
    in_flight.wait_for_all()
    assert {"end a", "end b"} <= set(network.log)


def test_looks_are_not_more_frequent_than_is_worth_it(network, monkeypatch):
    monkeypatch.setattr(dpoptim.comm.mpi.pieces, "_BETWEEN_LOOKS_S", 1e6)
    in_flight = InFlight(LIMIT)
    in_flight.begin([network.piece("a")])
    in_flight.poll()
    network.end("a0")
    in_flight.poll()
    assert network.log == ["start a0"]
