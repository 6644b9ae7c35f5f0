"""Every rank answers before gradients travel, so that no rank waits for one that will not come.

Note [Roll call]
----------------
A reduction starts with one all-reduce of five numbers. In it each rank says whether it has left the program, whether
it was told to stop (:mod:`dpoptim.utils.preemption`), the weight of its batch, and a fingerprint of where it is (which
optimizer, which step, which backward) and of the numbers in its parameter groups (Note [Numbers that part] in
hyper_parameters.py). Ranks that
are at different places would otherwise pair their messages wrongly, or wait for ever; here all of them learn of it
in the same call and raise the same error. A rank that leaves the program answers one last time at exit: if all
leave, that is the end, and if some still train, they raise instead of waiting.

All optimizers on one communicator share one roll call, on a duplicate of its own. With one each, a rank that
reduces optimizer A and a rank that reduces optimizer B would wait for each other. Roll calls on several communicators
(of all ranks, and of each node's) are left all at once at exit, since others may wait in any of them: hence the
non-blocking all-reduce.
"""

import atexit
import functools
import logging
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.errors import heard_if_left, left_within, print_and_abort, raised_on_all_ranks
from dpoptim.comm.mpi import library

__all__ = ["Alike", "DifferentPlacesError", "RollCall"]

logger = logging.getLogger(__name__)

# Squares of fingerprints are summed in float64, exactly up to 2^53: 20 bits leave room for 2^13 ranks.
_FINGERPRINT_BITS = 20

# Where a rank is, in UTF-8, and one byte that says whether it has left.
_PLACE_BYTES = 512

_LEAVING_POLL_S = 1e-3
# Ranks that are told to stop leave within a moment of each other, and may have something to write before.
_LEAVING_TOGETHER_S = 4.0
_NOTE = "\x1f"  # between a place and what else is told
_GONE = object()


class Alike(Protocol):
    """What must be alike on all ranks when they answer."""

    def fingerprint(self) -> int:
        """Return 32 bits that are equal on ranks that are alike; called as often on all of them. Local."""

    def texts(self) -> Sequence[Mapping[str, str]]:
        """Return in words what is compared. Local."""

    def difference(self, everybody: Sequence[Sequence[Mapping[str, str]]]) -> str | None:
        """Say where a rank differs from rank 0, given all ranks' :meth:`texts`. Local."""


class DifferentPlacesError(RuntimeError):
    """The ranks are at different places of the program.

    Parameters
    ----------
    places, told : sequence of str
        Where each rank is, and what it tells of that.
    """

    def __init__(self, places: Sequence[str], told: Sequence[str]) -> None:
        here = "; ".join(f"{_ranks([r for r, p in enumerate(told) if p == q])}: {q}" for q in sorted(set(told)))
        super().__init__(
            f"the ranks are at different places ({here}): every rank must run the same backward passes, no_sync() "
            "blocks and steps in the same order"
        )
        self.places = list(places)


