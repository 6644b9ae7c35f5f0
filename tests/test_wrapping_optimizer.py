"""An optimizer that stands for another one has no copy of anything: what is read, set or called is the other's."""

import copy

import pytest
import torch
from torch import nn

from dpoptim.wrapping_optimizer import WrappingOptimizer


class Special(torch.optim.SGD):
    """Has an attribute, a method and a step that counts."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.temperature, self.calls = 1.0, []

    def cool(self, by, *, twice=False):
        self.temperature -= by * (2 if twice else 1)
        return self.temperature


class Watching(WrappingOptimizer):
    """Notes what it is told of, and steps the wrapped one."""

    own: list

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.own = []

    def step(self, closure=None):
        self.own.append("step")

    def _before_step(self, stepped, args, kwargs):
        self.own.append("before")

    def _note_new_state(self):
        self.own.append("state")

    def _call_method(self, name, method, *args, **kwargs):
        self.own.append(name)
        return super()._call_method(name, method, *args, **kwargs)


class Counting(Watching):
    """Makes a step of two batches."""

    _accumulates = True

    def _count_batch(self, closure=None):
        self.own.append("count")
        return self.own.count("count") % 2 == 1


def _pair(kind=Watching):
    inner = Special(nn.Linear(3, 2).parameters())
    return inner, kind(inner)


def test_groups_state_and_defaults_are_the_wrapped_ones():
    inner, wrapper = _pair()
    assert wrapper.optimizer is inner
    for name in ("param_groups", "state", "defaults"):
        assert getattr(wrapper, name) is getattr(inner, name)
        new = copy.copy(getattr(inner, name))
        setattr(wrapper, name, new)
        assert getattr(inner, name) is new
    assert wrapper.own == ["state"], "it is told of another state"
    wrapper.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    assert len(inner.param_groups) == 2


def test_attributes_of_the_wrapped_class_are_read_and_set():
    inner, wrapper = _pair()
    assert wrapper.temperature == 1.0
    wrapper.temperature = 2.0
    assert inner.temperature == 2.0
    wrapper.new = 3
    assert inner.new == 3
    assert "new" not in vars(wrapper)
    wrapper._private = 4
    assert "_private" not in vars(inner)
    wrapper.own = [1]
    assert "own" not in vars(inner), "what the wrapper's class annotates is its own"


def test_methods_of_the_wrapped_class_go_through_one_place():
    inner, wrapper = _pair()
    assert wrapper.cool(0.25, twice=True) == 0.5 == inner.temperature
    assert wrapper.own == ["cool"]


def test_what_neither_has_is_an_error_that_names_both():
    _, wrapper = _pair()
    with pytest.raises(AttributeError, match="neither Watching nor the wrapped Special has an attribute 'warmth'"):
        _ = wrapper.warmth
    with pytest.raises(AttributeError, match="Watching has no attribute '__fspath__'"):
        _ = wrapper.__fspath__


def test_hooks_run_once_whoever_they_were_registered_on_and_after_the_wrappers_own():
    inner, wrapper = _pair()
    inner.register_step_pre_hook(lambda *_: wrapper.own.append("inner's"))
    wrapper.register_step_pre_hook(lambda *_: wrapper.own.append("wrapper's"))
    wrapper.register_step_post_hook(lambda *_: wrapper.own.append("after"))
    wrapper.step()
    assert wrapper.own == ["before", "inner's", "wrapper's", "step", "after"]


def test_without_hooks_the_wrappers_own_runs():
    _, wrapper = _pair()
    wrapper.step()
    assert wrapper.own == ["before", "step"]


def test_a_batch_that_only_counts_runs_no_hook():
    _, wrapper = _pair(Counting)
    wrapper.register_step_post_hook(lambda *_: wrapper.own.append("after"))
    for _ in range(4):
        wrapper.step()
    assert wrapper.own == ["count", "count", "before", "step", "after"] * 2


def test_a_scheduler_of_the_wrapper_sets_rates_of_the_wrapped_one():
    inner, wrapper = _pair()
    scheduler = torch.optim.lr_scheduler.StepLR(wrapper, 1, gamma=0.5)
    wrapper.step()
    scheduler.step()
    assert inner.param_groups[0]["lr"] == pytest.approx(0.05)
