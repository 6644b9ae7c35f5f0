"""PhaseHook: the communication hook of DASO, which is the user's between nodes and none within one."""

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.work import Work
from dpoptim.comm_hooks import CommHook, allreduce
from dpoptim.gradients.bucket import Bucket

__all__ = ["PhaseHook"]


class PhaseHook:
    """Sums plainly within a node, and with the user's hook over all ranks.

    Parameters
    ----------
    across_nodes : callable
        The user's.

    Attributes
    ----------
    node : Communicator or None
        The ranks of the node; to be set before the first sum among them.
    """

    def __init__(self, across_nodes: CommHook) -> None:
        self._across_nodes = across_nodes
        self.node: Communicator | None = None

    def __call__(self, communicator: Communicator, bucket: Bucket) -> Work:
        """Start the sum of a bucket; collective on these ranks."""
        hook = allreduce if communicator is self.node else self._across_nodes
        return hook(communicator, bucket)
