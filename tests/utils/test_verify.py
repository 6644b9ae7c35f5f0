"""``dpoptim.utils.verify_step``: it finds what is wrong, says why, and leaves everything as it was."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from oracle import EVERY_OPTIMIZER, MODES, Net, local_part, model_for, part_sizes, seeded
from torch import nn

import dpoptim
from dpoptim.utils import Verdict, verify_step
from dpoptim.utils.checkpoint.rng import get_rng
from dpoptim.utils.consistency import digest

pytestmark = pytest.mark.parallel

every_mode = pytest.mark.parametrize("mode", MODES)


def square(model, batch):
    return model(batch).pow(2).mean()


def own_batch(world, width=5, *, equal=False, dtype=torch.float64):
    """Return this rank's part of a batch, of another size on each rank unless they are equal."""
    sizes = part_sizes(world.size, equal=equal)
    joined = torch.randn(sum(sizes), width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return local_part(joined, sizes, world.rank).to(dtype)


def wrapped(world, optimizer, mode="replicated", **options):
    """Return a wrapper without the warning that it stays replicated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dpoptim.DataParallelOptimizer(optimizer, **MODES[mode], **options)


def train(opt, model, batch, num_steps=2):
    def closure():
        opt.zero_grad()
        loss = square(model, batch)
        loss.backward()
        return loss

    for _ in range(num_steps):
        opt.step(closure)


def agreed(world, verdict):
    """Return the verdict, which must be the same on all ranks."""
    assert world.allgather(verdict) == [verdict] * world.size
    return verdict


# ------------------------------------------------------------------------------------------ what is right


@pytest.mark.once
@pytest.mark.ranks(2)
@every_mode
def test_every_optimizer_is_equal(world, mode):
    """... with the state that it has in the middle of training, and other sizes of batches on each rank."""
    table = [(name, options, torch.float32) for name, options in EVERY_OPTIMIZER.items()]
    table += [(name, EVERY_OPTIMIZER[name], torch.bfloat16) for name in ("SGD", "AdamW", "RMSprop")]
    found = []
    for name, options, dtype in table:
        model = seeded(model_for(name), dtype=dtype)
        opt = wrapped(world, getattr(dpoptim, name)(model.parameters(), **options), mode)
        batch = own_batch(world, dtype=dtype)
        opt.batch_weight = len(batch)
        train(opt, model, batch)
        found.append((name, dtype, str(verify_step(opt, model, square, batch))))
        opt.detach()
    assert [entry for entry in found if not entry[2].startswith("equal: 3 steps of")] == []


def test_a_verdict_reads_well(world):
    model = seeded()
    opt = wrapped(world, dpoptim.SGD(model.parameters(), lr=0.1))
    verdict = agreed(world, verify_step(opt, model, square, own_batch(world, equal=True), num_steps=1))
    assert verdict
    assert (verdict.equal, verdict.parameter, verdict.notes) == (True, None, ())
    ranks = f"{world.size} rank{'s' * (world.size > 1)} (replicated)"
    assert str(verdict).startswith(f"equal: 1 step of {ranks} as of one process on the joined batch, to at most ")
    wrong = Verdict(False, "a.weight", "gradient", 0.5, 1e-6, 2, 3, "sharded", ("why", "- that"))
    assert str(wrong) == (
        "DIFFERS in step 2: gradient 'a.weight' on 3 ranks (sharded) is off by 5.0e-01 (rounding explains 1.0e-06)\n"
        "  why\n  - that"
    )
    opt.detach()


@every_mode
def test_batches_of_many_tensors(world, mode):
    model = seeded()
    opt = wrapped(world, dpoptim.AdamW(model.named_parameters(), lr=0.01), mode)
    x = own_batch(world)
    opt.batch_weight = len(x)
    batch = {"x": x, "more": [(x[:, :2], None)], "scale": torch.tensor(2.0), "name": "b"}

    def loss_fn(model, batch):
        return (model(batch["x"])[:, :2] - batch["scale"] * batch["more"][0][0]).pow(2).mean()

    assert agreed(world, verify_step(opt, model, loss_fn, batch))
    opt.detach()


def test_autocast_is_judged_by_its_dtype(world):
    model = seeded(dtype=torch.float32)
    opt = wrapped(world, dpoptim.AdamW(model.parameters(), lr=0.01))

    def loss_fn(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch).float().pow(2).mean()

    assert verify_step(opt, model, loss_fn, own_batch(world, equal=True, dtype=torch.float32))
    opt.detach()


@every_mode
def test_options_of_the_wrapper(world, mode):
    """Accumulation, small buckets, groups, a compressing hook, clipping, a scheduler's step: all as the user has it."""
    model = seeded(dtype=torch.float32)
    groups = [{"params": model.first.parameters(), "lr": 0.05}, {"params": model.middle.parameters()}]
    batch = own_batch(world, equal=True, dtype=torch.float32)
    opt = wrapped(world, dpoptim.SGD(groups, lr=0.1, momentum=0.9), mode, accumulate=2, bucket_mb=1e-5, overlap=False)
    dpoptim.lr_scheduler.StepLR(opt, 1)
    clip = lambda optimizer: optimizer.clip_grad_norm_(1e-3)  # noqa: E731
    assert verify_step(opt, model, square, batch, before_step=clip)
    opt.detach()


def test_a_heat_wrapper(world):
    pytest.importorskip("heat", reason="Heat is not installed in this environment")
    import dpoptim.heat as optim

    model = seeded()
    opt = optim.DataParallelOptimizer(dpoptim.SGD(model.parameters(), lr=0.1), blocking=True)
    network = optim.DataParallel(model, world, opt, blocking_parameter_updates=True)
    assert verify_step(opt, network, square, own_batch(world, equal=True))
    opt.detach()


# ------------------------------------------------------------------------------------------ what is left as it was


def _everything(opt, model):
    """Return all that must not change, as text of bits."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    state = opt.local_state_dict()
    values = [v for entry in state["state"].values() for v in entry.values() if isinstance(v, torch.Tensor)]
    hooks = [
        [(key, id(hook)) for key, hook in (hooks or {}).items()]
        for p in model.parameters()
        for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks)
    ]
    hooks += [list(vars(opt)[name].items()) for name in sorted(vars(opt)) if name.endswith("_hooks")]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in opt.param_groups]
    return (
        [digest(tensor) for tensor in (*tensors, *values)],
        [id(tensor) for tensor in tensors],
        [tensor.data_ptr() for tensor in tensors],
        repr((hooks, groups, opt.batch_weight, [m.training for m in model.modules()], sorted(vars(opt)))),
        repr((get_rng(), random.getstate(), np.random.get_state())),
        [len(opt.optimizer.state), opt.is_accumulating],
    )


class Noisy(Net):
    """Has what changes by itself: random numbers of all generators, statistics, a gradient hook."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return super().forward(self.norm(self.dropout(x))) * (1 + 0.1 * random.random() + 0.1 * np.random.rand())


@every_mode
def test_nothing_is_changed(world, mode):
    torch.manual_seed(world.rank)
    model = seeded(Noisy)
    seen = []
    model.middle.weight.register_hook(lambda gradient: gradient * 2)
    opt = wrapped(world, dpoptim.AdamW(model.parameters(), lr=0.01), mode, module=model)
    scheduler = dpoptim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    model.last.bias.register_post_accumulate_grad_hook(halve)
    opt.register_step_post_hook(lambda *_: seen.append(1))
    batch = own_batch(world)
    train(opt, model, batch, 2)
    square(model, batch).backward()  # there are gradients, which must stay
    twin = copy.deepcopy(scheduler.state_dict())
    before = _everything(opt, model)
    verdict = agreed(world, verify_step(opt, model, square, batch))
    assert _everything(opt, model) == before
    assert (scheduler.state_dict(), len(seen)) == (twin, 2)
    assert verdict.equal == (world.size == 1), verdict
    assert "1 step hook left out: give before_step what they do" in verdict.notes
    with pytest.raises(RuntimeError, match="wrong here"):  # nor by an error in the middle of a step
        verify_step(opt, model, square, batch, before_step=_raise)
    assert _everything(opt, model) == before
    opt.step()
    opt.detach()


def halve(parameter):
    parameter.grad.mul_(0.5)


def _raise(_):
    raise RuntimeError("wrong here")


def test_training_goes_on_as_without(world):
    """The same bits, with checks between the steps and without."""
    models = [seeded() for _ in range(2)]
    for model, is_checked in zip(models, (True, False), strict=True):
        opt = wrapped(world, dpoptim.Adam(model.parameters(), lr=0.01), "sharded")
        for _ in range(3):
            if is_checked:
                verify_step(opt, model, square, own_batch(world, equal=True), num_steps=1)
            train(opt, model, own_batch(world, equal=True), 1)
        opt.detach()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------ what is wrong


class UsesTheRank(torch.optim.SGD):
    """Steps longer on other ranks than 0."""

    rank = 0

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] *= 1 + self.rank
        return super().step(closure)


