"""Every configuration in torch's own tests, of every optimizer and implementation: N ranks against one process."""

import copy
import warnings

import pytest
import torch
from oracle import assert_replicas, assert_same_parameters, joined_batch, local_part, model_for, part_sizes, seeded

import dpoptim

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's test helpers use what torch deprecates
    from torch.testing._internal.common_optimizers import optim_db

pytestmark = [
    pytest.mark.parallel,
    pytest.mark.once,
    pytest.mark.ranks(3),  # some 190 configurations
]

NUM_STEPS = 10


def _cases():
    for info in optim_db:
        name = info.optim_cls.__name__
        for given in info.optim_inputs_func(device="cpu"):
            for implementation in (
                "for-loop",
                *(kind for kind in ("foreach", "fused") if kind in info.supported_impls),
            ):
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
                marks = [pytest.mark.supports(row, replicated="{name}") for row in _rows(options)]
                case = f"{name}-{given.desc}-{implementation}".replace(" ", "_")
                yield pytest.param(name, implementation, options, id=case, marks=marks)


def _rows(options):
    """Return which rows of the table of what is supported a configuration belongs to."""
    for option in (
        "maximize",
        "differentiable",
        "capturable",
        "amsgrad",
        "nesterov",
        "centered",
        "decoupled_weight_decay",
    ):
        if options.get(option):
            yield option
    if isinstance(options.get("lr"), torch.Tensor):
        yield "lr as a Tensor"


@pytest.mark.parametrize(("name", "implementation", "options"), list(_cases()))
@pytest.mark.supports("{name}", replicated="yes", implementations="{implementation}")
def test_configurations(world, name, implementation, options):
    sizes = part_sizes(world.size, equal=False)
    model, expected = seeded(model_for(name)), seeded(model_for(name))
    inner = getattr(dpoptim, name)(model.parameters(), **copy.deepcopy(options))
    opt = dpoptim.DataParallelOptimizer(inner)
    plain = getattr(torch.optim, name)(expected.parameters(), **copy.deepcopy(options))
    opt.batch_weight = sizes[world.rank]
    # A step of LBFGS is up to 20 iterations, which end where rounding alone is left and grows.
    for step in range(3 if name == "LBFGS" else NUM_STEPS):
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
