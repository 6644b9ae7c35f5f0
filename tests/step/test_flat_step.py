"""Steps on blocks: the same bits as torch's loop, whatever is done to parameters, gradients and state in between."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import dpoptim
from dpoptim.step import flat_step, step_blocks
from dpoptim.torch_optim import CHOICES, compile_step, implementation

FLAT = [name for name, choice in CHOICES["cpu"].items() if choice.kind == "flat"]
FUSED = [name for name, choice in CHOICES["cpu"].items() if choice.kind == "fused" and choice.flat_below]
OPTIONS = {
    "RMSprop": {"momentum": 0.9, "centered": True, "weight_decay": 0.01},
    "Adadelta": {"weight_decay": 0.01, "maximize": True},
    "ASGD": {"t0": 3, "weight_decay": 0.01},
    "NAdam": {"weight_decay": 0.01, "decoupled_weight_decay": True},
    "Adam": {"amsgrad": True},
}
# One element, scalars, vectors, matrices, a channels-last kernel, one that is cut (into 3 and a rest), one in between.
SHAPES = [(1,), (), (7,), (5, 6), (3, 4, 2, 2), (40, 80), (31, 33), (4,), (4,), (9, 2)]

supports_flat = pytest.mark.supports("{name}", implementations="flat")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(step_blocks, "_TOGETHER_NUMEL", 40)
    monkeypatch.setattr(step_blocks, "_PART_NUMEL", 1024)
    monkeypatch.setattr(step_blocks, "_NUMEL_PER_THREAD", 1)
    for name in [*FLAT, *FUSED]:
        choice = CHOICES["cpu"][name]
        monkeypatch.setitem(CHOICES["cpu"], name, type(choice)(choice.kind, 100, choice.kind == "flat"))


class Pair:
    """Our optimizer and torch's on equal parameters, which get equal gradients."""

    def __init__(self, name, dtype=torch.float32, groups=1, **options):
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
        values[4] = values[4].to(memory_format=torch.channels_last)
        self.ours, self.theirs = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))
        options = {"lr": 0.01, **OPTIONS.get(name, {}), **options}
        self.opt = getattr(dpoptim, name)(self._grouped(self.ours, groups), **options)
        self.plain = getattr(torch.optim, name)(self._grouped(self.theirs, groups), **options)
        self.exact = implementation(self.opt) != "fused"
        self.generator = generator

    @staticmethod
    def _grouped(parameters, groups):
        return [{"params": parameters[number::groups]} for number in range(groups)]

    def give_gradients(self, without=()):
        for index, (a, b) in enumerate(zip(self.ours, self.theirs, strict=True)):
            gradient = torch.randn(a.shape, generator=self.generator)
            for parameter in (a, b):  # in the parameter's layout, as autograd makes it
                parameter.grad = None if index in without else torch.empty_like(parameter).copy_(gradient)

    def step(self, num_steps=3, without=()):
        for _ in range(num_steps):
            self.give_gradients(without)
            self.opt.step()
            self.plain.step()
        self.check()

    def check(self):
        for number, (a, b) in enumerate(zip(self.ours, self.theirs, strict=True)):
            state, expected = self.opt.state.get(a, {}), self.plain.state.get(b, {})
            assert state.keys() == expected.keys()
            pairs = [(a, b), *((state[key], expected[key]) for key in state)]
            for value, other in pairs:
                assert (value.shape, value.dtype, value.stride()) == (other.shape, other.dtype, other.stride())
                if self.exact:
                    assert torch.equal(value, other), f"parameter {number} of shape {tuple(a.shape)}"
                else:  # the fused kernels round the last elements of a tensor otherwise
                    torch.testing.assert_close(value, other)
        assert set(self.opt.state) <= set(self.ours), "a block is left in the state"

    def is_flat(self):
        """Whether small parameters have their state in common memory."""
        state, neighbour = self.opt.state[self.ours[7]], self.opt.state[self.ours[8]]
        return all(
            state[key].untyped_storage().data_ptr() == neighbour[key].untyped_storage().data_ptr() for key in state
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [*(pytest.param(name, marks=supports_flat) for name in FLAT), *FUSED])
def test_the_same_bits_while_gradients_come_and_go(name, dtype):
    pair = Pair(name, dtype)
    pair.step(3)
    assert pair.is_flat()
    pair.step(2, without={0, 2, 5, 7})
    for step in range(4):
        pair.step(1, without={number for number in range(len(SHAPES)) if (number + step) % 3 == 0})
    pair.step(3)
    pair.step(1, without=set(range(len(SHAPES))))
    pair.step(3)
    assert not any(parameter.untyped_storage().nbytes() > parameter.nbytes for parameter in pair.ours)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_adagrad_begins_a_later_group_as_the_first(dtype, fused):
    """Against torch's with both groups from the start, since torch up to 2.11 makes no state for a later one."""
    options = {"lr": 0.1, "initial_accumulator_value": 0.5, "fused": None if dtype.is_complex else fused}
    ours, theirs = ([torch.nn.Parameter(torch.ones(5, dtype=dtype)) for _ in range(2)] for _ in range(2))
    opt = dpoptim.Adagrad(ours[:1], **options)
    opt.add_param_group({"params": ours[1:]})
    plain = torch.optim.Adagrad([{"params": theirs[:1]}, {"params": theirs[1:]}], lr=0.1, initial_accumulator_value=0.5)
    for optimizer, parameters in ((opt, ours), (plain, theirs)):
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, 0.25)
            optimizer.step()
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other)
        torch.testing.assert_close(opt.state[own]["sum"], plain.state[other]["sum"])


