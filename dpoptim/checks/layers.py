"""Layers that do something with each rank's batch that one process would do with the joined batch. Local.

They are looked for in the module that the user names, else among all objects, by whose weights are trained.

Tests: ``tests/checks/test_ranks_alike.py``.
"""

import gc
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["layer_error", "renormalisation_error"]

_KINDS = (nn.Embedding, nn.EmbeddingBag, nn.SyncBatchNorm)


def layer_error(parameters: Sequence[Tensor], names: Sequence[str], module: nn.Module | None) -> ValueError | None:
    """Return an error if a layer changes one of these parameters in forward, by the rank's own batch.

    Warns if a layer takes statistics of the rank's own batch where its name says that it takes those of all.
    """
    layers = _layers(parameters, module)
    by_identity = {id(parameter): name for parameter, name in zip(parameters, names, strict=True)}
    for layer in layers:
        name, max_norm = by_identity.get(id(layer.weight)), getattr(layer, "max_norm", None)
        if name is not None and max_norm is not None:
            which = f"parameter '{name}' is the weight of an {type(layer).__name__}"
            return renormalisation_error(which, max_norm, getattr(layer, "norm_type", 2.0))
    num_local = sum(isinstance(layer, nn.SyncBatchNorm) for layer in layers)
    has_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    if num_local and not has_group:
        warnings.warn(
            f"{num_local} SyncBatchNorm layers have no torch.distributed process group, so that each normalises with "
            "this rank's own batch, as BatchNorm does: call torch.distributed.init_process_group, or keep BatchNorm",
            stacklevel=4,
        )
    return None


def renormalisation_error(which: str, max_norm: float, norm_type: float) -> ValueError:
    """Return the error of an embedding with ``max_norm``."""
    return ValueError(
        f"{which} with max_norm={max_norm}, which in each forward renormalises the rows of this rank's batch alone, so "
        "that replicas drift apart: set max_norm=None and renormalise all rows after each step, with torch.no_grad(), "
        f"opt.exclusive(): weight.copy_(torch.renorm(weight, {norm_type}, 0, {max_norm}))"
    )


def _layers(parameters: Sequence[Tensor], module: nn.Module | None) -> list[nn.Module]:
    """Return the layers of such kinds, or of classes derived from them."""
    if module is not None:
        return [layer for layer in module.modules() if isinstance(layer, _KINDS)]
    index = {id(parameter): number for number, parameter in enumerate(parameters)}
    found = []
    kinds = _with_derived(_KINDS)
    for candidate in gc.get_referrers(*kinds):  # an object refers to its class
        if type(candidate) in kinds:
            own = candidate.__dict__.get("_parameters", {}).values()
            found += [(index[id(parameter)], candidate) for parameter in own if id(parameter) in index]
    return list(dict.fromkeys(layer for _, layer in sorted(found, key=lambda pair: pair[0])))


def _with_derived(kinds: Iterable[type[nn.Module]]) -> list[type[nn.Module]]:
    known = list(kinds)
    for kind in known:  # which grows meanwhile
        known += [derived for derived in kind.__subclasses__() if derived not in known]
    return known
