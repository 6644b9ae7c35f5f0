"""Collectives and training over several hosts with real links, through shared memory in each and messages between."""

import hosts as harness
import pytest
from hosts import Hosts

REASON = harness.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no hosts to be had: {REASON}")

PROGRAM = """
import torch, dpoptim
from dpoptim.comm.communicator import Communicator
from dpoptim.partition import even_counts, start_offsets
communicator = Communicator()
rank, world_size = communicator.rank, communicator.world_size
several = communicator.topology.local_size > 1 or any(len(node) > 1 for node in communicator.topology.nodes)
numel = (1 << 20) + 3
def values(rank, dtype):
    return torch.arange(numel).remainder(7 + rank).to(dtype)
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int32):
    total = sum(values(other, torch.float64) for other in range(world_size)).to(dtype)
    tensor = values(rank, dtype)
    communicator.all_reduce(tensor)
    assert torch.equal(tensor, total), dtype
    counts = even_counts(numel, world_size)
    part = torch.empty(counts[rank], dtype=dtype)
    communicator.reduce_scatter(part, values(rank, dtype))
    start = start_offsets(counts)[rank]
    assert torch.equal(part, total[start : start + counts[rank]]), dtype
    whole = torch.empty(numel, dtype=dtype)
    communicator.all_gather(whole, part)
    assert torch.equal(whole, total), dtype
assert (communicator.why_no_node_memory() is None) == several, communicator.why_no_node_memory()

modes = [{}, {"shard": True}, {"node_shared": True}]
for overlap, mode in [(False, mode) for mode in modes] + [(True, mode) for mode in modes if not several]:
    for kind in ("AdamW", "Adafactor"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(400, 400), torch.nn.Tanh(), torch.nn.Linear(400, 3)).double()
        expected = torch.nn.Sequential(torch.nn.Linear(400, 400), torch.nn.Tanh(), torch.nn.Linear(400, 3)).double()
        expected.load_state_dict(model.state_dict())
        inner = getattr(dpoptim, kind)(model.parameters(), lr=0.01)
        opt = dpoptim.DataParallelOptimizer(inner, overlap=overlap, **mode)
        plain = getattr(dpoptim, kind)(expected.parameters(), lr=0.01)
        for step in range(4):
            batch = torch.randn(2 * world_size, 400, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            for optimizer, net, data in ((opt, model, batch[2 * rank :][:2]), (plain, expected, batch)):
                optimizer.zero_grad()
                net(data).pow(2).mean().backward()
                (opt.clip_grad_norm_(1.0) if net is model else torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0))
                optimizer.step()
        bits = communicator.all_gather_object([p.detach().numpy().tobytes() for p in model.parameters()])
        assert all(other == bits[0] for other in bits), (mode, kind, "replicas differ")
        for own, other in zip(model.parameters(), expected.parameters()):
            torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-11)
        full = opt.full_state_dict()
        if rank == 0:
            for index, entry in plain.state_dict()["state"].items():
                for key, value in entry.items():
                    torch.testing.assert_close(full["state"][index][key], value, rtol=1e-8, atol=1e-11)
        opt.detach()
print("equal")
"""


@pytest.mark.parametrize("ranks", [[2, 2], [1, 1, 1], [2, 1, 3]], ids=str)
def test_hosts_end_where_one_process_ends(ranks):
    with Hosts(len(ranks), rate="1gbit") as hosts:
        done = hosts.mpirun(ranks, "-c", PROGRAM, timeout_s=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == sum(ranks), done.stderr
