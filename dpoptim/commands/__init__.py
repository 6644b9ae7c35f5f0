"""The command line: ``python -m dpoptim info``, ``check``, ``bench`` and ``checkpoint``."""

__all__: list[str] = []
