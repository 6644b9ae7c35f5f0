"""Why N ranks do not train as one process: what the model and the loss tell.

Tests: ``tests/utils/test_verify.py``.
"""

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

__all__ = ["reasons_in_loss"]

_KINDS = (
    (_BatchNorm, "normalises with each rank's own batch in training mode"),
    ((_DropoutNd, nn.RReLU), "draws random numbers in training mode, other ones on each rank"),
)


def reasons_in_loss(
    model: nn.Module,
    *,
    losses: Sequence[float],
    joined_loss: float,
    weights: Sequence[float],
    sizes: Sequence[int],
    draws: bool,
) -> list[str]:
    """Return why the mean over ranks may not be that of the joined batch.

    Parameters
    ----------
    model : nn.Module
        With its training flags.
    losses, weights, sizes : sequence
        Of each rank, on its own batch; weights are ``batch_weight``, sizes numbers of samples.
    joined_loss : float
        On the joined batch.
    draws : bool
        Whether the loss draws random numbers.
    """
    reasons = []
    if len(losses) > 1 and abs(sum(losses) - joined_loss) <= 1e-3 * abs(joined_loss) and joined_loss:
        reasons.append(
            "the loss is a sum over samples, and the mean over ranks is smaller by the number of ranks: use a mean"
        )
    if any(weight * sizes[0] != weights[0] * size for weight, size in zip(weights, sizes, strict=True)):
        reasons.append(
            f"ranks have {_listed(sizes)} samples but batch_weight {_listed(weights)}: set opt.batch_weight to the "
            "number of samples"
        )
    for kinds, what in _KINDS:
        found = [
            (name, module) for name, module in model.named_modules() if isinstance(module, kinds) and module.training
        ]
        if found:
            names = ", ".join(f"'{name}'" for name, _ in found[:3]) + ", ..." * (len(found) > 3)
            reasons.append(f"{type(found[0][1]).__name__} {names} {what}")
    if draws and not any("random numbers" in reason for reason in reasons):
        reasons.append("the loss draws random numbers, other ones on each rank")
    return reasons


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
