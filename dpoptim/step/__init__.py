"""An optimizer's arithmetic on one rank. Nothing here communicates."""

__all__: list[str] = []
