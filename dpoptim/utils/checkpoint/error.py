"""The error that everything here raises.

Tests: ``tests/utils/test_checkpoint_damage.py``.
"""

__all__ = ["CheckpointError"]


class CheckpointError(RuntimeError):
    """A checkpoint can't be written, or read, or doesn't fit the program; raised on every rank."""
