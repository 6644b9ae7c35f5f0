"""verify_step: a step of the wrapper against one of a plain process; Note [Three ways to make one step] in sides.py.

Tests: ``tests/utils/test_verify.py``.
"""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.roll_call import RollCall
from dpoptim.utils.checkpoint.rng import get_rng
from dpoptim.utils.consistency import digest, raise_together, run_together
from dpoptim.utils.verify.batches import join_batches
from dpoptim.utils.verify.comparing import (
    ROUNDING,
    Difference,
    allowed_of_parameter,
    differences,
    largest_gradient,
    what_rounding_changes,
)
from dpoptim.utils.verify.copies import TrainingCopy, is_own_hook
from dpoptim.utils.verify.reasons import reasons_in_loss
from dpoptim.utils.verify.sides import BeforeStep, LossFunction, Plain, Program, Wrapped
from dpoptim.utils.verify.untouched import Hooks, emptied, global_step_hooks, untouched
from dpoptim.utils.verify.verdict import Verdict

__all__ = ["verify_step"]

_T = TypeVar("_T")


@torch.enable_grad()
def verify_step(
    opt: Any,
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    *,
    num_steps: int = 3,
    before_step: BeforeStep | None = None,
    with_closure: bool | None = None,
) -> Verdict:
    """Compare a step of the wrapper with one of a plain process on the batch of all ranks; collective, blocks.

    Both are made on copies: afterwards model, optimizer, gradients, buffers, hooks, schedulers and the global random
    numbers are as they were, bit for bit. Call it where the program trains, before ``opt.zero_grad()``, for the first
    batch and perhaps for some others, and print the verdict on one rank. Every rank needs memory for the batch of all:
    take few ranks, or a small batch.

    Parameters
    ----------
    opt : DataParallelOptimizer
        In any mode, with the options and the ``batch_weight`` that it has.
    model : torch.nn.Module
        What it trains, with all of its parameters. Training flags count.
    loss_fn : callable
        ``loss_fn(model, batch)`` returns the loss, a mean over samples (the ranks' mean of a sum is too small by the
        number of ranks). It is called with copies of the model, with this rank's batch and with that of all ranks. What
        it does beside (printing, counting) is not undone.
    batch : Tensor, or tuples, lists and dicts of tensors
        This rank's, with the samples in dim 0 of each tensor. Ranks may have different numbers of them.
    num_steps : int
        One step does not show state that is lost on the way to the next one, so that several are made, on this batch.
    before_step : callable, optional
        What the program does between ``backward()`` and ``step()``, such as clipping: ``before_step(opt)`` is given the
        wrapper, or the plain optimizer of one process, which has a ``clip_grad_norm_`` too.
    with_closure : bool, optional
        Whether to step with a closure; by default if the optimizer demands one, such as LBFGS.

    Returns
    -------
    Verdict
        The same on all ranks. Gradients are compared as well, as far as ranks have them: Adam steps alike with
        gradients of twice the size.

    Raises
    ------
    TypeError, ValueError
        On every rank: an argument is wrong on one; the batches can't be joined; model or optimizer can't be copied.
    RuntimeError
        On every rank: one is elsewhere, or the loss or the step fails on one.

    Notes
    -----
    Differences are rounding up to 1e-5 of the largest gradient, and of a parameter's movement, if all is computed in
    float32, 1e-6 in float64, 4e-3 in float16 or TF32, 3e-2 in bfloat16 (Note [Tolerance] in comparing.py says why):
    the finer the dtype, the sharper the check. Random numbers, and BatchNorm in training mode, make N ranks differ
    from one process for good reason; the verdict names them. ``model.eval()``, for this call, tells whether all else is
    right.

    Step hooks are left out, since what they do can't be undone; the verdict says so: give ``before_step`` what they do.
    Hooks of modules and of parameters run, on the copies. Generators of your own, and what a hook or ``loss_fn`` keeps
    in variables around it, go on.
    """
    if not hasattr(opt, "local_state_dict") or hasattr(opt, "end_epoch"):
        why = " (DASO's nodes differ between exchanges, as no one process does)" * hasattr(opt, "end_epoch")
        raise TypeError(f"opt must be a DataParallelOptimizer, got {type(opt).__name__}{why}")
    roll_call: RollCall = opt.roll_call
    roll_call.check_in("verify_step", 1.0)
    raise_together(roll_call.communicator, _argument_error(opt, model, loss_fn, num_steps, before_step))
    with untouched(model), emptied(*global_step_hooks()):
        check = _Check(opt, model, loss_fn, batch, before_step, with_closure)
        try:
            verdict = check.replicas_before()
            if verdict is None:
                verdict = check.run(num_steps)
        except Exception:
            check.close(after_error=True)
            raise
        check.close()
    return verdict


