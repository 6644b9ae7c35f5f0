"""What lets ranks part in silence: the right result, or an error or a warning on all of them."""

import contextlib
import enum
import itertools
import warnings

import pytest
import torch
from oracle import MODES, joined_batch, local_part, seeded, twin
from torch import nn
from torch.nn import functional

import dpoptim
from dpoptim.checks.hyper_parameters import HyperParameters, first_difference

pytestmark = pytest.mark.parallel


def _on_several(world, kind, match):
    """Expect an error where there are several ranks."""
    return pytest.raises(kind, match=match) if world.size > 1 else contextlib.nullcontext()


def _layers(*widths):
    return nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(widths)])


def _parts(world, step):
    sizes = [3] * world.size
    batch = joined_batch(step, sizes)
    return batch.split(sizes), local_part(batch, sizes, world.rank)


def _assert_same(model, expected, what):
    for value, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-12, msg=lambda text: f"{what}: {text}")


# ---------------------------------------------------------------- numbers in parameter groups

PARTING = {
    "a scheduler on a local metric": lambda opt, rank: torch.optim.lr_scheduler.ReduceLROnPlateau(
        opt, patience=0, factor=0.1
    ),
    "lr": lambda opt, rank: opt.param_groups[0].update(lr=0.1 + 0.01 * rank),
    "lr, a tensor written in place": lambda opt, rank: opt.param_groups[0]["lr"].add_(rank),
    "one of two betas": lambda opt, rank: opt.param_groups[0].update(betas=(0.9, 0.9 + 0.01 * rank)),
    "NaN on one rank": lambda opt, rank: opt.param_groups[0].update(weight_decay=float("nan") if rank else 0.0),
    "a flag": lambda opt, rank: opt.param_groups[0].update(maximize=bool(rank)),
}


@pytest.mark.parametrize("what", PARTING)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_hyper_parameters_that_part_are_an_error_on_all_ranks(world, mode, what):
    model = seeded(lambda: _layers(5, 4, 3))
    lr = torch.tensor(0.01, dtype=torch.float64) if "tensor" in what else 0.01
    opt = dpoptim.DataParallelOptimizer(
        dpoptim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, foreach=False), world, **mode
    )

    def train(step):
        opt.zero_grad()
        model(_parts(world, step)[1]).pow(2).mean().backward()
        opt.step()

    train(0)
    scheduler = PARTING[what](opt, world.rank)
    with _on_several(world, RuntimeError, "parameter group 0 has .* on rank 0 but .* on rank 1.*ReduceLROnPlateau"):
        for step in range(4):
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler.step(float(step) if world.rank else -float(step))
            train(step)
    opt._reducer.detach()


def test_numbers_that_are_no_numbers_yet_equal_go_on(world):
    model = seeded(lambda: _layers(5, 3))
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.parameters(), lr=0.1), world)
    for lr in (float("nan"), float("nan"), torch.tensor(0.1), 0, True, 10**400):
        opt.param_groups[0]["lr"] = lr
        assert opt.mean(1.0) == 1.0
    opt.detach()


def test_a_change_among_hundreds_of_groups_is_seen_after_some_roll_calls(world):
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(100)]
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD([{"params": [p]} for p in parameters], lr=0.1), world)
    opt.mean(1.0)
    opt.param_groups[97]["momentum"] = 0.1 * world.rank
    with _on_several(world, RuntimeError, "parameter group 97 has momentum = 0.0 on rank 0 but 0.1 on rank 1"):
        for _ in range(13):  # eight at a time
            opt.mean(1.0)
    opt.detach()


