"""Every optimizer of ``torch.optim`` under its own name, with the fastest implementation that the device has.

torch implements a step up to three times: *fused* (one kernel for all parameters), *foreach* (one kernel for each
operation on all parameters) and a loop over parameters. On CPU it takes the loop unless told otherwise, at 4 to 7
times the time of the fused step. The classes here are subclasses of torch's, with the same arguments, state and
``state_dict``; they differ only where the caller names neither ``fused`` nor ``foreach``.

Note [Choosing the implementation]
----------------------------------
Fused where torch has a fused kernel of the optimizer for the device and dtype of every parameter; else foreach, for
which torch's own default needs a GPU. Neither supports ``differentiable``; fused takes no tensor ``betas``, and foreach
takes a tensor ``lr`` only if ``capturable``. A sparse gradient, known only when it comes, needs the loop: the group
falls back then. A loaded ``state_dict`` whose groups name none (torch saves ``None``) is chosen for again.
"""

import inspect
from collections.abc import Container
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

if TYPE_CHECKING:
    from torch.optim import (
        ASGD,
        LBFGS,
        SGD,
        Adadelta,
        Adafactor,
        Adagrad,
        Adam,
        Adamax,
        AdamW,
        Muon,
        NAdam,
        RAdam,
        RMSprop,
        Rprop,
        SparseAdam,
    )

__all__ = [
    "ASGD",
    "LBFGS",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SparseAdam",
    "implementation",
]


def implementation(optimizer: torch.optim.Optimizer, group: int = 0) -> str:
    """Say how a parameter group is stepped: ``"fused"``, ``"foreach"`` or ``"for-loop"``."""
    options = optimizer.param_groups[group]
    if options.get("fused"):
        return "fused"
    if options.get("foreach"):
        return "foreach"
    return "for-loop"


def _choose(options: dict[str, Any], accepted: Container[str], fused_devices: Container[str]) -> bool:
    """Choose for a parameter group that names neither; return whether fused was chosen now."""
    if options.get("fused") is not None or options.get("foreach") is not None or options.get("differentiable"):
        return False
    parameters: list[Tensor] = options["params"]
    tensor_betas = any(isinstance(beta, Tensor) for beta in options.get("betas", ()))
    tensor_options = tensor_betas or isinstance(options["lr"], Tensor)
    if (
        "fused" in accepted
        and not tensor_betas
        and all(p.device.type in fused_devices and p.is_floating_point() for p in parameters)
    ):
        options["fused"] = True
        return True
    if "foreach" in accepted and (options.get("capturable") or not tensor_options):
        options["foreach"] = True
    return False


def _fastest(torch_class: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Derive a class that differs from torch's in the choice of implementation alone."""
    name = torch_class.__name__
    accepted = inspect.signature(torch_class.__init__).parameters.keys() & {"fused", "foreach"}
    fused_devices = set(_get_fused_kernels_supported_devices()) - _NO_FUSED_KERNEL.get(name, set())

    def add_param_group(self: Any, param_group: dict[str, Any]) -> None:
        torch_class.add_param_group(self, param_group)
        if _choose(self.param_groups[-1], accepted, fused_devices):
            self._need_device_dtype_check_for_fused = True

    def set_state(self: Any, state: dict[str, Any]) -> None:
        torch_class.__setstate__(self, state)
        for options in self.param_groups:
            if not _choose(options, accepted, fused_devices):
                continue
            for parameter in options["params"]:
                entry = self.state.get(parameter, {})
                if "step" in entry:  # the fused kernels want it in float32 beside the parameter
                    entry["step"] = entry["step"].to(parameter.device, torch.float32)

    def init_group(self: Any, group: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if group.get("fused") and any(p.grad is not None and p.grad.is_sparse for p in group["params"]):
            group["fused"] = False
        return torch_class._init_group(self, group, *args, **kwargs)  # type: ignore[attr-defined]

    members: dict[str, Any] = {"__doc__": torch_class.__doc__, "__module__": __name__}
    if accepted:
        members |= {"add_param_group": add_param_group, "__setstate__": set_state}
    if name in _LOOP_TAKES_SPARSE:
        members["_init_group"] = init_group
    return type(name, (torch_class,), members)


# Devices on which torch has fused kernels, but not of this optimizer.
_NO_FUSED_KERNEL = {"Adagrad": {"cuda"}}
# Of the optimizers with a fused kernel, those whose loop takes sparse gradients.
_LOOP_TAKES_SPARSE = ("SGD", "Adagrad")

if not TYPE_CHECKING:
    for _name in __all__[:-1]:
        if hasattr(torch.optim, _name):  # Muon is new in torch 2.9
            globals()[_name] = _fastest(getattr(torch.optim, _name))
    __all__ = [name for name in __all__ if name in globals()]
