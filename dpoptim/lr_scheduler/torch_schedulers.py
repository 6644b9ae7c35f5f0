"""torch's schedulers, which have ``print_lr`` besides.

Tests: ``tests/lr_scheduler/test_schedulers.py``.
"""

from typing import TYPE_CHECKING

import torch.optim.lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from dpoptim.lr_scheduler.print_lr import PrintsLR

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import (
        ChainedScheduler,
        ConstantLR,
        CosineAnnealingLR,
        CosineAnnealingWarmRestarts,
        CyclicLR,
        ExponentialLR,
        LambdaLR,
        LinearLR,
        MultiplicativeLR,
        MultiStepLR,
        OneCycleLR,
        PolynomialLR,
        SequentialLR,
        StepLR,
    )

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
    "MultiStepLR",
    "MultiplicativeLR",
    "OneCycleLR",
    "PolynomialLR",
    "SequentialLR",
    "StepLR",
]


def _printing(torch_class: type[LRScheduler]) -> type[LRScheduler]:
    """Derive a class that has ``print_lr`` besides, and is torch's in all else."""
    members = {"__doc__": torch_class.__doc__, "__module__": __name__}
    return type(torch_class.__name__, (PrintsLR, torch_class), members)


if not TYPE_CHECKING:
    for _name in torch.optim.lr_scheduler.__all__:  # a newer torch's as well
        # What all have in common stays torch's own, for isinstance(); reduce_on_plateau.py has a step of its own.
        if _name not in ("LRScheduler", "ReduceLROnPlateau"):
            globals()[_name] = _printing(getattr(torch.optim.lr_scheduler, _name))
    __all__ += [name for name in torch.optim.lr_scheduler.__all__ if name in globals() and name not in __all__]
