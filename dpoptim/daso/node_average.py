"""The mean of parameters over nodes, computed while training goes on.

Tests: ``tests/daso/test_daso.py``.

Note [Differences travel]
-------------------------
Nodes do not send their parameters but the differences to the last mean, which every node knows to the bit. The sum is
the same, but on a narrow wire (:func:`~dpoptim.comm_hooks.bf16_compress`) rounding is then relative to what has changed
since, not to the parameters: bfloat16 parameters would lose every update below their 256th part.

Note [All ranks drive the network]
----------------------------------
The ranks of a node hold the same parameters, so each exchanges a part of them with its counterparts on the other
nodes, and the node puts the parts together when they have come. Where nodes have different numbers of ranks, there are
as many parts as the smallest node has ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.work import Work
from dpoptim.comm_hooks import CommHook
from dpoptim.daso.state_average import reals
from dpoptim.gradients.bucket import Bucket
from dpoptim.partition import even_counts, start_offsets

__all__ = ["NodeAverage"]


class _Flat:
    """Parameters of one dtype and device, and the last mean of their values that all nodes know.

    ``anchor`` is replaced, never written to: a ``state_dict`` may hold it.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.indices: list[int] = []
        self.parameters: list[Tensor] = []
        self.anchor = torch.empty(0, dtype=dtype, device=device)
        self.counts: list[int] = []
        self.part: Tensor | None = None

    def add(self, index: int, parameter: Tensor) -> None:
        self.indices.append(index)
        self.parameters.append(parameter)
        self.anchor = torch.cat([self.anchor, self._values([parameter])])

    def difference(self) -> Tensor:
        return self._values(self.parameters).sub_(self.anchor)

    def merge(self, weight: float) -> None:
        means = torch.split(self.anchor, [reals(parameter).numel() for parameter in self.parameters])
        for parameter, flat_mean in zip(self.parameters, means, strict=True):
            values = reals(parameter)
            mean = flat_mean.view(values.shape)
            values.copy_(mean if weight == 1.0 else torch.lerp(values.to(mean.dtype), mean, weight))

    def _values(self, parameters: Sequence[Tensor]) -> Tensor:
        return torch.cat([reals(parameter).reshape(-1).to(self.anchor.dtype) for parameter in parameters])