def test_fingerprints_follow_what_is_written():
    groups = [{"params": [], "lr": torch.tensor(0.1), "betas": (0.9, 0.99), "name": "a", "extra": None}]
    numbers, others = HyperParameters(lambda: groups), HyperParameters(lambda: [dict(groups[0], name="b")])
    first = numbers.fingerprint()
    assert first == numbers.fingerprint() == others.fingerprint(), "names are no numbers"
    groups[0]["lr"].fill_(0.2)
    second = numbers.fingerprint()
    assert second != first
    groups.append({"params": [], "lr": 0.1})
    assert numbers.fingerprint() != second
    del groups[1]
    assert numbers.fingerprint() == second
    assert first_difference([numbers.texts(), others.texts()]) is None
    assert first_difference([[{"lr": "1"}], [{"lr": "2"}]]) == "parameter group 0 has lr = 1 on rank 0 but 2 on rank 1"
    assert "1 parameter groups on rank 0 but 0 on rank 1" in str(first_difference([[{}], []]))


class _Colour(enum.Enum):
    RED = 1


def test_options_are_compared_as_far_as_they_can_be(world):
    def local(step):
        return step

    words = ["decay", "bias", "norm", "x"]
    options = {
        "function": local,
        "object": object(),
        "set": set(words if world.rank else reversed(words)),
        "nested": {"b": [{1, 2}, (object(), None)], "a": torch.float32},
        "enum": _Colour.RED,
        "module": nn.Linear(1, 1),
        "tensor": torch.ones(2),
    }
    model = _layers(3, 2)
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD([{"params": model.parameters(), **options}], lr=0.1), world)
    opt.detach()
    for value, match in (({"x", str(world.rank)}, "extra = {'0', 'x'} on rank 0"), ([world.rank], "extra = .0. on")):
        with _on_several(world, ValueError, match):
            dpoptim.DataParallelOptimizer(
                dpoptim.SGD([{"params": _layers(3, 2).parameters(), "extra": value}], lr=0.1), world
            )


# ---------------------------------------------------------------- layers

LAYERS = {
    "Embedding": lambda: nn.Embedding(5, 3, max_norm=1.0),
    "EmbeddingBag": lambda: nn.EmbeddingBag(5, 3, max_norm=0.5),
    "a class of the user's": lambda: type("Mine", (nn.Embedding,), {})(5, 3, max_norm=2.0),
}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_weights_that_forward_renormalises_are_an_error(world, layer, named):
    model = nn.Sequential(LAYERS[layer](), nn.Linear(3, 2))
    options = {"module": model} if named else {}
    for mode in MODES.values():
        with _on_several(world, ValueError, r"parameter '0.weight' is the weight of an .*max_norm=.*torch.renorm"):
            dpoptim.DataParallelOptimizer(
                dpoptim.SGD(model.named_parameters(), lr=0.1), world, **options, **mode
            ).detach()
    plain = _layers(3, 2)
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(plain.parameters(), lr=0.1), world)
    with _on_several(world, ValueError, "max_norm"):
        opt.add_param_group({"params": list(model.parameters())})
    assert len(opt.param_groups) == 1 + (world.size == 1)
    opt.detach()


@pytest.mark.parametrize("mode", MODES)
def test_a_function_that_renormalises_weights_is_an_error(world, mode):
    weight = nn.Parameter(torch.ones(5, 3))
    message = r"shape \(5, 3\) is the weight of an embedding with max_norm=1.0, .*renorm"
    words = torch.tensor([[0, world.rank]])
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD([weight], lr=0.1), world, **MODES[mode])
    for function in (functional.embedding, functional.embedding_bag):
        function(words, weight).sum().backward()
        with _on_several(world, ValueError, message):
            function(words, weight, max_norm=1.0)
    opt.detach()
    functional.embedding(words, weight, max_norm=1.0)
    assert weight[0].norm() <= 1.0


