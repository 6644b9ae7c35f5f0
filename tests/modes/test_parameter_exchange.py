"""In which order owners meet, start to send and wait, and when gathers are prepared anew."""

from types import SimpleNamespace

import pytest
import torch

from dpoptim.modes.parameter_exchange import ParameterExchange


class Log:
    """Stands for a communicator and its batches, and notes what is done."""

    def __init__(self, *, defers):
        self.done, self.defers = [], defers

    def batch(self, num_collectives):
        self.done.append(f"batch of {num_collectives}")
        self.is_deferred = self.defers and num_collectives is not None
        return self

    def open(self, start, meet):
        if self.is_deferred:
            start(1.0)
        divisor = meet()
        if not self.is_deferred:
            start(divisor)

    def prepare_all_gathers(self, outputs):
        self.done.append(f"prepare {len(outputs)}")

        def start():
            self.done.append("start")
            return [SimpleNamespace(wait=lambda: self.done.append("wait"))] * 2

        return start

    def exchange(self, exchange, device="cpu"):
        bucket = SimpleNamespace(device=torch.device(device))
        part = SimpleNamespace(bucket=bucket, gathered=lambda: self.done.append("gathered"))
        exchange.exchange([part], self.outputs, self._meet)

    def _meet(self):
        self.done.append("meet")
        return 2.0

    def new_outputs(self):
        self.outputs = [[("flat", [1, 2]), ("flat", [3, 4])], [("flat", [5])]]


@pytest.mark.parametrize(
    ("defers", "device", "order"),
    [
        (False, "cpu", ["batch of 3", "meet", "prepare 3", "start"]),
        (True, "cpu", ["batch of 3", "prepare 3", "start", "meet"]),
        (True, "meta", ["batch of None", "meet", "prepare 3", "start"]),
    ],
)
def test_ranks_meet_before_anything_is_waited_for(defers, device, order):
    log = Log(defers=defers)
    log.new_outputs()
    log.exchange(ParameterExchange(log), device)
    assert log.done == [*order, "wait", "wait", "gathered"]


def test_gathers_are_prepared_once_for_the_same_outputs():
    log = Log(defers=False)
    exchange = ParameterExchange(log)
    log.new_outputs()
    log.exchange(exchange)
    log.exchange(exchange)
    assert log.done.count("prepare 3") == 1
    assert log.done.count("start") == 2
    log.new_outputs()  # equal ones, which lie elsewhere
    log.exchange(exchange)
    assert log.done.count("prepare 3") == 2


def test_gathers_are_prepared_anew_where_they_no_longer_defer():
    log = Log(defers=True)
    exchange = ParameterExchange(log)
    log.new_outputs()
    log.exchange(exchange)
    log.defers = False
    log.exchange(exchange)
    assert log.done.count("prepare 3") == 2
