"""Ranks and their tensors: collectives over MPI messages and a node's memory. Nothing here knows a parameter."""

from dpoptim.comm.communicator import Communicator, Work

__all__ = ["Communicator", "Work"]
