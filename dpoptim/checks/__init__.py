"""What is refused before anything changes, and what ranks must have alike."""

__all__: list[str] = []
