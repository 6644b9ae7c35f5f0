"""``print_lr`` of the schedulers, which torch 2.7 has removed and programs still call.

Tests: ``tests/lr_scheduler/test_schedulers.py``.
"""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dpoptim.optimizer import DataParallelOptimizer

__all__ = ["PrintsLR"]


class PrintsLR:
    """What a scheduler of this package has beside torch's."""

    optimizer: Optimizer

    def print_lr(
        self, is_verbose: bool, group: int | dict[str, Any], lr: float | Tensor, epoch: float | None = None
    ) -> None:
        """Print a learning rate as torch did up to 2.6, on rank 0 of a ``DataParallelOptimizer`` alone; local.

        Parameters
        ----------
        is_verbose : bool
            Whether to print.
        group : int
            What to call the parameter group.
        lr : float or Tensor of one element
            The rate, such as one of ``get_last_lr()``.
        epoch : int or float, optional
            Named as well if given.
        """
        is_ours = isinstance(self.optimizer, DataParallelOptimizer)
        communicator = getattr(self.optimizer, "communicator", None) if is_ours else None  # Heat's may have none yet
        if not is_verbose or (communicator is not None and communicator.rank != 0):
            return
        if epoch is None:
            print(f"Adjusting learning rate of group {group} to {float(lr):.4e}.")
            return
        number = f"{epoch:.2f}" if isinstance(epoch, float) else f"{epoch:05d}"
        print(f"Epoch {number}: adjusting learning rate of group {group} to {float(lr):.4e}.")
