"""Helpers beside the optimizer."""

from dpoptim.utils import checkpoint, consistency, plateau, preemption, state_dict
from dpoptim.utils.plateau import DetectMetricPlateau

__all__ = ["DetectMetricPlateau", "checkpoint", "consistency", "plateau", "preemption", "state_dict"]
