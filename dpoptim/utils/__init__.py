"""Helpers beside the optimizer."""

from dpoptim.utils import consistency, plateau
from dpoptim.utils.plateau import DetectMetricPlateau

__all__ = ["DetectMetricPlateau", "consistency", "plateau"]
