"""The version of this package.

Tests: ``tests/test_package.py``.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
