"""dtypes, and the parts of torch that work with any optimizer: N ranks against one process."""

import copy

import pytest
import torch
from mpi4py import MPI
from oracle import (
    EVERY_OPTIMIZER,
    Matrices,
    Net,
    Words,
    assert_replicas,
    assert_same_parameters,
    joined_batch,
    local_part,
    part_sizes,
    same_implementation,
    seeded,
    train,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import dpoptim

pytestmark = [pytest.mark.parallel, pytest.mark.ranks(2, 3)]

REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex128, torch.complex64)
NOT_COMPLEX = ("Adafactor", "Muon", "SparseAdam")
# A step must be seen in 8 bits.
RATES = {"Adadelta": 8.0, "Adagrad": 0.25, "SGD": 0.25, "ASGD": 0.25}


def _parameters(dtype):
    """Return two matrices, with a multiple of 64 elements: torch rounds 16-bit remainders of them otherwise."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(8, 16, generator=generator, dtype=torch.float64).to(dtype)) for _ in range(2)]


def _gradient(step, rank, parameter):
    """Return small whole numbers, of which sums and means are exact in any dtype; none is 0, which Adam divides by."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    shape = (*parameter.shape, 2) if parameter.is_complex() else parameter.shape
    values = torch.randint(1, 4, shape, generator=generator).double()
    return (torch.view_as_complex(values) if parameter.is_complex() else values).to(parameter.dtype)


def _loss(parameters, gradients):
    """Return a number whose gradient is as given."""
    return sum((p * g.conj()).sum().real.double() for p, g in zip(parameters, gradients, strict=True))


def _cases():
    for name in sorted(EVERY_OPTIMIZER.keys() - {"LBFGS"}):
        for dtype in (*REAL, *(() if name in NOT_COMPLEX else COMPLEX)):
            yield pytest.param(name, dtype, id=f"{name}-{dtype}".replace("torch.", ""))


@pytest.mark.parametrize(("name", "dtype"), list(_cases()))
@pytest.mark.supports("{name}", replicated="yes", dtypes="{dtype}")
def test_dtypes_bit_for_bit(world, name, dtype):
    """The mean of whole numbers is exact, so N ranks have the bits of one process."""
    options = EVERY_OPTIMIZER[name] | {"lr": RATES.get(name, 0.125)}
    options.pop("centered", None)  # a variance of 16 bits may be negative
    ours, theirs = _parameters(dtype), _parameters(dtype)
    opt = dpoptim.DataParallelOptimizer(getattr(dpoptim, name)(ours, **options))
    plain = getattr(torch.optim, name)(theirs, **options, **same_implementation(opt))
    before = [parameter.detach().clone() for parameter in ours]
    for step in range(4):
        for optimizer, parameters, ranks in ((opt, ours, [world.rank]), (plain, theirs, range(world.size))):

            def closure(optimizer=optimizer, parameters=parameters, ranks=ranks):
                optimizer.zero_grad()
                gradients = [sum(_gradient(step, rank, p) for rank in ranks) for p in parameters]  # noqa: B023
                if optimizer is opt:  # whose mean over N ranks is the sum of the whole numbers
                    gradients = [gradient * world.size for gradient in gradients]
                loss = _loss(parameters, gradients)
                loss.backward()
                return loss

            if name == "SparseAdam":
                closure()
                for parameter in parameters:  # the reduced gradient, as an embedding would have it
                    parameter.grad = parameter.grad.to_sparse(1)
                optimizer.step()
            else:
                optimizer.step(closure)
        for parameter, other in zip(ours, theirs, strict=True):
            assert parameter.dtype == dtype
            assert torch.equal(parameter, other), f"step {step}"
        assert_replicas(opt, nn.ParameterList(ours))
    assert all(not torch.equal(parameter, old) for parameter, old in zip(ours, before, strict=True))
    assert torch.isfinite(torch.view_as_real(ours[0]) if dtype.is_complex else ours[0]).all()
    opt.detach()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *COMPLEX], ids=str)
