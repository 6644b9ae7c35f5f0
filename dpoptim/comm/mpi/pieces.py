"""Transfers that go on while their caller computes, as far as it looks after them. No MPI here.

Note [Looking after transfers]
------------------------------
MPI goes on with a collective while some MPI call runs. A thread that waits for one takes a core from the computation,
or the interpreter's lock from its hooks, of which backward may call hundreds. Here whoever computes looks after what is
under way, from those hooks, and takes neither.

Note [Phases]
-------------
All ranks must start the collectives of a communicator in one order, which may not depend on what happens to end first.
So each phase of a transfer has a communicator of its own, and in each of them transfers start in the order in which
they began. Whoever waits anyway needs one communicator: nobody asks what has ended, and what was started first is
waited for first.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dpoptim.comm.work import Pending
from dpoptim.tuning import TUNING

__all__ = ["InFlight", "Transfer"]

_BETWEEN_LOOKS_S = TUNING.between_looks_s


# The collectives of one piece of a transfer, each started when the one before has ended.
Phases = Iterator[Pending[None]]


class Transfer:
    """Pieces under way; :class:`InFlight` makes it.

    Parameters
    ----------
    in_flight : InFlight
        What looks after them.
    num_pieces : int
        How many have not ended.
    """

    def __init__(self, in_flight: "InFlight", num_pieces: int) -> None:
        self._in_flight, self.num_pieces = in_flight, num_pieces

    def wait(self) -> None:
        """Block until all pieces have ended; errors of their collectives are raised here."""
        self._in_flight.wait_for(self)


@dataclass(frozen=True)
class _Piece:
    transfer: Transfer
    phases: Phases


class InFlight:
    """Pieces of transfers under way, some of them at a time.

    Parameters
    ----------
    limit : int
        How many pieces are under way at most; further ones start when others have ended.
    asks : bool
        Whether phases have a communicator each, so that those that have ended may be asked for. If not, they share one,
        on which each is waited for in the order in which they started.
    """

    def __init__(self, limit: int, *, asks: bool = True) -> None:
        self._limit, self._asks = limit, asks
        self._not_started: deque[_Piece] = deque()
        self._lanes: list[deque[tuple[_Piece, Pending[None]]]] = []  # one for each communicator
        self._num_started = 0
        self._next_look_s = 0.0

    def begin(self, pieces: Iterable[Phases]) -> Transfer:
        """Begin a transfer; local, does not block."""
        begun = list(pieces)
        transfer = Transfer(self, len(begun))
        self._not_started += [_Piece(transfer, phases) for phases in begun]
        self._start_more()
        return transfer

    def poll(self) -> None:
        """Go on with what is under way, if that was not done just now; local, does not block."""
        now_s = time.monotonic()
        if now_s >= self._next_look_s and self._num_started:
            self._look()
            self._next_look_s = now_s + _BETWEEN_LOOKS_S

    def wait_for(self, transfer: Transfer) -> None:
        """Block until this transfer has ended."""
        while transfer.num_pieces:
            lane = next(lane for lane, queue in enumerate(self._lanes) if queue)
            self._lanes[lane][0][1].wait()
            self._advance(lane)
            self._look()

    def wait_for_all(self) -> None:
        """Block until nothing is under way."""
        while self._num_started:
            queue = next(queue for queue in self._lanes if queue)
            self.wait_for(queue[0][0].transfer)

    def _look(self) -> None:
        lane = 0
        while self._asks and lane < len(self._lanes):  # a piece that leaves the last lane so far makes another
            queue = self._lanes[lane]
            while queue and queue[0][1].test():
                self._advance(lane)
            lane += 1
        self._start_more()

    def _advance(self, lane: int) -> None:
        """Let the oldest piece of a lane go on to its next phase (Note [Phases])."""
        piece, _ = self._lanes[lane].popleft()
        self._enter(piece, lane + 1 if self._asks else 0)

    def _enter(self, piece: _Piece, lane: int) -> None:
        pending = next(piece.phases, None)
        if pending is None:
            piece.transfer.num_pieces -= 1
            self._num_started -= 1
            return
        if lane == len(self._lanes):
            self._lanes.append(deque())
        self._lanes[lane].append((piece, pending))

    def _start_more(self) -> None:
        while self._not_started and self._num_started < self._limit:
            self._num_started += 1
            self._enter(self._not_started.popleft(), 0)