class Counts(torch.optim.Optimizer):
    """Keeps a count outside of its groups and state, and multiplies with it."""

    is_elementwise = True

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.counts = {"num_steps": 0}

    @torch.no_grad()
    def step(self, closure=None):
        self.counts["num_steps"] += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] * self.counts["num_steps"])


def forgets_a_rank(communicator, bucket):
    if communicator.rank == communicator.world_size - 1:
        bucket.flat.zero_()
    return dpoptim.comm_hooks.sum_over_ranks(communicator, bucket, bucket.flat)


class WrongStep(dpoptim.DataParallelOptimizer):
    """A wrapper that is wrong in its second step."""

    num_made = 0

    def step(self, closure=None):
        loss = super().step(closure)
        self.num_made += 1
        if self.num_made == 2:
            with self.exclusive(), torch.no_grad():
                self.param_groups[0]["params"][1].add_(1e-4)
        return loss


@pytest.fixture
def _several_ranks(world):
    if world.size == 1:
        pytest.skip("one rank can't differ from others")


needs_several = pytest.mark.usefixtures("_several_ranks")


@needs_several
def test_an_optimizer_that_uses_the_rank_is_found(world):
    model = seeded()
    inner = UsesTheRank(model.parameters(), lr=0.1)
    inner.rank = world.rank
    opt = wrapped(world, inner)
    verdict = agreed(world, verify_step(opt, model, square, own_batch(world, equal=True)))
    assert not verdict
    assert verdict.parameter == "first.weight"
    assert verdict.notes[0] == "ranks hold different bits of it after the step"
    opt.detach()


