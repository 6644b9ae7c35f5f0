"""Every scheduler of ``torch.optim.lr_scheduler``. All take a ``DataParallelOptimizer`` as any torch optimizer.

They are torch's own classes, except ``ReduceLROnPlateau``, which decides on the metric's mean over ranks, and
``LinearScalingLR``, which torch lacks: the linear scaling rule with gradual warm-up.
"""

from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
    StepLR,
)

from dpoptim.lr_scheduler.linear_scaling import LinearScalingLR
from dpoptim.lr_scheduler.reduce_on_plateau import ReduceLROnPlateau

__all__ = [
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "LRScheduler",
    "LambdaLR",
    "LinearLR",
    "LinearScalingLR",
    "MultiStepLR",
    "MultiplicativeLR",
    "OneCycleLR",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "SequentialLR",
    "StepLR",
]
