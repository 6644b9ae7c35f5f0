"""ParameterExchange: how the owners of parameters give the others what they have stepped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.work import Work
from dpoptim.step.units import Outputs, ShardedBucket

__all__ = ["ParameterExchange"]


@dataclass(frozen=True)
class _Prepared:
    """How the parameters are gathered that these outputs are of."""

    outputs: Sequence[Outputs]
    defers: bool
    start: Callable[[], Sequence[Work]]

    def is_for(self, outputs: Sequence[Outputs], *, defers: bool) -> bool:
        """Whether nothing has changed."""
        is_same = len(outputs) == len(self.outputs) and all(map(is_, outputs, self.outputs))
        return is_same and defers == self.defers


class ParameterExchange:
    """Gathers the parameters of one optimizer, after a step of their owners.

    Parameters
    ----------
    communicator : Communicator
        Of the owners.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._prepared: _Prepared | None = None

    def exchange(self, parts: Sequence[ShardedBucket], outputs: Sequence[Outputs], meet: Callable[[], object]) -> None:
        """Gather the parameters of these parts; collective, blocks. All ranks have the same bits afterwards.

        Parameters
        ----------
        parts : sequence of ShardedBucket
            Those that were stepped, the same on all ranks.
        outputs : sequence of Outputs
            What each part has to gather.
        meet : callable
            Meets the other ranks before anything is waited for.
        """
        on_host = all(part.bucket.device.type == "cpu" for part in parts)
        if on_host and self._communicator.defers(sum(map(len, outputs)), ()):
            works = self._start_gathers(outputs, defers=True)
            self._communicator.announce_by(meet)
        else:
            meet()
            works = self._start_gathers(outputs, defers=False)
        for work in works:
            work.wait()
        for part in parts:
            part.gathered()

    def _start_gathers(self, outputs: Sequence[Outputs], *, defers: bool) -> Sequence[Work]:
        prepared = self._prepared
        if prepared is None or not prepared.is_for(outputs, defers=defers):
            start = self._communicator.prepare_all_gathers([output for some in outputs for output in some])
            prepared = self._prepared = _Prepared(outputs, defers, start)
        return prepared.start()
