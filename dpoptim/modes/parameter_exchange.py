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
    is_deferred: bool
    start: Callable[[], Sequence[Work]]

    def is_for(self, outputs: Sequence[Outputs], *, is_deferred: bool) -> bool:
        """Whether nothing has changed."""
        is_same = len(outputs) == len(self.outputs) and all(map(is_, outputs, self.outputs))
        return is_same and is_deferred == self.is_deferred


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

    def exchange(self, parts: Sequence[ShardedBucket], outputs: Sequence[Outputs], meet: Callable[[], float]) -> None:
        """Gather the parameters of these parts; collective, blocks. All ranks have the same bits afterwards.

        Parameters
        ----------
        parts : sequence of ShardedBucket
            Those that were stepped, the same on all ranks.
        outputs : sequence of Outputs
            What each part has to gather.
        meet : callable
            Meets the other ranks before anything is waited for, and returns how many they are.
        """
        on_host = all(part.bucket.device.type == "cpu" for part in parts)
        batch = self._communicator.batch(sum(map(len, outputs)) if on_host else None)
        works: list[Work] = []

        def start(_: float) -> None:
            works.extend(self._start_gathers(outputs, is_deferred=batch.is_deferred))

        batch.open(start, meet)
        for work in works:
            work.wait()
        for part in parts:
            part.gathered()

    def _start_gathers(self, outputs: Sequence[Outputs], *, is_deferred: bool) -> Sequence[Work]:
        prepared = self._prepared
        if prepared is None or not prepared.is_for(outputs, is_deferred=is_deferred):
            start = self._communicator.prepare_all_gathers([output for some in outputs for output in some])
            prepared = self._prepared = _Prepared(outputs, is_deferred, start)
        return prepared.start()
