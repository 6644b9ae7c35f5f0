"""DetectMetricPlateau against torch's ReduceLROnPlateau and Heat's own class."""

import json
import math
import random
import warnings
from itertools import product

import pytest
import torch

from dpoptim.utils import DetectMetricPlateau

OPTIONS = [
    {"mode": mode, "patience": patience, "threshold": threshold, "threshold_mode": threshold_mode, "cooldown": cooldown}
    for mode, patience, threshold, threshold_mode, cooldown in product(
        ("min", "max"), (0, 1, 4), (0.0, 1e-4, 0.1), ("rel", "abs"), (0, 3)
    )
]


def metrics_of(seed, *, negative):
    """Return a metric that falls, rises, stays and is at times no number; few digits make exact ties."""
    generator = random.Random(seed)
    metric, metrics = 8.0, []
    for _ in range(80):
        metric += generator.choice([-0.5, -0.1, 0.0, 0.0, 0.1, 0.5])
        metric = metric if negative else max(metric, 0.0)
        metrics.append(generator.choice([metric] * 20 + [math.nan, math.inf, round(metric)]))
    return [metric - 8.0 if negative else metric for metric in metrics]


def plateaus_of_torch(options, metrics):
    """Return after which metrics torch's scheduler lowers the rate."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.9, eps=0.0, **options)
    decisions = []
    for metric in metrics:
        before = optimizer.param_groups[0]["lr"]
        scheduler.step(metric)
        decisions.append(optimizer.param_groups[0]["lr"] < before)
    return decisions, scheduler


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_decides_as_torch_does(options):
    """For negative metrics too, except that torch's relative threshold has the wrong sign there in mode "min"."""
    for seed in range(4):
        negative = seed % 2 == 1 and (options["mode"], options["threshold_mode"]) != ("min", "rel")
        metrics = metrics_of(seed, negative=negative)
        detector = DetectMetricPlateau(**options)
        decisions = [detector.test_if_improving(metric) for metric in metrics]
        expected, scheduler = plateaus_of_torch(options, metrics)
        assert decisions == expected
        for name in ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "in_cooldown", "mode_worse"):
            assert getattr(detector, name) == getattr(scheduler, name), name


@pytest.fixture(scope="module")
def heat_class():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Heat's and its dependencies' own
        return pytest.importorskip("heat.optim.utils", reason="Heat is not installed").DetectMetricPlateau


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_decides_as_heat_does(heat_class, options):
    for seed in range(4):
        ours, heats = DetectMetricPlateau(**options), heat_class(**options)
        assert ours.get_state() == heats.get_state()
        for epoch, metric in enumerate(metrics_of(seed, negative=seed % 2 == 1)):
            for best in (metric, 0.5, -2.0, ours.best):
                assert ours.is_better(metric, best) == heats.is_better(metric, best)
            assert ours.test_if_improving(torch.tensor(metric)) == heats.test_if_improving(torch.tensor(metric))
            assert ours.get_state() == heats.get_state()
            assert ours.in_cooldown == heats.in_cooldown
            if epoch == 40:
                ours.reset()
                heats.reset()
                assert ours.get_state() == heats.get_state()
            if epoch == 60:  # each goes on from the other's state
                state = ours.get_state()
                ours.set_state(heats.get_state())
                heats.set_state(state)


def test_has_the_constructor_of_heat(heat_class):
    import inspect

    ours, heats = (inspect.signature(each).parameters.values() for each in (DetectMetricPlateau, heat_class))
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in heats]
    for arguments in ({"mode": "mean"}, {"threshold_mode": "log"}):
        for each in (DetectMetricPlateau, heat_class):
            with pytest.raises(ValueError, match=r"mode"):
                each(**arguments)


def test_reports_the_epoch_after_the_patience():
    detector = DetectMetricPlateau(patience=2)
    assert [detector.test_if_improving(metric) for metric in (5.0, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0)] == [
        False,  # the first one is the best
        False,
        False,
        True,  # the third one that does not improve
        False,
        False,
        True,
    ]


def test_cooldown_ignores_bad_epochs():
    detector = DetectMetricPlateau(patience=0, cooldown=2)
    seen = [(detector.test_if_improving(metric), detector.in_cooldown) for metric in (5.0, 6.0, 6.0, 6.0, 6.0)]
    assert seen == [(False, False), (True, True), (False, True), (False, False), (True, True)]


def test_a_state_survives_json_and_goes_on_where_it_was():
    metrics = metrics_of(9, negative=False)
    detector = DetectMetricPlateau("max", 1, 0.05, "abs", 2)
    for metric in metrics[:30]:
        detector.test_if_improving(metric)
    other = DetectMetricPlateau()
    other.set_state(json.loads(json.dumps(detector.get_state())))
    assert other.get_state() == detector.get_state()
    assert [other.test_if_improving(m) for m in metrics[30:]] == [detector.test_if_improving(m) for m in metrics[30:]]


def test_reset_keeps_the_arguments_and_the_epoch():
    detector = DetectMetricPlateau("max", patience=0, cooldown=5)
    for metric in (1.0, 1.0, 0.5):
        detector.test_if_improving(metric)
    detector.reset()
    assert (detector.best, detector.num_bad_epochs, detector.cooldown_counter) == (-math.inf, 0, 0)
    assert (detector.mode, detector.patience, detector.cooldown, detector.last_epoch) == ("max", 0, 5, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "mean"}, r"mode must be 'min' or 'max', got 'mean'"),
        ({"mode": None}, r"mode must be 'min' or 'max', got None"),
        ({"threshold_mode": "log"}, r"threshold_mode must be 'rel' or 'abs', got 'log'"),
    ],
)
def test_unknown_modes(arguments, message):
    with pytest.raises(ValueError, match=message):
        DetectMetricPlateau(**arguments)


def test_a_bad_state_changes_nothing():
    detector = DetectMetricPlateau(patience=3)
    before = detector.get_state()
    incomplete = {name: value for name, value in DetectMetricPlateau().get_state().items() if name != "best"}
    with pytest.raises(ValueError, match=r"dic must hold all of get_state\(\), but has no best: it has \['cooldown', "):
        detector.set_state(incomplete)
    with pytest.raises(ValueError, match="mode must be 'min' or 'max', got 'mean'"):
        detector.set_state({**before, "patience": 9, "mode": "mean"})
    assert detector.get_state() == before
