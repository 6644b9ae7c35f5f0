"""Parts: what a reducer is made of, and has in common with what becomes of its gradients.

Tests: ``tests/gradients/test_reducer.py``.
"""

from dataclasses import dataclass

from dpoptim.gradients.backward_state import BackwardState
from dpoptim.gradients.homes import Homes
from dpoptim.gradients.parameters import Parameters
from dpoptim.gradients.plan import Plan
from dpoptim.gradients.presence import Presence
from dpoptim.gradients.sparse import SparseGradients
from dpoptim.gradients.sums import Sums

__all__ = ["Parts"]


@dataclass(frozen=True)
class Parts:
    """The parts of one reducer, each of which says what it is for; and how many batches make one mean."""

    parameters: Parameters
    plan: Plan
    presence: Presence
    sparse: SparseGradients
    homes: Homes
    backward: BackwardState
    sums: Sums
    accumulate: int
