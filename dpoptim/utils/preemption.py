"""Stop in time: a signal to any one rank becomes an agreed ``should_stop`` on all of them.

Batch systems warn a job before they end it, with a signal, and often to one process of many. Ranks that act on
it alone leave the others waiting. Here the signal only sets a flag, which travels with the all-reduce that every
reduction of gradients begins with anyway (Note [Roll call] in ``dpoptim/comm/roll_call.py``)::

    stop = preemption.StopSignal(opt)
    for x, y in loader:
        ...
        opt.step()
        if stop.should_stop:
            checkpoint.save("run", model=model, optimizer=opt, step=step)
            sys.exit(preemption.EXIT_CODE)

The batch script puts the job back into the queue when it ends with this code: see ``slurm/``.
"""

import logging
import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

from dpoptim.comm.roll_call import RollCall

__all__ = ["EXIT_CODE", "StopSignal"]

logger = logging.getLogger(__name__)

# "temporary failure; the user is invited to retry" (sysexits.h); no shell and no MPI uses it for something else.
EXIT_CODE = os.EX_TEMPFAIL


class StopSignal:
    """Listens for signals that mean "save and leave".

    Parameters
    ----------
    optimizer : DataParallelOptimizer, optional
        Whose ranks stop together; by default all of ``comm``.
    signals : sequence of signal.Signals
        What to listen for, on every rank. Handlers that were there are called too.
    comm : mpi4py.MPI.Comm or heat MPICommunication, optional
        Instead of ``optimizer``; collective at the first call for ``comm``.

    Attributes
    ----------
    should_stop : bool
        Whether any rank had received a signal when the last reduction (or other meeting of the ranks) began. The same
        on all ranks at the same place of the program: local, no communication.

    Raises
    ------
    ValueError
        Made in another thread than the main one, where Python handles no signals.

    Notes
    -----
    A rank that waits in MPI handles its signal when the call returns. Use it as a context manager, or call
    :meth:`close`, to put back the handlers that were there.
    """

    def __init__(
        self,
        optimizer: Any = None,
        *,
        signals: Sequence[signal.Signals] = (signal.SIGUSR1, signal.SIGTERM),
        comm: Any = None,
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("StopSignal must be made in the main thread: Python handles signals nowhere else")
        self._roll_call: RollCall = getattr(optimizer, "roll_call", None) or RollCall.of(comm)
        self._previous = {number: signal.signal(number, self._on_signal) for number in signals}

    @property
    def should_stop(self) -> bool:
        """Whether to save and leave now; the same on all ranks."""
        return self._roll_call.should_stop

    def close(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def __enter__(self) -> "StopSignal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._roll_call.request_stop()
        name, rank = signal.Signals(number).name, self._roll_call.communicator.rank
        logger.warning("rank %d received %s: all ranks stop at the next step", rank, name)
        previous = self._previous.get(signal.Signals(number))
        if callable(previous):
            previous(number, frame)
