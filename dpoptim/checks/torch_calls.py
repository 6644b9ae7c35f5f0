"""torch's own functions that read the gradients of many parameters at once, where ranks have parts of them.

Note [Functions of torch]
-------------------------
Programs, and frameworks around them, call ``torch.nn.utils.clip_grad_norm_`` and ``GradScaler.unscale_`` on a model's
parameters. With a sharded step each rank would see another norm. When the first optimizer of several ranks is made,
functions of torch are replaced by ones that ask first whose gradients they are given. The total norm becomes the global
one (collective, as ``opt.clip_grad_norm_``), and infinities are looked for without canaries (Note [Canaries] in
canaries.py). A rank that has no gradient in a step first joins the reduction in which the others wait for it. An
embedding's ``max_norm`` renormalises the rows of the rank's own batch in forward: it raises for a weight that several
ranks train. All else goes to torch's own code.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad
from torch.optim import Optimizer

from dpoptim.checks.layers import renormalisation_error
from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.gradients.reducer import Reducer
from dpoptim.step.classes import parameters_of

__all__ = ["Answers", "forget", "make_known"]


class Answers:
    """Answers for one optimizer of several ranks what torch's functions ask.

    Parameters
    ----------
    optimizer : Optimizer
        The wrapper, whom callers of torch's functions know.
    reducer : Reducer
        Of its gradients.
    partial_norm : callable
        Given gradients of which each rank has a part, and the order of the norm, returns their global norm in float64;
        collective.
    """

    def __init__(
        self, optimizer: Optimizer, reducer: Reducer, partial_norm: Callable[[Sequence[Tensor], float], Tensor]
    ) -> None:
        self.optimizer = optimizer
        self.partial_norm = partial_norm
        self._reducer = reducer

    @property
    def number(self) -> int:
        """Which optimizer on these ranks it is, in the order in which they were made."""
        return self._reducer.number

    def own_gradients_among(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return those of these gradients of which each rank has a part; local."""
        own = {id(parameter.grad) for parameter in parameters_of(self.optimizer) if parameter.grad is not None}
        return [
            gradient for gradient in gradients if id(gradient) in own and self._reducer.gradients.is_partial(gradient)
        ]

    def join_reduction(self, parameters: Sequence[Tensor]) -> None:
        """Join a reduction for which this rank had no gradient, if it is one of some of these parameters."""
        own = map(id, parameters_of(self.optimizer))
        if self._reducer.waits_for_gradients and not set(map(id, parameters)).isdisjoint(own):
            self._reducer.finish()

    def trains(self, parameter: Tensor) -> bool:
        """Whether this is one of its parameters; local."""
        return any(own is parameter for own in parameters_of(self.optimizer))

    def while_infinities_are_sought(self) -> AbstractContextManager[None]:
        """Let gradients have no infinite element within that was not computed; they are reduced before."""
        self._reducer.finish()
        return self._reducer.gradients.without_marks()


_known: WeakSet[Answers] = WeakSet()


def make_known(answers: Answers) -> None:
    """Let torch's functions ask for an optimizer of several ranks (Note [Functions of torch]).

    They do as long as somebody else, such as the optimizer, keeps the answers.
    """
    if not _known:
        _replace(clip_grad, "_get_total_norm", _with_global_norm)
        _replace(torch.amp.GradScaler, "_unscale_grads_", _with_whole_gradients)
        for module in (clip_grad, torch.nn.utils):
            _replace(module, "get_total_norm", _with_global_norm)
        _replace(functional, "_no_grad_embedding_renorm_", _of_own_weights)
    _known.add(answers)


def forget(answers: Answers) -> None:
    """Treat an optimizer as one of a single rank again."""
    _known.discard(answers)


def _replace(holder: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    function = getattr(holder, name, None)
    if function is not None and not getattr(function, "_knows_parts", False):
        wrapper: Any = functools.wraps(function)(around(function))
        wrapper._knows_parts = True
        setattr(holder, name, wrapper)


def _in_order() -> list[Answers]:
    """Return those of all optimizers in the order in which they were made, which is the same on all ranks."""
    return sorted(_known, key=lambda answers: answers.number)


def _with_global_norm(total_norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def get_total_norm(
        tensors: Tensor | Iterable[Tensor],
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> Tensor:
        rest = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        if not rest:
            # The others have gradients perhaps, of the parameters that torch's function was called with.
            parameters = sys._getframe(1).f_locals.get("parameters")
            parameters = parameters if isinstance(parameters, list) else []
            for answers in _in_order():
                answers.join_reduction(parameters)
            rest = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms, dtype, device = [], None, None
        for answers in _in_order():
            own = answers.own_gradients_among(rest)
            if own:
                dtype, device = own[0].dtype.to_real(), own[0].device
                norms.append(answers.partial_norm(own, float(norm_type)))
                taken = set(map(id, own))
                rest = [gradient for gradient in rest if id(gradient) not in taken]
        if not norms:
            return total_norm(rest, norm_type, error_if_nonfinite, foreach)
        if rest:
            norms.append(total_norm(rest, norm_type, False, foreach).to("cpu", torch.float64))
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms), float(norm_type))
        if error_if_nonfinite and not torch.isfinite(total):
            message = f"the total norm of order {norm_type} of the gradients is {total}, so it can't be clipped"
            raise raised_on_all_ranks(RuntimeError(message))
        return total.to(device, dtype)

    return get_total_norm


def _with_whole_gradients(unscale: Callable[..., Any]) -> Callable[..., Any]:
    def unscale_grads(scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        answers = next((one for one in _known if one.optimizer is optimizer), None)
        if answers is None:
            return unscale(scaler, optimizer, *args, **kwargs)
        with answers.while_infinities_are_sought():
            return unscale(scaler, optimizer, *args, **kwargs)

    return unscale_grads


def _of_own_weights(renormalise: Callable[..., Any]) -> Callable[..., Any]:
    def renormalise_rows(weight: Tensor, input: Tensor, max_norm: float, norm_type: float) -> Any:  # noqa: A002  torch's
        if any(answers.trains(weight) for answers in _known):
            shape = f"a parameter of shape {tuple(weight.shape)} is the weight of an embedding"
            raise renormalisation_error(shape, max_norm, norm_type)
        return renormalise(weight, input, max_norm, norm_type)

    return renormalise_rows
