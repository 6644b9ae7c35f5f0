"""Implementations: which of torch's implementations of a step is right for a tensor, and the fastest of them.

Note [What is left to torch]
----------------------------
The loop over parameters is right whatever it is given, and torch's default on CPU. The other ways are taken only where
they give the same to rounding:

- The kernels go through memory element by element: parameter and state must be dense and in one order. (A gradient in
  another order is copied.)
- They, and blocks, take every tensor for memory of its own: parameters that are twice in the lists, or share memory
  with another one, are stepped one after another.
- They want all tensors of one dtype. On CPU they round 16 bits only at the end of a step, which gives other numbers
  than the loop: these go into blocks, which the loop steps. So do those with a rate that is a tensor, in whose
  precision the loop reckons.
- torch's fused SGD wants momentum for all or for none: those that have none yet go into a call of their own.
- Anything that is no plain dense real tensor is left.
"""

import inspect
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dpoptim.step.facts import AS_THE_LOOP, FACTS, Choice
from dpoptim.step.step_hooks import bare_step

__all__ = ["Implementations", "sharing_memory"]


class Implementations:
    """What there is to step with for one class of ``torch.optim``.

    Parameters
    ----------
    torch_class : type
        The class.
    choose : callable
        Returns what is fastest for it on CPU.
    fused_devices : container of str
        Where torch has a fused kernel for it.

    Attributes
    ----------
    body : callable
        torch's step alone, of an optimizer or what stands for one.
    num_lists : int
        How many lists ``_init_group`` fills.
    is_linear : bool
        Whether it moves a parameter by ``lr`` times something that does not depend on it.
    common_names, own_names : tuple of str
        The hyper-parameters that must be equal of what is stepped by one call, and those that, if linear, need not.
    """

    def __init__(
        self, torch_class: type[torch.optim.Optimizer], choose: Callable[[], Choice], fused_devices: Container[str]
    ) -> None:
        self.body = bare_step(torch_class)
        self.num_lists = len(inspect.signature(torch_class._init_group).parameters) - 2  # type: ignore[attr-defined]
        facts = FACTS[torch_class.__name__]
        self.is_linear = facts.is_linear
        self.own_names = () if facts.reads_rate_once else ("lr", "weight_decay")
        hyper_parameters = tuple(inspect.signature(torch_class.__init__).parameters)[2:]
        common = {
            key: None for key in (*hyper_parameters, "decoupled_weight_decay") if key not in ("lr", "weight_decay")
        }
        self.common_names = tuple(common)
        self._has_fused = "fused" in self.common_names
        self._fused_devices = fused_devices
        self._choose = choose

    @property
    def choice(self) -> Choice:
        """What is fastest on CPU."""
        return self._choose()

    @staticmethod
    def are_free(group: dict[str, Any]) -> bool:
        """Whether the hyper-parameters of a group leave the choice to us."""
        if group.get("fused") is not None or group.get("foreach") is not None:
            return False
        if group.get("differentiable") or group.get("capturable"):
            return False
        numbers = (*group.get("betas", ()), group.get("weight_decay"))
        rate = group["lr"]
        return not any(isinstance(number, Tensor) for number in numbers) and (
            not isinstance(rate, Tensor) or (rate.device.type == "cpu" and not rate.requires_grad)
        )

    def way(self, parameter: Tensor, rate: object = None) -> str | None:
        """Return the fastest implementation that may be right for a parameter; None is torch's default."""
        if type(parameter) not in _PLAIN_TYPES or parameter.layout != torch.strided:
            return None
        if not parameter.is_floating_point() or not parameter.numel():
            return None
        if parameter.device.type != "cpu":
            is_fused = self._has_fused and parameter.device.type in self._fused_devices
            return "fused" if is_fused and not isinstance(rate, Tensor) else None
        kind = self.choice.kind
        if kind == "fused" and (isinstance(rate, Tensor) or parameter.dtype not in AS_THE_LOOP):
            return "flat"
        if kind == "for-loop" or (kind == "foreach" and parameter.dtype not in AS_THE_LOOP):
            return None
        return kind

    def way_of(self, entries: Sequence[Any], rate: object) -> str | None:
        """Return the fastest implementation that is right for a parameter, its gradient and its state."""
        parameter, gradient, *state = entries
        if type(gradient) not in _PLAIN_TYPES or gradient.layout != torch.strided:
            return None
        if gradient.shape != parameter.shape:
            return None  # torch says what is wrong
        way = self.way(parameter, rate)
        if way == "fused" and not (
            gradient.dtype == parameter.dtype
            and _is_dense(parameter)
            and all(entry is None or _is_number(entry) or _is_like(entry, parameter) for entry in state)
        ):
            return None
        if way == "foreach" and any(entry is not None and entry.dtype != parameter.dtype for entry in entries[:-1]):
            return None
        return way


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a piece of memory, in whatever order."""
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _is_number(entry: object) -> bool:
    return isinstance(entry, Tensor) and entry.dim() == 0 and entry.layout == torch.strided


def _is_like(entry: Any, parameter: Tensor) -> bool:
    return type(entry) in _PLAIN_TYPES and (
        (entry.shape, entry.dtype, entry.device, entry.layout)
        == (parameter.shape, parameter.dtype, parameter.device, parameter.layout)
        and entry.stride() == parameter.stride()
    )


def sharing_memory(lists: Iterable[Sequence[Any]]) -> set[int]:
    """Return the positions in the lists of which an entry shares memory with another one."""
    spans = []
    for entries in lists:
        for index, entry in enumerate(entries):
            if type(entry) in _PLAIN_TYPES and entry.layout == torch.strided and entry.numel():
                start = entry.data_ptr()
                reach = sum((size - 1) * stride for size, stride in zip(entry.shape, entry.stride(), strict=True))
                spans.append((start, start + (reach + 1) * entry.itemsize, index))
    spans.sort()
    shared = set()
    stop = last = 0
    for start, end, index in spans:
        if start < stop:
            shared |= {index, last}
        if end > stop:
            stop, last = end, index
    return shared
