"""How often nodes exchange parameters, from the losses alone."""

import pytest

from dpoptim.daso.schedule import Cycle, Schedule


class Losses:
    """Stands for what watches the losses: those below zero are a plateau."""

    def __init__(self):
        self.seen = []

    def test_if_improving(self, loss):
        self.seen.append(loss)
        return loss < 0


def _schedule(**changes):
    settings = {
        "total_epochs": 10,
        "warmup_epochs": 2,
        "cooldown_epochs": 3,
        "max_global_skips": 8,
        "skip_reduction_factor": 2,
        "local_skip_factor": 4,
    }
    return Schedule(**(settings | changes))


def _follow(schedule, losses, last=Cycle(), epoch=2):  # noqa: B008  frozen
    found = []
    watch = Losses()
    for number, loss in enumerate(losses, epoch):
        last = schedule.next_cycle(number, last, loss, watch)
        found.append((last.global_skip, last.batches_to_wait))
    return found


def test_the_first_and_the_last_epochs_are_blocking():
    schedule = _schedule()
    assert [epoch for epoch in range(12) if not schedule.is_blocking(epoch)] == [2, 3, 4, 5, 6]
    watch = Losses()
    for epoch in (0, 1, 7, 9, 12):
        assert schedule.next_cycle(epoch, Cycle(4, 1), -1.0, watch) == Cycle(0, 0)
    assert watch.seen == [], "only losses of cycling epochs are compared"


def test_without_skips_all_epochs_are_blocking():
    assert all(_schedule(max_global_skips=0).is_blocking(epoch) for epoch in range(10))


def test_a_cycle_keeps_its_length_while_losses_improve():
    assert _follow(_schedule(), [1.0, 0.5, 0.2]) == [(4, 1)] * 3


@pytest.mark.parametrize("most", [1, 2, 3])
def test_the_first_skip_is_at_most_the_largest(most):
    assert _follow(_schedule(max_global_skips=most), [1.0]) == [(most, 1)]


def test_plateaus_shorten_the_cycle_and_then_reset_it():
    schedule = _schedule(total_epochs=20)
    assert _follow(schedule, [1.0, -1.0, -1.0, -1.0, -1.0, -1.0]) == [(4, 1), (2, 1), (1, 1), (8, 2), (4, 1), (2, 1)]


def test_what_is_waited_for_shrinks_by_one_and_stays_within_the_cycle():
    cycles = _follow(_schedule(max_global_skips=12, local_skip_factor=2), [-1.0, -1.0], Cycle(12, 6))
    assert cycles == [(6, 5), (3, 3)], "4 would be more than the 3 of a cycle"


@pytest.mark.parametrize(("factor", "wait"), [(1, 8), (3, 2), (8, 1), (100, 1)])
def test_a_reset_waits_for_a_part_of_the_largest_skip(factor, wait):
    assert _follow(_schedule(local_skip_factor=factor), [-1.0], Cycle(1, 1)) == [(8, wait)]


@pytest.mark.parametrize(("factor", "skip"), [(1, 8), (3, 2), (9, 1)])
def test_a_plateau_divides_by_the_factor(factor, skip):
    assert _follow(_schedule(skip_reduction_factor=factor), [-1.0], Cycle(8, 1)) == [(skip, 1)]


def test_after_a_blocking_epoch_the_cycle_begins_anew():
    assert _follow(_schedule(), [1.0], Cycle(0, 0), epoch=6) == [(4, 1)]
