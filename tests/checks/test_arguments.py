"""What an optimizer refuses: an error on every rank that says what differs, and nothing changed."""

import copy

import pytest
import torch
from oracle import Net, joined_batch, part_sizes, seeded, train
from torch import nn

import dpoptim
from dpoptim.checks.loadable import _ADDED_LATER, _hyper_parameters
from dpoptim.step.facts import FACTS, NUMBERS

pytestmark = pytest.mark.parallel

OPTIONS = {
    "Adafactor": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "SGD": {"momentum": 0.9},
    "Adam": {"amsgrad": True},
    "AdamW": {"amsgrad": True},
}
# Those that share their keys: torch itself loads one's state into the other.
ALIKE = {frozenset(("Adam", "AdamW"))}
NAMES = [name for name, facts in FACTS.items() if facts.keeps is not None and name in dpoptim.__all__]


class Matrices(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.first = nn.Linear(5, width, bias=False)
        self.last = nn.Linear(width, 5, bias=False)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


class Words(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.words = nn.Embedding(11, width, sparse=True)

    def forward(self, x):
        return self.words((x * 3).long() % 11)


def _trained(name, num_steps=2, **changes):
    model = seeded(lambda: {"Muon": Matrices, "SparseAdam": Words}.get(name, Net)(**changes))
    inner = getattr(dpoptim, name)(model.named_parameters(), lr=0.01, **OPTIONS.get(name, {}))
    opt = dpoptim.DataParallelOptimizer(inner)
    for step in range(num_steps):
        train(opt, model, joined_batch(step, part_sizes(1, equal=True), width=changes.get("width", 5)))
    return model, opt


def _snapshot(opt):
    return copy.deepcopy(opt.state_dict())


def _assert_equal(left, right):
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for number, entry in left["state"].items():
        assert entry.keys() == right["state"][number].keys()
        pairs = ((torch.as_tensor(value), torch.as_tensor(right["state"][number][key])) for key, value in entry.items())
        assert all(torch.equal(value, other) for value, other in pairs)


def _refused(opt, state_dict, match):
    before = _snapshot(opt)
    given = copy.deepcopy(state_dict)
    with pytest.raises(ValueError, match=match):
        opt.load_state_dict(state_dict)
    _assert_equal(_snapshot(opt), before)
    assert given["param_groups"] == state_dict["param_groups"]


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_states_is_torchs(world, name):
    _, opt = _trained(name)
    always, sometimes = FACTS[name].keeps, FACTS[name].may_keep
    found = [entry.keys() for entry in opt.state.values() if entry]
    assert found
    assert all(always <= keys <= always | sometimes for keys in found)
    if name != "Adafactor":  # of which a parameter has either the rows and columns, or the variance
        assert all(keys == always | sometimes for keys in found)
    numbers = {key for entry in opt.state.values() for key, value in entry.items() if torch.as_tensor(value).dim() == 0}
    assert numbers <= NUMBERS
    assert _hyper_parameters(getattr(torch.optim, name)) - _ADDED_LATER
    opt.load_state_dict(_snapshot(opt))
    opt.detach()


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "Adafactor", "Adamax"])
def test_a_state_of_another_shape(world, name):
    _, opt = _trained(name)
    _, narrow = _trained(name, width=4)
    _refused(
        opt,
        narrow.state_dict(),
        r"'\w+' of parameter 'first.weight' must have shape \(5, [15]\) in the state dict, got \(4, [14]\): the "
        r"parameter itself has shape \(5, 5\)",
    )
    opt.detach()
    narrow.detach()


def _one_matrix(name, num_steps):
    matrix = nn.Parameter(torch.ones(6, 4))
    inner = getattr(dpoptim, name)([("matrix", matrix)], lr=0.01, **OPTIONS.get(name, {}))
    for _ in range(num_steps):
        matrix.grad = torch.ones(6, 4).to_sparse(1) if name == "SparseAdam" else torch.ones(6, 4)
        inner.step()
    return dpoptim.DataParallelOptimizer(inner)


@pytest.mark.parametrize("num_steps", [0, 2], ids=["before the first step", "after it"])
@pytest.mark.parametrize("theirs", NAMES)
@pytest.mark.ranks(2)
def test_a_state_of_another_optimizer(world, theirs, num_steps):
    opt = _one_matrix(theirs, num_steps)
    saved = _snapshot(opt)
    opt.detach()
    for name in NAMES:
        other = _one_matrix(name, 0)
        alike = name == theirs or frozenset((name, theirs)) in ALIKE
        if alike or (num_steps == 0 and _same_hyper_parameters(name, theirs)):
            other.load_state_dict(copy.deepcopy(saved))
        else:
            _refused(other, saved, "another optimizer")
        other.detach()


def _same_hyper_parameters(name, theirs):
    """Whether the states before the first step differ in nothing but what torch fills in."""
    own, other = (_hyper_parameters(getattr(torch.optim, kind)) for kind in (name, theirs))
    return own - _ADDED_LATER <= other <= own


def test_another_number_of_groups_or_parameters(world):
    _, opt = _trained("AdamW")
    saved = _snapshot(opt)
    two = copy.deepcopy(saved)
    two["param_groups"].append({**two["param_groups"][0], "params": []})
    _refused(opt, two, r"must have 1 parameter groups, as the optimizer has, got 2")
    fewer = copy.deepcopy(saved)
    fewer["param_groups"][0]["params"] = fewer["param_groups"][0]["params"][:-1]
    num = len(saved["param_groups"][0]["params"])
    _refused(opt, fewer, rf"parameter group 0 must have {num} parameters in the state dict.*, got {num - 1}")
    with pytest.raises(ValueError, match=r"must have 'state', got only \['param_groups'\]"):
        opt.load_state_dict({"param_groups": saved["param_groups"]})
    opt.detach()


