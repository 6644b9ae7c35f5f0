"""Optimizers of other classes than torch's, in every mode: right, or replicated with a warning, or an error."""

import contextlib
import warnings

import foreign_classes
import pytest
import torch
from oracle import MODES, assert_replicas, assert_same_parameters, joined_batch, local_part, part_sizes, seeded, train
from torch import nn

import dpoptim
from dpoptim.utils import checkpoint
from dpoptim.utils.consistency import check_replicas

pytestmark = [pytest.mark.parallel, pytest.mark.ranks(2, 3)]

DIVIDED = (
    *("AdamOfGroups", "CountsInItself", "StateOfNobody", "StateFromTheStart", "TrustRatio", "OwnLoading", "Takes"),
    *("GivesMemory", "GivesMemoryByElement", "KnowsItsParameters", "KeepsGradients", "Containers", "SharesAList"),
)
REPLICATED = {
    "Coupled": "couples parameters",
    "StepsAllThatItKnows": "couples parameters",
    "Random": "draws random numbers",
    "Perturbs": r"steps another optimizer \(SGD\)",
}


def _groups(model):
    """Two groups, one of which is smaller than the number of ranks: some own nothing of it."""
    parameters = list(model.parameters())
    return [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.03}]


def _wrapped(name, mode, groups, expects_division=True):
    inner = getattr(foreign_classes, name)(groups)
    if name in REPLICATED and mode != "replicated" and expects_division:
        with pytest.warns(UserWarning, match=f"{name} can't be sharded among ranks, since it .*{REPLICATED[name]}"):
            return dpoptim.DataParallelOptimizer(inner, **MODES[mode])
    return dpoptim.DataParallelOptimizer(inner, **MODES[mode])


def _train(optimizer, model, batch):
    def closure():
        optimizer.zero_grad()
        loss = model(batch).pow(2).mean()
        loss.backward()
        return loss

    if isinstance(getattr(optimizer, "optimizer", optimizer), foreign_classes.Perturbs):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*DIVIDED, *REPLICATED])
def test_as_one_process_and_resumed(world, tmp_path_factory, name, mode):
    sizes = part_sizes(world.size, equal=True)
    path = world.bcast(str(tmp_path_factory.mktemp("saved")) if world.rank == 0 else None)
    model, expected = seeded(), seeded()
    opt, plain = _wrapped(name, mode, _groups(model)), getattr(foreign_classes, name)(_groups(expected))
    assert opt.mode == ("replicated" if name in REPLICATED else mode)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.rank)
        for step in range(7):
            if step == 3:  # a new optimizer goes on from what was saved, another from the checkpoint
                full = opt.full_state_dict(rank0_only=False)
                checkpoint.save(path, optimizer=opt)
                for is_from_file in (False, True):
                    opt.detach()
                    opt = _wrapped(name, mode, _groups(model))
                    if is_from_file:
                        checkpoint.load(path, optimizer=opt)
                    else:
                        opt.load_full_state_dict(full if world.rank == 0 else None)
            batch = joined_batch(step, sizes)
            _train(opt, model, local_part(batch, sizes, world.rank))
            if name != "Random":
                _train(plain, expected, batch)
                assert_same_parameters(model, expected, step)
    check_replicas(opt.communicator, model.named_parameters())
    if name in ("AdamOfGroups", "OwnLoading"):
        assert [group["step"] for group in opt.param_groups] == [7, 7]
    opt.detach()


@pytest.mark.parametrize("mode", MODES)
def test_random_numbers_are_the_same_on_all_ranks_and_as_in_one_process(world, mode):
    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(), seeded()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5 + world.rank)
        opt = _wrapped("Random", mode, model.parameters())
        before = torch.get_rng_state()
        for step in range(3):
            train(opt, model, local_part(joined_batch(step, sizes), sizes, world.rank))
        assert torch.equal(before, torch.get_rng_state())  # this rank's own generator has not moved
        torch.manual_seed(5)
        plain = foreign_classes.Random(expected.parameters())
        for step in range(3):
            train(plain, expected, joined_batch(step, sizes))
    assert_same_parameters(model, expected)
    assert_replicas(opt, model)
    opt.detach()