@pytest.mark.supports("LBFGS", replicated="yes", dtypes="{dtype}")
def test_dtypes_of_lbfgs(world, dtype):
    """To rounding: the mean over ranks of a loss and gradient of squares is rounded otherwise than in one process."""
    ours, theirs = _parameters(dtype), _parameters(dtype)
    options = {"lr": 0.25, "max_iter": 2}  # far from the minimum, where rounding would decide the search
    opt = dpoptim.DataParallelOptimizer(dpoptim.LBFGS(ours, **options))
    plain = torch.optim.LBFGS(theirs, **options)
    for step in range(3):
        for optimizer, parameters, ranks in ((opt, ours, [world.rank]), (plain, theirs, range(world.size))):

            def closure(optimizer=optimizer, parameters=parameters, ranks=ranks):
                optimizer.zero_grad()
                parts = [(p - _gradient(step, rank, p)).abs().pow(2).sum() for p in parameters for rank in ranks]  # noqa: B023
                loss = sum(parts) / len(ranks)
                loss.backward()
                return loss

            optimizer.step(closure)
        for parameter, other in zip(ours, theirs, strict=True):
            assert parameter.dtype == dtype
            torch.testing.assert_close(parameter, other)  # torch's own limits for this dtype
        assert_replicas(opt, nn.ParameterList(ours))
    opt.detach()


# ---------------------------------------------------------------- several optimizers, sparse beside dense


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon is new in torch 2.9")
@pytest.mark.supports("two optimizers on one model", replicated="Muon and AdamW")
def test_muon_for_matrices_beside_adamw(world):
    sizes = part_sizes(world.size, equal=False)
    model, expected = seeded(), seeded()

    def optimizers(package, net):
        matrices = [p for p in net.parameters() if p.dim() == 2 and p.requires_grad]
        vectors = [p for p in net.parameters() if p.dim() < 2 and p.requires_grad]
        return [package.Muon(matrices, lr=0.02), package.AdamW(vectors, lr=0.01, fused=True)]

    opts = [dpoptim.DataParallelOptimizer(inner) for inner in optimizers(dpoptim, model)]
    plains = optimizers(torch.optim, expected)
    for step in range(6):
        batch = joined_batch(step, sizes)
        for both, net, part in ((opts, model, local_part(batch, sizes, world.rank)), (plains, expected, batch)):
            for optimizer in both:
                optimizer.zero_grad()
                optimizer.batch_weight = sizes[world.rank]
            net(part).pow(2).mean().backward()
            for optimizer in both:
                optimizer.step()
        # Muon orthogonalises in bfloat16 (2^-8): the last bit of a gradient may decide a rounding there
        for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(parameter, other, rtol=0, atol=0.02 * 2**-7 * (step + 1))
    for opt in opts:
        assert_replicas(opt, model)
        opt.detach()


class Mixed(nn.Module):
    """A sparse embedding beside dense layers."""

    def __init__(self):
        super().__init__()
        self.words = Words()
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.words(x))


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "SparseAdam"])
@pytest.mark.supports("sparse gradients", replicated="{name}")
def test_sparse_beside_dense(world, name):
    """One optimizer for all where it takes both kinds, SparseAdam beside AdamW otherwise."""
    sizes = part_sizes(world.size, equal=False)
    model, expected = seeded(Mixed), seeded(Mixed)

    def optimizers(package, net):
        if name == "SparseAdam":
            return [package.SparseAdam(net.words.parameters(), lr=0.01), package.AdamW(net.out.parameters(), lr=0.01)]
        return [getattr(package, name)(net.parameters(), lr=0.1)]

    opts = [dpoptim.DataParallelOptimizer(inner) for inner in optimizers(dpoptim, model)]
    plains = optimizers(torch.optim, expected)
    for step in range(6):
        batch = joined_batch(step, sizes).abs()
        for both, net, part in ((opts, model, local_part(batch, sizes, world.rank)), (plains, expected, batch)):
            for optimizer in both:
                optimizer.zero_grad()
                optimizer.batch_weight = sizes[world.rank]
            with torch.sparse.check_sparse_tensor_invariants():  # said explicitly, or Adagrad's own code warns
                net(part).pow(2).mean().backward()
                for optimizer in both:
                    optimizer.step()
        assert model.words.words.weight.grad.is_sparse
        assert_same_parameters(model, expected, step)
    for opt in opts:
        assert_replicas(opt, model)
        opt.detach()


# ---------------------------------------------------------------- models that are not called plainly


def _train_both(world, opt, plain, model, expected, call, num_steps=4):
    sizes = part_sizes(world.size, equal=False)
    opt.batch_weight = sizes[world.rank]
    for step in range(num_steps):
        batch = joined_batch(step, sizes)
        opt.zero_grad()
        plain.zero_grad()
        call(model, local_part(batch, sizes, world.rank)).pow(2).mean().backward()
        expected(batch).pow(2).mean().backward()
        opt.step()
        plain.step()
        assert_replicas(opt, model)
        assert_same_parameters(model, expected, step)