@dataclass(frozen=True)
class _Spread:
    """What other rounding may change in each parameter and gradient (Note [Tolerance] in comparing.py)."""

    parameters: Sequence[Tensor | None]
    gradients: Sequence[Tensor | None]


class _Check:
    """One call of :func:`verify_step`. Every method is collective unless it says otherwise."""

    def __init__(
        self,
        opt: Any,
        model: nn.Module,
        loss_fn: LossFunction,
        batch: Any,
        before_step: BeforeStep | None,
        with_closure: bool | None,
    ) -> None:
        self._opt = opt
        self._model = model
        self._communicator: Communicator = opt.roll_call.communicator
        self._batch = batch
        self._joined, self._sizes = join_batches(self._communicator, batch)
        random_numbers = get_rng()
        self._program = Program(
            opt,
            model,
            loss_fn,
            before_step,
            needs_closure(opt.optimizer) if with_closure is None else with_closure,
            random_numbers,
            self._communicator.broadcast_object(random_numbers),
            self._on_all,
        )
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._names = [names[id(parameter)] for parameter in _parameters(opt)]
        self._wrapped: Wrapped | None = None
        self._state: Any = None
        if opt.mode != "replicated":
            with emptied(*_hooks_of(opt, "state_dict")):
                self._state = opt.full_state_dict(rank0_only=False)

    def replicas_before(self) -> Verdict | None:
        """Return what is wrong if ranks differ already."""
        name = self._first_unequal(list(self._model.named_parameters()))
        if name is None:
            return None
        note = (
            "ranks hold different values of it before the step: it was written to on some ranks, or is frozen and was "
            "never broadcast (DataParallelOptimizer(..., module=model) does)"
        )
        return self._verdict(Difference("parameter", name, float("inf"), 0.0), 1, [note])

    def run(self, num_steps: int) -> Verdict:
        """Make the steps and compare."""
        wrapped = self._wrapped = Wrapped(self._on_all(self._copy), self._program, self._batch)
        plain = self._on_all(lambda: Plain(self._copy(), self._program, self._joined))
        before = [parameter.detach().clone() for parameter in plain.parameters]
        largest = Difference("parameter", "", 0.0, 0.0)
        for step in range(1, num_steps + 1):
            self._together(f"step {step} of the wrapper", wrapped.step)
            self._together(f"step {step} of one process", plain.step)
            unequal = self._first_unequal(list(zip(self._names, wrapped.parameters, strict=True)))
            if unequal is not None:
                notes = ["ranks hold different bits of it after the step", *self._about_step(plain)]
                return self._verdict(Difference("parameter", unequal, float("inf"), 0.0), step, notes)
            worst = self._worst(wrapped, plain, before, None)
            if worst.ratio > 1:
                spread = self._together("steps that rounding changes", partial(self._spread, plain, step))
                worst = self._worst(wrapped, plain, before, spread)
                if worst.ratio > 1:
                    return self._verdict(worst, step, self._reasons(wrapped, plain, before, spread, step))
            largest = max(largest, worst, key=lambda found: found.difference)
        return self._verdict(largest, num_steps, [], equal=True)

    def close(self, *, after_error: bool = False) -> None:
        """Take down what the check has put up; after an error only if all ranks come."""
        if self._wrapped is None:
            return
        with contextlib.suppress(RuntimeError) if after_error else contextlib.nullcontext():
            self._opt.roll_call.check_in("the end of verify_step", 1.0)
            self._wrapped.optimizer.detach()

    # ---------------------------------------------------------------- how

    def _copy(self) -> TrainingCopy:
        """Copy model and optimizer, with the whole state; local."""
        made = TrainingCopy.of(self._opt, self._model)
        if self._state is not None:
            made.optimizer.load_state_dict(self._state)
        return made

    def _on_all(self, function: Callable[[], Any]) -> Any:
        """Call a local function, and raise on all ranks what it raises on one."""
        result, error = None, None
        try:
            result = function()
        except Exception as caught:
            error = caught
        raise_together(self._communicator, error)
        return result

    def _together(self, purpose: str, function: Callable[[], _T]) -> _T:
        """Call a function that may be collective, and raise on all ranks what it raises on one."""
        return run_together(self._opt.roll_call, f"verify_step, {purpose}", function)

    def _first_unequal(self, named: Sequence[tuple[str, Tensor]]) -> str | None:
        """Return the name of the first tensor that ranks hold different bits of."""
        everybody = self._communicator.all_gather_object([digest(tensor) for _, tensor in named])
        return next((name for (name, _), *row in zip(named, *everybody, strict=True) if len(set(row)) > 1), None)

    def _worst(self, wrapped: Wrapped, plain: Plain, before: Sequence[Tensor], spread: "_Spread | None") -> Difference:
        """Return what is furthest off, on any rank; a gradient rather than what a step has made of it."""
        rounding = max(ROUNDING[wrapped.coarsest], ROUNDING[plain.coarsest])
        of_gradient = torch.tensor(rounding * largest_gradient(plain.gradients), dtype=torch.float64)
        of_gradients = [of_gradient] * len(self._names)
        of_parameters = [
            allowed_of_parameter(old, new, rounding) for old, new in zip(before, plain.parameters, strict=True)
        ]
        if spread is not None:
            of_gradients = _added(of_gradients, wrapped.own(spread.gradients))
            of_parameters = _added(of_parameters, spread.parameters)
        gradients = wrapped.own(wrapped.gradients), wrapped.own(plain.gradients)
        own = max(
            (
                *differences("gradient", self._names, *gradients, of_gradients),
                *differences("parameter", self._names, wrapped.parameters, plain.parameters, of_parameters),
            ),
            key=Difference.severity,
            default=Difference("parameter", "", 0.0, 0.0),
        )
        everybody: list[Difference] = self._communicator.all_gather_object(own)
        return max(everybody, key=Difference.severity)

    def _spread(self, plain: Plain, num_steps: int) -> "_Spread":
        """Return what gradients that are rounded otherwise may change; local."""
        noise = ROUNDING[plain.coarsest]
        others = [Plain(self._copy(), self._program, self._joined, noise=sign * noise) for sign in (1, -1)]
        for other in others:
            for _ in range(num_steps):
                other.step()
        return _Spread(
            what_rounding_changes(plain.parameters, [other.parameters for other in others]),
            what_rounding_changes(plain.gradients, [other.gradients for other in others]),
        )

    def _reasons(
        self, wrapped: Wrapped, plain: Plain, before: Sequence[Tensor], spread: "_Spread", num_steps: int
    ) -> list[str]:
        """Say why the two differ."""
        mean = self._on_all(lambda: Plain(self._copy(), self._program, self._batch, averaged=True))
        for step in range(1, num_steps + 1):
            self._together(f"step {step} with the mean over ranks", mean.step)
        rest = self._worst(wrapped, mean, before, spread)
        if rest.ratio > 1 and rest.what == "gradient":
            hook = self._opt._arguments["comm_hook"]
            which = (
                "" if hook is None else f": comm_hook {getattr(hook, '__qualname__', type(hook).__name__)} may be wrong"
            )
            return [f"the wrapper's gradient is not the mean of the ranks' own gradients{which}"]
        if rest.ratio > 1:
            return self._about_step(plain)
        facts = self._communicator.all_gather_object((wrapped.losses[0], self._opt.batch_weight, wrapped.draws))
        losses, weights, draws = (list(fact) for fact in zip(*facts, strict=True))
        reasons = reasons_in_loss(
            self._model,
            losses=losses,
            joined_loss=self._communicator.broadcast_object(plain.losses[0]),
            weights=weights,
            sizes=self._sizes,
            draws=any(draws),
        )
        buffer = self._first_unequal(list(self._model.named_buffers()))
        if buffer is not None:
            reasons.append(f"buffer '{buffer}' differs between ranks (opt.average_buffers() makes it equal)")
        if not reasons:
            reasons.append(
                "the loss divides by something else than the number of samples (tokens, a mask: set opt.batch_weight "
                "to that), or compares samples of one batch with each other"
            )
        title = "the mean over ranks travels and is stepped rightly, but is not the gradient of the joined batch:"
        return [title, *(f"- {reason}" for reason in reasons)]

    def _about_step(self, plain: Plain) -> list[str]:
        kind = type(self._opt.optimizer).__name__
        notes = [f"{kind}.step() does not do in mode {self._opt.mode} what it does in one process"]
        if any(self._communicator.all_gather_object(plain.step_draws)):
            notes.append(f"{kind}.step() draws random numbers")
        return notes

    def _verdict(self, worst: Difference, step: int, notes: Sequence[str], *, equal: bool = False) -> Verdict:
        num_hooks = sum(not is_own_hook(hook) for hooks in _hooks_of(self._opt, "step") for hook in hooks.values())
        left_out = f"{num_hooks} step hook{'s' * (num_hooks > 1)} left out: give before_step what they do"
        return Verdict(
            equal,
            None if equal else worst.name,
            worst.what,
            worst.difference,
            worst.tolerance,
            step,
            self._communicator.world_size,
            self._opt.mode,
            (*notes, *[left_out] * bool(num_hooks)),
        )


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether an optimizer steps with a closure only. Local."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _argument_error(
    opt: Any, model: object, loss_fn: object, num_steps: object, before_step: object
) -> Exception | None:
    """Return what is wrong with the arguments of this rank, if anything is."""
    if not isinstance(model, nn.Module):
        return TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss_fn) or isinstance(loss_fn, nn.Module):
        kind = type(loss_fn).__name__
        return TypeError(
            f"loss_fn must be a function loss_fn(model, batch) that returns the loss, got {kind}: for example "
            "lambda model, batch: criterion(model(batch[0]), batch[1])"
        )
    if not isinstance(num_steps, int) or num_steps < 1:
        return ValueError(f"num_steps must be an integer >= 1, got {num_steps!r}")
    if before_step is not None and not callable(before_step):
        return TypeError(f"before_step must be callable, got {type(before_step).__name__}")
    known = set(map(id, model.parameters()))
    for number, parameter in enumerate(_parameters(opt)):
        if id(parameter) not in known:
            return ValueError(
                f"model must hold all parameters of the optimizer, but parameter {number} of shape "
                f"{tuple(parameter.shape)} is not in it: give all modules as one (torch.nn.ModuleList)"
            )
    return None


def _added(tolerances: Sequence[Tensor], more: Sequence[Tensor | None]) -> list[Tensor]:
    return [one if other is None else one + other for one, other in zip(tolerances, more, strict=True)]


def _parameters(opt: Any) -> list[Tensor]:
    return [parameter for group in opt.param_groups for parameter in group["params"]]


def _hooks_of(opt: Any, what: str) -> tuple[Hooks, Hooks]:
    return getattr(opt, f"_optimizer_{what}_pre_hooks"), getattr(opt, f"_optimizer_{what}_post_hooks")
