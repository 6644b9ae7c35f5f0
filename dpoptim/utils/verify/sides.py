"""The ways to make one step that are compared.

Tests: ``tests/utils/test_verify.py``.

Note [Three ways to make one step]
----------------------------------
*The wrapper's*: another wrapper, in the same mode and with the same options, around a copy of the optimizer, for a copy
of the model. *One process*: copies without a wrapper, on the batch of all ranks. Where these two differ by more than
rounding, a third tells why. *The ranks' mean*: one process that is given the mean of what each rank computes on its own
batch. If the wrapper agrees with this one, gradients travel and the step is made rightly, but the mean of the ranks'
gradients is not that of the joined batch: the loss is a sum, BatchNorm sees other batches, dropout other random
numbers. If not, the communication or the step is wrong.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpoptim.comm.communicator import Communicator
from dpoptim.utils.checkpoint.rng import get_rng, set_rng
from dpoptim.utils.verify.comparing import coarsest, largest_gradient
from dpoptim.utils.verify.copies import TrainingCopy, make_plain
from dpoptim.utils.verify.untouched import is_same

__all__ = ["BeforeStep", "LossFunction", "Plain", "Program", "Wrapped"]

LossFunction = Callable[[nn.Module, Any], Tensor]
BeforeStep = Callable[[Any], object]


@dataclass(frozen=True)
class Program:
    """What of the user's program every side does.

    Attributes
    ----------
    opt, model
        The wrapper and the model themselves.
    loss_fn, before_step, with_closure
        As of :func:`~dpoptim.utils.verify_step`.
    random_numbers, common_random_numbers : dict
        The states of this rank's generators, and of rank 0's, in which every side begins.
    on_all : callable
        Calls a local function, and raises on all ranks what it raises on one; collective.
    """

    opt: Any
    model: nn.Module
    loss_fn: LossFunction
    before_step: BeforeStep | None
    with_closure: bool
    random_numbers: dict[str, Any]
    common_random_numbers: dict[str, Any]
    on_all: Callable[[Callable[[], Any]], Any]

    @property
    def communicator(self) -> Communicator:
        """Of all ranks, for small objects."""
        communicator: Communicator = self.opt.roll_call.communicator
        return communicator

    @property
    def num_batches(self) -> int:
        """How many batches the wrapper accumulates."""
        return int(self.opt._arguments["accumulate"])


class _Side(ABC):
    """A copy of the model, of the optimizer, and random numbers of its own.

    Attributes
    ----------
    parameters : list of Tensor
        The optimizer's, in order.
    gradients : list of (Tensor or None)
        What the last step was made with.
    losses : list of float
        Of every forward pass.
    coarsest : torch.dtype
        The dtype whose rounding tells.
    draws : bool
        Whether the loss draws random numbers.
    """

    def __init__(self, made: TrainingCopy, program: Program, batch: Any) -> None:
        self.made = made
        self.parameters = made.parameters
        self.gradients: list[Tensor | None] = []
        self.losses: list[float] = []
        self.draws = False
        self._dtypes = {parameter.dtype for parameter in self.parameters}
        self._program = program
        self._batch = batch
        self._random_numbers = program.random_numbers
        self._noise = 0.0
        self._signs = torch.Generator().manual_seed(0)

    @property
    def coarsest(self) -> torch.dtype:
        return coarsest(self._dtypes, on_cuda=any(p.device.type == "cuda" for p in self.parameters))

    def step(self) -> None:
        """Make a step, with the random numbers of this side."""
        set_rng(self._random_numbers)
        self._step()
        self._random_numbers = get_rng()

    @abstractmethod
    def _step(self) -> None:
        """Make a step in this side's way."""

    def _loss(self) -> Tensor:
        before = get_rng()
        loss = self._program.loss_fn(self.made.model, self._batch)
        self.draws = self.draws or not is_same(before, get_rng())
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            got = type(loss).__name__
            if isinstance(loss, Tensor):
                got = f"one of shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}"
            raise TypeError(f"loss_fn(model, batch) must return a tensor of one element that requires grad, got {got}")
        if not self.losses:
            leaves, dtypes = _leaves_and_dtypes(loss)
            _refuse_others(leaves, self.made.model, self._program.model)
            self._dtypes |= dtypes
        self.losses.append(float(loss.detach()))
        return loss

    def _ready(self, optimizer: Any) -> None:
        """Note the gradients that the step is to be made with, and let the user do something to them."""
        self.gradients = [None if p.grad is None else p.grad.detach().clone() for p in self.parameters]
        if self._noise:
            self._add_noise()
        if self._program.before_step is not None:
            self._program.before_step(optimizer)

    def _add_noise(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()
        size = self._noise * largest_gradient(parameter.grad for parameter in self.parameters)
        for parameter in self.parameters:
            if parameter.grad is not None:
                gradient = parameter.grad.detach()
                values = gradient._values() if gradient.is_sparse else gradient
                signs = torch.randint(0, 2, values.shape, generator=self._signs).mul_(2).sub_(1)
                values.add_(signs.to(values.device, values.dtype), alpha=size)


class Wrapped(_Side):
    """Steps of a wrapper like the user's. Construction and ``step`` are collective."""

    def __init__(self, made: TrainingCopy, program: Program, batch: Any) -> None:
        super().__init__(made, program, batch)
        set_rng(program.random_numbers)
        self.optimizer = program.opt._wrap_alike(made.optimizer)
        self.optimizer.batch_weight = program.opt.batch_weight
        made.add_late_hooks()
        if not program.with_closure:
            self.optimizer.register_step_pre_hook(lambda optimizer, *_: self._ready(optimizer))

    def _step(self) -> None:
        if self._program.with_closure:
            self.optimizer.step(self._closure)
            return
        for _ in range(self._program.num_batches):
            self._backward()
            self.optimizer.step()

    def _closure(self) -> Tensor:
        loss = self._backward()
        self._ready(self.optimizer)
        return loss

    def _backward(self) -> Tensor:
        self.optimizer.zero_grad()
        loss: Tensor = self._program.on_all(self._loss)
        loss.backward()
        return loss

    def own(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return of each parameter's gradient what this rank has of the mean; None where that can't be told. Local."""
        if self.optimizer.mode == "replicated":
            return list(gradients)
        slices = self.optimizer.local_slices().values()
        return [
            gradient.flatten()[start:stop]
            if gradient is not None
            and not gradient.is_sparse
            and parameter.is_contiguous()
            and gradient.is_contiguous()
            else None
            for parameter, gradient, (start, stop) in zip(self.parameters, gradients, slices, strict=True)
        ]


class Plain(_Side):
    """Steps of one process.

    Parameters
    ----------
    made, program, batch
        As of every side.
    noise : float
        Relative to the largest gradient, what is added to or taken from every element.
    averaged : bool
        Whether to take the mean of the ranks' gradients and losses (Note [Three ways to make one step]): ``step`` is
        collective then.
    """

    def __init__(
        self, made: TrainingCopy, program: Program, batch: Any, *, noise: float = 0.0, averaged: bool = False
    ) -> None:
        super().__init__(made, program, batch)
        make_plain(made.optimizer)
        made.add_late_hooks()
        vars(made.optimizer)["clip_grad_norm_"] = self._clip_grad_norm
        self.step_draws = False
        self._noise = noise
        self._averaged = averaged
        self._random_numbers_of_step = program.common_random_numbers

    def _step(self) -> None:
        optimizer = self.made.optimizer
        step: Any = type(optimizer).step
        step = step.__wrapped__ if getattr(step, "hooked", False) else step  # beneath hooks
        if self._program.with_closure:
            step(optimizer, self._backward)
            return
        self._backward()
        # All ranks draw the same in the step of an optimizer that draws random numbers; the wrapper sees to that.
        outside = get_rng()
        set_rng(self._random_numbers_of_step)
        step(optimizer)
        after = get_rng()
        self.step_draws = not is_same(self._random_numbers_of_step, after)
        self._random_numbers_of_step = after
        set_rng(outside)

    def _backward(self) -> Tensor:
        self.made.optimizer.zero_grad()
        num_passes = self._program.num_batches if self._averaged else 1
        for _ in range(num_passes):
            loss = self._program.on_all(self._loss) if self._averaged else self._loss()
            (loss / num_passes).backward()
        if self._averaged:
            loss = loss.new_tensor(self._average()).view_as(loss)
        self._ready(self.made.optimizer)
        result: Tensor = loss.detach()
        return result

    def _average(self) -> float:
        """Replace gradients by their mean over ranks, and return that of the losses; collective."""
        gradients = [None if p.grad is None else p.grad.detach().cpu() for p in self.parameters]
        own = (self._program.opt.batch_weight, self.losses[-1], gradients)
        everybody = self._program.communicator.all_gather_object(own)
        total = sum(weight for weight, _, _ in everybody)
        for index, parameter in enumerate(self.parameters):
            parts = [
                of_rank[index] * (weight / total) for weight, _, of_rank in everybody if of_rank[index] is not None
            ]
            parameter.grad = sum(parts[1:], parts[0]).to(parameter.device) if parts else None
        return float(sum(weight * loss for weight, loss, _ in everybody) / total)

    def _clip_grad_norm(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        return nn.utils.clip_grad_norm_(self.parameters, max_norm, norm_type, error_if_nonfinite)


def _leaves_and_dtypes(loss: Tensor) -> tuple[list[Tensor], set[torch.dtype]]:
    """Return the leaves of a graph, and the dtypes of what was computed in it."""
    leaves: list[Tensor] = []
    dtypes: set[torch.dtype] = set()
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        dtypes |= {metadata.dtype for metadata in getattr(node, "_input_metadata", ())}
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.append(variable)
        waiting += [following for following, _ in node.next_functions]
    return leaves, dtypes


def _refuse_others(leaves: Iterable[Tensor], copied: nn.Module, original: nn.Module) -> None:
    """Raise ``ValueError`` if a loss depends on parameters that are not those of the model it was given."""
    own = set(map(id, copied.parameters()))
    names = {id(parameter): name for name, parameter in original.named_parameters()}
    for leaf in leaves:
        if id(leaf) in names:
            raise ValueError(
                f"loss_fn(model, batch) must use the model that it is given, a copy, but used '{names[id(leaf)]}' of "
                "the original"
            )
        if isinstance(leaf, nn.Parameter) and id(leaf) not in own:
            raise ValueError(
                f"loss_fn(model, batch) used a parameter of shape {tuple(leaf.shape)} that is not of the model: give "
                "all modules as one (torch.nn.ModuleList), or freeze the others"
            )
