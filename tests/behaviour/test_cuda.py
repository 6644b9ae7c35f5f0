"""Device tensors: through pinned host memory, or by MPI itself where it reads device memory."""

import pytest
import torch
from oracle import assert_replicas, assert_same_parameters, joined_batch, local_part, part_sizes, seeded, train
from torch import nn

import dpoptim
from dpoptim.comm.communicator import Communicator
from dpoptim.partition import even_counts

pytestmark = [
    pytest.mark.parallel,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int32], ids=str)
def test_collectives(world, dtype, overlap):
    communicator = Communicator(world, overlap=overlap)
    numel = 1001
    tensor = torch.full((numel,), world.rank + 1, dtype=dtype, device="cuda")
    communicator.all_reduce(tensor, async_op=True).wait()
    total = world.size * (world.size + 1) // 2
    assert torch.equal(tensor, torch.full_like(tensor, total))
    part = torch.empty(even_counts(numel, world.size)[world.rank], dtype=dtype, device="cuda")
    communicator.reduce_scatter(part, torch.ones_like(tensor), async_op=True).wait()
    communicator.all_gather(tensor, part, async_op=True).wait()
    assert torch.equal(tensor, torch.full_like(tensor, world.size))
    tensor.fill_(world.rank)
    communicator.broadcast(tensor, root=world.size - 1)
    assert torch.equal(tensor, torch.full_like(tensor, world.size - 1))
    communicator.free()


@pytest.mark.parametrize("overlap", [False, True])
def test_training_ends_where_one_process_ends(world, overlap):
    sizes = part_sizes(world.size, equal=False)
    model, expected = seeded().cuda(), seeded().cuda()
    opt = dpoptim.DataParallelOptimizer(dpoptim.AdamW(model.parameters(), lr=0.01), module=model, overlap=overlap)
    plain = torch.optim.AdamW(expected.parameters(), lr=0.01, fused=True)
    opt.batch_weight = sizes[world.rank]
    for step in range(10):
        batch = joined_batch(step, sizes).cuda()
        train(opt, model, local_part(batch, sizes, world.rank))
        train(plain, expected, batch)
        assert_replicas(opt, model)
        assert_same_parameters(model, expected, step)
    opt.detach()


def test_parameters_on_several_devices(world):
    parameters = [nn.Parameter(torch.zeros(3, device=device)) for device in ("cpu", "cuda")]
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(parameters, lr=1.0))
    sum((parameter * (world.rank + 1)).sum().cpu() for parameter in parameters).backward()
    for parameter in parameters:
        assert torch.allclose(parameter.grad, torch.full_like(parameter, (world.size + 1) / 2))
    opt.step()
    assert torch.equal(parameters[0], parameters[1].cpu())
    opt.detach()


@pytest.mark.parametrize("hook", [None, dpoptim.comm_hooks.bf16_compress])
def test_nodes_exchange_parameters_that_lie_on_a_device(world, hook):
    model = seeded().float().cuda()
    inner = dpoptim.AdamW(model.named_parameters(), lr=0.01)
    opt = dpoptim.DASO(inner, total_epochs=3, warmup_epochs=0, cooldown_epochs=1, node=world.rank, comm_hook=hook)
    opt.add_scaler(scaler := torch.amp.GradScaler("cuda"))
    opt.end_epoch(1.0)
    sizes = part_sizes(world.size, equal=True)
    for step in range(6):
        batch = local_part(joined_batch(step, sizes, dtype=torch.float32), sizes, world.rank).cuda()
        opt.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = model(batch).float().pow(2).mean()
        scaler.scale(loss).backward()
        opt.step()
    opt.end_epoch(loss)
    assert_replicas(opt, model)
