"""The linear scaling rule with gradual warm-up."""

import math
from numbers import Real

from torch import Tensor
from torch.optim import Optimizer

from dpoptim.lr_scheduler.torch_schedulers import LinearLR
from dpoptim.optimizer import DataParallelOptimizer

__all__ = ["LinearScalingLR"]


class LinearScalingLR(LinearLR):
    """Multiply every learning rate by the number of ranks, and warm up to it from the rate of one rank.

    N ranks make one step on N times the batch. Goyal et al. (2017) found that training then follows the same curve if
    the rate is N times as large (the linear scaling rule), once the first steps are made with less: the rate grows in
    equal increments from the unscaled to the scaled one (gradual warm-up). Construct the optimizer with the rates that
    are right for one rank, then this scheduler *before any other*, and call ``step()`` once for each step of the
    optimizer; other schedulers anneal from the scaled rate. Local, equal on all ranks if they give equal arguments.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Usually a :class:`~dpoptim.DataParallelOptimizer`. All its groups are scaled; tensor rates in place.
    warmup_steps : int
        After how many calls of ``step()`` the scaled rate is reached. Goyal et al. take five epochs. 0 scales at once.
    factor : float, optional
        What to multiply by, >= 1; by default the number of ranks of the ``DataParallelOptimizer``. Give it if the
        batch of one rank is not the one the rates were tuned for, or gradients are accumulated:
        ``factor = num_samples_per_step / num_samples_tuned_for``.
    last_epoch : int
        As in torch: -1 starts. Any other value resumes an optimizer whose rates and ``initial_lr`` were scaled before
        and loaded, and scales nothing.

    Attributes
    ----------
    factor : float
        What the rates were multiplied by. Schedulers that take rates as arguments (``OneCycleLR``, ``CyclicLR``,
        ``SWALR``, a minimum) want them multiplied by hand.

    Raises
    ------
    TypeError
        ``optimizer`` is no ``torch.optim.Optimizer``; ``warmup_steps`` is no int; ``factor`` is no number.
    ValueError
        ``warmup_steps < 0``; ``factor`` below 1, infinite or NaN, or missing where no number of ranks is known; another
        scheduler was there first, or a state was loaded before. Nothing is changed then.

    Notes
    -----
    It is torch's ``LinearLR`` from ``1 / factor`` to 1 on rates scaled before, so it combines as that does. To resume,
    construct optimizer and scheduler as at the start, then load both states. Rates that were saved stay as they are
    on another number of ranks.

    The momentum correction of the paper's section 3 is not needed: ``torch.optim.SGD`` keeps the learning rate out
    of its momentum buffer.

    References
    ----------
    Goyal et al., Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour, 2017, arXiv:1706.02677.

    Examples
    --------
    Warm up for 500 steps, then anneal from the scaled rate for 9500::

        opt = dpoptim.DataParallelOptimizer(dpoptim.SGD(model.named_parameters(), lr=0.1, momentum=0.9))
        warmup = dpoptim.lr_scheduler.LinearScalingLR(opt, warmup_steps=500)
        cosine = dpoptim.lr_scheduler.CosineAnnealingLR(opt, T_max=9500)
        scheduler = dpoptim.lr_scheduler.SequentialLR(opt, [warmup, cosine], milestones=[500])
    """

    def __init__(
        self, optimizer: Optimizer, *, warmup_steps: int, factor: float | None = None, last_epoch: int = -1
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if not isinstance(warmup_steps, int) or isinstance(warmup_steps, bool):
            raise TypeError(f"warmup_steps must be an int, got {warmup_steps!r}")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be >= 0, got {warmup_steps}")
        self.factor = _checked_factor(optimizer, factor)
        if last_epoch == -1:
            _scale(optimizer, self.factor)
        # LinearLR divides by its number of steps.
        start_factor = 1 / self.factor if warmup_steps else 1.0
        super().__init__(optimizer, start_factor, 1.0, max(1, warmup_steps), last_epoch)


def _checked_factor(optimizer: Optimizer, factor: float | None) -> float:
    if factor is None:
        if not isinstance(optimizer, DataParallelOptimizer):
            raise ValueError(
                f"factor must be given for an optimizer that knows no number of ranks, got None for "
                f"{type(optimizer).__name__}: pass factor=, or a DataParallelOptimizer"
            )
        return float(optimizer.communicator.world_size)
    if not isinstance(factor, Real) or isinstance(factor, bool):
        raise TypeError(f"factor must be a number or None, got {factor!r}")
    if not 1 <= factor < math.inf:
        raise ValueError(f"factor must be >= 1 and finite, got {factor}: for smaller batches lower lr itself")
    return float(factor)


def _scale(optimizer: Optimizer, factor: float) -> None:
    for number, group in enumerate(optimizer.param_groups):
        if "initial_lr" in group:
            raise ValueError(
                f"parameter group {number} must not have an initial_lr yet, got {float(group['initial_lr']):g}: "
                "construct LinearScalingLR before any other scheduler and before loading a state_dict"
            )
    scaled = [float(group["lr"]) * factor for group in optimizer.param_groups]  # groups may share one tensor
    for group, lr in zip(optimizer.param_groups, scaled, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