@pytest.mark.parametrize("named", [True, False])
def test_a_batch_norm_that_is_to_be_synchronised_and_is_not_is_warned_of(world, named):
    for converts in (False, True):
        kind = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        if converts:
            kind = nn.SyncBatchNorm.convert_sync_batchnorm(kind)
        options = {"module": kind} if named else {}
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            dpoptim.DataParallelOptimizer(dpoptim.SGD(kind.parameters(), lr=0.1), world, **options).detach()
        expected = converts and world.size > 1
        assert ["SyncBatchNorm" in str(warning.message) for warning in seen] == [True] * expected


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_ranks_whose_backward_reaches_other_optimizers(world, mode, overlap):
    """A trunk and two heads have an optimizer each; each rank uses one head or none, in turns."""

    def make():
        return seeded(lambda: nn.ModuleList([_layers(5, 4, 4), _layers(4, 3, 2), _layers(4, 2)]))

    def loss(model, batch, head):
        hidden = torch.tanh(model[0](batch))
        return hidden.pow(2).mean() + (0.0 if head is None else model[1 + head](hidden).pow(2).mean())

    model, expected = make(), make()
    opts = [
        dpoptim.DataParallelOptimizer(dpoptim.AdamW(part.parameters(), lr=0.01), world, overlap=overlap, **mode)
        for part in model
    ]
    plain = [torch.optim.AdamW(part.parameters(), lr=0.01) for part in expected]
    for step in range(6):
        heads = [(0, 1, None)[(rank + step // 2) % 3] for rank in range(world.size)]
        parts, own = _parts(world, step)
        for optimizer in (*opts, *plain):
            optimizer.zero_grad()
        loss(model, own, heads[world.rank]).backward()
        (sum(loss(expected, *each) for each in zip(parts, heads, strict=True)) / world.size).backward()
        for optimizer in (*opts, *plain):
            optimizer.step()
        _assert_same(model, expected, f"step {step}")
    for opt in opts:
        opt.detach()


def test_gradients_changed_on_one_rank_alone_are_an_error_in_the_next_step(world):
    model = seeded(lambda: _layers(5, 3))
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.parameters(), lr=0.1), world)
    with _on_several(world, RuntimeError, "rank 0: .*gradients changed between the reduction and the last step"):
        for step in range(2):
            opt.zero_grad()
            model(_parts(world, step)[1]).sum().backward()
            if world.rank == 0:
                for parameter in model.parameters():
                    parameter.grad.mul_(0.5)
            opt.step()
    opt.detach()


def test_local_gradients_that_were_scaled_before_their_reduction_are_warned_of(world):
    model = seeded(lambda: _layers(5, 3))
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.parameters(), lr=0.1), world)
    for step in range(2):
        opt.zero_grad()
        with opt.no_sync():
            model(_parts(world, step)[1]).sum().backward()
        if step == 0:
            opt.step()
            continue
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        with (
            pytest.warns(UserWarning, match=r"call opt.clip_grad_norm_") if world.size > 1 else contextlib.nullcontext()
        ):
            opt.step()
    opt.detach()


KINDS = {  # by step, whether the gradient of rank 0 and those of the others are sparse (and in how many dims), or none
    "sparse and dense at once": [(1, 0), (1, 0)],
    "dense, then sparse": [(0, 0), (1, 1), (0, 0)],
    "sparse, then mixed, then dense": [(1, 1), (1, 0), (0, 0), (0, 0)],
    "other sparse dims": [(1, 2), (2, 1)],
    "sparse and none": [(None, 1), (1, None), (0, None)],
}


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_sparse_gradients_on_some_ranks_only(world, kinds):
    weight = nn.Parameter(torch.ones(6, 3, dtype=torch.float64))
    expected = twin(weight)
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD([weight], lr=0.1), world)
    plain = torch.optim.SGD([expected], lr=0.1)
    for step, (first, others) in enumerate(kinds):
        gradients = []
        for rank in range(world.size):
            dims = others if rank else first
            dense = torch.zeros(6, 3, dtype=torch.float64)
            dense[(rank + step) % 6] = 1.0 + rank
            gradients.append(None if dims is None else dense.to_sparse(dims) if dims else dense)
        opt.zero_grad()
        if gradients[world.rank] is not None:
            weight.backward(gradients[world.rank])
        plain.zero_grad()
        present = [g.to_dense() for g in gradients if g is not None]
        expected.grad = sum(present) / world.size if present else None
        opt.step()
        plain.step()
        torch.testing.assert_close(weight, expected, msg=lambda text, step=step: f"step {step}: {text}")
        if present:
            assert weight.grad.is_sparse == all(g is None or g.is_sparse for g in gradients), f"step {step}"
    opt.detach()
