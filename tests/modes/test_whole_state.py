"""Groups and devices by which a state is put together."""

import copy

import pytest
import torch
from torch import nn

from dpoptim.modes.whole_state import devices_of, groups_with


def _optimizer():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = [{"params": list(layer.parameters()), "lr": 0.1 * number} for number, layer in enumerate(model, 1)]
    return torch.optim.SGD(groups, momentum=0.9)


def test_groups_that_have_the_parameters_stay():
    optimizer = _optimizer()
    groups = optimizer.param_groups
    with groups_with(optimizer, [list(group["params"]) for group in groups]):
        assert optimizer.param_groups is groups


@pytest.mark.parametrize("change", ["one gone", "a group gone", "another one"])
def test_other_parameters_are_there_within_alone(change):
    optimizer = _optimizer()
    known = [list(group["params"]) for group in optimizer.param_groups]
    if change == "one gone":
        optimizer.param_groups[0]["params"].pop()
    elif change == "a group gone":
        del optimizer.param_groups[1:]
    else:
        optimizer.param_groups[1]["params"][0] = nn.Parameter(torch.zeros(1))
    groups, before = optimizer.param_groups, copy.copy(optimizer.param_groups)
    with groups_with(optimizer, known):
        within = optimizer.param_groups
        assert [[id(p) for p in group["params"]] for group in within] == [[id(p) for p in group] for group in known]
        assert {group["momentum"] for group in within} == {0.9}
    assert optimizer.param_groups is groups
    assert groups == before


def test_without_groups_the_options_are_the_defaults():
    optimizer = _optimizer()
    known = [list(group["params"]) for group in optimizer.param_groups]
    optimizer.param_groups.clear()
    with groups_with(optimizer, known):
        assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9]


def test_devices_are_told_by_unique_name():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, device="meta"))])
    found = devices_of(optimizer, ["same", "same"])
    assert [(name, device.type) for name, device in found.items()] == [
        ("same (0 of group 0)", "cpu"),
        ("same (1 of group 0)", "meta"),
    ]