@every_mode
def test_attributes_of_an_optimizer_are_copied(world, mode):
    model = seeded()
    inner = Counts(model.parameters())
    opt = wrapped(world, inner, mode)
    assert verify_step(opt, model, square, own_batch(world, equal=True))
    assert inner.counts == {"num_steps": 0}
    opt.detach()


@needs_several
@pytest.mark.parametrize("mode", ["replicated", "sharded"])
def test_a_wrong_comm_hook_is_found(world, mode):
    """... although Adam steps alike with gradients of any size."""
    model = seeded()
    opt = wrapped(world, dpoptim.Adam(model.parameters(), lr=0.01), mode, comm_hook=forgets_a_rank)
    verdict = agreed(world, verify_step(opt, model, square, own_batch(world, equal=True)))
    assert not verdict
    assert (verdict.what, verdict.step) == ("gradient", 1)
    assert verdict.notes == (
        "the wrapper's gradient is not the mean of the ranks' own gradients: comm_hook forgets_a_rank may be wrong",
    )
    opt.detach()


def test_a_wrong_step_is_found(world):
    model = seeded()
    opt = WrongStep(dpoptim.SGD(model.parameters(), lr=0.1))
    assert verify_step(opt, model, square, own_batch(world, equal=True), num_steps=1)
    verdict = agreed(world, verify_step(opt, model, square, own_batch(world, equal=True)))
    assert (verdict.equal, verdict.parameter, verdict.what, verdict.step) == (False, "first.bias", "parameter", 2)
    assert verdict.difference == pytest.approx(1e-4)
    assert verdict.notes == ("SGD.step() does not do in mode replicated what it does in one process",)
    assert opt.num_made == 0
    opt.detach()


@needs_several
@every_mode
def test_a_sum_is_named(world, mode):
    model = seeded()
    opt = wrapped(world, dpoptim.Adam(model.parameters(), lr=0.01), mode)
    verdict = verify_step(opt, model, lambda model, batch: model(batch).pow(2).sum(), own_batch(world, equal=True))
    assert not verdict
    assert verdict.what == "gradient"
    assert verdict.notes[0].endswith("is not the gradient of the joined batch:")
    assert verdict.notes[1:] == (
        "- the loss is a sum over samples, and the mean over ranks is smaller by the number of ranks: use a mean",
    )
    opt.detach()


