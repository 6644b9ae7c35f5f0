"""CompiledStep: torch's step of an optimizer, compiled for the lists of tensors that it is given.

Tests: ``tests/step/test_flat_step.py``.

Note [What is compiled]
-----------------------
``torch.compile(optimizer.step)`` compiles one program for all tensors of a model: minutes for hundreds, and anew when a
parameter has no gradient. Here only the step of the lists that ``_init_group`` has filled is compiled, after small
tensors have been put together (:mod:`dpoptim.step.step_blocks`). torch's own ``step`` is run on a stand-in for the
optimizer, which hands over these lists. Its foreach and ``capturable`` code is taken, in which everything is a tensor
operation; the compiler turns it into one pass over the memory. The learning rate goes in as a tensor, since a
scheduler changes it often.
"""

import functools
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from dpoptim.step.step_hooks import bare_step

__all__ = ["CompiledStep", "StandIn", "check_compiler"]


class CompiledStep:
    """Steps lists of tensors with the compiled step of a torch optimizer. Local.

    Parameters
    ----------
    torch_class : type
        A class of ``torch.optim`` that has a foreach implementation.
    """

    def __init__(self, torch_class: type[torch.optim.Optimizer]) -> None:
        self._body = bare_step(torch_class)
        self._compiled: dict[int, Callable[..., None]] = {}

    def __call__(self, number: int, group: dict[str, Any], lists: Sequence[list[Tensor]]) -> None:
        """Make the step of group ``number`` on these lists, in place; gradients must be disabled."""
        if number not in self._compiled:
            # The compiler counts how often it compiles a piece of code, and gives up at 8: each group has its own.
            code = _step_lists.__code__.replace(co_name=f"_step_lists_{number}")
            self._compiled[number] = torch.compile(FunctionType(code, _step_lists.__globals__))
        options = {key: value for key, value in group.items() if key not in ("params", "param_names", "initial_lr")}
        lr = options.pop("lr")
        rate = lr.to(torch.float64) if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64, device="cpu")
        self._compiled[number](self._body, options, rate, lists)


def _step_lists(body: Callable[[Any], Any], options: dict[str, Any], rate: Tensor, lists: Sequence[list[Any]]) -> None:
    """Make a step; what is compiled. Uncompiled, when the compiler has given up, it is the foreach step."""
    if torch.compiler.is_compiling():
        group = {**options, "params": [], "lr": rate, "foreach": True, "capturable": True}
    else:
        group = {**options, "params": [], "lr": rate.item(), "foreach": True, "capturable": False}
    body(StandIn([group], [lists], [False], {}))  # no complex parameters


class StandIn:
    """What torch's ``step`` needs of an optimizer, with lists that are filled already.

    Parameters
    ----------
    groups : list of dict
        The hyper-parameters of each group.
    lists : sequence
        What ``_init_group`` puts into its lists, of each group.
    results : sequence
        What it returns.
    state : mapping
        Where SGD puts its momentum.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lists: Sequence[Sequence[list[Any]]], results: Sequence[Any], state: Any
    ) -> None:
        self.param_groups = groups
        self.state = state
        self._lists = lists
        self._results = results
        self._num_asked = 0

    def _init_group(self, _: dict[str, Any], *lists: list[Any]) -> Any:
        number, self._num_asked = self._num_asked, self._num_asked + 1
        for empty, full in zip(lists, self._lists[number], strict=True):
            empty.extend(full)
        return self._results[number]

    def _accelerator_graph_capture_health_check(self) -> None:
        """There is no CUDA graph here."""

    _cuda_graph_capture_health_check = _accelerator_graph_capture_health_check  # its name before torch 2.10


@functools.cache
def check_compiler() -> None:
    """Compile something small; raise ``RuntimeError`` if that does not work on this machine."""
    try:
        torch.compile(_double)(torch.ones(1 << 10))
    except Exception as error:  # whatever a missing or broken compiler leads to
        first_line = next(iter(str(error).strip().splitlines()), "")
        message = f"torch.compile must work here, but it needs a C++ compiler: {type(error).__name__}: {first_line}"
        raise RuntimeError(message) from error


def _double(x: Tensor) -> Tensor:
    return x * 2
