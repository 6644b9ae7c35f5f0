"""Which implementation is right for a tensor, and what is taken for one."""

import copy
import pickle

import pytest
import torch
from torch import nn

import dpoptim
from dpoptim.step.implementations import sharing_memory

OURS = [name for name in dpoptim.torch_optim.__all__ if isinstance(getattr(dpoptim.torch_optim, name), type)]


def parameters(num=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(3, 4, generator=generator, dtype=dtype)) for _ in range(num)]
    for parameter in made:
        parameter.grad = torch.randn(3, 4, generator=generator, dtype=dtype)
    return made


def assert_equal(ours, theirs):
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-11)


def test_what_shares_memory():
    base = torch.zeros(10)
    assert sharing_memory([[base[:3], base[3:6], torch.zeros(3)]]) == set()
    assert sharing_memory([[base[:3], base[2:6], base[6:]]]) == {0, 1}
    assert sharing_memory([[base, base[2:4], base[6:], torch.zeros(2)]]) == {0, 1, 2}
    assert sharing_memory([[base[::2], base[1::2]]]) == {0, 1}  # one within the gaps of the other: to be careful
    assert sharing_memory([[base[:2], base[2:4]], [None, base[3:5]]]) == {1}
    assert sharing_memory([[base[:2], base[2:4]], [base[8:], base[8:]]]) == {0, 1}
    assert sharing_memory([[torch.zeros(0), torch.zeros(0)], [torch.zeros(()), torch.zeros(())]]) == set()


def test_classes_are_related_as_torchs_are():
    for name in OURS:
        for other in OURS:
            expected = issubclass(getattr(torch.optim, name), getattr(torch.optim, other))
            assert issubclass(getattr(dpoptim, name), getattr(dpoptim, other)) == expected, (name, other)
        kind = getattr(dpoptim, name)
        assert issubclass(kind, getattr(torch.optim, name))
        assert kind.__module__ == "dpoptim.torch_optim"
        assert kind.__name__ == name
        assert pickle.loads(pickle.dumps(kind)) is kind
    opt = dpoptim.AdamW(parameters())
    assert isinstance(opt, dpoptim.Adam)
    assert isinstance(opt, torch.optim.Adam)
    assert type(pickle.loads(pickle.dumps(opt))) is dpoptim.AdamW


def test_an_adamw_steps_as_adamw():
    ours, theirs = parameters(), parameters()
    opt, plain = (package.AdamW(mine, weight_decay=0.5) for package, mine in ((dpoptim, ours), (torch.optim, theirs)))
    for _ in range(3):
        opt.step()
        plain.step()
    assert_equal(ours, theirs)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adagrad", "RMSprop", "NAdam"])
def test_scales_set_by_hand_are_as_with_torchs_default(name):
    outcomes = []
    for package in (dpoptim, torch.optim):
        mine = parameters()
        opt = getattr(package, name)(mine, lr=0.1)
        opt.step()
        opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        try:
            opt.step()
        except AssertionError as error:
            outcomes.append((str(error), mine))
        else:
            outcomes.append((None, mine))
    (own, ours), (other, theirs) = outcomes
    assert own == other
    assert_equal(ours, theirs)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adagrad", "RMSprop"])
@pytest.mark.parallel
def test_a_grad_scaler_skips_steps(name, wrapped):
    """The first gradients are of the second step for all, and of the third for one parameter."""
    results = []
    for package in (dpoptim, torch.optim):
        mine = parameters()
        opt = getattr(package, name)(mine, lr=0.1, **({"momentum": 0.9} if name == "SGD" else {}))
        if wrapped and package is dpoptim:
            opt = dpoptim.DataParallelOptimizer(opt)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(5):
            opt.zero_grad()
            loss = sum(p.pow(2).sum() for p in (mine if step != 1 else mine[1:]))
            scaler.scale(loss * (float("inf") if step in (0, 3) else 1.0)).backward()
            scaler.step(opt)
            scaler.update()
        results.append(mine)
        if wrapped and package is dpoptim:
            opt.detach()
    assert_equal(*results)


def test_a_default_dtype_of_float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for name in ("AdamW", "Adagrad", "NAdam", "SGD"):
            ours, theirs = parameters(), parameters()
            opt, plain = (getattr(package, name)(mine) for package, mine in ((dpoptim, ours), (torch.optim, theirs)))
            for _ in range(3):
                opt.step()
                plain.step()
            assert_equal(ours, theirs)
            for own, other in zip(opt.state.values(), plain.state.values(), strict=True):
                assert {key: value.dtype for key, value in own.items()} == {k: v.dtype for k, v in other.items()}
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adagrad", "RMSprop", "Adafactor"])
def test_an_expanded_parameter_is_torchs_error(name):
    messages = []
    for package in (dpoptim, torch.optim):
        parameter = nn.Parameter(torch.ones(3, 1).expand(3, 4))
        parameter.grad = torch.ones(3, 4)
        opt = getattr(package, name)([parameter, *parameters(2, torch.float32)], lr=0.1)
        with pytest.raises(RuntimeError) as caught:
            opt.step()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_state_that_two_parameters_share():
    """Which torch's loop steps one after the other."""
    ours, theirs = parameters(), parameters()
    for package, mine in ((dpoptim, ours), (torch.optim, theirs)):
        opt = package.AdamW(mine, lr=0.1)
        for _ in range(3):
            opt.step()
        opt.state[mine[1]] = opt.state[mine[0]]
        opt.state[mine[2]]["step"] = opt.state[mine[0]]["step"]
        for _ in range(3):
            opt.step()
    assert_equal(ours, theirs)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="grad_dtype is new in torch 2.10")
@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop"])
def test_gradients_of_another_dtype(name):
    outcomes = []
    for package in (dpoptim, torch.optim):
        mine = parameters(3, torch.float32)
        mine[1].grad, mine[1].grad_dtype = None, torch.float64
        mine[1].grad = torch.ones(3, 4, dtype=torch.float64) / 3
        opt = getattr(package, name)(mine, lr=0.1)
        error = None
        try:
            for _ in range(3):
                opt.step()
        except RuntimeError as caught:
            error = str(caught)
        outcomes.append((error, mine))
    (own, ours), (other, theirs) = outcomes
    assert own == other
    if own is None:
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_a_plan_is_kept_while_rates_change():
    """A schedule must not cost a new plan a step."""
    mine = parameters(8)
    opt = dpoptim.AdamW([{"params": [p], "lr": 0.01 * (1 + number)} for number, p in enumerate(mine)])
    for _ in range(3):
        opt.step()
    flat = dpoptim.step.flat_step.FlatStep.of(opt)
    plan = flat._plan
    for _ in range(3):
        for group in opt.param_groups:
            group["lr"] *= 0.9
        opt.step()
    assert flat._plan is plan
    assert len(plan.calls) == 1
    opt.param_groups[0]["lr"] = opt.param_groups[1]["lr"]
    opt.step()
    assert flat._plan is not plan


def test_what_was_chosen_leaves_no_mark():
    for name in ("SGD", "AdamW", "RMSprop"):
        ours, theirs = parameters(), parameters()
        opt, plain = (getattr(package, name)(mine) for package, mine in ((dpoptim, ours), (torch.optim, theirs)))
        for _ in range(3):
            opt.step()
            plain.step()
        assert opt.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
        plain.load_state_dict(copy.deepcopy(opt.state_dict()))
        plain.step()
        opt.step()
        assert_equal(ours, theirs)