@needs_several
def test_a_missing_batch_weight_is_named(world):
    model = seeded()
    opt = wrapped(world, dpoptim.SGD(model.parameters(), lr=0.1))
    verdict = agreed(world, verify_step(opt, model, square, own_batch(world)))
    sizes = ", ".join(map(str, part_sizes(world.size, equal=False)))
    ones = ", ".join(["1"] * world.size)
    assert verdict.notes[1:] == (
        f"- ranks have {sizes} samples but batch_weight {ones}: set opt.batch_weight to the number of samples",
    )
    opt.detach()


@needs_several
def test_random_and_batch_dependent_modules_are_named(world):
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 2)))
    torch.manual_seed(world.rank)
    opt = wrapped(world, dpoptim.SGD(model.parameters(), lr=0.1))
    batch = own_batch(world, equal=True)
    verdict = agreed(world, verify_step(opt, model, square, batch))
    assert verdict.notes[1:] == (
        "- BatchNorm1d '1' normalises with each rank's own batch in training mode",
        "- Dropout '2' draws random numbers in training mode, other ones on each rank",
    )
    model.eval()
    assert verify_step(opt, model, square, batch)
    model[1].running_mean += world.rank
    verdict = verify_step(opt, model, square, batch)
    assert verdict.notes[1:] == (
        "- buffer '1.running_mean' differs between ranks (opt.average_buffers() makes it equal)",
    )
    model[1].running_mean -= world.rank
    verdict = verify_step(opt, model, lambda model, x: square(model, x + torch.rand(5)), batch)
    assert verdict.notes[1:] == ("- the loss draws random numbers, other ones on each rank",)
    verdict = verify_step(opt, model, lambda model, x: square(model, x - x.mean(0)), batch)
    assert verdict.notes[1].startswith(
        "- the loss divides by something else than the number of samples (tokens, a mask"
    )
    opt.detach()


@needs_several
def test_replicas_that_differ_before_are_named(world):
    model = seeded()
    opt = wrapped(world, dpoptim.SGD(model.parameters(), lr=0.1))
    with torch.no_grad():
        model.frozen.weight += world.rank
    verdict = agreed(world, verify_step(opt, model, square, own_batch(world, equal=True)))
    assert (verdict.equal, verdict.parameter) == (False, "frozen.weight")
    assert "ranks hold different values of it before the step" in str(verdict)
    opt.detach()


@needs_several
def test_clipping_each_ranks_gradient_is_found(world):
    """A hook that clips each rank's own gradient does not clip the mean; torch's clipping does, also sharded."""
    model = seeded()
    opt = wrapped(world, dpoptim.SGD(model.parameters(), lr=0.1), "sharded")
    batch = own_batch(world, equal=True)
    clip = lambda optimizer: nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1e-3)  # noqa: E731
    assert verify_step(opt, model, square, batch, before_step=clip)
    assert verify_step(opt, model, square, batch, before_step=lambda optimizer: optimizer.clip_grad_norm_(1e-3))
    model.first.weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    assert not verify_step(opt, model, square, batch)
    opt.detach()


def test_a_step_that_makes_much_of_rounding_is_no_difference(world):
    """A bias before BatchNorm has no gradient but rounding, of which Adam makes a step of full length."""
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 5), nn.InstanceNorm1d(5), nn.Linear(5, 2)), dtype=torch.float32)
    opt = wrapped(world, dpoptim.Adam(model.parameters(), lr=0.01))

    def loss_fn(model, batch):
        y = model[0](batch)
        return model[2]((y - y.mean(0, keepdim=True) * 0 - model[0].bias).pow(2)).pow(2).mean()

    batch = own_batch(world, equal=True, dtype=torch.float32)
    assert verify_step(opt, model, loss_fn, batch)
    opt.detach()


# ------------------------------------------------------------------------------------------ what is refused


def _mixed(model, batch):
    return model(batch["x"]).pow(2).mean()


