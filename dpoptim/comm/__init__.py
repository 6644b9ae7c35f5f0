"""Ranks and their tensors: collectives over MPI messages and a node's memory. Nothing here knows a parameter."""

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.work import Work

__all__ = ["Communicator", "Work"]
