"""StepCall: parameters that are stepped by one call (Note [How a step is divided]), and what it must be given.

Nothing here decides what is stepped how: :mod:`dpoptim.step.step_plan` does.

Tests: ``tests/step/test_implementations.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor

from dpoptim.partition import picker
from dpoptim.step.compiled_step import CompiledStep, StandIn
from dpoptim.step.found import Found
from dpoptim.step.implementations import Implementations
from dpoptim.step.step_blocks import Blocks

__all__ = ["CallKey", "StepCall"]


@dataclass(frozen=True)
class CallKey:
    """What the parameters of one call have in common: hyper-parameters, implementation, and which state they have."""

    values: int  # the number of these hyper-parameters
    uses: tuple[bool, ...]
    way: str
    is_first: bool  # some of the state is made by this step
    dtype: torch.dtype | None  # if foreach


class StepCall:
    """Parameters that are stepped at once.

    Parameters
    ----------
    key : CallKey
        What they have in common.
    indices : list of int
        Which of all parameters they are.
    number_of : sequence of int
        The number of each parameter's group among those that were found.
    found : Found
        What is to be stepped.
    how : Implementations
        What there is to step with.
    compiled : CompiledStep, optional
        What steps the blocks instead of torch's loop.
    have_rates : bool
        Whether the blocks have rates of their own, since the groups of their parameters have different ones.

    Attributes
    ----------
    knows_rates : bool
        Whether the blocks have the rates that the groups have.
    """

    def __init__(
        self,
        key: CallKey,
        indices: list[int],
        number_of: Sequence[int],
        found: Found,
        how: Implementations,
        compiled: CompiledStep | None,
        *,
        have_rates: bool = False,
    ) -> None:
        self._pick = picker(indices)
        self._numbers = [number_of[index] for index in indices]
        self._uses = key.uses
        self._way = key.way
        self._how = how
        self._compiled = compiled if key.way == "flat" else None
        self._result = _nothing_special(found.results[self._numbers[0]])
        self._options: dict[str, Any] = {"params": [], "foreach": key.way == "foreach"}
        if "fused" in how.common_names:
            self._options["fused"] = key.way == "fused"
        self._have_rates = have_rates
        if have_rates:
            self._options |= {"lr": 1.0, "weight_decay": 0.0}
        self.knows_rates = False
        self._lists = lists = found.select(picker(indices), key.uses)
        used = [entries for entries in lists if entries]
        choice = how.choice
        self._blocks = Blocks(
            used,
            flat_below=0 if key.way == "foreach" else choice.flat_below,
            cut_large=key.way == "flat" and choice.cut_large and compiled is None,
            have_rates=have_rates,
        )
        self._strides = {
            index: parameter.stride() for index, parameter in enumerate(lists[0]) if not parameter.is_contiguous()
        }
        self._state = self._state_apart(lists)
        self._addresses = _addresses(self._state)

    def take(self, found: Found) -> bool:
        """Take over the lists; return False if the state, or the order of a parameter's memory, no longer fits."""
        self._lists = lists = found.select(self._pick, self._uses)
        if not self._blocks.take([entries for entries in lists if entries]):
            return False
        if self._way != "fused":
            return True
        state = self._state_apart(lists)
        return (
            all(map(is_, state, self._state))
            and _addresses(state) == self._addresses
            and all(lists[0][index].stride() == stride for index, stride in self._strides.items())
        )

    def _state_apart(self, lists: Sequence[list[Any]]) -> list[Any]:
        """Return the state that the fused kernel is given as it is."""
        if self._way != "fused":
            return []
        return [entries[index] for entries in lists[2:] if entries for index in self._blocks.whole]

    def step(self, groups: Sequence[dict[str, Any]], state: Any) -> None:
        """Step what was taken over."""
        lists, self._lists = self._lists, []
        group = groups[self._numbers[0]]
        if self._way == "fused":
            _align(lists[0], lists[1])
        if self._have_rates and not self.knows_rates:
            self.knows_rates = True
            rates, decays = ([groups[number][name] for number in self._numbers] for name in self._how.own_names)
            self._blocks.set_rates(
                rates,
                decays,
                decouples=bool(group.get("decoupled_weight_decay")),
                maximizes=bool(group.get("maximize")),
            )
        used = [entries for entries in lists if entries]
        self._blocks.load(used, state)
        try:
            if self._compiled is not None:
                self._compiled(self._numbers[0], {**group, **self._options}, lists)
            else:
                self._how.body(StandIn([{**group, **self._options}], [lists], [self._result], state))
        finally:
            self._blocks.store(state)


def _nothing_special(result: Any) -> Any:
    """Return what ``_init_group`` returns, flags for sparse or complex tensors, if there are none."""
    return tuple(False for _ in result) if isinstance(result, tuple) else False


def _align(parameters: Sequence[Tensor], gradients: list[Tensor]) -> None:
    """Give gradients the memory layout of their parameter, which torch's fused kernels take for granted.

    They step element by element in memory, whatever the strides: a contiguous gradient of a channels-last parameter
    would be applied to other elements.
    """
    if all(map(Tensor.is_contiguous, gradients)) and all(map(Tensor.is_contiguous, parameters)):
        return
    for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        if gradient.stride() != parameter.stride():
            gradients[index] = torch.empty_like(parameter).copy_(gradient)


def _addresses(entries: Sequence[Tensor | None]) -> list[int]:
    return [0 if entry is None else entry.data_ptr() for entry in entries]
