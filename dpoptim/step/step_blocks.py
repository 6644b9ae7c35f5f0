"""Blocks: few flat tensors that an optimizer steps instead of the many tensors, or the large ones, of a model.

A step on CPU without a fused kernel is bound by two things. Many small tensors cost a dozen calls each, of a
microsecond or more. Large ones go through the memory a dozen times, since each call reads and writes all of them.
Both end when the same elementwise operations run on blocks of a size that fits a cache: small tensors are put
together into blocks, large ones are cut into blocks. Every element meets the same operations: the result is the same
bits as without blocks.

Tests: ``tests/step/test_flat_step.py``.

Note [State in blocks]
----------------------
Parameters and gradients are copied into a block and parameters out of it, at every step: they are the user's, who may
write to them, move them, or share their memory. State is the optimizer's: when the same parameters are stepped
together a second time, their entries in ``optimizer.state`` become views of the block, and need no copies any more.
A view is like any tensor for those who read, write, save or copy it. Each step compares the entries with the views
by identity and address; whatever is not a view any more (a loaded state, an entry that was replaced) is copied into
the block and becomes one again. So nothing is held that could be out of date: blocks are memory to work in, and the
truth is in ``param_groups`` and ``optimizer.state``.

Numbers of a parameter (``step``; ``eta``, ``mu``, ``mu_product``) must be equal throughout a block, which steps one.
They are compared at each step, and parameters are divided among blocks anew when they are not.

Note [Blocks of several rates]
------------------------------
Most optimizers move a parameter by ``lr`` times something that depends on neither the rate nor, but for weight decay,
on the parameter. A block whose members differ in these two is stepped at rate 1 without decay, with zeros in place of
the parameters: what comes out, times each member's own rate, is how they move. Decay is made beside it, with each
member's own factor. The result is equal to rounding.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor

from dpoptim.partition import group_by_size, picker
from dpoptim.tuning import TUNING

__all__ = ["Blocks", "is_plain"]

# Elements that small tensors fill at most together, and of the parts of a large one. So many that the calls hardly
# count, so few that a part, its gradient, its state and what is computed on the way stay in a cache: of the powers of 2
# from 2^13 to 2^19 the best with one thread (measured by the benchmark in docs/performance.md).
_TOGETHER_NUMEL = TUNING.block_numel
_PART_NUMEL = TUNING.part_numel
# torch gives a thread no less than 2^15 elements.
_NUMEL_PER_THREAD = 1 << 16

# The lists of one call: parameters, gradients, and one or more of state, each of one tensor a parameter.
Lists = Sequence[list[Any]]


class Blocks:
    """How the tensors of one call are stepped: in blocks, in parts, or as they are.

    Parameters
    ----------
    lists : sequence of list
        Parameters, gradients, then state. All gradients are dense.
    flat_below : int
        Parameters with fewer elements are put together into blocks.
    cut_large : bool
        Whether parameters that are larger than a block are cut: right for a step of many operations, useless for a
        fused one.
    have_rates : bool
        Whether all parameters, each of them plain, go into blocks whose members have rates of their own
        (Note [Blocks of several rates]).
    """

    def __init__(self, lists: Lists, *, flat_below: int, cut_large: bool, have_rates: bool = False) -> None:
        self._num_loads = 0
        self._cuts: list[_Cut] = []
        small: dict[Any, list[int]] = {}
        whole: list[int] = []
        cut_above = max(_PART_NUMEL, _NUMEL_PER_THREAD * torch.get_num_threads())
        for index, parameter in enumerate(lists[0]):
            entries = [entries[index] for entries in lists]
            if not is_plain(entries):
                whole.append(index)
            elif have_rates or parameter.numel() < flat_below:
                kinds = tuple((entry.dtype, entry.item() if entry.dim() == 0 else None) for entry in entries[2:])
                small.setdefault((parameter.dtype, entries[1].dtype, kinds), []).append(index)
            elif cut_large and parameter.numel() > cut_above:
                self._cuts.append(_Cut(index, cut_above))
            else:
                whole.append(index)
        self._blocks: list[_Block] = []
        for indices in small.values():
            sizes_bytes = [lists[0][index].nbytes for index in indices]
            for run in group_by_size(sizes_bytes, _TOGETHER_NUMEL * lists[0][indices[0]].itemsize):
                members = [indices[index] for index in run]
                if len(members) > 1 or have_rates:
                    self._blocks.append(_Block(members, lists, have_rates=have_rates))
                else:
                    whole += members
        self.whole = sorted(whole)

    def set_rates(self, rates: Sequence[float], decays: Sequence[float], *, decouples: bool, maximizes: bool) -> None:
        """Give each parameter its learning rate and its weight decay."""
        for block in self._blocks:
            block.set_rates(rates, decays, decouples=decouples, maximizes=maximizes)

    def take(self, lists: Lists) -> bool:
        """Whether the state still fits; changes nothing outside of the blocks."""
        return all(block.takes(lists) for block in self._blocks)

    def load(self, lists: Lists, state: Any) -> None:
        """Copy into the blocks what is not there already, and put blocks and parts into the lists instead."""
        self._num_loads += 1
        for block in self._blocks:
            block.load(lists, state if self._num_loads > 1 else None)  # Note [State in blocks]
        if not self._blocks and not self._cuts:
            return
        pieces: list[list[Any]] = [[entries[index] for index in self.whole] for entries in lists]
        for block in self._blocks:
            for entries, flat in zip(pieces, block.flat, strict=True):
                entries.append(flat)
        for cut in self._cuts:
            for entries, parts in zip(pieces, cut.parts(lists), strict=True):
                entries.extend(parts)
        for entries, new in zip(lists, pieces, strict=True):
            entries[:] = new

    def store(self, state: Any) -> None:
        """Copy out of the blocks what the step has changed."""
        for block in self._blocks:
            block.store()
            state.pop(block.flat[0], None)  # SGD stores its momentum with what it has stepped
        for cut in self._cuts:
            for part in cut.store():
                state.pop(part, None)


class _Block:
    """Small tensors put together: for each list one flat tensor, and the views of it that stand for the entries."""

    def __init__(self, members: Sequence[int], lists: Lists, *, have_rates: bool) -> None:
        self._members = members
        self._pick = picker(members)
        self._entries: list[_Entries] = []
        self.flat: list[Tensor] = []  # what is stepped
        for entries in lists:
            first = [entries[index] for index in members]
            self._entries.append(_Entries(first))
            flat = self._entries[-1].flat
            # A number is stepped in a tensor of its own, once for all members.
            self.flat.append(torch.empty_like(first[0]) if first[0].dim() == 0 else flat)
        self._rates: _Rates | None = None
        if have_rates:
            numels = [lists[0][index].numel() for index in members]
            self._rates = _Rates(self._entries[0].flat, self._entries[1].flat, numels)
            self.flat[0] = self._rates.moves
        self._to_store: list[Callable[[], None]] = []

    def set_rates(self, rates: Sequence[float], decays: Sequence[float], *, decouples: bool, maximizes: bool) -> None:
        assert self._rates is not None
        own = (self._pick(values) for values in (rates, decays))
        self._rates.set(*own, decouples=decouples, maximizes=maximizes)

    def takes(self, lists: Lists) -> bool:
        """Whether the members' state still is of one kind; changes nothing outside of the block."""
        for mine, stepped, entries in zip(self._entries[2:], self.flat[2:], lists[2:], strict=True):
            theirs = self._pick(entries)
            if not mine.are_in_place():
                return False
            if not mine.are(theirs):
                if not mine.match(theirs):
                    return False
                if stepped is not mine.flat:
                    mine.copy_in(theirs)
            if stepped is not mine.flat:
                number = mine.flat[0]
                if not torch.equal(mine.flat, number.expand_as(mine.flat)):
                    return False
                stepped.copy_(number)
        return True

    def load(self, lists: Lists, state: Any) -> None:
        """Copy into the block what is not there already, and give the state of its members to it."""
        self._to_store.clear()
        parameters = self._pick(lists[0])
        self._entries[0].copy_in(parameters)
        self._entries[1].copy_in(self._pick(lists[1]))
        for mine, stepped, entries in zip(self._entries[2:], self.flat[2:], lists[2:], strict=True):
            theirs = self._pick(entries)
            if mine.are(theirs):
                continue
            if stepped is mine.flat:
                mine.copy_in(theirs)
            if state is None or not mine.move_in(theirs, [state[parameter] for parameter in parameters]):
                self._to_store.append(_CopyOut(mine, theirs))
        self._to_store.append(_CopyOut(self._entries[0], parameters))
        if self._rates is not None:
            self._rates.begin()

    def store(self) -> None:
        if self._rates is not None:
            self._rates.end()
        for mine, stepped in zip(self._entries[2:], self.flat[2:], strict=True):
            if stepped is not mine.flat:
                mine.flat.fill_(stepped)
        for copy_out in self._to_store:
            copy_out()
        self._to_store.clear()


