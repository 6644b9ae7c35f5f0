"""What is found out about a class before its parameters are divided (Note [Probing])."""

import random

import foreign_classes
import numpy as np
import pytest
import torch
from torch import nn

from dpoptim.step.divisibility import divisibility
from dpoptim.step.probe import Divisibility

pytestmark = pytest.mark.once


def _parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 4), (4,), (5, 6), (3,), (2, 3, 3, 3)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("AdamOfGroups", "element"),
        ("CountsInItself", "element"),
        ("StateOfNobody", "element"),
        ("StateFromTheStart", "element"),
        ("Slow", "element"),
        ("Takes", "element"),
        ("OwnLoading", "element"),
        ("GivesMemory", "element"),
        ("KeepsGradients", "element"),
        ("Containers", "element"),
        ("TrustRatio", "parameter"),
        ("KnowsItsParameters", "parameter"),
        ("Coupled", "nothing"),
        ("StepsAllThatItKnows", "nothing"),
        ("Random", "nothing"),
        ("SecondOrder", "nothing"),
        ("Perturbs", "nothing"),
    ],
)
def test_verdicts(name, by):
    parameters = _parameters()
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.0}]
    assert divisibility(getattr(foreign_classes, name)(groups)).by == by


def test_a_group_of_one_parameter_shows_a_norm_of_the_group():
    first, second = _parameters()[:2]
    optimizer = foreign_classes.Switched([{"params": [first]}, {"params": [second]}])
    assert divisibility(optimizer).by == "element"
    optimizer.param_groups[0]["clip"] = 1.0
    assert divisibility(optimizer).by == "parameter"


def test_a_step_of_one_object_is_not_tried():
    optimizer = torch.optim.SGD(_parameters())
    optimizer.step = lambda closure=None: None
    assert divisibility(optimizer) == Divisibility("nothing", "has a step of this object's own")


@pytest.mark.parametrize(
    ("name", "by"), [("AdamOfGroups", "element"), ("TrustRatio", "parameter"), ("Random", "nothing")]
)
def test_parameters_of_16_bits(name, by):
    assert divisibility(getattr(foreign_classes, name)(_parameters(torch.bfloat16))).by == by


def test_nothing_is_disturbed(capsys, recwarn):
    class Loud(foreign_classes.Random):
        def step(self, closure=None):
            print("step")
            random.random()
            np.random.rand()
            super().step()

    parameters = _parameters()
    optimizer = Loud(parameters)
    hook = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    before = [p.detach().clone() for p in parameters]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert divisibility(optimizer) == Divisibility("nothing", "draws random numbers in its step")
    assert all(map(torch.equal, parameters, before))
    assert all(p.grad is None for p in parameters)
    assert not optimizer.state
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert not capsys.readouterr().out
    assert not recwarn.list
    hook.remove()


def test_a_coupling_that_begins_late_or_at_large_gradients_is_seen():
    class Late(foreign_classes.AdamOfGroups):
        @torch.no_grad()
        def step(self, closure=None):
            super().step()
            if self.param_groups[0]["step"] > 10:
                total = sum(float(p.grad.sum()) for _, p in self._trained())
                for _, p in self._trained():
                    p.add_(1e-3 * total)

    class Clips(foreign_classes.AdamOfGroups):
        @torch.no_grad()
        def step(self, closure=None):
            total = sum(float(p.grad.norm()) for _, p in self._trained())
            for group, p in self._trained():
                p.sub_(p.grad, alpha=group["lr"] * min(1.0, 300 / total))

    class Factors(foreign_classes.AdamOfGroups):
        @torch.no_grad()
        def step(self, closure=None):
            for group, p in self._trained():
                large = p.dim() == 2 and min(p.shape) >= 128
                p.sub_(p.grad / (p.grad.norm(dim=0, keepdim=True) if large else 1.0), alpha=group["lr"])

    assert divisibility(Late(_parameters())).by == "nothing"
    assert divisibility(Clips(_parameters())).by == "nothing"
    assert divisibility(Factors([*_parameters(), nn.Parameter(torch.ones(300, 200))])).by == "parameter"


def test_a_class_that_takes_float32_alone():
    class Narrow(foreign_classes.AdamOfGroups):
        def step(self, closure=None):
            assert all(p.dtype == torch.float32 for _, p in self._trained())
            super().step()

    assert divisibility(Narrow(_parameters())).by == "element"


def test_a_class_that_fails_says_why():
    class Fails(foreign_classes.AdamOfGroups):
        def step(self, closure=None):
            raise KeyError("no such parameter")

    found = divisibility(Fails(_parameters()))
    assert found.by == "nothing"
    assert "KeyError: 'no such parameter'" in found.why_not
