"""DASO: distributed asynchronous and selective optimization, one exchange of parameters among nodes in many batches."""

from dpoptim.daso.optimizer import DASO

__all__ = ["DASO"]
