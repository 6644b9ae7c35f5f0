"""What DASO refuses, on all ranks, and which rank is on which node."""

import math
from typing import Any

from torch import Tensor

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.errors import raised_on_all_ranks

__all__ = ["argument_error", "check_settings", "checked_loss", "nodes_of"]


def nodes_of(world: Communicator, node: int | None) -> tuple[tuple[int, ...], ...]:
    """Return the ranks of each node, the same on all ranks; collective."""
    colors = world.all_gather_object(node)
    if all(color is None for color in colors):
        return world.topology.nodes
    missing = [rank for rank, color in enumerate(colors) if color is None]
    if missing:
        error = ValueError(f"node must be given on all ranks or on none, it is None on ranks {missing}")
        raise raised_on_all_ranks(error)
    return tuple(tuple(r for r, color in enumerate(colors) if color == wanted) for wanted in dict.fromkeys(colors))


_AT_LEAST = {
    "total_epochs": 1,
    "warmup_epochs": 0,
    "cooldown_epochs": 0,
    "max_global_skips": 0,
    "skip_reduction_factor": 1,
    "local_skip_factor": 1,
    "chunk_numel": 1,
}


def argument_error(settings: dict[str, Any], node: object, comm_hook: object) -> Exception | None:
    """Return what is wrong with the arguments of this rank, if anything is. Local."""
    for name, value in settings.items():
        if name == "stability_level":
            if not isinstance(value, float):
                return TypeError(f"stability_level must be a float, got {type(value).__name__}")
        elif not isinstance(value, int):
            return TypeError(f"{name} must be an int, got {type(value).__name__}")
        elif value < _AT_LEAST[name]:
            return ValueError(f"{name} must be >= {_AT_LEAST[name]}, got {value}")
    if node is not None and not isinstance(node, int):
        return TypeError(f"node must be an int or None, got {type(node).__name__}")
    if comm_hook is not None and not callable(comm_hook):
        return TypeError(f"comm_hook must be callable, got {type(comm_hook).__name__}")
    return None


def checked_loss(loss: object) -> tuple[float, Exception | None]:
    """Return this rank's loss as a number, NaN if it is none, and what is wrong with it, if anything is. Local."""
    own = float("nan")
    try:
        own = float(loss.detach() if isinstance(loss, Tensor) else loss)  # type: ignore[arg-type]  # raises TypeError
    except (TypeError, ValueError, RuntimeError) as error:
        return own, error
    if not math.isfinite(own):
        return own, ValueError(f"loss must be finite, got {own}: training has diverged")
    return own, None


def check_settings(world: Communicator, settings: dict[str, Any]) -> None:
    """Raise on all ranks if they have given different arguments; collective."""
    for rank, other in enumerate(everybody := world.all_gather_object(settings)):
        for name, value in everybody[0].items():
            if other[name] != value:
                error = ValueError(
                    f"{name} is {value} on rank 0 but {other[name]} on rank {rank}: give all ranks the same"
                )
                raise raised_on_all_ranks(error)
