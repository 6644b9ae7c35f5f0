"""Helpers beside the optimizer."""

from dpoptim.utils import consistency

__all__ = ["consistency"]