def _sgd_pair(make=Net):
    model, expected = seeded(make), seeded(make)
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.parameters(), lr=0.1, momentum=0.9), module=model)
    return opt, torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9), model, expected


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.supports("activation checkpointing", replicated="hooks run once")
def test_activation_checkpointing_runs_hooks_once(world, use_reentrant):
    opt, plain, model, expected = _sgd_pair(Matrices)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("step"))
    counts = [0] * len(list(model.parameters()))
    for index, parameter in enumerate(model.parameters()):

        def count(_, index=index):
            counts[index] += 1

        parameter.register_post_accumulate_grad_hook(count)

    def call(net, x):
        return checkpoint(net.layers, x.requires_grad_(use_reentrant), use_reentrant=use_reentrant)

    _train_both(world, opt, plain, model, expected, call)
    assert calls == ["step"] * 4
    assert counts == [4] * len(counts)
    opt.detach()


@pytest.mark.supports("torch.func.functional_call", replicated="yes")
@pytest.mark.supports("torch.func.functional_call", limits="gradients of other tensors than the parameters stay local")
def test_functional_call(world):
    """With the parameters, as backward sees them; with other tensors in their place nothing is reduced."""
    opt, plain, model, expected = _sgd_pair()

    def call(net, x):
        return torch.func.functional_call(net, dict(net.named_parameters()), (x,))

    _train_both(world, opt, plain, model, expected, call)
    others = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    x = joined_batch(0, [3]) * (world.rank + 1)
    opt.zero_grad()
    torch.func.functional_call(model, others, (x,), tie_weights=False).sum().backward()
    assert model.middle.weight.grad is None
    assert len({float(value) for value in world.allgather(others["middle.weight"].grad.sum())}) == world.size
    opt.detach()


@pytest.fixture
def compiler():
    from dpoptim.step.compiled_step import check_compiler

    try:
        check_compiler()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of the compiler's own code
@pytest.mark.skipif(MPI.COMM_WORLD.size > 2, reason="compiling takes seconds: on one and two ranks")
@pytest.mark.supports("torch.compile of the model", replicated="yes")
def test_a_compiled_model(world, compiler):
    opt, plain, model, expected = _sgd_pair(Matrices)
    compiled = torch.compile(model)
    _train_both(world, opt, plain, model, expected, lambda _, x: compiled(x))
    opt.detach()


# ---------------------------------------------------------------- clipping


@pytest.mark.parametrize("how", ["clip_grad_norm_", "clip_grad_value_", "the wrapper's clip_grad_norm_"])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop"])
@pytest.mark.supports("clip_grad_norm_", replicated="yes")
@pytest.mark.supports("clip_grad_value_", replicated="yes")
def test_clipping_reads_the_global_gradient(world, name, how):
    sizes = part_sizes(world.size, equal=False)
    model, expected = seeded(), seeded()
    opt = dpoptim.DataParallelOptimizer(getattr(dpoptim, name)(model.parameters(), lr=0.01))
    opt.batch_weight = sizes[world.rank]
    plain = getattr(torch.optim, name)(expected.parameters(), lr=0.01)
    for step in range(4):
        batch = joined_batch(step, sizes)
        norms = []
        for optimizer, net, part in ((opt, model, local_part(batch, sizes, world.rank)), (plain, expected, batch)):
            optimizer.zero_grad()
            net(part).pow(2).mean().backward()
            if how == "clip_grad_value_":
                nn.utils.clip_grad_value_(net.parameters(), 0.01)
            elif optimizer is opt and how.startswith("the wrapper"):
                norms.append(opt.clip_grad_norm_(0.05))
            else:
                norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.05))
            optimizer.step()
        if norms:
            torch.testing.assert_close(norms[0], norms[1], rtol=1e-12, atol=0)
        assert_replicas(opt, model)
        assert_same_parameters(model, expected, step)
    opt.detach()


# ---------------------------------------------------------------- torch's recipes for named parameters


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(3, 4)
        self.fc2 = nn.Linear(3, 4)


