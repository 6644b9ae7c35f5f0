"""OuterState: the ``state`` of an optimizer while the entries of its parameters are sharded among ranks. Local.

Tests: ``tests/behaviour/test_between_steps.py``.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor

__all__ = ["OuterState"]

_ABSENT = object()


class OuterState(defaultdict[Any, Any]):
    """What a user finds in ``optimizer.state``: all but the entries of parameters, of which this rank has parts alone.

    Entries may be deleted, one by one or all, so that the state of those parameters starts anew; every rank does it.
    To read or write one is an error that says what to call instead.

    Parameters
    ----------
    forget : callable
        Forgets the state of a parameter, or with None of all.
    """

    def __init__(self, forget: Callable[[Tensor | None], None]) -> None:
        super().__init__(dict)
        self._forget = forget

    def __missing__(self, key: Any) -> Any:
        if isinstance(key, Tensor):
            _refuse()
        return super().__missing__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, Tensor):
            _refuse()
        super().__setitem__(key, value)

    def __delitem__(self, key: Any) -> None:
        if isinstance(key, Tensor):
            self._forget(key)
        else:
            super().__delitem__(key)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """Return the entry of a key that is no parameter, which is ``default`` if there is none."""
        if isinstance(key, Tensor):
            _refuse()
        return super().setdefault(key, default)

    def pop(self, key: Any, default: Any = _ABSENT) -> Any:
        """Forget an entry; that of a parameter is not returned."""
        if isinstance(key, Tensor):
            self._forget(key)
            return {} if default is _ABSENT else default
        return super().pop(key) if default is _ABSENT else super().pop(key, default)

    def clear(self) -> None:
        """Forget everything."""
        super().clear()
        self._forget(None)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take over entries of keys that are no parameters."""
        new = dict(*args, **kwargs)
        if any(isinstance(key, Tensor) for key in new):
            _refuse()
        super().update(new)


def _refuse() -> NoReturn:
    raise RuntimeError(
        "the state of this parameter is sharded among ranks: read it with full_state_dict() and write it with "
        "load_full_state_dict(), on all of them"
    )
