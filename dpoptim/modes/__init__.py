"""How ranks share the work and the memory of a step."""

__all__: list[str] = []