class _Rates:
    """Lets a block move by one call whose members have rates of their own (Note [Blocks of several rates])."""

    def __init__(self, values: Tensor, gradients: Tensor, numels: Sequence[int]) -> None:
        self._values = values
        self._gradients = gradients
        self._numels = torch.tensor(numels)
        self.moves = torch.empty_like(values)  # by how much the values move at rate 1
        self._rates = self._factors = self._decays = torch.empty(0)

    def set(self, rates: Sequence[float], decays: Sequence[float], *, decouples: bool, maximizes: bool) -> None:
        self._rates = self._spread(rates)
        self._factors = self._decays = torch.empty(0)
        if any(decays) and decouples:
            self._factors = self._spread([1 - rate * decay for rate, decay in zip(rates, decays, strict=True)])
        elif any(decays):  # torch changes the sign of the gradient first
            self._decays = self._spread([-decay for decay in decays] if maximizes else decays)

    def _spread(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=self._values.dtype).repeat_interleave(self._numels)

    def begin(self) -> None:
        self.moves.zero_()
        if len(self._factors):
            self._values.mul_(self._factors)
        if len(self._decays):
            self._gradients.addcmul_(self._values, self._decays)

    def end(self) -> None:
        self._values.addcmul_(self.moves, self._rates)


class _Entries:
    """One flat tensor, and views of it in the shapes of a list's entries."""

    def __init__(self, first: Sequence[Tensor]) -> None:
        self.flat = torch.empty(sum(entry.numel() for entry in first), dtype=first[0].dtype, device=first[0].device)
        parts = self.flat.split([entry.numel() for entry in first])
        self.views = [part.view(entry.shape) for part, entry in zip(parts, first, strict=True)]
        self._addresses = [view.data_ptr() for view in self.views]

    def are_in_place(self) -> bool:
        """Whether the views are still where they were made: nobody has given one of them other memory."""
        return list(map(Tensor.data_ptr, self.views)) == self._addresses

    def are(self, others: Sequence[Tensor]) -> bool:
        """Whether these are the views."""
        return all(map(is_, others, self.views))

    def match(self, others: Sequence[Tensor]) -> bool:
        """Whether others are alike, and no two of them one."""
        return len({other.data_ptr() for other in others}) == len(others) and all(
            other.dtype == view.dtype and other.shape == view.shape and other.device == view.device
            for other, view in zip(others, self.views, strict=True)
        )

    def copy_in(self, others: list[Tensor] | tuple[Tensor, ...]) -> None:
        torch._foreach_copy_(self.views, others)

    def move_in(self, others: Sequence[Tensor], states: Iterable[dict[str, Any]]) -> bool:
        """Put the views into the optimizer's state in place of these; return False if one of them is not there."""
        slots = []
        for other, entry in zip(others, states, strict=True):
            key = next((key for key, value in entry.items() if value is other), None)
            if key is None:
                return False
            slots.append((entry, key))
        for (entry, key), view in zip(slots, self.views, strict=True):
            entry[key] = view
        return True


