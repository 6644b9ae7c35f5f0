"""Optimizer state by name and interval: every round trip gives the same bits."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import OPTIMIZERS, Net, assert_same, joined_batch, seeded, train

from dpoptim.utils import state_dict as sd

PARTITIONS = {"element": sd.slices_by_element, "parameter": sd.slices_by_parameter}


def trained(name, options):
    """Return a torch optimizer after three steps, with a scheduler's initial_lr, and the shapes of its parameters."""
    model = seeded(Net)
    parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    two = [{"params": parameters[:3], "lr": 0.02}, {"params": parameters[3:]}]
    groups = parameters if name == "LBFGS" else two
    optimizer = getattr(torch.optim, name)(groups, **options)
    torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for step in range(3):
        train(optimizer, model, joined_batch(step, [4]))
    return optimizer, [p.shape for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_optimizer_survives_any_division(name, options, partition):
    optimizer, shapes = trained(name, options)
    before = optimizer.state_dict()
    form = sd.to_named(before, shapes)
    divide = PARTITIONS[partition]
    for n in (1, 2, 3, 7):
        shards = [sd.shard(form, slices) for slices in divide(form["shapes"], n)]
        for m in (1, 2, 5):
            resharded = [sd.reshard(iter(shards), slices) for slices in divide(form["shapes"], m)]
            assert_same(sd.from_named(sd.unshard(resharded)), before)
    assert all("initial_lr" in group for group in sd.unshard(shards)["param_groups"])
    optimizer.load_state_dict(sd.from_named(sd.unshard(shards)))


DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool])
SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=6)


@st.composite
def states(draw):
    """Return the state_dict of an optimizer that never was, with the shapes of its parameters."""
    shapes = draw(SHAPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def bits(shape):
        return torch.randint(0, 2, shape, generator=generator).to(draw(DTYPES))

    scalars = st.one_of(st.none(), st.integers(), st.floats(), st.booleans(), st.text(max_size=3))
    state = {}
    for index, shape in enumerate(shapes):
        if draw(st.booleans()):
            state[index] = {f"like{i}": bits(shape) for i in range(draw(st.integers(0, 2)))}
            for i in range(draw(st.integers(0, 3))):
                state[index][f"other{i}"] = draw(
                    st.one_of(
                        scalars,
                        st.lists(scalars, max_size=2),
                        st.lists(st.integers(0, 5), max_size=2).map(lambda s: bits(tuple(s))),
                        st.just([torch.ones(2), None]),
                    )
                )
    cut = draw(st.integers(0, len(shapes)))
    groups = [
        {"lr": draw(st.floats()), "betas": (0.9, 0.99), "params": list(range(cut))},
        {"lr": torch.tensor(0.5), "params": list(range(cut, len(shapes)))},
    ]
    return {"state": state, "param_groups": groups, "hook": {"error": torch.ones(3)}}, shapes


@settings(deadline=None, max_examples=300)
@given(states(), st.integers(1, 6), st.integers(1, 6), st.sampled_from(sorted(PARTITIONS)))
def test_any_state_survives_any_division(state_and_shapes, n, m, partition):
    state, shapes = state_and_shapes
    divide = PARTITIONS[partition]
    untouched = copy.deepcopy(state)
    form = sd.to_named(state, shapes)
    shards = [sd.shard(form, slices) for slices in divide(form["shapes"], n)]
    resharded = [sd.reshard((shard for shard in shards), slices) for slices in divide(form["shapes"], m)]
    back = sd.from_named(sd.unshard(reversed(resharded)))
    back["state"] = {
        index: {key: back["state"][index][key] for key in state["state"][index]} for index in back["state"]
    }
    assert_same({key: back[key] for key in state}, untouched)
    assert_same(state, untouched)


@settings(deadline=None)
@given(SHAPES, st.integers(1, 9))
def test_divisions_cover_every_element_once_and_evenly(shapes, world_size):
    shapes = {f"p{index}": shape for index, shape in enumerate(shapes)}
    whole = sd.full_slices(shapes)
    for divide in PARTITIONS.values():
        slices = divide(shapes, world_size)
        for name, (_, numel) in whole.items():
            intervals = sorted(s[name] for s in slices if s[name][0] < s[name][1])
            assert [start for start, _ in intervals] == [0, *(stop for _, stop in intervals)][: len(intervals)]
            assert sum(stop - start for start, stop in intervals) == numel
    loads = [sum(stop - start for start, stop in s.values()) for s in sd.slices_by_element(shapes, world_size)]
    assert max(loads) - min(loads) <= 1
    loads = [sum(stop - start for start, stop in s.values()) for s in sd.slices_by_parameter(shapes, world_size)]
    assert max(loads) - min(loads) <= max(numel for _, numel in whole.values())


def test_resharding_holds_one_old_shard_at_a_time():
    alive, most = 0, 0

    class Counted(dict):
        def __init__(self, *args):
            nonlocal alive, most
            super().__init__(*args)
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    optimizer, shapes = trained("Adam", {"lr": 0.01})
    form = sd.to_named(optimizer.state_dict(), shapes)
    slices = sd.slices_by_element(form["shapes"], 4)
    sd.reshard((Counted(sd.shard(form, own)) for own in slices), sd.slices_by_element(form["shapes"], 3)[1])
    assert most <= 2, "the generator makes the next before the loop lets go of the last"


def test_names_that_come_twice_are_told_apart():
    groups = [{"params": [0, 1], "param_names": ["weight", "bias"]}, {"params": [2], "param_names": ["weight"]}]
    assert sd.unique_names(groups) == ["weight (0 of group 0)", "bias", "weight (0 of group 1)"]
    assert sd.unique_names([{"params": [0, 1]}]) == ["0 of group 0", "1 of group 0"]


def test_errors_say_what_is_wrong():
    optimizer, shapes = trained("Adam", {"lr": 0.01})
    form = sd.to_named(optimizer.state_dict(), shapes)
    slices = sd.slices_by_element(form["shapes"], 2)
    half = sd.shard(form, slices[0])
    with pytest.raises(ValueError, match=r"hold all of every parameter, got elements .* unshard"):
        sd.from_named(half)
    with pytest.raises(ValueError, match=r"no form has element \d+ of 'exp_avg' of parameter '.*': give the forms"):
        sd.unshard([half])
    with pytest.raises(ValueError, match="at least one form"):
        sd.unshard([])
    with pytest.raises(ValueError, match=r"slices must lie in 0 to 25 for 'first.weight', got 0 to 26"):
        sd.shard(form, {**slices[0], "first.weight": (0, 26)})
    with pytest.raises(ValueError, match="'new' is in one of them only"):
        sd.shard(form, {**slices[0], "new": (0, 0)})
    other = {**half, "shapes": {**half["shapes"], "first.weight": (25,)}}
    with pytest.raises(ValueError, match=r"same parameters, but 'first.weight'"):
        sd.unshard([half, other])
    with pytest.raises(ValueError, match="shapes must have one entry a parameter"):
        sd.to_named(optimizer.state_dict(), shapes[:-1])
    with pytest.raises(ValueError, match="names must have one entry a parameter"):
        sd.to_named(optimizer.state_dict(), shapes, ["a"])
    with pytest.raises(ValueError, match="world_size must be >= 1"):
        sd.slices_by_parameter(form["shapes"], 0)
