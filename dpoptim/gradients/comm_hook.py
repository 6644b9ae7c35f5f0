"""CommHook: what a communication hook is (:mod:`dpoptim.comm_hooks`)."""

from collections.abc import Callable

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.work import Work
from dpoptim.gradients.bucket import Bucket

__all__ = ["CommHook"]

CommHook = Callable[[Communicator, Bucket], Work]