def test_hooks_see_a_state_before_it_is_compared(world):
    _, opt = _trained("AdamW")
    saved = _snapshot(opt)
    broken = copy.deepcopy(saved)
    broken["param_groups"].append({"params": []})
    handle = opt.register_load_state_dict_pre_hook(
        lambda _, state_dict: {**state_dict, "param_groups": state_dict["param_groups"][:1]}
    )
    opt.load_state_dict(broken)
    handle.remove()
    _refused(opt, broken, "got 2")
    opt.detach()


def test_older_states_and_those_of_schedulers_are_taken(world):
    _, opt = _trained("AdamW")
    saved = _snapshot(opt)
    group = saved["param_groups"][0]
    for key in _ADDED_LATER & group.keys():
        del group[key]
    group |= {"initial_lr": 0.01, "max_momentum": 0.9, "mine": 3}
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["mine"] == 3
    opt.detach()


def test_someone_elses_optimizer_is_not_judged(world):
    class Mine(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

    opt = dpoptim.DataParallelOptimizer(Mine(seeded().parameters()))
    saved = opt.state_dict()
    saved["state"] = {0: {"anything": torch.zeros(3)}}
    opt.load_state_dict(saved)
    assert opt.state[opt.param_groups[0]["params"][0]]["anything"].shape == (3,)
    opt.detach()


# ---------------------------------------------------------------- gradients, closures, groups


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 4, sparse=True)
        self.out = nn.Linear(4, 3)

    def forward(self, indices):
        return self.out(self.words(indices))


REFUSING = ["Adadelta", "Adafactor", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "ASGD", "Muon"]


@pytest.mark.parametrize("name", [name for name in REFUSING if name in dpoptim.__all__])
@pytest.mark.supports("{name}", limits="refuses sparse gradients")
def test_a_sparse_gradient_is_refused_by_name(world, name):
    model = seeded(Mixed if name != "Muon" else Words)
    opt = dpoptim.DataParallelOptimizer(getattr(dpoptim, name)(model.named_parameters(), lr=0.01))
    before = copy.deepcopy(model.state_dict())
    indices = torch.arange(3) + world.rank
    if world.rank == 0:  # one rank alone has a sparse gradient
        model(indices.double() if name == "Muon" else indices).sum().backward()
    with pytest.raises(RuntimeError, match=r"the gradient of parameter 'words.weight' is sparse: .*not support sparse"):
        opt.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    opt.detach()


@pytest.mark.supports("SparseAdam", limits="refuses dense gradients")
def test_a_dense_gradient_is_refused_by_sparse_adam_by_name(world):
    model = seeded(Mixed)
    opt = dpoptim.DataParallelOptimizer(dpoptim.SparseAdam(list(model.named_parameters()), lr=0.01))
    model(torch.arange(3)).sum().backward()
    with pytest.raises(RuntimeError, match=r"the gradient of parameter 'out.weight', 'out.bias' is dense: SparseAdam"):
        opt.step()
    opt.detach()


@pytest.mark.parametrize("package", [torch.optim, dpoptim], ids=["torch", "dpoptim"])
@pytest.mark.supports("LBFGS", limits="one parameter group")
@pytest.mark.supports("LBFGS", limits="a closure is needed")
def test_lbfgs_without_a_closure_and_with_two_groups(world, package):
    model = seeded()
    opt = dpoptim.DataParallelOptimizer(package.LBFGS(model.parameters(), lr=0.5))
    with pytest.raises(TypeError, match=r"LBFGS.step\(\) missing 1 required positional argument: 'closure'"):
        opt.step()
    more = {"params": [nn.Parameter(torch.zeros(2, dtype=torch.float64))]}
    with pytest.raises(ValueError, match="LBFGS doesn't support per-parameter options"):
        opt.add_param_group(more)
    assert len(opt.param_groups) == 1
    with pytest.raises(ValueError, match="LBFGS doesn't support per-parameter options"):
        package.LBFGS([{"params": list(seeded().parameters())}, more])
    train(opt, model, joined_batch(0, [3]))
    opt.detach()


def _with_option(option):
    return [name for name in NAMES if option in _hyper_parameters(getattr(torch.optim, name))]


@pytest.mark.parametrize(
    ("option", "name"),
    [(option, name) for option in ("differentiable", "capturable") for name in _with_option(option)],
)
@pytest.mark.supports("{option}", limits="raises what torch raises on CPU and for parameters that are leaves")
def test_options_that_torch_refuses_on_cpu_raise_what_torch_raises(world, name, option):
    outcomes = []
    for wrapped in (False, True):
        model = seeded(Matrices)
        not_fused = {"fused": False} if "fused" in _hyper_parameters(getattr(torch.optim, name)) else {}
        inner = getattr(dpoptim, name)(model.parameters(), lr=0.01, **{option: True}, **not_fused)
        optimizer = dpoptim.DataParallelOptimizer(inner) if wrapped else inner
        try:
            train(optimizer, model, joined_batch(0, [2]))
            outcomes.append("stepped")
        except (AssertionError, RuntimeError) as error:
            outcomes.append((type(error), str(error)))
        if wrapped:
            optimizer.detach()
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] != "stepped"