class RollCall:
    """The roll call of all optimizers on one communicator. Get it with :meth:`of`.

    Attributes
    ----------
    communicator : Communicator
        Of its ranks.
    """

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self._num_optimizers = 0
        self._closed: str | None = None
        self._stop_requested = False
        self._stop_agreed = False

    @classmethod
    def of(cls, comm: Any) -> "RollCall":
        """Return the roll call of ``comm``; collective at the first call for ``comm``."""
        return cls.on(Communicator.shared(comm))

    @classmethod
    def on(cls, communicator: Communicator) -> "RollCall":
        """Return the roll call on this communicator, which it then has for its own; not collective."""
        for roll_call in _alive:
            if roll_call.communicator is communicator:
                return roll_call
        roll_call = cls(communicator)
        if communicator.world_size > 1:
            _listen_for_the_end()
            _alive.append(roll_call)
            communicator.users.when_freed(roll_call._retire)
        return roll_call

    @classmethod
    def near(cls, communicator: Communicator) -> "RollCall | None":
        """Return the roll call that these ranks have: on this communicator, or on the one that it duplicates; local."""
        return next((call for call in _alive if call.communicator in (communicator, communicator.origin)), None)

    def enroll(self) -> int:
        """Return a number for a new optimizer, the same on all ranks if they make them in the same order."""
        self._num_optimizers += 1
        self.communicator.users.add()
        return self._num_optimizers - 1

    def dismiss(self) -> None:
        """Take note that an optimizer is detached; collective where it was the last on a communicator that is gone."""
        self.communicator.users.remove()

    def request_stop(self) -> None:
        """Tell all ranks to stop, with this rank's next answer; local, may be called by a signal handler."""
        self._stop_requested = True

    @property
    def should_stop(self) -> bool:
        """Whether any rank has asked to stop, as of the last answer: the same on all ranks."""
        return self._stop_agreed or (self._stop_requested and self.communicator.world_size == 1)

    def check_in(self, place: str, weight: float, alike: Alike | None = None, note: str = "") -> float:
        """Meet all ranks before a reduction; collective, blocks.

        Parameters
        ----------
        place : str
            Where this rank is; must be the same on all.
        weight : float
            Weight of this rank's batch, > 0.
        alike : Alike, optional
            What must be the same on all.
        note : str
            What else to tell, if the ranks turn out to be at different places.

        Returns
        -------
        float
            The sum of the weights of all ranks, the same bits on all.

        Raises
        ------
        DifferentPlacesError
            On every rank, if the ranks are at different places.
        RuntimeError
            On every rank that is still there, if the ranks have set different numbers, or one has left the program.
        """
        if self._closed is not None:
            raise raised_on_all_ranks(RuntimeError(self._closed))
        with heard_if_left(place):
            num_left, total_weight = self._meet(place, weight, alike, note)
        if num_left:
            gone = [rank for rank, (left, _) in enumerate(self._explain(place)) if left]
            self._closed = (
                f"{_ranks(gone)} left the program while others go on ({place} on rank {self.communicator.rank}): "
                "give every rank the same number of batches, or stop all ranks together"
            )
            raise raised_on_all_ranks(RuntimeError(self._closed))
        return total_weight

    def leave(self) -> Iterator[None]:
        """Answer for the last time; collective with whatever the other ranks reduce, or leave.

        Yields as long as others have not answered; the caller comes back for more until there is none.
        """
        if self._closed is not None:
            return
        self._closed = "this rank has left the program"
        answers = self.communicator.start_sum(self._answers("leaving", 0.0, left=True))
        while not answers.test():
            yield
        if answers.wait()[0] < self.communicator.world_size:
            board = self._board("leaving", left=True)
            pending = self.communicator.start_all_reduce(board)
            while not pending.test():
                yield
            still = [f"rank {rank}: {place}" for rank, (left, place) in enumerate(_read(board)) if not left]
            logger.error("rank %d left the program while others go on: %s", self.communicator.rank, "; ".join(still))

    def _retire(self) -> None:
        """Forget this roll call, whose communicator is about to be freed, on all ranks alike; not collective."""
        self._closed = "this roll call's communicator was freed"
        if self in _alive:
            _alive.remove(self)

    def _answers(self, place: str, weight: float, *, left: bool, alike: Alike | None = None) -> list[float]:
        fingerprint = zlib.crc32(place.encode()) ^ (0 if alike is None else alike.fingerprint())
        fingerprint &= (1 << _FINGERPRINT_BITS) - 1
        return [left, weight, fingerprint, fingerprint**2, self._stop_requested]

    def _meet(self, place: str, weight: float, alike: Alike | None, note: str) -> tuple[int, float]:
        if self.communicator.world_size == 1:
            self._stop_agreed = self._stop_agreed or self._stop_requested
            return 0, weight
        answers = self.communicator.start_sum(self._answers(place, weight, left=False, alike=alike)).wait()
        num_left, total_weight, total, total_of_squares, num_stopping = answers
        self._stop_agreed = self._stop_agreed or num_stopping > 0
        # By Cauchy and Schwarz equality holds only if all are equal.
        if not num_left and self.communicator.world_size * int(total_of_squares) != int(total) ** 2:
            self._raise_difference(place, alike, note)
        return int(num_left), total_weight

    def _raise_difference(self, place: str, alike: Alike | None, note: str) -> None:
        """Raise an error that says where the ranks are, or which numbers differ; collective."""
        told = [text for _, text in self._explain(f"{place}{_NOTE}{note}")]
        places = [text.partition(_NOTE)[0] for text in told]
        if len(set(places)) > 1:
            raise raised_on_all_ranks(DifferentPlacesError(places, [text.replace(_NOTE, "") for text in told]))
        assert alike is not None
        difference = alike.difference(self.communicator.all_gather_object(alike.texts()))
        if difference is not None:
            raise raised_on_all_ranks(
                RuntimeError(
                    f"{difference} ({place}): every rank must set the same hyper-parameters, or replicas drift apart. "
                    "A scheduler that decides on a rank's own metric, as torch's ReduceLROnPlateau, sets others on "
                    "each: use dpoptim.lr_scheduler.ReduceLROnPlateau, or give it opt.mean(metric)"
                )
            )

    def _explain(self, place: str) -> list[tuple[bool, str]]:
        """Collect who has left and who is where; only after an answer that all ranks know to be an error."""
        board = self._board(place, left=False)
        self.communicator.start_all_reduce(board).wait()
        return _read(board)

    def _board(self, place: str, *, left: bool) -> Tensor:
        """Return the table that becomes every rank's place when it is summed: one row a rank, others' rows zero."""
        board = torch.zeros(self.communicator.world_size, _PLACE_BYTES, dtype=torch.uint8, device="cpu")
        text = place.encode()[: _PLACE_BYTES - 1]
        board[self.communicator.rank, : len(text) + 1] = torch.tensor(
            [1 + left, *text], dtype=torch.uint8, device="cpu"
        )
        return board


def _read(board: Tensor) -> list[tuple[bool, str]]:
    rows = [bytes(row) for row in board.tolist()]
    return [(row[0] == 2, row[1:].rstrip(b"\0").decode(errors="replace")) for row in rows]


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


_alive: list[RollCall] = []


@functools.cache
def _listen_for_the_end() -> None:
    """Have the others told at exit, once; or before, where the program finalises MPI itself."""
    atexit.register(_answer_a_last_time)
    library.before_finalizing(_answer_a_last_time)


def _answer_a_last_time() -> None:
    """Tell the others at exit; before mpi4py finalises MPI, which itself waits for all ranks.

    If this rank has left a collective before its end, the others may wait for it there. Unless they leave as well, the
    job is ended.
    """
    place = left_within()
    end_s = time.monotonic() + _LEAVING_TOGETHER_S
    leaving = [roll_call.leave() for roll_call in _alive]
    while leaving:
        leaving = [steps for steps in leaving if next(steps, _GONE) is not _GONE]
        if leaving:
            time.sleep(_LEAVING_POLL_S)
            if place is not None and time.monotonic() > end_s:
                rank = _alive[0].communicator.rank
                print_and_abort(f"dpoptim: rank {rank} left the program {place}, where the others wait", library.abort)
