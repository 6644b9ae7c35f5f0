"""DNDarrays in, DNDarrays out: uneven parts, exact means, nothing sent or copied."""

import pytest
import torch
from oracle import joined_batch, seeded
from torch import nn

heat = pytest.importorskip("heat", reason="Heat is not installed in this environment")
import dpoptim.heat as dph  # noqa: E402  needs Heat

pytestmark = pytest.mark.parallel


def _rows(world, counts=None):
    """Return all rows, and a DNDarray of which each rank has so many of them."""
    counts = [3 + 2 * rank for rank in range(world.size)] if counts is None else counts
    rows = joined_batch(0, counts)
    return rows, heat.array(rows.split(counts)[world.rank].clone(), is_split=0)


def test_the_local_part_is_a_view_with_its_exact_weight(world):
    rows, array = _rows(world)
    labels = heat.array(torch.arange(world.rank, world.rank + len(array.larray)), is_split=0)
    part = dph.local_part(array, labels)
    assert part.tensors[0].data_ptr() == array.larray.data_ptr()
    assert part.tensors[1].tolist() == labels.larray.tolist()
    assert part.row_counts == tuple(3 + 2 * rank for rank in range(world.size))
    assert part.weight == 3 + 2 * world.rank

    model, plain = nn.Linear(5, 1).double(), nn.Linear(5, 1).double()
    opt = dph.DataParallelOptimizer(dph.SGD(model.parameters(), lr=0.1))
    parallel = dph.DataParallel(model, array.comm, opt)
    plain.load_state_dict(model.state_dict())
    opt.batch_weight = part.weight
    parallel(part.tensors[0]).pow(2).mean().backward()
    plain(rows).pow(2).mean().backward()
    torch.testing.assert_close(model.weight.grad, plain.weight.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("batch_size", [6, 9, 1000])
def test_batches_are_as_many_on_all_ranks_and_hold_every_row_once(world, batch_size, seed):
    _, array = _rows(world, [6 + 2 * rank for rank in range(world.size)])
    state = torch.random.get_rng_state()
    found = list(dph.batches(array, array, batch_size=batch_size, seed=seed))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(set(world.allgather(len(found)))) == 1
    total = sum(world.allgather(len(array.larray)))
    assert len(found) == -(-total // batch_size)
    assert sorted(torch.cat([x for x, _ in found]).tolist()) == sorted(array.larray.tolist())
    assert all(torch.equal(x, y) for x, y in found)
    if seed is not None and len(array.larray) > 4:
        assert not torch.equal(torch.cat([x for x, _ in found]), array.larray)


@pytest.mark.parametrize("split", [None, 1])
def test_another_split_is_an_error_that_says_what_to_do(world, split):
    rows, array = _rows(world)
    other = heat.array(rows, split=split)
    with pytest.raises(ValueError, match=rf"array 1 must have split=0.*got split={split}: use ht.resplit\(array, 0\)"):
        dph.local_part(array, other)


def test_unbalanced_arrays_are_taken_as_they_are_and_different_divisions_are_not(world):
    _, array = _rows(world)
    assert len(dph.local_part(array).tensors[0]) == 3 + 2 * world.rank
    balanced = heat.balance(array, copy=True)
    if world.size > 2 or len(balanced.larray) != len(array.larray):
        with pytest.raises(ValueError, match="arrays must be divided alike, but array 0 has"):
            dph.local_part(array, balanced)


def test_a_rank_without_rows_is_an_error_on_all(world):
    if world.size == 1:
        pytest.skip("an only rank has all rows")
    _, array = _rows(world, [2] * (world.size - 1) + [0])
    with pytest.raises(ValueError, match=r"every rank must have rows, got \[2, .*0\] rows"):
        dph.local_part(array)


def test_bad_arguments_are_errors_on_all_ranks(world):
    _, array = _rows(world)
    with pytest.raises(ValueError, match="one or more DNDarrays, got none"):
        dph.local_part()
    with pytest.raises(TypeError, match="array 0 must be a DNDarray, got Tensor"):
        dph.local_part(array.larray)
    with pytest.raises(ValueError, match="batch_size must be >= the number of ranks"):
        dph.batches(array, batch_size=0)
    with pytest.raises(TypeError if world.rank == 0 else (TypeError, ValueError), match="batch_size must be"):
        dph.batches(array, batch_size="four" if world.rank == 0 else 4)
    if world.size > 1:
        _, uneven = _rows(world, [20] * (world.size - 1) + [1])
        with pytest.raises(ValueError, match="every rank must have a row for each of"):
            dph.batches(uneven, batch_size=world.size)
        pair = heat.MPICommunication(world).Split(0, world.rank)
        other = heat.array(array.larray, is_split=0, comm=pair)
        with pytest.raises(ValueError, match="array 1 must have the communicator of array 0"):
            dph.local_part(array, other)


def test_parameters_and_gradients_come_out_as_dndarrays(world):
    model = seeded(lambda: nn.Linear(5, 2), seed=world.rank)
    opt = dph.DataParallelOptimizer(dph.SGD(model.parameters(), lr=0.1))
    parallel = dph.DataParallel(model, heat.MPI_WORLD, opt)
    assert dph.gradients(model) == {}
    _, array = _rows(world)
    parallel(dph.local_part(array).tensors[0]).pow(2).mean().backward()
    found = dph.parameters(model)
    assert list(found) == ["weight", "bias"]
    assert found["weight"].larray.data_ptr() == model.weight.data_ptr()
    assert (found["weight"].shape, found["weight"].split) == ((2, 5), None)
    norm = heat.norm(dph.gradients(model)["weight"]).item()
    assert norm == pytest.approx(model.weight.grad.norm().item())
    with pytest.raises(TypeError, match=r"parameter 'weight' is torch.bfloat16, which Heat has no type for"):
        dph.parameters(nn.Linear(2, 2).bfloat16())