@pytest.mark.parametrize("mode", MODES)
def test_methods_and_attributes_of_the_class_are_the_wrappers(world, mode):
    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(), seeded()
    opt, plain = _wrapped("Slow", mode, model.parameters()), foreign_classes.Slow(expected.parameters())
    assert opt.mode == mode
    for step in range(4):
        for optimizer in (opt, plain):
            optimizer.train()
            optimizer.temperature = 1.0 / (step + 1)
        batch = joined_batch(step, sizes)
        train(opt, model, local_part(batch, sizes, world.rank))
        train(plain, expected, batch)
        for optimizer in (opt, plain):
            optimizer.eval()
        assert_same_parameters(model, expected, step)
        assert opt.temperature == opt.optimizer.temperature == plain.temperature
        assert opt.param_groups[0]["train_mode"] is False
    with pytest.raises(
        AttributeError, match="neither DataParallelOptimizer nor the wrapped Slow has an attribute 'colour'"
    ):
        opt.colour  # noqa: B018
    check_replicas(opt.communicator, model.named_parameters())
    opt.detach()


def test_arguments_of_the_step(world):
    model, expected = seeded(), seeded()
    sizes = part_sizes(world.size, equal=True)
    opt, plain = _wrapped("Takes", "replicated", model.parameters()), foreign_classes.Takes(expected.parameters())
    batch = joined_batch(0, sizes)
    model(local_part(batch, sizes, world.rank)).pow(2).mean().backward()
    expected(batch).pow(2).mean().backward()
    opt.step(factor=torch.tensor(0.5))
    plain.step(factor=torch.tensor(0.5))
    assert_same_parameters(model, expected)
    with pytest.raises(ValueError, match=r"the arguments of step\(\) must be the same on all ranks"):
        opt.step(factor=torch.tensor(float(world.rank)))
    opt.detach()
    opt = _wrapped("Takes", "sharded", model.parameters())
    with pytest.raises(TypeError, match=r"with sharded parameters step\(\) takes no arguments but a closure"):
        opt.step(factor=torch.tensor(0.5))


@pytest.mark.parametrize("mode", MODES)
def test_what_uses_each_ranks_own_graph_is_refused(world, mode):
    model = seeded()
    divides = mode != "replicated"
    with pytest.warns(UserWarning, match="can't be sharded") if divides else contextlib.nullcontext():
        opt = dpoptim.DataParallelOptimizer(foreign_classes.SecondOrder(model.parameters()), **MODES[mode])
    sizes = part_sizes(world.size, equal=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of cycles that create_graph makes
        model(local_part(joined_batch(0, sizes), sizes, world.rank)).pow(2).mean().backward(create_graph=True)
    with pytest.raises(
        RuntimeError, match="SecondOrder can't be stepped on several ranks if it differentiates gradients"
    ):
        opt.step()
    opt.detach()


@pytest.mark.parametrize("mode", MODES)
def test_ours_around_theirs(world, mode):
    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(), seeded()
    inner = foreign_classes.Lookahead(dpoptim.AdamW(model.parameters(), lr=0.01))
    plain = foreign_classes.Lookahead(torch.optim.AdamW(expected.parameters(), lr=0.01))
    divides = mode != "replicated"
    with pytest.warns(UserWarning, match="steps another optimizer") if divides else contextlib.nullcontext():
        opt = dpoptim.DataParallelOptimizer(inner, **MODES[mode])
    for step in range(4):
        batch = joined_batch(step, sizes)
        train(opt, model, local_part(batch, sizes, world.rank))
        train(plain, expected, batch)
        assert_same_parameters(model, expected, step)
    with pytest.warns(UserWarning, match="Lookahead keeps state in its attribute 'slow' that can't be saved"):
        assert opt.state_dict()["state"].keys() == plain.state_dict()["state"].keys()
    check_replicas(opt.communicator, model.named_parameters())
    opt.detach()


@pytest.mark.parametrize("mode", MODES)
def test_theirs_around_ours(world, mode):
    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(), seeded()
    opt = dpoptim.DataParallelOptimizer(dpoptim.AdamW(model.parameters(), lr=0.01), **MODES[mode])
    theirs = foreign_classes.Lookahead(opt)
    plain = foreign_classes.Lookahead(torch.optim.AdamW(expected.parameters(), lr=0.01))
    if mode != "replicated":
        model(local_part(joined_batch(0, sizes), sizes, world.rank)).pow(2).mean().backward()
        with pytest.raises(
            RuntimeError, match="Lookahead steps this DataParallelOptimizer and may read all gradients or write"
        ):
            theirs.step()
    else:
        for step in range(5):
            batch = joined_batch(step, sizes)
            train(theirs, model, local_part(batch, sizes, world.rank))
            train(plain, expected, batch)
            assert_same_parameters(model, expected, step)
        check_replicas(opt.communicator, model.named_parameters())
    opt.detach()


def test_state_that_can_not_be_saved_is_said(world):
    class Masks(foreign_classes.AdamOfGroups):
        def __init__(self, params):
            super().__init__(params)
            self.masks = {}

        def step(self, closure=None):
            for _, p in self._trained():
                self.masks[p] = torch.ones_like(p)
            return super().step()

    model = seeded()
    opt = dpoptim.DataParallelOptimizer(Masks(model.parameters()))
    opt.state_dict()
    train(opt, model, torch.ones(2, 5, dtype=torch.float64))
    with pytest.warns(UserWarning, match="Masks keeps state in its attribute 'masks' that can't be saved"):
        opt.state_dict()
    opt.detach()


@pytest.mark.parametrize("mode", MODES)
def test_an_option_that_is_switched_on_later(world, mode):
    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(), seeded()
    opt = dpoptim.DataParallelOptimizer(foreign_classes.Switched(_groups(model)), **MODES[mode])
    plain = foreign_classes.Switched(_groups(expected))
    for step in range(4):
        batch = joined_batch(step, sizes)
        if step == 2:
            opt.param_groups[0]["clip"] = plain.param_groups[0]["clip"] = 1.0
        if step == 2 and mode != "replicated":
            with pytest.raises(
                ValueError, match="an option of a parameter group was switched, and Switched is no longer by element"
            ):
                train(opt, model, local_part(batch, sizes, world.rank))
            break
        train(opt, model, local_part(batch, sizes, world.rank))
        train(plain, expected, batch)
        assert_same_parameters(model, expected, step)
    opt.detach()


def test_an_attribute_that_parameters_get_later(world):
    for kind, is_seen in ((foreign_classes.KnowsItsParameters, True), (foreign_classes.AdamOfGroups, False)):
        sizes = part_sizes(world.size, equal=True)
        model, expected = seeded(), seeded()
        opt = dpoptim.DataParallelOptimizer(kind(model.parameters()), shard=True)
        plain = kind(expected.parameters())
        for parameters in (model.parameters(), expected.parameters()):
            for parameter in parameters:
                parameter.factor = 0.5
        batch = joined_batch(0, sizes)
        with (
            contextlib.nullcontext() if is_seen else pytest.raises(RuntimeError, match="has got the attribute 'factor'")
        ):
            train(opt, model, local_part(batch, sizes, world.rank))
            train(plain, expected, batch)
            assert_same_parameters(model, expected)
        opt.detach()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [dpoptim.SGD, foreign_classes.AdamOfGroups])