@pytest.mark.parametrize("name", [*FUSED, "SGD"])
def test_gradients_and_state_in_another_memory_layout(name):
    """Against the loop: torch's fused kernels would apply them to other elements."""
    pair = Pair(name, **({"momentum": 0.9} if name == "SGD" else {}))
    pair.exact = False
    pair.plain.param_groups[0].update(fused=False, foreach=False)
    for step in range(6):
        pair.give_gradients()
        for parameters in (pair.ours, pair.theirs):
            parameters[3].grad = parameters[3].grad.t().contiguous().t()
            parameters[4].grad = parameters[4].grad.contiguous()
        if step == 3:
            for parameters in (pair.ours, pair.theirs):
                parameters[4].data = parameters[4].data.contiguous()
            pair.opt.load_state_dict(copy.deepcopy(pair.opt.state_dict()))
        pair.opt.step()
        pair.plain.step()
        for a, b in zip(pair.ours, pair.theirs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*FLAT, *FUSED, "SGD"])
def test_sixteen_bits_against_torchs_loop(name, dtype):
    """Whatever is chosen is right: torch's fused SGD on CPU leaves most elements as they are (pytorch#191763)."""
    # A step that is seen in 8 bits; nothing that vanishes in float16.
    options = {"SGD": {"momentum": 0.9}, "Adadelta": {"lr": 1.0}, "Adam": {"eps": 0.1}, "AdamW": {"eps": 0.1}}
    pair = Pair(name, dtype, **options.get(name, {}))
    before = [parameter.detach().clone() for parameter in pair.ours]
    if pair.plain.param_groups[0].get("fused"):
        pair.plain.param_groups[0]["fused"] = False
    pair.plain.param_groups[0]["foreach"] = False
    for _ in range(4):
        pair.give_gradients()
        pair.opt.step()
        pair.plain.step()
    for a, b, old in zip(pair.ours, pair.theirs, before, strict=True):
        assert a.dtype == dtype
        if a.numel() > 8:  # a single number may be rounded back
            assert not torch.equal(a, old)
        # the loop rounds after each operation, a fused kernel at the end, and torch the last elements of a tensor
        # otherwise: some units in the last place in each of four steps
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=8 * eps, atol=8 * eps, equal_nan=True)


@pytest.mark.parametrize("name", [*FLAT, *FUSED])
def test_several_groups_one_of_them_added_one_without_gradients(name):
    pair = Pair(name, groups=2)
    pair.step(3)
    for optimizer, mine in ((pair.opt, pair.ours), (pair.plain, pair.theirs)):
        more = [nn.Parameter(torch.full((3,), number / 8)) for number in range(3)]
        optimizer.add_param_group({"params": more, "lr": 0.1})
        mine.extend(more)
    pair.give_gradients()
    try:
        pair.plain.step()
    except KeyError:
        pytest.skip(f"torch {torch.__version__} itself can't step a group that was added to {name}")
    pair.opt.step()
    pair.step(3)
    pair.step(2, without=set(range(0, len(SHAPES), 2)))
    pair.step(2)


