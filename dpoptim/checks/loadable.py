"""Whether a state dict fits an optimizer, said before anything is loaded. Nothing collective.

Tests: ``tests/checks/test_arguments.py``.
"""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dpoptim.step.facts import FACTS, NUMBERS

__all__ = ["check_loadable"]


# Hyper-parameters that torch has added to optimizers, so that older states lack them; it fills them in.
_ADDED_LATER = {"foreach", "fused", "maximize", "capturable", "differentiable", "decoupled_weight_decay"}
_NO_HYPER_PARAMETERS = {"params", "param_names", "self", "initial_lr"}


def check_loadable(optimizer: Optimizer, state_dict: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise ``ValueError`` that says what differs unless a state dict is one of such an optimizer. Local.

    Parameters
    ----------
    optimizer : Optimizer
        The one that is to load it; not changed.
    state_dict : mapping
        In torch's form: ``state`` and ``param_groups``.
    names : sequence of str
        A name for each parameter of the optimizer.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(
                f"the state dict of an optimizer must have '{key}', got only {sorted(map(str, state_dict))}"
            )
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if len(groups) != len(saved_groups):
        raise ValueError(
            f"the state dict must have {len(groups)} parameter groups, as the optimizer has, got {len(saved_groups)}"
        )
    for number, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                f"parameter group {number} must have {len(group['params'])} parameters in the state dict, as in the "
                f"optimizer, got {len(saved['params'])}"
            )
    torch_class = _torch_class(optimizer)
    if torch_class is None:
        return  # nobody else's state is known here
    for number, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        _check_hyper_parameters(torch_class, number, group, saved)
    parameters = [parameter for group in groups for parameter in group["params"]]
    keys = [key for saved in saved_groups for key in saved["params"]]
    for parameter, key, name in zip(parameters, keys, names, strict=True):
        entry = state_dict["state"].get(key)
        if entry:
            _check_state(torch_class, parameter, name, entry)


def _check_hyper_parameters(
    torch_class: type[Optimizer], number: int, group: Mapping[str, Any], saved: Mapping[str, Any]
) -> None:
    own = _hyper_parameters(torch_class)
    lacking = sorted((own & group.keys()) - saved.keys() - _ADDED_LATER)
    foreign = sorted((saved.keys() & _all_hyper_parameters()) - own - group.keys())
    if lacking or foreign:
        what = [f"has no {', '.join(lacking)}"] * bool(lacking) + [f"has {', '.join(foreign)}"] * bool(foreign)
        raise ValueError(
            f"the state dict must be one of {torch_class.__name__}, got one of another optimizer: its parameter group "
            f"{number} {' and '.join(what)}"
        )


def _check_state(torch_class: type[Optimizer], parameter: Tensor, name: str, entry: Mapping[str, Any]) -> None:
    kind = torch_class.__name__
    always, sometimes = FACTS[kind].keeps, FACTS[kind].may_keep
    if always is None:
        return  # LBFGS keeps a history in vectors of all parameters
    # What is no torch optimizer's was added by a wrapper of somebody else, such as a slow average.
    if not always <= entry.keys() or entry.keys() & _all_state_keys() - always - sometimes:
        expected = ", ".join(sorted(always)) or "nothing"
        optional = f" (or also {', '.join(sorted(sometimes))})" if sometimes else ""
        raise ValueError(
            f"the state of parameter '{name}' must hold {expected}{optional}, as that of {kind}, got "
            f"{', '.join(map(str, entry))}: the state dict is one of another optimizer"
        )
    for key, value in entry.items():
        expected_shape = _state_shape(key, parameter)
        if key in always | sometimes and isinstance(value, Tensor) and value.shape != expected_shape:
            raise ValueError(
                f"'{key}' of parameter '{name}' must have shape {tuple(expected_shape)} in the state dict, got "
                f"{tuple(value.shape)}: the parameter itself has shape {tuple(parameter.shape)}"
            )


@functools.cache
def _all_state_keys() -> frozenset[str]:
    return frozenset[str]().union(*((facts.keeps or frozenset()) | facts.may_keep for facts in FACTS.values()))


def _state_shape(key: str, parameter: Tensor) -> torch.Size:
    if key in NUMBERS:
        return torch.Size([])
    shape = list(parameter.shape)
    if key == "row_var":
        shape[-1] = 1
    elif key == "col_var":
        shape[-2] = 1
    return torch.Size(shape)


def _torch_class(optimizer: Optimizer) -> type[Optimizer] | None:
    """Return the class of ``torch.optim`` that an optimizer is of, if it is of one."""
    known: list[type[Optimizer]] = [getattr(torch.optim, name) for name in FACTS if hasattr(torch.optim, name)]
    return next((kind for kind in type(optimizer).__mro__ if kind in known), None)


def _hyper_parameters(torch_class: type[Optimizer]) -> set[str]:
    return set(inspect.signature(torch_class.__init__).parameters) - _NO_HYPER_PARAMETERS


@functools.cache
def _all_hyper_parameters() -> frozenset[str]:
    return frozenset[str]().union(
        *(_hyper_parameters(getattr(torch.optim, name)) for name in FACTS if hasattr(torch.optim, name))
    )
