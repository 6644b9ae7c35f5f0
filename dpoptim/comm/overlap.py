"""Whether exchanging gradients beside the computation pays here, found out by trying it.

Note [Trying overlap]
---------------------
A thread that exchanges takes time from the computation where it finds no core of its own, and memory bandwidth
everywhere; MPI waits by taking a whole core. What remains depends on the machine, its network and its MPI, so it is
tried: an exchange alone, a computation of the same length alone, and both at once, in turns. With several nodes both
are tried a second time with a thread that sleeps while it waits for the network (Note [Patience] in messages.py), and
where every rank has a node for itself, without a thread (Note [Looking after transfers] in pieces.py).
In one node without a core to spare nothing is tried: there an exchange is nothing but work for the same cores.
Ranks agree on the slowest rank's times, hence all decide alike. The first optimizer on a communicator pays for it,
some tenths of a second on a slow network, less elsewhere.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import torch

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.mpi import library
from dpoptim.comm.topology import available_cores
from dpoptim.tuning import TUNING

__all__ = ["Trial", "duplicate_overlapping", "has_spare_cores", "try_overlap"]

_ROUNDS = 5
_SMALLEST_BYTES, _LARGEST_BYTES = 1 << 18, 1 << 22
# So long an exchange is enough to see what it costs.
_ENOUGH_S = 0.01
_WIDTH = 192
# Overlap must hide at least this much of an exchange: what it hides in training is less than in a trial. So must a
# thread, of what is not hidden without one: a trial has none of the hooks that it delays.
_WORTH = TUNING.overlap_gain


@dataclass(frozen=True)
class Trial:
    """What an exchange beside a computation has cost, in seconds of the slowest rank; the same on all ranks.

    Attributes
    ----------
    num_bytes : int
        Size of the exchange (an all-reduce).
    exchange_s, computation_s : float
        Each alone.
    awake_s, asleep_s, polled_s : float
        Both at once: with a thread that waits as MPI does, with one that sleeps, and without one, where the computation
        looks after the exchange; infinite if not tried.
    why_not : str or None
        Why nothing was tried, in which case the numbers are 0.
    """

    num_bytes: int = 0
    exchange_s: float = 0.0
    computation_s: float = 0.0
    awake_s: float = math.inf
    asleep_s: float = math.inf
    polled_s: float = math.inf
    why_not: str | None = None

    @property
    def hidden(self) -> float:
        """The part of the exchange that the computation has hidden, at most 1; below 0 if it costs more."""
        if not self.exchange_s:
            return 0.0
        both_s = self.polled_s if self.polls else min(self.awake_s, self.asleep_s)
        return (self.exchange_s + self.computation_s - both_s) / self.exchange_s

    @property
    def pays(self) -> bool:
        """Whether to overlap."""
        return self.hidden >= _WORTH

    @property
    def sleeps(self) -> bool:
        """Whether a thread had better sleep while it waits."""
        return not self.polls and self.asleep_s < self.awake_s

    @property
    def polls(self) -> bool:
        """Whether there had better be no thread."""
        return self.polled_s < min(self.awake_s, self.asleep_s) + _WORTH * self.exchange_s

    def __str__(self) -> str:
        if self.why_not is not None:
            return f"no ({self.why_not})"
        return (
            f"{'yes' if self.pays else 'no'} (of an all-reduce of {self.num_bytes / 2**20:.2g} MiB in "
            f"{self.exchange_s * 1e3:.2g} ms, a computation{' that looks after it' if self.polls else ''} hides "
            f"{self.hidden:.0%}{', for which a thread waits asleep' if self.sleeps else ''})"
        )


_trials: WeakKeyDictionary[Communicator, Trial] = WeakKeyDictionary()


def try_overlap(communicator: Communicator) -> Trial:
    """Return whether overlap pays on these ranks; collective at the first call for ``communicator``."""
    if communicator not in _trials:
        _trials[communicator] = _try(communicator)
    return _trials[communicator]


def has_spare_cores(communicator: Communicator) -> bool:
    """Whether every node has a core left for a thread of each of its ranks; the same on all ranks, collective."""
    wanted = communicator.all_gather_object((available_cores(), torch.get_num_threads() + 1))
    return all(
        len(set[int]().union(*(wanted[rank][0] for rank in node))) >= sum(wanted[rank][1] for rank in node)
        for node in communicator.topology.nodes
    )


def duplicate_overlapping(communicator: Communicator, overlap: bool | str, *, on_host: bool) -> Communicator:
    """Return a duplicate that overlaps as it was asked for, in the way that was best in a trial; collective.

    Parameters
    ----------
    communicator : Communicator
        Of the ranks that exchange; what was tried on it is remembered.
    overlap : "auto" or bool
        Whether to overlap; the same on all ranks.
    on_host : bool
        Whether all that is exchanged lies on the host, as in a trial.
    """
    if overlap == "auto":
        overlap = try_overlap(communicator).pays if on_host else has_spare_cores(communicator)
    if not (overlap and on_host and communicator.topology.num_nodes > 1):
        return communicator.duplicate(overlap=bool(overlap))
    trial = try_overlap(communicator)
    return communicator.duplicate(overlap=True, patient=trial.sleeps, polled=trial.polls)


def _try(communicator: Communicator) -> Trial:
    if communicator.world_size == 1:
        return Trial(why_not="one rank exchanges nothing")
    topology = communicator.topology
    if topology.num_nodes == 1 and not has_spare_cores(communicator):
        return Trial(why_not="an exchange in a node is work for its cores, and the ranks' threads fill them")
    ways: dict[str, Communicator] = {}
    if library.takes_threads():
        ways["awake_s"] = communicator.duplicate(overlap=True)
        if topology.num_nodes > 1:
            ways["asleep_s"] = communicator.duplicate(overlap=True, patient=True)
    if topology.num_nodes == communicator.world_size:
        ways["polled_s"] = communicator.duplicate(overlap=True, polled=True)
    if not ways:
        return Trial(why_not="this MPI was initialised without MPI_THREAD_MULTIPLE")
    try:
        return _timed(communicator, ways)
    finally:
        for way in ways.values():
            way.free()


def _timed(communicator: Communicator, ways: dict[str, Communicator]) -> Trial:
    matrix = torch.full((_WIDTH, _WIDTH), 1e-3, dtype=torch.float32, device="cpu")
    tensor = torch.zeros(_SMALLEST_BYTES // 4, dtype=torch.float32, device="cpu")

    def exchange() -> None:
        communicator.all_reduce(tensor)

    def compute(times: int) -> None:
        for _ in range(times):
            torch.mm(matrix, matrix)

    def both(beside: Communicator, times: int) -> None:
        work = beside.all_reduce(tensor, async_op=True)
        for _ in range(times):
            compute(1)
            beside.poll()  # as often as backward does
        work.wait()

    def seconds(*steps: Callable[[], object]) -> list[float]:
        own = []
        for step in steps:
            communicator.barrier()
            start_s = time.perf_counter()
            step()
            own.append(time.perf_counter() - start_s)
        return [max(times) for times in zip(*communicator.all_gather_object(own), strict=True)]

    exchange()  # sets up shared memory
    (probe_s,) = seconds(exchange)
    num_bytes = int(min(_LARGEST_BYTES, max(1.0, _ENOUGH_S / max(probe_s, 1e-6)) * _SMALLEST_BYTES))
    tensor = torch.zeros(num_bytes // 4, dtype=torch.float32, device="cpu")
    compute(2)
    exchange_s, ten_s = seconds(exchange, lambda: compute(10))
    times = max(1, round(10 * exchange_s / ten_s))
    for way in ways.values():
        way.all_reduce(tensor)
    steps: list[Callable[[], object]] = [exchange, lambda: compute(times)]
    steps += [partial(both, way, times) for way in ways.values()]
    rounds = [seconds(*steps) for _ in range(_ROUNDS)]
    exchange_s, computation_s, *both_s = (statistics.median(column) for column in zip(*rounds, strict=True))
    return Trial(num_bytes, exchange_s, computation_s, **dict(zip(ways, both_s, strict=True)))