def test_a_step_of_one_object(world, mode, kind):
    def own(optimizer):
        step, zero_grad = optimizer.step, optimizer.zero_grad

        def half_step(closure=None):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(0.5)
            return step(closure)

        def zero_grad_and_count(set_to_none=True):
            optimizer.num_cleared = getattr(optimizer, "num_cleared", 0) + 1
            zero_grad(set_to_none)

        optimizer.step, optimizer.zero_grad = half_step, zero_grad_and_count
        return optimizer

    sizes = part_sizes(world.size, equal=True)
    model, expected = seeded(), seeded()
    inner, plain = own(kind(model.parameters(), lr=0.1)), own(kind(expected.parameters(), lr=0.1))
    divides = mode != "replicated"
    with pytest.warns(UserWarning, match="has a step of this object's own") if divides else contextlib.nullcontext():
        opt = dpoptim.DataParallelOptimizer(inner, **MODES[mode])
    num_hooked = []
    opt.register_step_post_hook(lambda *_: num_hooked.append(1))
    for step in range(3):
        batch = joined_batch(step, sizes)
        train(opt, model, local_part(batch, sizes, world.rank))
        train(plain, expected, batch)
        assert_same_parameters(model, expected, step)
    assert (inner.num_cleared, len(num_hooked)) == (3, 3)
    opt.detach()


def test_who_puts_other_tensors_into_groups_is_told(world):
    class Replaces(foreign_classes.AdamOfGroups):
        is_elementwise = False

        def step(self, closure=None):
            for group in self.param_groups:
                group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]

    model = seeded()
    opt = dpoptim.DataParallelOptimizer(Replaces(model.parameters()), shard=True)
    with pytest.raises(RuntimeError, match="Replaces puts other tensors into its groups"):
        train(opt, model, torch.ones(2, 5, dtype=torch.float64))
    opt.detach()


