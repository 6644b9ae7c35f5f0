"""Checkpoints: saved by all ranks at once, complete or not there at all, loaded at any number of ranks in any mode.

::

    from dpoptim.utils import checkpoint

    saved = checkpoint.load("run", model=model, optimizer=opt, scheduler=sched, missing_ok=True)
    for step in range(saved["step"] + 1 if saved else 0, num_steps):
        ...
        checkpoint.save("run", model=model, optimizer=opt, scheduler=sched, step=step)

The format is described in ``docs/checkpoints.md``. Weights are read without dpoptim by any reader of safetensors.
"""

from dpoptim.utils.checkpoint.error import CheckpointError
from dpoptim.utils.checkpoint.loading import latest, load
from dpoptim.utils.checkpoint.saving import save, wait

__all__ = ["CheckpointError", "latest", "load", "save", "wait"]
