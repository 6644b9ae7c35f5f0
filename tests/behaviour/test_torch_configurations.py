"""Every configuration in torch's own tests, of every optimizer and implementation: N ranks against one process."""

import copy
import inspect
import warnings

import pytest
import torch
from oracle import assert_replicas, assert_same_parameters, joined_batch, local_part, model_for, part_sizes, seeded
from support import OPTIMIZERS

import dpoptim

pytestmark = [
    pytest.mark.parallel,
    pytest.mark.once,
    pytest.mark.ranks(3),  # some 190 configurations
]

NUM_STEPS = 10


def _options(name, implementation):
    """Yield torch's name of each configuration that this implementation takes, and its options."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's test helpers use what torch deprecates
        # Takes seconds, which runs that leave these tests out need not spend.
        from torch.testing._internal.common_optimizers import optim_db
    (info,) = (info for info in optim_db if info.optim_cls.__name__ == name)
    for given in info.optim_inputs_func(device="cpu"):
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
        yield given.desc, options


# For the table of what is supported: which optimizers torch's configurations show with each option.
SHOWN = {
    "maximize": set(OPTIMIZERS) - {"LBFGS", "Muon"},
    "amsgrad": {"Adam", "AdamW"},
    "nesterov": {"SGD"},
    "centered": {"RMSprop"},
    "decoupled_weight_decay": {"NAdam", "RAdam"},
    "lr as a Tensor": {"Adagrad", "LBFGS", "Muon", "SGD", "SparseAdam"},
}


def _shown_by(options):
    """Return which options of the table a configuration has."""
    rows = {option for option in SHOWN if options.get(option)}
    return rows | {"lr as a Tensor"} if isinstance(options.get("lr"), torch.Tensor) else rows


def _cases():
    for name in OPTIMIZERS:
        if not hasattr(torch.optim, name):
            continue  # an older torch
        known = inspect.signature(getattr(torch.optim, name)).parameters
        for implementation in ("for-loop", "foreach", "fused"):
            if implementation == "for-loop" or implementation in known:
                shown = [pytest.mark.supports(name, replicated="yes", implementations=implementation)]
                if implementation == "for-loop":
                    shown += [
                        pytest.mark.supports(row, replicated=name) for row, names in SHOWN.items() if name in names
                    ]
                yield pytest.param(name, implementation, id=f"{name}-{implementation}", marks=shown)


@pytest.mark.parametrize(("name", "implementation"), list(_cases()))
def test_configurations(world, name, implementation):
    cases = list(_options(name, implementation))
    assert cases
    if implementation == "for-loop":
        shown = set().union(*(_shown_by(options) for _, options in cases))
        assert shown == {row for row, names in SHOWN.items() if name in names}
    for case, options in cases:
        try:
            _train(world, name, options)
        except Exception as error:
            error.add_note(f"with torch's configuration {case!r}: {options}")
            raise


def _train(world, name, options):
    """Compare N ranks with one process, step by step."""
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
