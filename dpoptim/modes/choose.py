"""Which mode an optimizer gets: the one that was asked for, where that can be."""

import logging
import warnings

from torch import Tensor

from dpoptim.checks.alike import parameter_names
from dpoptim.checks.arguments import memory_error
from dpoptim.modes.agreed_division import agreed_division
from dpoptim.modes.mode import Mode, Replicated
from dpoptim.modes.node_memory import NodeMemory
from dpoptim.modes.node_shared import NodeShared
from dpoptim.modes.sharded import Sharded
from dpoptim.modes.sharded_stepping import Stepped
from dpoptim.step.classes import parameters_of

__all__ = ["choose_mode"]

logger = logging.getLogger(__name__)


def choose_mode(stepped: Stepped, *, shard: bool, node_shared: bool) -> Mode:
    """Return the mode that was asked for, or the replicated one where it can't be; collective.

    Warns where the optimizer can't be sharded, and logs where a node has no memory to share.

    Parameters
    ----------
    stepped : Stepped
        The optimizer, and what belongs to it.
    shard, node_shared : bool
        What was asked for.
    """
    optimizer, communicator = stepped.optimizer, stepped.communicator
    replicated = Replicated(optimizer, stepped.inner_step, stepped.names)
    share_nodes = node_shared and communicator.topology.num_nodes < communicator.world_size
    if communicator.world_size == 1 or not (shard or share_nodes):
        return replicated
    name = type(optimizer).__name__
    by, why_not = agreed_division(optimizer, communicator)
    if by == "nothing":
        warnings.warn(f"{name} can't be sharded among ranks, since it {why_not}: it stays replicated", stacklevel=3)
        return replicated
    mine = memory_error(parameters_of(optimizer), parameter_names(optimizer.param_groups, None))
    errors = communicator.all_gather_object(None if mine is None else str(mine))
    if any(errors):
        why = next(error for error in errors if error)
        warnings.warn(f"{name} can't be sharded among ranks, since {why}: it stays replicated", stacklevel=3)
        return replicated
    if node_shared:
        try:
            memory = _node_memory(stepped)
        except OSError as error:
            logger.warning(
                "node_shared=True has one copy of the parameters a rank, as shard=True: %s (rank %d)",
                error,
                communicator.rank,
            )
        else:
            return NodeShared(stepped, memory, by_element=by == "element")
    return Sharded(stepped, by_element=by == "element")


def _node_memory(stepped: Stepped) -> NodeMemory:
    """Return memory of every node for the parameters; collective. Raise ``OSError`` on all ranks where one has none."""
    parameters = parameters_of(stepped.optimizer)
    (num_with_views,) = stepped.communicator.start_sum([any(map(_is_view_of_more, parameters))]).wait()
    if num_with_views:
        raise OSError("a parameter is a part of a larger tensor, which would keep the old memory")
    return NodeMemory(stepped.communicator, parameters)


def _is_view_of_more(parameter: Tensor) -> bool:
    """Whether a parameter's memory holds elements of other tensors too."""
    return parameter.untyped_storage().nbytes() > parameter.nbytes
