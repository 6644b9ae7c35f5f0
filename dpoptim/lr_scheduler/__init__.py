"""Every scheduler of ``torch.optim.lr_scheduler``. All take a ``DataParallelOptimizer`` as any torch optimizer.

They are subclasses of torch's that have ``print_lr`` besides. ``ReduceLROnPlateau`` decides on the metric's mean over
ranks, and ``LinearScalingLR``, which torch lacks, is the linear scaling rule with gradual warm-up. Other names of
``torch.optim.lr_scheduler``, such as ``_LRScheduler``, are torch's.
"""

from typing import TYPE_CHECKING

import torch.optim.lr_scheduler

from dpoptim.fall_through import fall_through
from dpoptim.lr_scheduler import torch_schedulers
from dpoptim.lr_scheduler.linear_scaling import LinearScalingLR
from dpoptim.lr_scheduler.reduce_on_plateau import ReduceLROnPlateau
from dpoptim.lr_scheduler.torch_schedulers import *  # noqa: F403  its __all__ holds every scheduler of the installed torch

if not TYPE_CHECKING:
    __getattr__, __dir__ = fall_through(__name__, torch.optim.lr_scheduler)

__all__ = [  # noqa: PLE0604
    "LinearScalingLR",
    "ReduceLROnPlateau",
    *torch_schedulers.__all__,
]
