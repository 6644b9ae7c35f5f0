"""The check that Heat is here, and new enough.

Tests: ``tests/heat/test_heat.py``.
"""

import importlib
from typing import Any

__all__ = ["OLDEST", "require_heat"]

OLDEST = (1, 7)


def require_heat() -> Any:
    """Import Heat and return it; not collective, so a rank without it says so by itself.

    Raises
    ------
    ImportError
        Heat is not installed, or is older than ``OLDEST``.
    """
    oldest = ".".join(map(str, OLDEST))
    try:
        heat = importlib.import_module("heat")
    except ModuleNotFoundError as error:
        if error.name != "heat":
            raise
        raise ImportError(
            f"dpoptim.heat needs Heat >= {oldest}, which is not installed: pip install 'dpoptim[heat]', in the "
            "environment of every rank. Without Heat use dpoptim.DataParallelOptimizer and dpoptim.DASO",
            name="heat",
        ) from None
    found = getattr(heat, "__version__", "0")
    parts = tuple(int(part) for part in found.split("-")[0].split(".")[:2] if part.isdigit())
    if parts < OLDEST:
        raise ImportError(f"dpoptim.heat needs Heat >= {oldest}, got {found}: pip install --upgrade heat", name="heat")
    return heat
