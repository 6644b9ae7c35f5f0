"""Helpers beside the optimizer."""

from dpoptim.utils import checkpoint, consistency, plateau, preemption, state_dict, verify
from dpoptim.utils.plateau import DetectMetricPlateau
from dpoptim.utils.verify import Verdict, verify_step

__all__ = [
    "DetectMetricPlateau",
    "Verdict",
    "checkpoint",
    "consistency",
    "plateau",
    "preemption",
    "state_dict",
    "verify",
    "verify_step",
]
