"""Programs with a default device, a default dtype, or calls in inference mode: nothing of dpoptim's depends on it."""

import contextlib

import pytest
import torch
from oracle import MODES, assert_same_parameters, joined_batch, local_part, part_sizes, seeded, twin
from torch import nn

import dpoptim
from dpoptim.comm.communicator import Communicator
from dpoptim.utils import checkpoint

pytestmark = pytest.mark.parallel


@contextlib.contextmanager
def _default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# The meta device stands for an accelerator: whatever lands there has no values, and is seen at once.
DEFAULTS = {
    "meta": lambda: torch.device("meta"),
    "float64": lambda: _default_dtype(torch.float64),
    "bfloat16": lambda: _default_dtype(torch.bfloat16),
}


def _net():
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_everything_is_as_without_a_default(world, mode, default, tmp_path):
    sizes = part_sizes(world.size, equal=True)
    batches = [joined_batch(step, sizes) for step in range(3)]
    loader = [local_part(batch, sizes, world.rank) for batch in batches]
    comm = world.Dup()  # whatever is made at its first use is made now
    directory = comm.bcast(str(tmp_path))
    for name in ("AdamW", "RMSprop", "Adafactor", "NAdam"):
        model = seeded(_net)
        model[1].eval()  # each rank has a batch of its own
        expected = twin(model)
        with DEFAULTS[default]():
            inner = getattr(dpoptim, name)(model.parameters(), lr=0.01)
            opt = dpoptim.DataParallelOptimizer(inner, comm, module=model, **mode)
            for batch in loader:
                opt.zero_grad()
                model(batch).pow(2).mean().backward()
                opt.clip_grad_norm_(0.05)
                opt.step()
                assert opt.mean(float(world.rank)) == (world.size - 1) / 2
            opt.average_buffers()
            state = opt.full_state_dict()
            opt.load_full_state_dict(state)
            if name == "AdamW":
                checkpoint.save(directory, model=model, optimizer=opt)
                checkpoint.load(directory, model=model, optimizer=opt)
                dpoptim.swa_utils.update_bn(loader, model, comm=comm)
            with opt.exclusive():
                pass
            opt.detach()
        # torch's counters are in the default dtype; in one process they would be on the default device too
        with contextlib.nullcontext() if default == "meta" else DEFAULTS[default]():
            plain = getattr(torch.optim, name)(expected.parameters(), lr=0.01)
            for batch in batches:
                plain.zero_grad()
                expected(batch).pow(2).mean().backward()
                nn.utils.clip_grad_norm_(expected.parameters(), 0.05)
                plain.step()
        assert_same_parameters(model, expected)
    comm.Free()


def test_daso_has_no_need_of_the_default_device(world):
    model = seeded(_net)
    batch = joined_batch(0, [3])
    with torch.device("meta"):
        opt = dpoptim.DASO(dpoptim.SGD(model.parameters(), lr=0.1), world, total_epochs=2, node=world.rank)
        for _ in range(2):
            for _ in range(3):
                opt.zero_grad()
                model(batch).pow(2).mean().backward()
                opt.step()
            opt.end_epoch(1.0)
        opt.synchronize()
    opt.detach()


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_what_is_first_called_in_inference_mode_goes_on_outside_of_it(world, mode):
    sizes = part_sizes(world.size, equal=True)
    for constructs in (False, True):
        comm = world.Dup()
        model = seeded(_net)
        model[1].eval()
        expected = twin(model)

        def make(comm=comm, model=model):
            inner = dpoptim.RMSprop(model.parameters(), lr=0.01)
            return dpoptim.DataParallelOptimizer(inner, comm, module=model, **mode)

        opt = None if constructs else make()
        with torch.inference_mode():
            opt = opt or make()
            large = torch.ones(1 << 17)
            opt.communicator.all_reduce(large)  # through the memory of the node
            assert opt.mean(1.0) == 1.0
            opt.average_buffers()
        plain = torch.optim.RMSprop(expected.parameters(), lr=0.01)
        for step in range(2):
            batch = joined_batch(step, sizes)
            for optimizer, module, data in (
                (opt, model, local_part(batch, sizes, world.rank)),
                (plain, expected, batch),
            ):
                optimizer.zero_grad()
                module(data).pow(2).mean().backward()
                optimizer.step()
            large = torch.ones(1 << 17)
            opt.communicator.all_reduce(large)
            assert large[0] == world.size
            assert opt.mean(1.0) == 1.0
        assert_same_parameters(model, expected)
        opt.detach()
        comm.Free()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.int64])
@pytest.mark.parametrize("numel", [3, 1 << 17])
def test_collectives_that_are_first_called_in_inference_mode_go_on_outside_of_it(world, numel, dtype):
    communicator = Communicator(world)
    counts = [numel // world.size + (rank < numel % world.size) for rank in range(world.size)]
    for within in (True, False, True, False):
        with torch.inference_mode() if within else contextlib.nullcontext():
            tensor = torch.ones(numel, dtype=dtype)
            communicator.all_reduce(tensor)
            assert tensor[-1] == world.size
            part = torch.empty(counts[world.rank], dtype=dtype)
            communicator.reduce_scatter(part, torch.ones(numel, dtype=dtype), counts=counts)
            assert (part == world.size).all()
            communicator.all_gather(tensor)
            communicator.broadcast(tensor)
            assert communicator.start_sum([1.0, 2.0]).wait() == [world.size, 2.0 * world.size]
    communicator.free()
