"""NodeMemory: parameters that lie once in a node, in memory that its ranks share.

Tests: ``tests/behaviour/test_sharded.py``.

Note [One copy a node]
----------------------
``parameter.data`` of every rank becomes a view of the same memory, with a storage of its own, so that saving or copying
a model sees nothing unusual. Parameters of a bucket lie one after another, so that what a rank owns of them is one flat
tensor. Whoever writes to a parameter writes for all ranks of the node: the step does, each rank its part, between two
meetings. Writes of the same values by all (``load_state_dict``) do no harm; others belong into
``DataParallelOptimizer.exclusive()``, where all ranks but rank 0 of the job have private copies, whose values are
dropped.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.node.shared_memory import SharedMemory
from dpoptim.gradients.bucket import Bucket
from dpoptim.partition import aligned

__all__ = ["NodeMemory"]


class NodeMemory:
    """The parameters of one optimizer in memory that the node shares (Note [One copy a node]).

    Parameters
    ----------
    communicator : Communicator
        All ranks, on all nodes.
    parameters : sequence of Tensor
        For which memory is set aside now; construction is collective.

    Raises
    ------
    OSError
        On every rank, if a node has not so much memory to share.
    """

    def __init__(self, communicator: Communicator, parameters: Sequence[Tensor]) -> None:
        why_not = communicator.why_no_node_memory()
        if why_not is not None:
            raise OSError(why_not)
        self._communicator = communicator
        self._set_aside: SharedMemory | None = communicator.share_in_node(
            sum(aligned(parameter.nbytes) for parameter in parameters) or 1
        )
        self._parameters: list[Tensor] = []
        self._names: list[str] = []
        self._addresses: list[int] = []
        self._views: list[Tensor] = []

    @torch.no_grad()
    def add(self, buckets: Sequence[Bucket], parameters: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
        """Move the parameters of these buckets, of equal values on all ranks, to shared memory; collective.

        Parameters
        ----------
        buckets : sequence of Bucket
            What lies together.
        parameters, names : sequence
            All parameters and their names, as the buckets number them.

        Returns
        -------
        list of Tensor
            The flat memory of each bucket.

        Raises
        ------
        OSError
            On every rank, if a node has not so much memory to share; never at the first call.
        """
        offsets_bytes, num_bytes = [], 0
        for bucket in buckets:
            offsets_bytes.append(num_bytes)
            num_bytes += aligned(bucket.numel * bucket.dtype.itemsize)
        memory, self._set_aside = self._set_aside, None
        if memory is None:
            memory = self._communicator.share_in_node(max(1, num_bytes))
        homes = []
        moves: list[tuple[Tensor, Tensor]] = []
        for bucket, offset_bytes in zip(buckets, offsets_bytes, strict=True):
            homes.append(memory.tensor(bucket.dtype, [bucket.numel], offset_bytes))
            for index, shape in zip(bucket.indices, bucket.shapes, strict=True):
                view = memory.tensor(bucket.dtype, shape, offset_bytes)
                offset_bytes += view.nbytes  # noqa: PLW2901
                moves.append((parameters[index], view))
                self._names.append(names[index])
        if self._communicator.topology.local_rank == 0:
            for parameter, view in moves:
                view.copy_(parameter)
        self._communicator.barrier()
        for parameter, view in moves:
            parameter.data = view
        self._parameters += [parameter for parameter, _ in moves]
        self._views += [view for _, view in moves]
        self._addresses += [view.data_ptr() for _, view in moves]
        return homes

    def check(self) -> None:
        """Raise ``RuntimeError`` if a parameter was given other memory; local."""
        addresses = list(map(Tensor.data_ptr, self._parameters))
        if addresses != self._addresses:
            pairs = zip(self._names, addresses, self._addresses, strict=True)
            name = next(name for name, now, before in pairs if now != before)
            raise RuntimeError(
                f"parameter '{name}' is no longer in the memory that the node shares: with node_shared=True don't "
                "assign to parameter.data and don't move or convert the model; detach() the optimizer first"
            )

    @torch.no_grad()
    def make_private(self) -> None:
        """Give every parameter memory of this rank's own, with the same values; local."""
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.data = view.clone()

    def make_shared(self) -> None:
        """Give every parameter its shared memory again, whatever is there; local."""
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.data = view

    @torch.no_grad()
    def adopt(self) -> None:
        """Take over rank 0's values of all parameters, and share them again; collective.

        Rank 0 has them in shared memory, all others in private memory whose values are dropped.
        """
        topology = self._communicator.topology
        for parameter, view in zip(self._parameters, self._views, strict=True):
            values = view if self._communicator.rank == 0 else parameter.detach()
            self._communicator.broadcast(values)
            # rank 0 is of node 0, and has written there
            if topology.local_rank == 0 and topology.node != 0:
                view.copy_(values)
        self.make_shared()
        self._communicator.barrier()
