"""Bucket: what goes in comes out, and only what must be copied is."""

import pytest
import torch

from dpoptim.gradients.bucket import Bucket, Division

_LARGE_NUMEL = 1 << 17


def _parameters(dtype=torch.float32):
    return [torch.zeros(shape, dtype=dtype) for shape in ((2, 3), (), (0, 4), (5,))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_pack_scales_and_unpack_copies_back(dtype):
    parameters = _parameters(dtype)
    bucket = Bucket([3, 2, 1, 0], parameters)
    gradients = [torch.full_like(parameter, 4 + i) for i, parameter in enumerate(parameters)]
    assert bucket.pack(gradients, 0.5)
    assert bucket.numel == bucket.flat.numel() == 12
    assert torch.equal(bucket.flat, torch.tensor([2.0] * 6 + [2.5] + [3.5] * 5).to(dtype))
    bucket.flat.mul_(10)
    bucket.unpack()
    for gradient, value in zip(gradients, (20, 25, 30, 35), strict=True):
        assert torch.equal(gradient, torch.full_like(gradient, value))


def test_absent_gradients_count_as_zero_and_can_be_asked_for():
    parameters = _parameters()
    bucket = Bucket(range(4), parameters)
    first = [torch.ones_like(parameter) for parameter in parameters]
    bucket.pack(first, 1.0)
    assert bucket.pack([None, torch.tensor(3.0), None, None], 1.0)
    assert bucket.flat.tolist() == [0.0] * 6 + [3.0] + [0.0] * 5
    bucket.flat.add_(1)
    reduced = bucket.reduced(0)
    assert torch.equal(reduced, torch.ones(2, 3))
    bucket.flat.zero_()
    assert torch.equal(reduced, torch.ones(2, 3)), "not a view"


def test_gradients_are_never_views_of_the_buffer():
    parameters = _parameters()
    bucket = Bucket(range(4), parameters)
    gradients = [torch.ones_like(parameter) for parameter in parameters]
    bucket.pack(gradients, 1.0)
    bucket.unpack()
    bucket.flat.fill_(9)
    assert torch.equal(gradients[0], torch.ones(2, 3))


def test_a_single_gradient_travels_from_its_own_memory():
    bucket = Bucket([0], [torch.zeros(4, 4)])
    gradient = torch.ones(4, 4)
    bucket.pack([gradient], 0.25)
    assert bucket.flat.data_ptr() == gradient.data_ptr()
    bucket.flat.mul_(8)
    bucket.unpack()
    assert torch.equal(gradient, torch.full((4, 4), 2.0))


def test_strided_gradients_keep_their_strides():
    parameter = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    for parameters in ([parameter], [parameter, torch.zeros(3)]):
        bucket = Bucket(range(len(parameters)), parameters)
        values = torch.arange(96.0).view(2, 3, 4, 4)
        gradients = [values.to(memory_format=torch.channels_last), torch.ones(3)][: len(parameters)]
        bucket.pack(gradients, 1.0)
        assert torch.equal(bucket.flat[:96], values.view(-1)), "row-major on the wire, whatever the strides"
        bucket.flat.add_(1)
        bucket.unpack()
        assert torch.equal(gradients[0], values + 1)
        assert gradients[0].stride() == parameter.stride()


@pytest.mark.parametrize(
    "stranger", [torch.ones(5, dtype=torch.float64), torch.ones(5, device="meta"), torch.ones(5).to_sparse()]
)
def test_gradients_of_another_kind_are_reported_and_count_as_zero(stranger):
    bucket = Bucket(range(4), _parameters())
    gradients = [torch.ones(2, 3), None, None, stranger]
    assert not bucket.pack(gradients, 1.0)
    assert bucket.flat.tolist() == [1.0] * 6 + [0.0] * 6
    bucket.unpack()
    assert not Bucket([0], [torch.zeros(5)]).pack([stranger], 1.0)


# ---------------------------------------------------------------- in given memory


def _bucket_in(memory, *, division=None):
    """Return a bucket of a large and two small parameters that lies in this memory, and the home of the large one."""
    parameters = [torch.zeros(3), torch.zeros(_LARGE_NUMEL // 256, 256), torch.zeros(5)]
    bucket = Bucket([7, 8, 9], parameters, division)

    def tensor_at(dtype, shape, offset_bytes):
        return torch.frombuffer(memory, dtype=dtype, count=shape_numel(shape), offset=offset_bytes).view(shape)

    def shape_numel(shape):
        return torch.Size(shape).numel()

    homes = bucket.use_memory(tensor_at)
    assert list(homes) == [8]
    return bucket, homes[8]


@pytest.fixture
def memory():
    return bytearray(4 * (_LARGE_NUMEL + 8))


def _made(home, value):
    """Return a gradient as autograd makes it, moved to its home."""
    parameter = torch.nn.Parameter(torch.zeros(_LARGE_NUMEL // 256, 256))
    home.before_adding(parameter, torch.ones_like(parameter))
    parameter.grad = torch.full_like(parameter, value)
    home.adopt(parameter)
    return parameter.grad


def test_a_gradient_at_home_is_packed_without_a_copy(memory):
    bucket, home = _bucket_in(memory)
    large, first, last = _made(home, 2.0), torch.ones(3), torch.ones(5)
    assert home.has(large)
    assert bucket.pack([first, large, last], 1.0)
    assert bucket.flat[3].data_ptr() == large.data_ptr()
    bucket.flat.mul_(3)
    assert torch.equal(large, torch.full_like(large, 6.0)), "the same memory"
    assert torch.equal(first, torch.ones(3)), "a copy"
    bucket.unpack()
    assert torch.equal(first, torch.full((3,), 3.0))
    assert torch.equal(last, torch.full((5,), 3.0))


@pytest.mark.parametrize("kind", ["elsewhere", "transposed", "sparse", "absent"])
def test_what_is_not_at_home_is_copied(memory, kind):
    bucket, home = _bucket_in(memory)
    values = torch.arange(_LARGE_NUMEL, dtype=torch.float32).view(-1, 256)
    large = values.clone()
    if kind == "transposed":
        large = _made(home, 0.0).copy_(values).view(256, -1).t().contiguous().t().reshape(values.shape)
    elif kind in ("sparse", "absent"):
        large = values.to_sparse() if kind == "sparse" else None
    assert bucket.pack([None, large, torch.ones(5)], 1.0) == (kind != "sparse")
    expected = torch.zeros(_LARGE_NUMEL) if kind in ("sparse", "absent") else large.reshape(-1)
    assert torch.equal(bucket.flat[3:-5], expected)
    bucket.flat.add_(1)
    bucket.unpack()
    if kind in ("elsewhere", "transposed"):
        assert torch.equal(large.reshape(-1), bucket.flat[3:-5])


def test_a_gradient_that_somebody_holds_is_not_overwritten(memory):
    bucket, home = _bucket_in(memory)
    held = _made(home, 2.0)[:1]  # a part is enough
    assert not home.is_free()
    following = _made(home, 3.0)
    assert not home.has(following)
    small = torch.ones(5)
    bucket.pack([None, following, small], 0.5)
    assert bucket.flat[3:-5].unique().tolist() == [1.5]
    assert held.unique().tolist() == [2.0]
    bucket.flat.add_(1)
    bucket.unpack()
    assert following.unique().tolist() == [2.5]
    assert small.unique().tolist() == [1.5]
    bucket.pack([None, None, None], 1.0)
    assert not bucket.flat.any()
    assert held.unique().tolist() == [2.0]
    bucket.release()
    del held
    assert home.is_free()
    assert home.has(_made(home, 4.0))


@pytest.mark.parametrize("where", ["home", "elsewhere", "held"])
def test_own_gradients_are_what_they_are_now(memory, where):
    start, stop = 2, _LARGE_NUMEL + 4
    bucket, home = _bucket_in(memory, division=Division((start, stop - start, 4), 1, in_node=False))
    gradients = [torch.ones(3), _made(home, 2.0), torch.ones(5)]
    if where == "elsewhere":
        gradients[1] = gradients[1].clone()
    held = gradients[1] if where == "held" else None
    if held is not None:
        gradients[1] = held.clone()
    bucket.pack(gradients, 1.0)
    bucket.unpack()
    bucket.release()
    for gradient in gradients:
        gradient.mul_(5)
    own = bucket.own_gradients(gradients)
    assert own.tolist()[:1] + own.tolist()[-1:] == [5.0, 5.0]
    assert own[1:-1].unique().tolist() == [10.0]
    assert held is None or held.unique().tolist() == [2.0]


@pytest.mark.parametrize("kind", ["accumulated", "dtype", "graph", "strides"])
def test_only_what_autograd_has_just_made_moves(memory, kind):
    _, home = _bucket_in(memory)
    parameter = torch.nn.Parameter(torch.zeros(_LARGE_NUMEL // 256, 256))
    gradient = torch.ones_like(parameter)
    if kind == "dtype":
        parameter = torch.nn.Parameter(parameter.double())
        gradient = gradient.double()
    elif kind == "graph":
        gradient.requires_grad_(True)
    elif kind == "strides":
        gradient = gradient.t().contiguous().t()
    elif kind == "accumulated":
        parameter.grad = gradient
    home.before_adding(parameter, torch.ones_like(parameter))
    parameter.grad = gradient
    home.adopt(parameter)
    assert parameter.grad is gradient
