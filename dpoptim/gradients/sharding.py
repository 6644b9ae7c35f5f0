"""Sharding: which rank owns which elements of the parameters, and the buckets that follow from it. Nothing collective.

Note [Who owns what]
--------------------
Optimizers that treat each element by itself are sharded by element: every bucket is cut into parts as equal as
possible, and the odd elements go to who has least, so that ranks own the same number to one element, whatever the
model. Large tensors are not copied: each is a bucket of its own; or, where their gradients lie in one memory, several
together are one. Optimizers that see a whole matrix are sharded by parameter: each goes to the rank that has least, the
largest first, and lies beside those of the same owner.

The division is made once and never changed, since the optimizer's state lies where the parameter was given. Buckets
of parameters that are frozen everywhere have an owner too, but are not exchanged until one of them is trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpoptim.gradients.bucket import Bucket, Division
from dpoptim.gradients.homes import is_large
from dpoptim.partition import group_by_size, owners_by_size

__all__ = ["Entry", "Sharding"]


@dataclass(frozen=True)
class Entry:
    """A parameter to shard: its number among all, itself, and its parameter group."""

    index: int
    parameter: Tensor
    group: int


@dataclass
class Sharding:
    """Divides parameters among owners, the same on all ranks (Note [Who owns what]).

    Attributes
    ----------
    num_owners : int
        How many ranks share them: all, or those of a node.
    num_ranks : int
        How many ranks take part in a reduction of a part; those from ``num_owners`` on own nothing.
    owner : int
        This rank's number among them.
    by_element : bool
        Whether parameters may be cut.
    in_node : bool
        Whether every node has all parts.
    """

    num_owners: int
    num_ranks: int
    owner: int
    by_element: bool
    in_node: bool
    _loads: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._loads = [0] * self.num_owners

    def divide(self, entries: Sequence[Entry], bucket_bytes: int, *, have_homes: bool = False) -> list[Bucket]:
        """Return sharded buckets of these parameters, in this order; each of one group, dtype and device.

        Parameters
        ----------
        entries : sequence of Entry
            In the order in which gradients are expected.
        bucket_bytes : int
            A bucket of several parameters has at most so many bytes.
        have_homes : bool
            Whether large gradients on the host are to lie in one memory (:meth:`Bucket.use_memory`).
        """
        kinds: dict[tuple[int, torch.dtype, torch.device, bool], list[Entry]] = {}
        alone: list[list[Entry]] = []
        for entry in entries:
            parameter = entry.parameter
            is_whole = self.by_element and is_large(parameter)  # not to be copied
            if is_whole and not (have_homes and parameter.device.type == "cpu" and parameter.is_contiguous()):
                alone.append([entry])
            else:
                kinds.setdefault((entry.group, parameter.dtype, parameter.device, is_whole), []).append(entry)
        together: list[list[Entry]] = []
        for members in kinds.values():
            sizes_bytes = [entry.parameter.nbytes for entry in members]
            together += [[members[i] for i in group] for group in group_by_size(sizes_bytes, bucket_bytes)]
        when_ready = {entry.index: when for when, entry in enumerate(entries)}
        members_of_all = sorted(alone + together, key=lambda members: when_ready[members[-1].index])
        if self.by_element:
            return [self._cut(members) for members in members_of_all]
        owners = dict(
            zip(when_ready, owners_by_size([entry.parameter.numel() for entry in entries], self._loads), strict=True)
        )
        return [self._give(members, owners) for members in members_of_all]

    def _cut(self, members: Sequence[Entry]) -> Bucket:
        """Divide a bucket by element."""
        quotient, remainder = divmod(sum(entry.parameter.numel() for entry in members), self.num_owners)
        counts = [quotient] * self.num_owners
        for owner in sorted(range(self.num_owners), key=lambda owner: self._loads[owner])[:remainder]:
            counts[owner] += 1
        self._loads = [load + count for load, count in zip(self._loads, counts, strict=True)]
        return self._bucket(members, counts)

    def _give(self, members: Sequence[Entry], owners: dict[int, int]) -> Bucket:
        """Divide a bucket by parameter: those of one owner lie together."""
        counts = [0] * self.num_owners
        for entry in members:
            counts[owners[entry.index]] += entry.parameter.numel()
        return self._bucket(sorted(members, key=lambda entry: owners[entry.index]), counts)

    def _bucket(self, members: Sequence[Entry], counts: Sequence[int]) -> Bucket:
        nothing = [0] * (self.num_ranks - self.num_owners)
        division = Division((*counts, *nothing), self.owner, self.in_node)
        return Bucket([entry.index for entry in members], [entry.parameter for entry in members], division)
