"""ReduceLROnPlateau that all ranks decide alike."""

from typing import SupportsFloat

import torch.optim.lr_scheduler

from dpoptim.lr_scheduler.print_lr import PrintsLR
from dpoptim.optimizer import DataParallelOptimizer
from dpoptim.utils.consistency import raise_together

__all__ = ["ReduceLROnPlateau"]


class ReduceLROnPlateau(PrintsLR, torch.optim.lr_scheduler.ReduceLROnPlateau):
    """torch's ``ReduceLROnPlateau`` on the metric's mean over ranks.

    Each rank measures its own part of the data, so its metric differs; decided locally, learning rates and then
    parameters would drift apart. With a :class:`~dpoptim.DataParallelOptimizer` the metric is averaged over its ranks,
    each of which counts the same; with another optimizer this is torch's class unchanged. Arguments, ``state_dict`` and
    everything else are torch's.
    """

    def step(self, metrics: SupportsFloat, epoch: int | None = None) -> None:  # type: ignore[override]
        """Take one epoch's metric of this rank; collective, the decision is the same on every rank.

        Parameters
        ----------
        metrics : float or Tensor of one element
            This rank's metric. Average it with :meth:`DataParallelOptimizer.mean` beforehand if ranks should count
            differently.
        epoch : int, optional
            As in torch, deprecated there.
        """
        if isinstance(self.optimizer, DataParallelOptimizer):
            metrics = self._mean(self.optimizer, metrics)
        super().step(metrics, epoch)

    def _mean(self, optimizer: DataParallelOptimizer, metrics: SupportsFloat) -> float:
        own, error = float("nan"), None
        try:
            own = float(metrics)
        except (TypeError, ValueError, RuntimeError) as caught:
            error = caught
        mean = optimizer.mean(own, weight=1.0)
        raise_together(optimizer.communicator, error)
        return mean