@dataclass(frozen=True)
class _CopyOut:
    """Copies from a block to the tensors that it stands for."""

    block: _Entries
    others: list[Tensor] | tuple[Tensor, ...]

    def __call__(self) -> None:
        torch._foreach_copy_(self.others, self.block.views)


class _Cut:
    """A large parameter cut into parts, which are views of it, of its gradient and of its state."""

    def __init__(self, index: int, numel: int) -> None:
        self._index = index
        self._numel = numel
        self._numbers: list[tuple[Tensor, Tensor]] = []
        self._parameters: Sequence[Tensor] = ()

    def parts(self, lists: Lists) -> list[Sequence[Tensor]]:
        self._numbers.clear()
        wholes = [entries[self._index] for entries in lists]
        if not is_plain(wholes):  # any more
            return [[whole] for whole in wholes]
        self._parameters = wholes[0].detach().view(-1).split(self._numel)
        parts: list[Sequence[Tensor]] = [self._parameters]
        for whole in wholes[1:]:
            if whole.dim() == 0:  # each part counts for itself
                numbers = whole.repeat(len(self._parameters)).unbind()
                self._numbers.append((whole, numbers[0]))
                parts.append(numbers)
            else:
                parts.append(whole.detach().view(-1).split(self._numel))
        return parts

    def store(self) -> Sequence[Tensor]:
        """Take over the numbers; return the parts that were stepped."""
        for whole, stepped in self._numbers:
            whole.copy_(stepped)
        self._numbers.clear()
        parameters, self._parameters = self._parameters, ()
        return parameters


def is_plain(entries: Sequence[Any]) -> bool:
    """Whether a parameter, its gradient and its state are numbers and dense real arrays in one order on CPU."""
    parameter = entries[0]
    if parameter.dim() == 0 or not parameter.is_floating_point() or type(parameter) not in _PLAIN_TYPES:
        return False
    arrays = [entry for entry in entries if not (isinstance(entry, Tensor) and entry.dim() == 0)]
    return all(
        isinstance(entry, Tensor)
        and entry.device.type == "cpu"
        and entry.layout == torch.strided
        and entry.is_contiguous()
        and entry.shape == parameter.shape
        and type(entry) in _PLAIN_TYPES
        for entry in arrays
    )


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
