"""The hooks of a reducer: what they tell whom, in which order beside the user's, and that they go."""

import torch
from reducing import made

from dpoptim.gradients.autograd_hooks import ParameterHooks, hear_before_making, is_reduced, listeners_of


class _Listener:
    def __init__(self):
        self.heard = []

    def on_gradient(self, index, parameter):
        self.heard.append(("ready", index, parameter.grad.clone()))


class _AddingListener:
    def __init__(self, heard):
        self.heard, self.put_aside = heard, {}

    def before_adding(self, index):
        self.heard.append(("adding", index))

    def before_making(self, index):
        self.heard.append(("making", index))


def _backward(parameter):
    parameter.sum().backward()


def test_who_hears_of_gradients():
    (parameter,) = made((2,))
    listener, hooks = _Listener(), ParameterHooks()
    hooks.add(5, parameter, listener, None)
    assert is_reduced(parameter)
    assert listeners_of([parameter]) == {listener}
    _backward(parameter)
    ((what, index, gradient),) = listener.heard
    assert (what, index) == ("ready", 5)
    assert torch.equal(gradient, torch.ones(2))
    hooks.remove()
    _backward(parameter)
    assert len(listener.heard) == 1
    assert not is_reduced(parameter)
    assert listeners_of([parameter]) == set()


def test_who_hears_before_autograd_adds():
    (parameter,) = made((2,))
    listener = _Listener()
    adding = _AddingListener(listener.heard)
    hooks = ParameterHooks()
    hooks.add(5, parameter, listener, adding)
    _backward(parameter)
    assert [heard[0] for heard in listener.heard] == ["ready"], "a gradient is made, and none is put aside"
    _backward(parameter)
    assert [heard[0] for heard in listener.heard] == ["ready", "adding", "ready"]
    parameter.grad = None
    adding.put_aside[3] = torch.zeros(1)
    _backward(parameter)
    assert [heard[:2] for heard in listener.heard[3:]] == [("making", 5), ("ready", 5)]
    hooks.remove()
    _backward(parameter)
    assert len(listener.heard) == 5


def test_a_frozen_parameter_is_heard_of_when_it_is_trained():
    (parameter,) = made((2,))
    parameter.requires_grad_(False)
    listener = _Listener()
    ParameterHooks().add(0, parameter, listener, None)
    assert not parameter.requires_grad
    parameter.requires_grad_(True)
    _backward(parameter)
    assert len(listener.heard) == 1


def test_our_hook_follows_the_users_from_the_second_time_on():
    (parameter,) = made((2,))
    hooks, heard = ParameterHooks(), []

    class Last(_Listener):
        def on_gradient(self, index, parameter):
            heard.append(("ours", hooks.is_last(index, parameter)))

    hooks.add(0, parameter, Last(), None)
    _backward(parameter)
    assert heard == [("ours", True)]
    heard.clear()
    parameter.register_post_accumulate_grad_hook(lambda _: heard.append("theirs"))
    for _ in range(2):
        _backward(parameter)
    assert heard == [("ours", False), "theirs", "theirs", ("ours", True)]


def test_what_is_heard_before_a_gradient_is_made():
    (parameter,) = made((2,))
    heard = []
    handle = hear_before_making(lambda own, gradient: heard.append((own is parameter, own.grad is None)), parameter)
    _backward(parameter)
    _backward(parameter)
    assert heard == [(True, True), (True, False)]
    handle.remove()
    _backward(parameter)
    assert len(heard) == 2
