"""The names of ``heat.optim.lr_scheduler``: every scheduler of torch, and those of :mod:`dpoptim.lr_scheduler`."""

from dpoptim import lr_scheduler
from dpoptim.lr_scheduler import *  # noqa: F403

__all__ = lr_scheduler.__all__
