"""Comparisons across ranks, and errors that all ranks raise together."""

import pytest
import torch

from dpoptim.comm.communicator import Communicator
from dpoptim.utils.consistency import check_replicas, digest, raise_together

pytestmark = pytest.mark.parallel


@pytest.fixture
def communicator(any_comm):
    return Communicator.shared(any_comm)


@pytest.mark.parametrize("kind", [ValueError, TypeError, RuntimeError, KeyError])
def test_an_error_on_the_last_rank_is_raised_on_all(communicator, kind):
    last = communicator.world_size - 1
    own = kind("lost") if communicator.rank == last else None
    seen_elsewhere = RuntimeError if kind is KeyError else kind
    with pytest.raises(kind if own else seen_elsewhere, match="lost" if own else f"on rank {last}: .*lost") as caught:
        raise_together(communicator, own)
    assert caught.value.raised_on_all_ranks
    raise_together(communicator, None)


def test_replicas_that_differ_are_named(communicator):
    tensors = {"a": torch.ones(3), "b": torch.zeros(2)}
    check_replicas(communicator, tensors.items())
    if communicator.world_size == 1:
        return
    last = communicator.world_size - 1
    if communicator.rank == last:
        tensors["b"][1] = 1e-30
    with pytest.raises(RuntimeError, match=f"'b' differs between rank 0 and ranks {last}"):
        check_replicas(communicator, tensors.items())
    fewer = list(tensors.items())[: 1 + (communicator.rank == 0)]
    with pytest.raises(RuntimeError, match="different numbers of tensors"):
        check_replicas(communicator, fewer)


def test_digests_tell_bits_shapes_and_dtypes_apart():
    zero = torch.zeros(4)
    others = [-zero, zero.view(2, 2), zero.to(torch.int32), torch.zeros(5), torch.tensor(0.0)]
    assert len({digest(tensor) for tensor in [zero, *others]}) == 6
    assert digest(zero) == digest(torch.zeros(8)[::2])
    assert digest(torch.ones(2, 3).t()) == digest(torch.ones(3, 2))
