"""The sleeping barrier: nobody leaves it before all have come, and it survives the turn of its counter."""

import threading
import time

import pytest
import torch

import dpoptim.comm.node.sleeping_barrier
from dpoptim.comm.node.sleeping_barrier import SleepingBarrier

pytestmark = pytest.mark.skipif(not SleepingBarrier.is_here(), reason="no futex on this system")
NUM_RANKS = 3


def _barriers():
    words = torch.zeros(SleepingBarrier.words_needed(NUM_RANKS), dtype=torch.int32)
    return words, [SleepingBarrier(words, rank, NUM_RANKS) for rank in range(NUM_RANKS)]


def _run(work):
    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(NUM_RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads), "the barrier hangs"


@pytest.mark.parametrize("first_count", [0, 2**31 - 5])
def test_all_come_before_any_leaves(monkeypatch, first_count):
    monkeypatch.setattr(dpoptim.comm.node.sleeping_barrier, "_NUM_LOOKS", 1)
    words, barriers = _barriers()
    words.fill_(first_count)
    for barrier in barriers:
        barrier._count = first_count
    arrived, wrong = [0] * NUM_RANKS, []

    def work(rank):
        for turn in range(1, 200):
            if turn % 50 == rank:
                time.sleep(0.01)
            arrived[rank] = turn
            barriers[rank].wait()
            wrong.extend(turn for other in arrived if other < turn)
            barriers[rank].wait()

    _run(work)
    assert not wrong


def test_the_last_to_come_wakes_all(monkeypatch):
    monkeypatch.setattr(dpoptim.comm.node.sleeping_barrier, "_NUM_LOOKS", 0)
    _, barriers = _barriers()
    for barrier in barriers:
        barrier._naps = [None]  # for ever

    def work(rank):
        for turn in range(60):
            if turn % NUM_RANKS == rank:
                time.sleep(0.01)  # the others sleep by now
            barriers[rank].wait()

    _run(work)


def test_a_late_rank_is_waited_for_asleep():
    _, barriers = _barriers()
    used_s = []

    def work(rank):
        if rank == 0:
            time.sleep(1.5)  # longer than a sleeper sleeps without looking
        before = time.thread_time()
        barriers[rank].wait()
        used_s.append(time.thread_time() - before)

    _run(work)
    assert max(used_s) < 0.3, "a rank that waits occupies a core"