class NodeAverage:
    """Averages parameters over nodes, in the background where the communicator allows it.

    Parameters
    ----------
    node : Communicator
        The ranks of this node.
    across : Communicator or None
        This rank and its counterparts on the other nodes; None on a rank that has none everywhere.
    num_parts : int
        How many ranks of each node take part in the exchange: those with the lowest local ranks.
    comm_hook : callable
        What travels, and how it is summed; see :mod:`dpoptim.comm_hooks`.
    chunk_numel : int
        The parameters travel in messages of at most so many elements.

    Attributes
    ----------
    is_pending : bool
        Whether an exchange was started and not finished.
    """

    def __init__(
        self, node: Communicator, across: Communicator | None, *, num_parts: int, comm_hook: CommHook, chunk_numel: int
    ) -> None:
        self.is_pending = False
        self._node = node
        self._across = across
        self._num_parts = num_parts
        self._comm_hook = comm_hook
        self._chunk_numel = chunk_numel
        self._flats: dict[tuple[torch.dtype, torch.device], _Flat] = {}
        self._covered: set[int] = set()
        self._works: list[Work] = []
        self._differences: dict[int, Tensor] = {}

    @property
    def numel(self) -> int:
        """How many elements an exchange has; must be the same on all ranks."""
        return sum(flat.anchor.numel() for flat in self._flats.values())

    def forget(self) -> None:
        """Cover no parameter any more; not while an exchange is pending."""
        assert not self.is_pending
        self._flats.clear()
        self._covered.clear()

    @torch.no_grad()
    def cover(self, parameters: Sequence[Tensor]) -> None:
        """Include those of these parameters in the average that are trained; local.

        To be called before each step: a parameter's value when it is first included, before its first step, is the
        same on all nodes.
        """
        for index, parameter in enumerate(parameters):
            if index in self._covered or not parameter.requires_grad:
                continue
            self._covered.add(index)
            values = reals(parameter)
            dtype = torch.float32 if values.element_size() < 4 else values.dtype
            flat = self._flats.setdefault((dtype, values.device), _Flat(dtype, values.device))
            flat.add(index, parameter)

    @torch.no_grad()
    def measure(self) -> bool:
        """Take the differences to the last mean, and return whether all of them are finite; local."""
        self._differences = {number: flat.difference() for number, flat in enumerate(self._flats.values())}
        return all(bool(torch.isfinite(difference).all()) for difference in self._differences.values())

    @torch.no_grad()
    def start(self, share: float) -> None:
        """Start the exchange of what :meth:`measure` has taken; collective, returns at once where threads allow it.

        Parameters
        ----------
        share : float
            This node's share in the mean; the shares of all nodes sum to one.
        """
        assert not self.is_pending
        self.is_pending = True
        for number, flat in enumerate(self._flats.values()):
            # The parts lie on the host, so that the sum needs neither the device nor a stream of it.
            numel, local_rank = flat.anchor.numel(), self._node.rank
            own = even_counts(numel, self._num_parts)
            flat.counts = own + [0] * (self._node.world_size - self._num_parts)
            begin = start_offsets(flat.counts)[local_rank]
            flat.part = self._differences[number][begin : begin + flat.counts[local_rank]].mul_(share).cpu()
            if self._across is None:
                continue
            for chunk in flat.part.split(self._chunk_numel):
                if chunk.numel():
                    bucket = Bucket([0], [chunk])
                    bucket.pack([chunk], 1.0)
                    self._works.append(self._comm_hook(self._across, bucket))
        self._differences.clear()

    def wait(self) -> None:
        """Block until what the other nodes have sent is here; local, the others have sent it already."""
        for work in self._works:
            work.wait()
        self._works.clear()

    @torch.no_grad()
    def finish(self, weight: float) -> None:
        """Move parameters towards the mean of what was sent; collective in the node, blocks.

        Parameters
        ----------
        weight : float
            Of the mean; the parameter's present value has one minus that. With 1 parameters become the mean, the same
            bits on all nodes.
        """
        self.wait()
        for flat in self._flats.values():
            assert flat.part is not None
            whole = flat.part.new_empty(flat.anchor.numel())
            self._node.all_gather(whole, flat.part, counts=flat.counts)
            flat.anchor = flat.anchor + whole.to(flat.anchor.device)
            flat.part = None
            flat.merge(weight)
        self.is_pending = False

    def state_dict(self) -> list[dict[str, Any]]:
        """Return what this rank needs to go on from here; local, waits for a pending exchange."""
        self.wait()
        return [
            {"indices": list(flat.indices), "anchor": flat.anchor, "counts": list(flat.counts), "part": flat.part}
            for flat in self._flats.values()
        ]

    def load_state_dict(
        self, state: Sequence[dict[str, Any]], parameters: Sequence[Tensor], *, is_pending: bool
    ) -> None:
        """Go on from there; local. Anchors and parts are copied."""
        self.wait()
        self._flats.clear()
        self._covered.clear()
        for entry in state:
            first = reals(parameters[entry["indices"][0]])
            anchor = entry["anchor"].to(first.device, copy=True)
            flat = self._flats[anchor.dtype, anchor.device] = _Flat(anchor.dtype, anchor.device)
            flat.indices = list(entry["indices"])
            flat.parameters = [parameters[index] for index in flat.indices]
            flat.anchor = anchor
            flat.counts = list(entry["counts"])
            flat.part = None if entry["part"] is None else entry["part"].clone().cpu()
            self._covered.update(flat.indices)
        self.is_pending = is_pending
