"""Facts: what is known of each optimizer of ``torch.optim``, a row each; a new one is a new row.

A class that has no row is stepped by torch, divided by whole parameter, and its states are not compared.

Tests: ``tests/behaviour/test_torch_sweep.py``.
"""

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["AS_THE_LOOP", "FACTS", "NUMBERS", "Choice", "Facts"]

# What optimizers count for a parameter as a whole, rather than for its elements.
NUMBERS = frozenset({"step", "eta", "mu", "mu_product"})

# On CPU the fused and foreach steps of other dtypes round otherwise than the loop.
AS_THE_LOOP = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Choice:
    """The fastest implementation of an optimizer on a kind of device.

    Attributes
    ----------
    kind : str
        ``"fused"``, ``"foreach"``, ``"flat"`` or ``"for-loop"``.
    flat_below : int
        If fused or flat, parameters with fewer elements are stepped together; see :mod:`dpoptim.step.step_blocks`.
    cut_large : bool
        If flat, whether large parameters are stepped in parts.
    foreach_below : int, optional
        If foreach, only for parameters that have fewer elements in the mean; the loop for others.
    """

    kind: str
    flat_below: int = 0
    cut_large: bool = False
    foreach_below: int | None = None


@dataclass(frozen=True)
class Facts:
    """What is known of one optimizer.

    Attributes
    ----------
    on_cpu : Choice
        What is fastest on CPU, measured with ``benchmarks/optimizers.py``.
    keeps : frozenset of str, optional
        The state of a parameter after a step; None if there is no state of each parameter.
    may_keep : frozenset of str
        What some options add to it.
    is_elementwise : bool
        Whether each element is stepped by itself, so that parameters may be cut.
    why_not : str
        If its step can't be sharded among ranks at all: why, as the rest of a sentence about the class.
    is_linear : bool
        Whether it moves a parameter by ``lr`` times something that does not depend on it.
    reads_rate_once : bool
        Whether it reads ``lr`` when state is made, and no more.
    is_fused_bare : bool
        Whether the fused step of flat tensors needs nothing but torch's own code.
    not_fused_on : frozenset of str
        Devices on which torch has fused kernels, but not of this optimizer.
    takes : str
        The parameters or gradients that it takes: ``"any"``, ``"matrices"`` or ``"sparse"``.
    """

    on_cpu: Choice
    keeps: frozenset[str] | None
    may_keep: frozenset[str] = frozenset()
    is_elementwise: bool = False
    why_not: str = ""
    is_linear: bool = False
    reads_rate_once: bool = False
    is_fused_bare: bool = False
    not_fused_on: frozenset[str] = frozenset()
    takes: str = "any"


_FUSED = Choice("fused")  # SGD: a step without momentum costs less than copies
_FUSED_FLAT = Choice("fused", flat_below=512)
_FLAT = Choice("flat", flat_below=4096, cut_large=True)
_FLAT_WHOLE = Choice("flat", flat_below=4096)  # ASGD: few operations, so that parts cost more than they save
_FOREACH = Choice("foreach", foreach_below=16384)
_LOOP = Choice("for-loop")


def _row(on_cpu: Choice, keeps: str | None, may_keep: str = "", **others: Any) -> Facts:
    kept = None if keeps is None else frozenset(keeps.split())
    return Facts(on_cpu, kept, frozenset(may_keep.split()), **others)


def _elementwise(on_cpu: Choice, keeps: str, may_keep: str = "", **others: Any) -> Facts:
    return _row(on_cpu, keeps, may_keep, is_elementwise=True, **others)


_ADAM = _elementwise(_FUSED_FLAT, "step exp_avg exp_avg_sq", "max_exp_avg_sq", is_linear=True, is_fused_bare=True)

FACTS: dict[str, Facts] = {
    "ASGD": _elementwise(_FLAT_WHOLE, "step eta mu ax"),
    "Adadelta": _elementwise(_FLAT, "step square_avg acc_delta", is_linear=True),
    "Adafactor": _row(_FOREACH, "step", "row_var col_var variance"),
    "Adagrad": _elementwise(_FUSED_FLAT, "step sum", is_linear=True, not_fused_on=frozenset({"cuda"})),
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "Adamax": _elementwise(_FLAT, "step exp_avg exp_inf", is_linear=True),
    "LBFGS": _row(_LOOP, None, why_not="needs a closure"),
    "Muon": _row(_LOOP, "momentum_buffer", takes="matrices"),
    "NAdam": _elementwise(_FLAT, "step exp_avg exp_avg_sq mu_product", is_linear=True),
    "RAdam": _elementwise(_FLAT, "step exp_avg exp_avg_sq", is_linear=True),
    "RMSprop": _elementwise(_FLAT, "step square_avg", "momentum_buffer grad_avg", is_linear=True),
    "Rprop": _elementwise(_FLAT, "step prev step_size", reads_rate_once=True),
    "SGD": _elementwise(_FUSED, "", "momentum_buffer", is_linear=True, is_fused_bare=True),
    "SparseAdam": _row(_LOOP, "step exp_avg exp_avg_sq", why_not="takes sparse gradients", takes="sparse"),
}
