"""An option that only this folder's tests have."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="write what the sweep finds to docs/support.md")
