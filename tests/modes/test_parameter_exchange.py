"""In which order owners meet, start to send and wait, and when gathers are prepared anew."""

from types import SimpleNamespace

import pytest
import torch

from dpoptim.modes.parameter_exchange import ParameterExchange


class Log:
    """Stands for a communicator, and notes what is done."""

    def __init__(self, *, defers):
        self.done, self._defers = [], defers

    def defers(self, count, dtypes):
        assert (count, dtypes) == (3, ())
        return self._defers

    def announce_by(self, meet):
        self.done.append("announce")
        meet()

    def prepare_all_gathers(self, outputs):
        self.done.append(f"prepare {len(outputs)}")

        def start():
            self.done.append("start")
            return [SimpleNamespace(wait=lambda: self.done.append("wait"))] * 2

        return start

    def exchange(self, exchange, device="cpu"):
        bucket = SimpleNamespace(device=torch.device(device))
        part = SimpleNamespace(bucket=bucket, gathered=lambda: self.done.append("gathered"))
        exchange.exchange([part], self.outputs, lambda: self.done.append("meet"))

    def new_outputs(self):
        self.outputs = [[("flat", [1, 2]), ("flat", [3, 4])], [("flat", [5])]]


@pytest.mark.parametrize(
    ("defers", "device", "order"),
    [
        (False, "cpu", ["meet", "prepare 3", "start"]),
        (True, "cpu", ["prepare 3", "start", "announce", "meet"]),
        (True, "meta", ["meet", "prepare 3", "start"]),
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
    log._defers = False
    log.exchange(exchange)
    assert log.done.count("prepare 3") == 2
