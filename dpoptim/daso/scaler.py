"""The steps of a GradScaler that DASO makes itself, and the scale that nodes agree on.

Tests: ``tests/daso/test_daso.py``.
"""

import torch
from torch.optim import Optimizer

from dpoptim.comm.communicator import Communicator

__all__ = ["agree_on_scale", "unscales_for_step"]


def unscales_for_step(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> bool:
    """Unscale gradients if that was not done yet, and return whether the step is to be made; local."""
    if not scaler.is_enabled():
        return True
    if not scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]:
        scaler.unscale_(optimizer)
    return not any(bool(found.item()) for found in scaler._found_inf_per_device(optimizer).values())


def agree_on_scale(communicator: Communicator, scaler: torch.amp.GradScaler) -> None:
    """Give all ranks the smallest scale, and else rank 0's state of the GradScaler; collective, blocks."""
    states = communicator.all_gather_object(scaler.state_dict())
    if states[0]:
        scaler.load_state_dict({**states[0], "scale": min(state["scale"] for state in states)})
