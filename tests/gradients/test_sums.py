"""Sums of buckets: what is given to the communication hook, and what is let go of; and gradients beside all buckets."""

import pytest
import torch
from reducing import Done, FakeCommunicator, made, parameters_of, twice

from dpoptim.gradients.bucket import Bucket
from dpoptim.gradients.comm_hook import allreduce
from dpoptim.gradients.outsiders import reduce_alone
from dpoptim.gradients.sums import Sums


def _sums(tensors, hook=twice, communicator=None):
    return Sums(communicator or FakeCommunicator(), hook, parameters_of(*tensors))


def test_a_bucket_is_summed_and_let_go():
    tensors = made((2,), (3,), grads=[1.0, None])
    sums, bucket = _sums(tensors), Bucket([1, 0], list(reversed(tensors)))
    bucket.num_pending = 0
    with torch.no_grad():
        sums.launch(bucket, 0.25)
        assert sums.finish(sums.launched, lambda: [float(bucket.flat.sum())]) == [1.0], "it was waited for first"
        bucket.unpack()
    assert torch.equal(tensors[0].grad, torch.full((2,), 0.5))
    assert not sums.has_misfit
    sums.release([bucket])
    assert (bucket.num_pending, bucket.flat.numel(), sums.launched) == (2, 0, [])


def test_a_gradient_that_does_not_fit_is_noted_until_the_bucket_is_let_go():
    tensors = made((2,), (3,), grads=[1.0, 1.0])
    sums, bucket = _sums(tensors), Bucket([0, 1], tensors)
    tensors[1].grad = tensors[1].grad.to_sparse()
    with torch.no_grad():
        sums.launch(bucket, 1.0)
    assert sums.has_misfit
    sums.release([bucket])
    assert not sums.has_misfit


class _Plain(FakeCommunicator):
    """One that notes what it is asked to sum."""

    def __init__(self, *, for_free):
        super().__init__()
        self.scales_for_free, self.seen = for_free, []

    def all_reduce(self, flat, *, scale, async_op):
        assert async_op
        self.seen.append((flat.tolist(), scale))
        return Done(lambda: None)


@pytest.mark.parametrize("for_free", [True, False])
def test_the_sum_without_a_hook_scales_where_that_is_free(for_free):
    (tensor,) = made((2,), grads=[1.0])
    communicator = _Plain(for_free=for_free)
    with torch.no_grad():
        _sums([tensor], allreduce, communicator).launch(Bucket([0], [tensor]), 0.5)
    assert communicator.seen == [([1.0, 1.0], 0.5) if for_free else ([0.5, 0.5], 1.0)]


def test_a_hook_finds_gradients_scaled():
    (tensor,) = made((2,), grads=[1.0])
    seen = []

    def hook(_, bucket):
        seen.append((bucket.flat.tolist(), bucket.scale))
        return Done(lambda: None)

    with torch.no_grad():
        _sums([tensor], hook, _Plain(for_free=True)).launch(Bucket([0], [tensor]), 0.5)
    assert seen == [([0.5, 0.5], 1.0)]


def test_what_a_hook_does_starts_when_all_have_met():
    bucket, communicator = Bucket([0], [torch.zeros(2)]), FakeCommunicator()
    on_device = Bucket([0], [torch.zeros(2, device="meta")])
    _sums([], allreduce, communicator).batch([bucket, bucket])
    _sums([], allreduce, communicator).batch([bucket, on_device])
    _sums([], twice, communicator).batch([bucket])
    assert communicator.batches == [(2, {torch.float32}), (None, set()), (None, set())]


@pytest.mark.parametrize("kind", ["dense", "sparse", "absent"])
def test_a_gradient_without_a_bucket_is_reduced_alone(kind):
    (tensor,) = made((3, 2), grads=[None if kind == "absent" else 3.0])
    if kind == "sparse":
        tensor.grad = tensor.grad.to_sparse()
    seen, kept = [], tensor.grad

    def hook(communicator, bucket):
        seen.append(bucket.indices)
        return twice(communicator, bucket)

    with torch.no_grad():
        reduce_alone(_sums([tensor], hook), 4, tensor, 0.25)
    assert torch.equal(tensor.grad, torch.full((3, 2), 0.0 if kind == "absent" else 1.5))
    assert seen == [(4,)], "the hook knows which it is"
    assert (tensor.grad is kept) == (kind == "dense")


@pytest.mark.parametrize("is_sparse", [True, False])
def test_what_is_sparse_is_added_to_what_was_dense(is_sparse):
    (tensor,) = made((3, 2), grads=[1.0])
    if is_sparse:
        tensor.grad = tensor.grad.to_sparse()
    with torch.no_grad():
        reduce_alone(_sums([tensor]), 0, tensor, 0.5, torch.full((3, 2), 7.0))
    assert torch.equal(tensor.grad, torch.full((3, 2), 8.0 if is_sparse else 7.0))
