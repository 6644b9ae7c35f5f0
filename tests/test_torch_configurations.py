"""Every configuration in torch's own tests, of every optimizer and implementation: N ranks against one process."""

import copy
import warnings

import pytest
import torch
from mpi4py import MPI
from oracle import Net, assert_replicas, assert_same_parameters, joined_batch, local_part, part_sizes, seeded
from torch import nn

import dpoptim

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's test helpers use what torch deprecates
    from torch.testing._internal.common_optimizers import optim_db

pytestmark = pytest.mark.parallel
if MPI.COMM_WORLD.size != 3:
    pytest.skip("some 170 configurations, on three ranks only", allow_module_level=True)

NUM_STEPS = 10


class Matrices(nn.Module):
    """Two matrices alone, for Muon."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 5, bias=False))

    def forward(self, x):
        return self.layers(x)


class Words(nn.Module):
    """An embedding with sparse gradients alone, for SparseAdam."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 4, sparse=True)

    def forward(self, x):
        return self.words((x * 3).long() % 11)


def _cases():
    for info in optim_db:
        name = info.optim_cls.__name__
        for given in info.optim_inputs_func(device="cpu"):
            for implementation in info.supported_impls:
                options = {key: value for key, value in given.kwargs.items() if key not in ("foreach", "fused")}
                tensor_rate = isinstance(options.get("lr"), torch.Tensor)
                if implementation == "foreach":
                    if tensor_rate and not options.get("capturable"):
                        continue  # torch refuses it
                    options["foreach"] = True
                elif implementation == "fused":
                    options["fused"] = True
                elif "foreach" in info.supported_impls:
                    options["foreach"] = False
                yield pytest.param(name, options, id=f"{name}-{given.desc}-{implementation}".replace(" ", "_"))


@pytest.mark.parametrize(("name", "options"), list(_cases()))
def test_configurations(world, name, options):
    make = {"Muon": Matrices, "SparseAdam": Words}.get(name, Net)
    sizes = part_sizes(world.size, equal=False)
    model, expected = seeded(make), seeded(make)
    inner = getattr(dpoptim, name)(model.parameters(), **copy.deepcopy(options))
    opt = dpoptim.DataParallelOptimizer(inner)
    plain = getattr(torch.optim, name)(expected.parameters(), **copy.deepcopy(options))
    opt.batch_weight = sizes[world.rank]
    for step in range(NUM_STEPS):
        batch = joined_batch(step, sizes)
        for optimizer, net, part in ((opt, model, local_part(batch, sizes, world.rank)), (plain, expected, batch)):

            def closure(optimizer=optimizer, net=net, part=part):
                optimizer.zero_grad()
                loss = net(part).pow(2).mean()
                loss.backward()
                return loss

            optimizer.step(closure)
        assert_replicas(opt, model)
        assert_same_parameters(model, expected, step)
    opt.detach()
