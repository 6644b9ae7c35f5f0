"""The names of ``heat.optim.lr_scheduler``: torch's own classes, as in Heat, and those of ours that do more.

``ReduceLROnPlateau`` decides on the metric's mean over ranks, ``LinearScalingLR`` is not in torch.

Tests: ``tests/heat/test_heat.py``.
"""

from typing import TYPE_CHECKING

import torch.optim.lr_scheduler
from torch.optim.lr_scheduler import *  # noqa: F403

from dpoptim.fall_through import fall_through
from dpoptim.lr_scheduler import LinearScalingLR, ReduceLROnPlateau

if not TYPE_CHECKING:
    __getattr__, __dir__ = fall_through(__name__, torch.optim.lr_scheduler)

__all__ = ["LinearScalingLR", "ReduceLROnPlateau"]
__all__ += [name for name in torch.optim.lr_scheduler.__all__ if name not in __all__]
