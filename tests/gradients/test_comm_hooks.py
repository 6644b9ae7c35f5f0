"""Communication hooks."""

import re
from pathlib import Path

import pytest
import torch

import dpoptim
from dpoptim import comm_hooks
from dpoptim.comm.communicator import Communicator
from dpoptim.gradients.bucket import Bucket

pytestmark = pytest.mark.parallel

PAGE = Path(__file__).parents[2] / "docs/hooks.md"


def _gradient(rank, dtype=torch.float32):
    return torch.randn(33, generator=torch.Generator().manual_seed(rank)).to(dtype)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("hook", "wire"),
    [
        (comm_hooks.allreduce, None),
        (comm_hooks.bf16_compress, torch.bfloat16),
        (comm_hooks.fp16_compress, torch.float16),
    ],
)
def test_hooks_sum_what_they_send(world, hook, wire, overlap):
    communicator = Communicator(world, overlap=overlap)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        bucket = Bucket([0], [torch.zeros(33, dtype=dtype)])
        own = _gradient(world.rank, dtype)
        bucket.pack([own], 1.0)
        hook(communicator, bucket).wait()
        sent = dtype if wire is None or dtype.itemsize <= wire.itemsize else wire
        summed = torch.float32 if sent.itemsize == 2 else dtype
        total = sum(_gradient(rank, dtype).to(sent).to(summed) for rank in range(world.size)).to(sent).to(dtype)
        if sent.itemsize == 2:  # summed in float32, in the order of ranks, rounded once: the very same bits
            assert torch.equal(bucket.flat, total)
        else:  # MPI adds in an order of its own
            torch.testing.assert_close(bucket.flat, total, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
        bits = communicator.all_gather_object(bucket.flat.view(torch.uint8).tolist())
        assert all(other == bits[0] for other in bits)
    communicator.free()


def test_integers_are_never_compressed(world):
    communicator = Communicator(world)
    bucket = Bucket([0], [torch.zeros(1, dtype=torch.int64)])
    bucket.flat = torch.tensor([2**40 + 1])
    comm_hooks.bf16_compress(communicator, bucket).wait()
    assert bucket.flat.item() == world.size * (2**40 + 1)
    communicator.free()


def test_what_a_hook_has_begun_before_it_raises_is_not_done_later(world):
    parameters = [torch.nn.Parameter(torch.zeros(numel)) for numel in (200_000, 1000, 1000)]  # the first has a home
    fails = True

    def hook(communicator, bucket):
        if fails and bucket.indices == (1,):
            raise LookupError("no way")
        return comm_hooks.allreduce(communicator, bucket)

    def backward():
        opt.zero_grad()
        sum(parameter.sum() * (world.rank + 1) for parameter in parameters).backward()

    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(parameters), world, comm_hook=hook, overlap=False, bucket_mb=1e-3)
    raises = pytest.raises(LookupError, match="no way")
    if world.size > 1:
        with raises:
            backward()
    fails = False
    backward()
    means = [parameter.grad.unique().tolist() for parameter in parameters]
    fails = world.size > 1
    if fails:
        with raises:
            backward()
    opt.detach()
    assert means == [[(world.size + 1) / 2]] * 3


@pytest.mark.parametrize("hook", [comm_hooks.bf16_compress, comm_hooks.fp16_compress])
def test_the_optimizer_uses_the_hook(world, hook):
    parameter = torch.nn.Parameter(torch.zeros(33))
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD([parameter], lr=1.0), comm_hook=hook)
    (parameter * _gradient(world.rank)).sum().backward()
    mean = sum(_gradient(rank) for rank in range(world.size)) / world.size
    bits = 8 if hook is comm_hooks.bf16_compress else 11
    if world.size > 1:
        # each rank's share is rounded, and the sum once more
        torch.testing.assert_close(parameter.grad, mean, rtol=0, atol=8 * 2.0**-bits)
        assert not torch.allclose(parameter.grad, mean, rtol=0, atol=1e-6), "it was compressed"
    opt.detach()


def test_a_hook_may_write_to_what_it_has_summed(world):
    """While other ranks are slower: none of them may still read it."""

    class Widen:
        def __init__(self, work, summed, bucket):
            self._work, self._summed, self._bucket = work, summed, bucket

        def wait(self):
            self._work.wait()
            self._bucket.flat.copy_(self._summed)
            self._summed.fill_(float("nan"))

    def hook(communicator, bucket):
        summed = bucket.flat.clone()
        return Widen(communicator.all_reduce(summed, async_op=True), summed, bucket)

    parameters = [torch.nn.Parameter(torch.zeros(1_000_000)) for _ in range(3)]
    opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(parameters, lr=0.1), comm=world, comm_hook=hook, overlap=False)
    wrong = 0
    for step in range(8):
        opt.zero_grad()
        sum(((world.rank + step) * parameter).sum() for parameter in parameters).backward()
        mean = torch.full((1_000_000,), step + (world.size - 1) / 2)
        wrong += sum(not torch.equal(parameter.grad, mean) for parameter in parameters)
    opt.detach()
    assert not wrong


def _run_page():
    """Run the program of docs/hooks.md, and return its names."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names = {"__name__": "hooks_page"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_the_program_of_the_page_trains(world):
    names = _run_page()
    losses, verdict = names["losses"], names["verdict"]
    assert verdict, str(verdict)
    assert losses[-1] < losses[0] / 2
    numel = sum(parameter.numel() for parameter in names["model"].parameters())
    num_steps = len(losses) if world.size > 1 else 0  # one rank has nothing to sum
    assert names["hook"].num_bytes == num_steps * numel * torch.float64.itemsize
    bits = world.allgather([parameter.tolist() for parameter in names["model"].parameters()])
    assert all(other == bits[0] for other in bits)


def test_the_hook_of_the_page_is_exact_in_each_mode(world):
    hook = _run_page()["ExactSum"]()
    for mode in ({}, {"overlap": True}, {"shard": True}, {"shard": True, "overlap": True}, {"node_shared": True}):
        parameters = [torch.nn.Parameter(torch.zeros(numel)) for numel in (33, 5, 200_000)]
        opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(parameters, lr=1.0), comm_hook=hook, **mode)
        gradients = [
            [torch.randn(parameter.numel(), generator=torch.Generator().manual_seed(rank)) for parameter in parameters]
            for rank in range(world.size)
        ]
        sum((p * g).sum() for p, g in zip(parameters, gradients[world.rank], strict=True)).backward()
        opt.step()
        stepped = [parameter.detach().clone() for parameter in parameters]
        opt.detach()
        for shares, parameter in zip(zip(*gradients, strict=True), stepped, strict=True):
            whole = sum(((share * (1 / world.size)).double() / hook.grid).round().long() for share in shares)
            mean = (whole.double() * hook.grid).float() if world.size > 1 else shares[0]
            assert torch.equal(parameter, -mean), mode
