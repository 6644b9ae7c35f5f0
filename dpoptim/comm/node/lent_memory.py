"""Memory that each rank of a node lends to the others, who sum what lies there from where it lies. No MPI here.

Note [Lent memory]
------------------
To read another rank's private memory is to have the kernel copy it. What lies in memory that all ranks map is an
operand like any other: who sums it reads it once, and copies nothing. Every rank has an area of such memory, at an
address of its own; a tensor's address says whether it lies there, and where the others find it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpoptim.comm.node.shared_memory import Node, SharedMemory
from dpoptim.comm.summing import add_others_in_order
from dpoptim.partition import aligned

__all__ = ["LentMemory"]

_PAGE_BYTES = 1 << 12


class LentMemory:
    """One area of each rank of a node, mapped by all of them; construction is collective in the node.

    Parameters
    ----------
    node : Node
        The ranks.
    num_bytes : int
        The size of each area, > 0; the same on all.
    window_bytes : int
        What is summed at once.

    Raises
    ------
    OSError
        On every rank of the node, if there is no memory to share.
    """

    def __init__(self, node: Node, num_bytes: int, window_bytes: int) -> None:
        self._rank, self._num_bytes = node.rank, aligned(num_bytes, _PAGE_BYTES)
        # A data loader's memory is not taken: this may be as large as the model.
        self._memory = SharedMemory(node, self._num_bytes * node.world_size, counted=False)
        own = self._memory.tensor(torch.uint8, [1], self._offset_bytes(node.rank))
        self._starts: list[int] = node.all_gather_object(own.data_ptr())  # of each area, in its rank's own process
        self._window_bytes = window_bytes
        self._scratch = torch.empty(window_bytes, dtype=torch.uint8, device="cpu")
        self._windows: dict[tuple[Sequence[int], torch.dtype, int, int], list[list[Tensor]]] = {}
        self._views: dict[tuple[int, int, int], Tensor] = {}

    def tensor(self, start_bytes: int, dtype: torch.dtype, shape: Sequence[int], offset_bytes: int) -> Tensor:
        """Return a tensor ``start_bytes + offset_bytes`` behind the start of this rank's area; its own storage."""
        return self._memory.tensor(dtype, shape, self._offset_bytes(self._rank) + start_bytes + offset_bytes)

    def view(self, rank: int, address: int, num_bytes: int) -> Tensor | None:
        """Return the bytes at this address of a rank, as this rank sees them; None if they lie elsewhere."""
        key = rank, address, num_bytes
        found = self._views.get(key)
        if found is None and self._holds(rank, address, num_bytes):
            found = self._views[key] = self._at(rank, address, torch.uint8, num_bytes)
        return found

    def sum_part(self, addresses: Sequence[int], dtype: torch.dtype, start: int, numel: int, scale: float) -> bool:
        """Sum a part of a tensor over all ranks, and put ``scale`` times the sum in its place here.

        Sums are taken as everywhere (Note [Order of sums] in summing.py). Nobody else reads this part meanwhile.

        Parameters
        ----------
        addresses : tuple of int
            Where the tensor lies on each rank.
        dtype : torch.dtype
            Of the tensor; not one that is summed in another.
        start, numel : int
            The part.
        scale : float
            The factor of all ranks.

        Returns
        -------
        bool
            Whether that was done: the tensor lies in all ranks' areas.
        """
        key = addresses, dtype, start, numel
        windows = self._windows.get(key)
        if windows is None:
            windows = self._cut(addresses, dtype, start, numel)
            if windows is None:
                return False
            self._windows[key] = windows
        for values in windows:
            self._sum_window(values, scale)
        return True

    def _sum_window(self, values: Sequence[Tensor], scale: float) -> None:
        own = add_others_in_order(values, self._rank, self._scratch.view(values[0].dtype))
        if scale != 1.0:
            own.mul_(scale)

    def _cut(self, addresses: Sequence[int], dtype: torch.dtype, start: int, numel: int) -> list[list[Tensor]] | None:
        """Return every rank's values of a part, window by window."""
        size = dtype.itemsize
        if not all(self._holds(rank, address + start * size, numel * size) for rank, address in enumerate(addresses)):
            return None
        window = self._window_bytes // size
        return [
            [
                self._at(rank, address + first * size, dtype, min(window, start + numel - first))
                for rank, address in enumerate(addresses)
            ]
            for first in range(start, start + numel, window)
        ]

    def _holds(self, rank: int, address: int, num_bytes: int) -> bool:
        return 0 <= address - self._starts[rank] <= self._num_bytes - num_bytes

    def _at(self, rank: int, address: int, dtype: torch.dtype, numel: int) -> Tensor:
        return self._memory.tensor(dtype, [numel], self._offset_bytes(rank) + address - self._starts[rank])

    def _offset_bytes(self, rank: int) -> int:
        return rank * self._num_bytes
