"""Exchange: when parameters travel among the nodes of a DASO, by which weight, and what of it is under way.

How they travel is in :mod:`dpoptim.daso.node_average`.

Tests: ``tests/daso/test_daso.py``.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.comm.roll_call import Alike, RollCall
from dpoptim.comm_hooks import CommHook
from dpoptim.daso.node_average import NodeAverage
from dpoptim.daso.schedule import Cycle
from dpoptim.utils.consistency import raise_together

__all__ = ["Exchange"]


class Exchange:
    """Exchanges the parameters of one optimizer among nodes, and counts the weights of the batches in between.

    Parameters
    ----------
    communicator : Communicator
        The optimizer's own, of all ranks.
    roll_call : RollCall
        Where all ranks meet before an exchange begins.
    nodes : sequence of tuple of int
        The ranks of each node.
    comm_hook : callable
        How what travels between nodes is summed.
    chunk_numel : int
        Parameters travel in messages of at most so many elements.
    parameters : callable
        Returns all parameters.
    hyper_parameters : Alike
        What ranks that exchange must have alike.
    place : callable
        Given a purpose, says where in the program that is, the same on all ranks.

    Attributes
    ----------
    node : Communicator
        The ranks of this node.
    node_roll_call : RollCall
        Where they meet.
    is_synchronised : bool
        Whether all nodes have the same parameters and state.
    """

    def __init__(
        self,
        communicator: Communicator,
        roll_call: RollCall,
        nodes: Sequence[tuple[int, ...]],
        *,
        comm_hook: CommHook,
        chunk_numel: int,
        parameters: Callable[[], list[Tensor]],
        hyper_parameters: Alike | None,
        place: Callable[[str], str],
    ) -> None:
        world = roll_call.communicator
        own = next(number for number, ranks in enumerate(nodes) if world.rank in ranks)
        local_rank = nodes[own].index(world.rank)
        num_parts = min(map(len, nodes))
        is_threaded = world.library()["thread level"] == "multiple"
        node = world.split(own, local_rank, overlap=communicator.overlap)
        assert node is not None
        self.node = node
        self.node_roll_call = RollCall.on(node)
        self.is_synchronised = True
        color = local_rank if local_rank < num_parts else None
        self._across = world.split(color, own, overlap=is_threaded, patient=is_threaded)
        self._average = NodeAverage(
            node, self._across, num_parts=num_parts, comm_hook=comm_hook, chunk_numel=chunk_numel
        )
        self._communicator = communicator
        self._roll_call = roll_call
        self._nodes = nodes
        self._parameters = parameters
        self._hyper_parameters = hyper_parameters
        self._place = place
        self._weight = 0.0  # of this rank's batches since the last exchange
        self._sent_at = 0  # the batch after which the pending exchange was started

    def restart(self) -> None:
        """Begin anew with equal nodes, and forget what is under way; local, waits for it."""
        self._average.wait()
        self._average.is_pending = False
        self._average.forget()
        self._weight = 0.0
        self.is_synchronised = True

    def before_step(self) -> None:
        """Take note of parameters that a step of this node alone will change; local."""
        self._average.cover(self._parameters())
        self.is_synchronised = False

    def after_step(self, batch: int, weight: float, cycle: Cycle) -> None:
        """End and start exchanges where they are due; collective then, the start returns at once.

        Parameters
        ----------
        batch : int
            The number of the batch that was stepped.
        weight : float
            This rank's weight of it.
        cycle : Cycle
            How often exchanges are due.
        """
        self._weight += weight
        if self._average.is_pending and batch - self._sent_at >= cycle.batches_to_wait:
            self._receive(batch)
        if batch % cycle.global_skip == 0:
            if self._average.is_pending:
                self._receive(batch)
            self._send("starting an exchange", weight)
            self._sent_at = batch

    def equalise(self, batch: int, weight: float) -> float:
        """Give all ranks the mean of the nodes' parameters; collective, blocks.

        Parameters
        ----------
        batch : int
            The number of the present batch.
        weight : float
            This rank's, if it has stepped no batch since the last exchange.

        Returns
        -------
        float
            This rank's share in the mean; the shares of all ranks sum to one.
        """
        if self._average.is_pending:
            self._receive(batch)
        share = self._send("synchronising", weight)
        self._average.finish(1.0)
        return share / self.node.world_size

    def check_finite(self) -> None:
        """Raise on all ranks if a parameter is not finite; they have the same bits, so nothing need be sent."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self._parameters()):
            self._raise_not_finite()

    def free(self) -> None:
        """Wait for what is under way, and free the communicators; collective."""
        self._average.wait()
        if self._across is not None:
            self._across.free()
        self.node.free()

    # ---------------------------------------------------------------- a state in the middle of a cycle

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank needs to go on from here; local, waits for what is under way."""
        return {
            "place": self._own_place(),
            "weight": self._weight,
            "sent_at": self._sent_at,
            "is_pending": self._average.is_pending,
            "flats": self._average.state_dict(),
        }

    def check_loadable(self, state: dict[str, Any]) -> None:
        """Raise ``ValueError`` unless a state is of this rank in a job with the same ranks on the same nodes; local."""
        if state["place"] != self._own_place():
            raise ValueError(
                f"this state_dict was saved in the middle of a cycle on {state['place']}, but this is "
                f"{self._own_place()}: load the state that this rank saved, or call synchronize() before saving"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; local."""
        self.is_synchronised = False
        self._weight, self._sent_at = state["weight"], state["sent_at"]
        self._average.load_state_dict(state["flats"], self._parameters(), is_pending=state["is_pending"])

    # ---------------------------------------------------------------- how

    def _receive(self, batch: int) -> None:
        self.node_roll_call.check_in(self._place("receiving"), 1.0)  # the node puts its parts together
        waited, num_nodes = 2.0 * (batch - self._sent_at), float(len(self._nodes))
        self._average.finish(num_nodes / (max(waited, 1.0) + num_nodes))

    def _send(self, purpose: str, weight: float) -> float:
        """Meet all ranks and start an exchange; return this node's share in the mean."""
        self._average.cover(self._parameters())
        is_finite = self._average.measure()
        weight = self._weight if self._weight > 0 else weight
        place = self._place(f"{purpose} of {self._average.numel} numbers")
        total_weight = self._roll_call.check_in(place, weight if is_finite else float("nan"), self._hyper_parameters)
        if math.isnan(total_weight):
            self._raise_not_finite()
        node_weight = torch.tensor([weight], dtype=torch.float64, device="cpu")
        self.node.all_reduce(node_weight)
        share = node_weight.item() / total_weight
        self._average.start(share)
        self._weight = 0.0
        return share

    def _raise_not_finite(self) -> NoReturn:
        bad = [i for i, parameter in enumerate(self._parameters()) if not bool(torch.isfinite(parameter).all())]
        error = (
            ValueError(f"parameters must be finite, but {len(bad)} are not (the first is {bad[0]})") if bad else None
        )
        raise_together(self._communicator, error)
        raise raised_on_all_ranks(ValueError("parameters must be finite, but their changes overflow"))

    def _own_place(self) -> str:
        return f"rank {self._communicator.rank} of nodes {[list(ranks) for ranks in self._nodes]}"
