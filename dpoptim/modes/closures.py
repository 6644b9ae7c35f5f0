"""Closures of a step: loss and gradients are averaged within, so that every rank takes the same branch of a search."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpoptim.gradients.reducer import Reducer

__all__ = ["averaged"]


def averaged(closure: Callable[[], Any], reducer: Reducer, mean: Callable[[float], float]) -> Callable[[], Any]:
    """Return a closure that is collective, and blocks: it returns the mean loss, as a tensor if it was one.

    Parameters
    ----------
    closure : callable
        The user's: clears gradients, computes the loss, calls ``backward()``, returns the loss.
    reducer : Reducer
        Of its gradients.
    mean : callable
        Returns a number averaged over ranks; collective.
    """

    def averaged_closure() -> Any:
        with torch.enable_grad():
            loss = closure()
        reducer.finish()
        own = loss.detach() if isinstance(loss, Tensor) else loss
        value = mean(float("nan") if own is None else float(own))
        reducer.expect_backward()
        if own is None:
            return None
        return own.new_tensor(value) if isinstance(own, Tensor) else value

    return averaged_closure
