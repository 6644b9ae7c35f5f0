"""The names of ``heat.optim.utils``."""

from dpoptim.utils.plateau import DetectMetricPlateau

__all__ = ["DetectMetricPlateau"]
