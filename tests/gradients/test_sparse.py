"""Sparse gradients: which are known to be, and that their mean is that of one process."""

import dataclasses

import pytest
import torch
from reducing import FakeCommunicator, made, parameters_of
from torch import nn

import dpoptim
from dpoptim.gradients.presence import Report
from dpoptim.gradients.sparse import SparseGradients

_NOTHING = Report(b"\1\1\1", b"\1\1\1", {}, {}, [], has_raised=False, rewritten=None)


def _reports(*dims, had=b"\1\1\1"):
    return [dataclasses.replace(_NOTHING, sparse_dims=each, had_gradient=had) for each in dims]


def test_what_is_sparse_on_any_rank_is_sparse():
    sparse = SparseGradients(parameters_of(*made((4, 2), (4,), (3,))))
    sparse.learn(_reports({0: 1}, {1: 2}))
    assert sparse.dims == {0: 1, 1: 2}
    assert sparse.dense_somewhere(_reports({0: 1}, {0: 1, 1: 2})) == {1}
    assert sparse.dense_somewhere(_reports({}, {}, had=b"\0\0\1")) == set(), "nobody had one"


def test_what_is_dense_everywhere_is_dense_again():
    sparse = SparseGradients(parameters_of(*made((4, 2), (4,), (3,))))
    sparse.learn(_reports({0: 1, 1: 1}, {0: 1, 1: 1}))
    reports = _reports({0: 1}, {})
    sparse.forget_dense(sparse.dense_somewhere(reports), reports)
    assert sparse.dims == {0: 1}, "the other is sparse on rank 0"


def test_a_dense_gradient_is_a_change():
    tensors = made((4, 2), (4,), grads=[1.0, 1.0])
    sparse = SparseGradients(parameters_of(*tensors))
    assert not sparse.have_changed()
    sparse.dims[0] = 1
    assert sparse.have_changed()
    tensors[0].grad = tensors[0].grad.to_sparse(1)
    assert not sparse.have_changed()
    tensors[0].grad = None
    assert not sparse.have_changed()


class _Both(FakeCommunicator):
    """Rank 1 has the same rows as rank 0."""

    def all_gather(self, gathered, rows, *, counts):
        gathered.copy_(torch.cat([rows, rows]))
        assert sum(counts) == gathered.numel()


@pytest.mark.parametrize("is_there", [True, False])
def test_those_that_any_rank_has_are_summed(is_there):
    tensors = made((4, 2), (4, 2), (4, 2))
    if is_there:
        tensors[0].grad = torch.eye(4)[:, :2].to_sparse(1)
    sparse = SparseGradients(parameters_of(*tensors))
    sparse.dims |= {0: 1, 1: 1, 2: 1}
    sparse.reduce(_Both(), [0, 2], 0.25, but={2})
    assert tensors[0].grad.is_sparse
    assert torch.equal(tensors[0].grad.to_dense(), torch.eye(4)[:, :2] * 0.5 * is_there)
    assert tensors[1].grad is None, "no rank had one"
    assert tensors[2].grad is None, "it was left out"


@pytest.mark.parallel
@pytest.mark.parametrize("kinds", ["all sparse", "one dense at first", "one dense at last"])
def test_gradients_that_are_dense_on_one_rank_now_and_then(world, kinds):
    """What was reduced one way in a step is reduced the other way in the next."""
    weight, bias = nn.Parameter(torch.zeros(6, 2)), nn.Parameter(torch.zeros(3))
    optimizer = dpoptim.DataParallelOptimizer(dpoptim.SGD([weight, bias], lr=1.0), world)
    for step in range(4):
        optimizer.zero_grad()
        is_dense = world.rank == world.size - 1 and kinds == {0: "one dense at first", 3: "one dense at last"}.get(step)
        rows = torch.tensor([world.rank, 5])
        looked_up = weight[rows] if is_dense else nn.functional.embedding(rows, weight, sparse=True)
        (looked_up.sum() + bias.sum()).backward()
        expected = torch.zeros(6, 2)
        expected[: world.size] = 1 / world.size
        expected[5] += 1.0
        torch.testing.assert_close(weight.grad.to_dense(), expected)
        assert torch.equal(bias.grad, torch.ones(3))
        optimizer.step()
    optimizer.detach()
