"""Users: who needs a communicator that all share, and what becomes of it when nobody does. Local."""

from collections.abc import Callable

__all__ = ["Users"]


class Users:
    """The users of one communicator, counted alike on all ranks."""

    def __init__(self) -> None:
        self._num_users = 0
        self._free: Callable[[], None] | None = None
        self._told: list[Callable[[], None]] = []

    def add(self) -> None:
        """Take note of one more."""
        self._num_users += 1

    def remove(self) -> None:
        """Take note that one is gone, on all ranks alike; collective where that was the last of an orphan."""
        self._num_users -= 1
        self._free_orphan()

    def orphan(self, free: Callable[[], None]) -> None:
        """Free it as soon as it has no user, which may be now; collective then."""
        self._free = free
        self._free_orphan()

    def when_freed(self, tell: Callable[[], None]) -> None:
        """Call this before it is freed."""
        self._told.append(tell)

    def tell_freed(self) -> None:
        """Tell whoever wants to know that it is about to be freed."""
        told, self._told, self._free = self._told, [], None
        for tell in told:
            tell()

    def _free_orphan(self) -> None:
        if self._free is not None and not self._num_users:
            self._free()
