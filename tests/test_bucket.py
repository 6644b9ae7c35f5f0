"""Bucket: what goes in comes out, and only what must be copied is."""

import pytest
import torch

from dpoptim.bucket import Bucket


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
    bucket.unpack(gradients)
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
    bucket.unpack(gradients)
    bucket.flat.fill_(9)
    assert torch.equal(gradients[0], torch.ones(2, 3))


def test_a_single_gradient_travels_from_its_own_memory():
    bucket = Bucket([0], [torch.zeros(4, 4)])
    gradient = torch.ones(4, 4)
    bucket.pack([gradient], 0.25)
    assert bucket.flat.data_ptr() == gradient.data_ptr()
    bucket.flat.mul_(8)
    bucket.unpack([gradient])
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
        bucket.unpack(gradients)
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
    bucket.unpack(gradients)
    assert not Bucket([0], [torch.zeros(5)]).pack([stranger], 1.0)
