"""Schedule: how often nodes exchange parameters in an epoch, given the losses of those before. No communication.

As the paper has it (section 3): the same on all ranks, since the losses are.
"""

from dataclasses import dataclass

from dpoptim.utils.plateau import DetectMetricPlateau

__all__ = ["Cycle", "Schedule"]

# At the beginning of the cycling phase.
_FIRST_SKIP, _FIRST_WAIT = 4, 1


@dataclass(frozen=True)
class Cycle:
    """How often nodes exchange parameters.

    Attributes
    ----------
    global_skip : int
        An exchange starts every so many batches; 0 in the blocking phases, which have none.
    batches_to_wait : int
        It is received when so many further batches are done, at least 1 and at most ``global_skip``.
    """

    global_skip: int = 0
    batches_to_wait: int = 0


@dataclass(frozen=True)
class Schedule:
    """The phases of a training and what its cycles may be; arguments of :class:`~dpoptim.DASO`, checked there."""

    total_epochs: int
    warmup_epochs: int
    cooldown_epochs: int
    max_global_skips: int
    skip_reduction_factor: int
    local_skip_factor: int

    def is_blocking(self, epoch: int) -> bool:
        """Whether gradients are averaged over all ranks in this epoch, counted from 0."""
        is_cycling = self.warmup_epochs <= epoch < self.total_epochs - self.cooldown_epochs
        return not is_cycling or self.max_global_skips == 0

    def next_cycle(self, epoch: int, last: Cycle, loss: float, stability: DetectMetricPlateau) -> Cycle:
        """Return how this epoch goes.

        Parameters
        ----------
        epoch : int
            Which one, counted from 0.
        last : Cycle
            Of the epoch before.
        loss : float
            Its mean loss.
        stability : DetectMetricPlateau
            Is told of the loss while nodes cycle, and says when losses have stopped to improve.
        """
        if self.is_blocking(epoch):
            return Cycle()
        skip, wait = last.global_skip, last.batches_to_wait
        if skip == 0:
            skip, wait = min(_FIRST_SKIP, self.max_global_skips), _FIRST_WAIT
        if not stability.test_if_improving(loss):  # the name is Heat's: True says that there is a plateau
            return Cycle(skip, wait)
        if skip > 1:
            skip, wait = max(1, skip // self.skip_reduction_factor), wait - 1
        else:
            skip, wait = self.max_global_skips, self.max_global_skips // self.local_skip_factor
        return Cycle(skip, max(1, min(wait, skip)))