@pytest.mark.parametrize("mode", ["sharded", "node-shared"])
def test_addresses_of_parameters_rule_out_a_division(world, mode):
    class KnowsAddresses(foreign_classes.AdamOfGroups):
        def __init__(self, params):
            super().__init__(params)
            self.places = [{"at": p.data_ptr()} for group in self.param_groups for p in group["params"]]

    with pytest.warns(UserWarning, match="since it knows parameters by their address: it stays replicated"):
        opt = dpoptim.DataParallelOptimizer(KnowsAddresses(seeded().parameters()), **MODES[mode])
    opt.detach()


def test_an_object_that_changes_can_not_be_saved(world):
    class Counter:
        def __init__(self):
            self.count = 0

    class CountsInAnObject(foreign_classes.AdamOfGroups):
        def __init__(self, params):
            super().__init__(params)
            self.counter, self.settings = Counter(), Counter()

        def step(self, closure=None):
            self.counter.count += 1
            return super().step()

    model = seeded()
    opt = dpoptim.DataParallelOptimizer(CountsInAnObject(model.parameters()))
    opt.state_dict()
    train(opt, model, torch.ones(2, 5, dtype=torch.float64))
    with pytest.warns(UserWarning, match="its attribute 'counter' that can't be saved") as caught:
        opt.state_dict()
    assert len(caught) == 1
    opt.detach()


def test_a_group_that_needs_another_division_is_refused(world):
    class Both(foreign_classes.AdamOfGroups):
        @torch.no_grad()
        def step(self, closure=None):
            for group, p in self._trained():
                p.sub_(p.grad / (p.grad.norm() if group.get("whole") else 1.0), alpha=group["lr"])

    model, more = seeded(), nn.Parameter(torch.ones(3, 3, dtype=torch.float64))
    opt = dpoptim.DataParallelOptimizer(Both(model.parameters()), shard=True)
    with pytest.raises(ValueError, match="with the new group Both can be sharded by whole parameter alone"):
        opt.add_param_group({"params": [more], "whole": True})
    assert len(opt.param_groups) == 1
    opt.detach()


def test_numbers_that_depend_on_the_part_are_an_error_on_all(world):
    class Hides(foreign_classes.TrustRatio):
        is_elementwise = False  # which is not true

        def step(self, closure=None):
            super().step()
            for group in self.param_groups:
                group["d"] = sum(float(p.grad.norm()) for p in group["params"])

    model = seeded()
    opt = dpoptim.DataParallelOptimizer(Hides(model.parameters()), shard=True)
    with pytest.raises(
        RuntimeError, match=r"after a step of Hides parameter group 0 has d = .* on rank 0 but .* on rank 1"
    ):
        train(opt, model, torch.ones(2, 5, dtype=torch.float64))
    opt.detach()


@pytest.mark.parametrize("mode", MODES)
def test_who_steps_within_backward_is_told(world, mode):
    model = seeded(lambda: nn.Linear(5, 5))

    def step(parameter):
        parameter.data.sub_(parameter.grad)
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.parameters(), lr=0.1), **MODES[mode])
    with pytest.raises(RuntimeError, match=r"the gradient of parameter .* was taken away before it could be reduced"):
        model(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
    opt.detach()


@pytest.mark.parametrize("mode", MODES)
def test_who_steps_within_backward_later_is_told(world, mode):
    """A parameter that had no gradient before, so that the next one that is gone changes nothing that ranks compare."""
    model = seeded(lambda: nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)]))
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.parameters(), lr=0.1), **MODES[mode])
    batch = torch.ones(2, 5, dtype=torch.float64)
    for _ in range(2):
        opt.zero_grad()
        model[0](batch).sum().backward()
        opt.step()

    def take_away(parameter):
        parameter.grad = None

    for parameter in model[1].parameters():
        parameter.register_post_accumulate_grad_hook(take_away)
    opt.zero_grad()
    with pytest.raises(RuntimeError, match=r"the gradient of parameter .* was taken away before it could be reduced"):
        model[1](model[0](batch)).sum().backward()
    opt.detach()


def test_a_state_dict_of_another_form_is_said(world):
    class Boxed(foreign_classes.Lookahead):
        def state_dict(self):
            return {"slow": [], "base": self.optimizer.state_dict()}

    opt = dpoptim.DataParallelOptimizer(Boxed(dpoptim.SGD(seeded().parameters(), lr=0.1)))
    assert opt.state_dict().keys() >= {"slow", "base"}
    with pytest.raises(RuntimeError, match="the state dict of Boxed is not of torch's form"):
        opt.local_state_dict()
    opt.detach()
