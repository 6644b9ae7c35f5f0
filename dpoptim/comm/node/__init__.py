"""Collectives of the ranks of one node through memory, without MPI."""

__all__: list[str] = []