@pytest.mark.parametrize("name", [*FLAT, *FUSED])
def test_state_is_torchs_and_goes_both_ways(name):
    pair = Pair(name)
    pair.step(3)
    ours, theirs = copy.deepcopy(pair.opt.state_dict()), copy.deepcopy(pair.plain.state_dict())
    assert ours["param_groups"] == theirs["param_groups"]
    pair.opt.load_state_dict(theirs)
    pair.plain.load_state_dict(ours)
    pair.step(3)
    saved = pickle.loads(pickle.dumps(pair.opt.state_dict()))
    pair.step(2)
    before = copy.deepcopy(saved)
    for optimizer in (pair.opt, pair.plain):
        optimizer.load_state_dict(copy.deepcopy(saved))
    pair.step(4)
    assert pair.is_flat()
    for number, entry in saved["state"].items():
        assert all(torch.equal(value, before["state"][number][key]) for key, value in entry.items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
@pytest.mark.parametrize("name", ["RMSprop", "ASGD", "Adam"])
def test_a_copy_of_the_optimizer_goes_its_own_way(name, copied):
    pair, other = Pair(name), Pair(name)
    pair.step(3)
    other.step(3)
    other.opt, other.ours = copied((pair.opt, pair.ours))
    other.step(3)
    pair.step(3)
    other.step(2)
    assert other.is_flat()
    assert pair.is_flat()


def test_an_object_with_a_copied_dict_and_state_of_its_own():
    """As a sharded step makes one, of few flat tensors."""
    pair, other = Pair("RMSprop"), Pair("RMSprop")
    pair.step(3)
    bare = object.__new__(type(pair.opt))
    bare.__dict__ |= pair.opt.__dict__
    bare.state = type(pair.opt.state)(dict)
    bare.param_groups = [{**pair.opt.param_groups[0], "params": other.ours}]
    other.opt = bare
    for _ in range(4):
        other.step(1)
        pair.step(1)


@pytest.mark.parametrize("name", ["RMSprop", "NAdam", "Adam"])
def test_what_the_user_writes_counts(name):
    pair = Pair(name)
    pair.step(3)
    with torch.no_grad():
        for parameters in (pair.ours, pair.theirs):
            parameters[2].mul_(2)
            parameters[5].data.add_(1)
            parameters[7].data = torch.ones(4)
    pair.step(2)
    key = next(key for key, value in pair.opt.state[pair.ours[2]].items() if value.dim())
    for optimizer, parameters in ((pair.opt, pair.ours), (pair.plain, pair.theirs)):
        optimizer.state[parameters[2]][key].mul_(3)
        optimizer.state[parameters[7]][key] = torch.full((4,), 0.5)
        optimizer.state[parameters[8]][key].data = torch.full((4,), 0.25)
    pair.step(1)
    assert torch.allclose(pair.opt.state[pair.ours[0]]["step"], torch.tensor(6.0))
    for optimizer, parameters in ((pair.opt, pair.ours), (pair.plain, pair.theirs)):
        optimizer.state[parameters[2]]["step"].fill_(1)  # other numbers than its neighbours
        optimizer.state[parameters[7]]["step"] = torch.tensor(20.0)
    pair.step(3)
    for optimizer, parameters in ((pair.opt, pair.ours), (pair.plain, pair.theirs)):
        for index in (2, 3):
            optimizer.state[parameters[index]].clear()  # starts again
    pair.step(3)


@pytest.mark.parametrize("name", ["RMSprop", "Adadelta", "Adam"])
def test_a_model_that_is_converted(name):
    pair = Pair(name)
    pair.step(3)
    for parameters in (pair.ours, pair.theirs):
        for parameter in parameters:
            parameter.grad = None
            parameter.data = parameter.data.double()
    for optimizer in (pair.opt, pair.plain):
        optimizer.load_state_dict(optimizer.state_dict())  # converts the state
    pair.step(3)
    assert pair.is_flat()
    if pair.exact:  # torch's own fused step is wrong then
        for parameters in (pair.ours, pair.theirs):
            parameters[4].data = parameters[4].data.contiguous()
        pair.step(2)


def test_a_converted_model_with_state_of_another_dtype_is_left_to_torch():
    pair = Pair("RMSprop")
    pair.step(3)
    for parameters in (pair.ours, pair.theirs):
        for parameter in parameters:
            parameter.grad = None
            parameter.data = parameter.data.double()
    pair.give_gradients()
    outcomes = []
    for optimizer in (pair.opt, pair.plain):
        try:
            optimizer.step()
            outcomes.append("stepped")
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def test_hyper_parameters_may_change():
    pair = Pair("RMSprop", momentum=0, centered=False)
    pair.step(3)
    for changes in ({"lr": 0.003}, {"alpha": 0.5, "weight_decay": 0.1}, {"foreach": True}, {"foreach": None}):
        for optimizer in (pair.opt, pair.plain):
            optimizer.param_groups[0].update(changes)
        pair.step(2)
    pair = Pair("Adam", amsgrad=False)
    pair.step(3)
    for optimizer in (pair.opt, pair.plain):
        optimizer.param_groups[0]["fused"] = False
    pair.step(2)


def test_a_tensor_rate():
    pair = Pair("NAdam", lr=torch.tensor(0.01))
    pair.step(3)
    for optimizer in (pair.opt, pair.plain):
        optimizer.param_groups[0]["lr"].mul_(0.5)
    pair.step(3)
    assert pair.is_flat()


@pytest.mark.parametrize("name", ["RMSprop", "ASGD"])
def test_torchs_own_step_called_past_ours(name):
    pair = Pair(name)
    pair.step(3)
    pair.give_gradients()
    getattr(torch.optim, name).step(pair.opt)
    pair.plain.step()
    pair.check()
    pair.step(2)


def test_large_tensors_in_other_orders():
    """A large parameter whose gradient, later whose values, are not contiguous."""
    pair = Pair("RMSprop")
    pair.step(2)
    for _ in range(2):
        pair.give_gradients()
        for parameters in (pair.ours, pair.theirs):
            parameters[5].grad = parameters[5].grad.t().contiguous().t()
            parameters[3].grad = parameters[3].grad.t().contiguous().t()
        pair.opt.step()
        pair.plain.step()
        pair.check()
    for parameters in (pair.ours, pair.theirs):
        parameters[5].data = parameters[5].data.t().contiguous().t()
    for _ in range(2):
        pair.give_gradients()
        pair.opt.step()
        pair.plain.step()
    assert torch.equal(pair.ours[5], pair.theirs[5])


def test_a_step_that_fails_leaves_no_block_behind():
    pair = Pair("RMSprop", groups=2)
    pair.step(3)
    pair.give_gradients()
    for parameters in (pair.ours, pair.theirs):
        parameters[7].grad = parameters[7].grad.to_sparse()  # of the second group
    for optimizer in (pair.opt, pair.plain):
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()
    pair.check()
    pair.step(2)


def test_sparse_gradients_beside_blocks():
    pair = Pair("Adagrad")
    pair.step(3)
    pair.give_gradients()
    for parameters in (pair.ours, pair.theirs):
        parameters[3].grad = parameters[3].grad.to_sparse(1)
    with torch.sparse.check_sparse_tensor_invariants():  # said explicitly, or torch's own code warns
        pair.opt.step()
        pair.plain.step()
    pair.check()
    pair.step(2)


def test_grad_scaler_unscales_in_the_fused_step():
    pair = Pair("AdamW")
    pair.step(3)
    for overflow in (False, True, False):
        pair.give_gradients()
        for optimizer, parameters in ((pair.opt, pair.ours), (pair.plain, pair.theirs)):
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            scaler.scale(torch.ones(()))
            for parameter in parameters:
                parameter.grad.mul_(float("inf") if overflow else 4.0)
            scaler.step(optimizer)
            scaler.update()
        pair.check()
        if not overflow:
            assert torch.equal(pair.ours[2].grad, pair.theirs[2].grad)


def test_blocks_die_with_their_optimizer():
    gc.collect()
    pair = Pair("RMSprop")
    pair.step(3)
    block = weakref.ref(flat_step.FlatStep.of(pair.opt))
    num_living = len(flat_step._flat_steps)
    del pair.opt
    gc.collect()
    assert block() is None
    assert len(flat_step._flat_steps) == num_living - 1


def test_what_is_chosen():
    parameters = [nn.Parameter(torch.zeros(3))]
    for name, expected in (("RMSprop", "flat"), ("AdamW", "fused"), ("Adafactor", "foreach"), ("LBFGS", "for-loop")):
        assert implementation(getattr(dpoptim, name)(parameters, lr=0.1)) == expected
    assert implementation(dpoptim.RMSprop(parameters, foreach=False)) == "for-loop"
    assert implementation(dpoptim.RMSprop(parameters, foreach=True)) == "foreach"
    assert implementation(dpoptim.RMSprop(parameters, differentiable=True)) == "for-loop"
    assert implementation(torch.optim.RMSprop(parameters)) == "for-loop"
    assert implementation(dpoptim.Adafactor([nn.Parameter(torch.zeros(16384))])) == "for-loop"
    assert implementation(dpoptim.RMSprop([nn.Parameter(torch.zeros(3, dtype=torch.complex64))])) == "for-loop"
    assert implementation(type("Mine", (dpoptim.NAdam,), {})(parameters)) == "flat"


@pytest.mark.supports("SGD", implementations="flat")
def test_sixteen_bits_of_sgd_are_not_fused():
    for dtype in (torch.bfloat16, torch.float16):
        assert implementation(dpoptim.SGD([nn.Parameter(torch.zeros(3, dtype=dtype))])) == "flat"


# ---------------------------------------------------------------- compiled


def test_what_can_not_be_compiled():
    parameters = [nn.Parameter(torch.zeros(3))]
    with pytest.raises(TypeError, match=r"optimizer must be .*RMSprop.*, got AdamW"):
        compile_step(dpoptim.AdamW(parameters))
    with pytest.raises(TypeError, match="got RMSprop"):
        compile_step(torch.optim.RMSprop(parameters))
    with pytest.raises(ValueError, match="must be stepped flat to be compiled, got foreach"):
        compile_step(dpoptim.RMSprop(parameters, foreach=True))
    hooked = nn.Parameter(torch.zeros(3))
    from dpoptim.gradients.autograd_hooks import GradientHook

    hooked.register_post_accumulate_grad_hook(GradientHook(lambda _: None))
    with pytest.raises(ValueError, match="before the optimizer is wrapped"):
        compile_step(dpoptim.RMSprop([hooked]))


def test_without_a_compiler_it_says_so(monkeypatch):
    def fail(*_, **__):
        raise OSError("no g++\nand more")

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    from dpoptim.step import compiled_step

    compiled_step.check_compiler.cache_clear()
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler: OSError: no g\+\+$"):
        compile_step(dpoptim.RMSprop([nn.Parameter(torch.zeros(3))]))


@pytest.fixture
def compiler():
    from dpoptim.step.compiled_step import check_compiler

    try:
        check_compiler()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of the compiler's own code
@pytest.mark.once
@pytest.mark.parametrize("name", FLAT)
@pytest.mark.supports("{name}", implementations="compiled")
def test_compiled_steps_are_equal_to_rounding(name, compiler):
    if name != "RMSprop" and not hasattr(torch.optim.Optimizer, "_cuda_graph_capture_health_check"):
        pytest.skip("compiling takes seconds: all optimizers are compiled with one version of torch alone")
    pair = Pair(name)
    pair.step(1)
    compile_step(pair.opt)
    for rate in (0.01, 0.008, 0.006):
        for optimizer in (pair.opt, pair.plain):
            optimizer.param_groups[0]["lr"] = rate
        pair.give_gradients()
        pair.opt.step()
        pair.plain.step()
        for a, b in zip(pair.ours, pair.theirs, strict=True):
            torch.testing.assert_close(a, b)  # torch's own limits for float32
            for key, value in pair.opt.state[a].items():
                torch.testing.assert_close(value, pair.plain.state[b][key])
    saved = copy.deepcopy(pair.opt.state_dict())
    pair.plain.load_state_dict(saved)
    assert saved["param_groups"] == pair.plain.state_dict()["param_groups"]
