"""The ranks that save or load together, and errors that all of them raise.

Tests: ``tests/utils/test_checkpoint.py``.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.comm.roll_call import RollCall
from dpoptim.utils.checkpoint.error import CheckpointError

__all__ = ["ONE_PROCESS", "Ranks", "attempt", "hold", "let_go", "meet", "meet_again", "together"]

_T = TypeVar("_T")


class Ranks(Protocol):
    """What of a :class:`~dpoptim.comm.communicator.Communicator` is needed here."""

    rank: int
    world_size: int

    def all_gather_object(self, item: Any) -> list[Any]:
        """Return every rank's item; collective."""

    def broadcast_object(self, item: Any, *, root: int = 0) -> Any:
        """Return the root's item; collective."""


class _OneProcess:
    """The ranks of a program on a machine without MPI."""

    rank = 0
    world_size = 1

    def all_gather_object(self, item: Any) -> list[Any]:
        return [item]

    def broadcast_object(self, item: Any, *, root: int = 0) -> Any:  # noqa: ARG002
        return item


ONE_PROCESS = _OneProcess()


def meet(comm: Any, parts: Iterable[Any], purpose: str) -> Ranks:
    """Wait for all ranks to come here for the same purpose; collective, an error on all where one is elsewhere.

    They are the ranks of ``comm``, else of the first data-parallel optimizer among the parts, else all. On a machine
    without an MPI library it is this process alone.
    """
    roll_call: RollCall | None = None
    if comm is None:
        roll_call = next((part.roll_call for part in parts if hasattr(part, "roll_call")), None)
    if roll_call is None:
        try:
            roll_call = RollCall.of(comm)
        except (ImportError, RuntimeError):
            if comm is not None or _has_mpi():
                raise
            return ONE_PROCESS
    roll_call.check_in(purpose, 1.0)
    return roll_call.communicator


def meet_again(ranks: Ranks, purpose: str) -> None:
    """Wait for the ranks that :func:`meet` has returned; collective, an error on all where one is elsewhere."""
    if isinstance(ranks, Communicator):
        RollCall.on(ranks).check_in(purpose, 1.0)


def hold(ranks: Ranks) -> None:
    """Keep the communicator of these ranks until :func:`let_go`, though the program frees its own; on all alike."""
    if isinstance(ranks, Communicator):
        ranks.users.add()


def let_go(ranks: Ranks) -> None:
    """Need the communicator of these ranks no longer; collective where nobody else does and its own was freed."""
    if isinstance(ranks, Communicator):
        ranks.users.remove()


def attempt(action: Callable[[], _T]) -> tuple[_T | None, Exception | None]:
    """Do something on this rank alone and return its result or its error."""
    try:
        return action(), None
    except Exception as error:
        return None, error


def together(ranks: Ranks, error: Exception | None) -> None:
    """Raise on every rank if any rank has an error; collective.

    A ``TypeError`` or ``ValueError`` is raised as such everywhere, anything else as ``CheckpointError`` or, on its own
    rank, as what it is.
    """
    kinds = (TypeError, ValueError)
    described = error and (next((kind for kind in kinds if isinstance(error, kind)), CheckpointError), str(error))
    for rank, other in enumerate(ranks.all_gather_object(described)):
        if other is not None:
            kind, message = other
            raise raised_on_all_ranks(kind(f"on rank {rank}: {message}") if error is None else error)


def _has_mpi() -> bool:
    try:
        Communicator.shared()
    except (ImportError, RuntimeError):
        return False
    return True
