"""Every rank answers before gradients travel, so that no rank waits for one that will not come.

Note [Roll call]
----------------
A reduction starts with one all-reduce of five numbers. In it each rank says whether it has left the program, whether
it was told to stop (:mod:`dpoptim.utils.preemption`), the weight of its batch, and a fingerprint of where it is (which
optimizer, which step, which backward). Ranks that
are at different places would otherwise pair their messages wrongly, or wait for ever; here all of them learn of it
in the same call and raise the same error. A rank that leaves the program answers one last time at exit: if all
leave, that is the end, and if some still train, they raise instead of waiting.

All optimizers on one communicator share one roll call, on a duplicate of its own. With one each, a rank that
reduces optimizer A and a rank that reduces optimizer B would wait for each other.
"""

import atexit
import logging
import zlib
from typing import Any

import torch

from dpoptim.communicator import Communicator
from dpoptim.errors import raised_on_all_ranks

__all__ = ["RollCall"]

logger = logging.getLogger(__name__)

# Squares of fingerprints are summed in float64, exactly up to 2^53: 20 bits leave room for 2^13 ranks.
_FINGERPRINT_BITS = 20


class RollCall:
    """The roll call of all optimizers on one communicator. Get it with :meth:`of`."""

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self._num_optimizers = 0
        self._closed: str | None = None
        self._stop_requested = False
        self._stop_agreed = False

    @classmethod
    def of(cls, comm: Any) -> "RollCall":
        """Return the roll call of ``comm``; collective at the first call for ``comm``."""
        communicator = Communicator.shared(comm)
        for roll_call in _alive:
            if roll_call.communicator is communicator:
                return roll_call
        roll_call = cls(communicator)
        if communicator.world_size > 1:
            if not _alive:
                atexit.register(_answer_a_last_time)
            _alive.append(roll_call)
        return roll_call

    def enroll(self) -> int:
        """Return a number for a new optimizer, the same on all ranks if they make them in the same order."""
        self._num_optimizers += 1
        return self._num_optimizers - 1

    def request_stop(self) -> None:
        """Tell all ranks to stop, with this rank's next answer; local, may be called by a signal handler."""
        self._stop_requested = True

    @property
    def should_stop(self) -> bool:
        """Whether any rank has asked to stop, as of the last answer: the same on all ranks."""
        return self._stop_agreed or (self._stop_requested and self.communicator.world_size == 1)

    def answer(self, place: str, weight: float) -> float:
        """Meet all ranks before a reduction; collective, blocks.

        Parameters
        ----------
        place : str
            Where this rank is; must be the same on all.
        weight : float
            Weight of this rank's batch, > 0.

        Returns
        -------
        float
            The sum of the weights of all ranks, the same bits on all.

        Raises
        ------
        RuntimeError
            On every rank that is still there, if the ranks are at different places or one has left the program.
        """
        if self._closed is not None:
            raise raised_on_all_ranks(RuntimeError(self._closed))
        num_left, total_weight = self._meet(place, weight, left=False)
        if num_left:
            gone = [rank for rank, (left, _) in enumerate(self._explain(place, left=False)) if left]
            self._closed = (
                f"{_ranks(gone)} left the program while others go on ({place} on rank {self.communicator.rank}): "
                "give every rank the same number of batches, or stop all ranks together"
            )
            raise raised_on_all_ranks(RuntimeError(self._closed))
        return total_weight

    def leave(self) -> None:
        """Answer for the last time; collective with whatever the other ranks reduce, or leave."""
        if self._closed is not None:
            return
        self._closed = "this rank has left the program"
        num_left, _ = self._meet("leaving", 0.0, left=True)
        if num_left < self.communicator.world_size:
            places = self._explain("leaving", left=True)
            still = [f"rank {rank}: {place}" for rank, (left, place) in enumerate(places) if not left]
            logger.error("rank %d left the program while others go on: %s", self.communicator.rank, "; ".join(still))

    def _meet(self, place: str, weight: float, *, left: bool) -> tuple[int, float]:
        fingerprint = zlib.crc32(place.encode()) & ((1 << _FINGERPRINT_BITS) - 1)
        stop = float(self._stop_requested)
        answers = torch.tensor([left, weight, fingerprint, fingerprint**2, stop], dtype=torch.float64)
        self.communicator.all_reduce(answers)
        num_left, total_weight, total, total_of_squares, num_stopping = answers.tolist()
        self._stop_agreed = self._stop_agreed or num_stopping > 0
        # By Cauchy and Schwarz equality holds only if all are equal.
        if not num_left and self.communicator.world_size * int(total_of_squares) != int(total) ** 2:
            places = [place for _, place in self._explain(place, left=left)]
            here = "; ".join(f"{_ranks([r for r, p in enumerate(places) if p == q])}: {q}" for q in sorted(set(places)))
            raise raised_on_all_ranks(
                RuntimeError(
                    f"the ranks are at different places ({here}): every rank must run the same backward passes, "
                    "no_sync() blocks and steps in the same order"
                )
            )
        return int(num_left), total_weight

    def _explain(self, place: str, *, left: bool) -> list[tuple[bool, str]]:
        """Collect who has left and who is where; only after an answer that all ranks know to be an error."""
        return self.communicator.all_gather_object((left, place))


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


_alive: list[RollCall] = []


def _answer_a_last_time() -> None:
    """Tell the others at exit; before mpi4py finalises MPI, which itself waits for all ranks."""
    for roll_call in _alive:
        roll_call.leave()