class Bypass(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.bypass = nn.Linear(3, 4)


def _trained(world, make, named=None):
    model = seeded(make)
    named = list(model.named_parameters()) if named is None else named(model)
    opt = dpoptim.DataParallelOptimizer(dpoptim.AdamW(named, lr=0.01))
    sum(
        (layer(torch.ones(2, 3, dtype=torch.float64) * (world.rank + 1))).sum() for layer in model.children()
    ).backward()
    opt.step()
    return model, opt


def _goes_on(world, model, opt):
    sum((layer(torch.ones(2, 3, dtype=torch.float64) * world.rank)).sum() for layer in model.children()).backward()
    opt.step()
    assert_replicas(opt, model)
    opt.detach()


@pytest.mark.supports("named parameters", replicated="one layer's state into two layers")
def test_recipe_one_layers_state_into_two_layers(world):
    one, saved_from = _trained(world, One)
    saved = copy.deepcopy(saved_from.state_dict())
    two, opt = _trained(world, Two)

    def adapt(optimizer, state_dict):
        adapted = copy.deepcopy(optimizer.state_dict())
        for name in ("lr", "betas", "eps", "weight_decay"):
            adapted["param_groups"][0][name] = state_dict["param_groups"][0][name]
        names = saved["param_groups"][0]["param_names"]
        for place, name in zip(
            adapted["param_groups"][0]["params"], optimizer.param_groups[0]["param_names"], strict=True
        ):
            source = names.index(name.replace("fc1", "fc").replace("fc2", "fc"))
            adapted["state"][place] = copy.deepcopy(state_dict["state"][source])
        return adapted

    opt.register_load_state_dict_pre_hook(adapt)
    opt.load_state_dict(saved)
    for layer in (two.fc1, two.fc2):
        for kind in ("weight", "bias"):
            state, source = opt.state[getattr(layer, kind)], saved_from.state[getattr(one.fc, kind)]
            assert all(torch.equal(state[key], source[key]) for key in source)
    saved_from.detach()
    _goes_on(world, two, opt)


@pytest.mark.supports("named parameters", replicated="a layer missing in the saved state")
def test_recipe_a_layer_that_is_missing_in_the_saved_state(world):
    one, saved_from = _trained(world, One)
    saved = copy.deepcopy(saved_from.state_dict())
    model = seeded(Bypass)
    opt = dpoptim.DataParallelOptimizer(dpoptim.AdamW(model.named_parameters(), lr=0.5))

    def adapt(optimizer, state_dict):
        names = [name for name, _ in model.named_parameters()]
        adapted = {"state": {}, "param_groups": copy.deepcopy(optimizer.state_dict()["param_groups"])}
        adapted["param_groups"][0]["lr"] = state_dict["param_groups"][0]["lr"]
        for source, name in enumerate(state_dict["param_groups"][0]["param_names"]):
            adapted["state"][names.index(name)] = copy.deepcopy(state_dict["state"][source])
        return adapted

    opt.register_load_state_dict_pre_hook(adapt)
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == 0.01
    assert torch.equal(opt.state[model.fc.weight]["exp_avg"], saved_from.state[one.fc.weight]["exp_avg"])
    assert not opt.state.get(model.bypass.weight)
    saved_from.detach()
    _goes_on(world, model, opt)


@pytest.mark.supports("named parameters", replicated="matching by name")
def test_recipe_matching_by_name(world):
    model, saved_from = _trained(world, Two)
    saved = copy.deepcopy(saved_from.state_dict())
    assert saved["param_groups"][0]["param_names"] == [name for name, _ in model.named_parameters()]
    other = seeded(Two)
    reordered = list(reversed(list(other.named_parameters())))
    opt = dpoptim.DataParallelOptimizer(dpoptim.AdamW(reordered, lr=0.01))

    def by_name(optimizer, state_dict):
        names = state_dict["param_groups"][0]["param_names"]
        own = optimizer.param_groups[0]["param_names"]
        state = {place: state_dict["state"][names.index(name)] for place, name in enumerate(own)}
        return {"state": state, "param_groups": [{**state_dict["param_groups"][0], "param_names": own}]}

    opt.register_load_state_dict_pre_hook(by_name)
    opt.load_state_dict(saved)
    for (name, parameter), theirs in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(opt.state[parameter]["exp_avg"], saved_from.state[theirs]["exp_avg"]), name
    saved_from.detach()
    _goes_on(world, other, opt)


def test_a_loss_of_the_wrapper_trains(world):
    """The helper of these tests against itself: a gradient that is not reduced is seen."""
    opt, plain, model, expected = _sgd_pair()
    train(opt, model, joined_batch(0, [2]))
    train(plain, expected, joined_batch(1, [2]))
    with pytest.raises(AssertionError):
        assert_same_parameters(model, expected)
    opt.detach()
