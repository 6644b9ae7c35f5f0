"""The error that everything here raises."""

__all__ = ["CheckpointError"]


class CheckpointError(RuntimeError):
    """A checkpoint can't be written, or read, or doesn't fit the program; raised on every rank."""
