"""Names that a module has not and lets another one give: what the next torch adds, and what few ask for.

Tests: ``tests/test_package.py``.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

__all__ = ["fall_through"]


def fall_through(module: str, other: ModuleType) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` for a module that stands in for another one. Local.

    A name that the module has is its own. Other names are those of ``other``, public or with one underscore; not those
    with two, and not the modules that ``other`` happens to import, unless its ``__all__`` names them: a submodule of
    ours is never taken for one of the same name there. ``dir()`` lists what ``other`` has in ``__all__`` besides.

    Parameters
    ----------
    module : str
        The ``__name__`` of the module.
    other : module
        What it stands in for.
    """
    offered = frozenset(other.__all__)

    def get_name(name: str) -> Any:
        if name in offered or not name.startswith("__"):
            value = getattr(other, name, None)
            if value is not None and (name in offered or not isinstance(value, ModuleType)):
                return value
        raise AttributeError(
            f"module {module!r} has no attribute {name!r}, nor has {other.__name__!r} one to offer",
            name=name,
            obj=sys.modules[module],
        )

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[module]), *offered})

    return get_name, list_names