def _refusals():
    original = seeded()
    other = nn.Linear(5, 5).double()
    batch = torch.ones(4, 5, dtype=torch.float64)
    return original, {
        "model must be a torch.nn.Module, got int": {"model": 3},
        "loss_fn must be a function": {"loss_fn": nn.MSELoss()},
        "num_steps must be an integer >= 1, got 0": {"num_steps": 0},
        "before_step must be callable, got int": {"before_step": 3},
        "model must hold all parameters of the optimizer, but parameter 0 of shape": {"model": other},
        "batch must hold a tensor whose dim 0 is the batch, got none": {"batch": ["x", 1]},
        "batch must be a tensor, or tuples, lists and dicts of tensors, got object": {"batch": [batch, object()]},
        r"batch\[0\] has 4 and batch\[1\] has 3": {"batch": (batch, batch[:3])},
        "must return a tensor of one element that requires grad, got one of shape": {"loss_fn": lambda m, b: m(b)},
        "must return a tensor of one element that requires grad, got float": {"loss_fn": lambda m, b: 0.5},
        "must use the model that it is given, a copy, but used 'first.weight' of the original": {
            "loss_fn": lambda m, b: square(original, b)
        },
        r"used a parameter of shape \(5, 5\) that is not of the model": {"loss_fn": lambda m, b: square(other, m(b))},
        "not enough": {"loss_fn": lambda m, b: (_ for _ in ()).throw(ValueError("not enough"))},
    }


@every_mode
def test_errors_on_one_rank_are_errors_on_all(world, mode):
    """... whichever rank it is, before anything is changed; the next call works."""
    model, refusals = _refusals()
    opt = wrapped(world, dpoptim.SGD(model.parameters(), lr=0.1), mode)
    right = {"model": model, "loss_fn": square, "batch": torch.ones(4, 5, dtype=torch.float64)}
    before = _everything(opt, model)
    for message, wrong in refusals.items():
        for rank in {0, world.size - 1}:
            arguments = {**right, **(wrong if world.rank == rank else {})}
            with pytest.raises((TypeError, ValueError), match=message):
                verify_step(opt, **arguments)
    assert _everything(opt, model) == before
    assert verify_step(opt, **right)
    opt.detach()


@needs_several
def test_batches_that_do_not_go_together(world):
    model = seeded()
    opt = wrapped(world, dpoptim.SGD(model.parameters(), lr=0.1))
    x = torch.ones(4, 5 + (world.rank == 1), dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"batch is torch.float64 of shape \(\*, 5\) on rank 0 but .*\(\*, 6\) on rank 1"
    ):
        verify_step(opt, model, square, x)
    x = torch.ones(4, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"batch\['k'\] is 0 on rank 0 but 1 on rank 1"):
        verify_step(opt, model, _mixed, {"x": x, "k": world.rank})
    opt.detach()


@needs_several
def test_a_rank_that_is_elsewhere(world):
    model = seeded()
    opt = wrapped(world, dpoptim.SGD(model.parameters(), lr=0.1))
    batch = torch.ones(4, 5, dtype=torch.float64)
    loss = square(model, batch)
    action = loss.backward if world.rank == 0 else lambda: verify_step(opt, model, square, batch)
    with pytest.raises(RuntimeError, match="the ranks are at different places"):
        action()
    opt.detach()


def test_other_things_are_refused(world):
    model = seeded()
    with pytest.raises(TypeError, match="opt must be a DataParallelOptimizer, got SGD"):
        verify_step(torch.optim.SGD(model.parameters(), lr=0.1), model, square, None)
    opt = dpoptim.DASO(dpoptim.SGD(model.parameters(), lr=0.1), total_epochs=2)
    with pytest.raises(TypeError, match=r"got DASO .DASO's nodes differ between exchanges"):
        verify_step(opt, model, square, None)
    opt.detach()


def test_a_model_that_cannot_be_copied(world):
    model = seeded()
    opt = wrapped(world, dpoptim.SGD(model.parameters(), lr=0.1))
    model.generator = (number for number in range(3))
    with pytest.raises(TypeError, match=r"the model \(Net\) can't be copied, which verify_step needs: cannot pickle"):
        verify_step(opt, model, square, torch.ones(4, 5, dtype=torch.float64))
    opt.detach()
