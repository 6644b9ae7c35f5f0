"""The names of ``heat.optim.utils``.

Tests: ``tests/heat/test_heat.py``.
"""

from dpoptim.utils.plateau import DetectMetricPlateau

__all__ = ["DetectMetricPlateau"]
