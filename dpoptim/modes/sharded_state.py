"""ShardedState: the state of an optimizer of which each rank has what belongs to the parameters that it owns.

Tests: ``tests/behaviour/test_sharded.py``.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dpoptim.comm.communicator import Communicator
from dpoptim.modes.agreed_division import OptionsWatch
from dpoptim.modes.mode import Wrapper
from dpoptim.modes.whole_state import devices_of, gather_state
from dpoptim.step.classes import parameters_of
from dpoptim.step.kept_attributes import aliases_kept
from dpoptim.step.sharded_step import ShardedStep
from dpoptim.step.units import State
from dpoptim.utils.state_dict import NamedState, Slices, from_named, groups_of, is_slice, shard, to_named, unique_names

__all__ = ["ShardedState"]


class ShardedState:
    """The state of one optimizer of which this rank has a part, by name.

    Parameters
    ----------
    optimizer : Optimizer
        The wrapped one.
    communicator : Communicator
        Of the ranks that have parts.
    step : ShardedStep
        Has the part of this rank.
    options : OptionsWatch
        Notes the options of the groups that come with a state.
    names : callable
        Returns what to call each parameter.
    by_element : bool
        Whether parameters are cut.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        communicator: Communicator,
        step: ShardedStep,
        options: OptionsWatch,
        names: Callable[[], list[str]],
        *,
        by_element: bool,
    ) -> None:
        self._optimizer = optimizer
        self._communicator = communicator
        self._step = step
        self._options = options
        self._names = names
        self._by_element = by_element

    @property
    def is_new(self) -> bool:
        """Whether the optimizer was given another ``state`` than the one that stands for the sharded one."""
        return self._optimizer.state is not self._step.outer_state

    def take_over(self) -> None:
        """Keep this rank's part of the whole state that the optimizer has; local."""
        held, param_groups = self._optimizer.state, self._optimizer.param_groups
        parameters = parameters_of(self._optimizer)
        state = {number: held[p] for number, p in enumerate(parameters) if p in held}
        others = {key: value for key, value in held.items() if not isinstance(key, Tensor)}
        groups = groups_of({"param_groups": param_groups}, param_groups)
        shapes = [parameter.shape for parameter in parameters]
        whole = to_named({"state": state, "param_groups": groups}, shapes, self._unique_names())
        self._load_own(shard({**whole, **({"unnamed": others} if others else {})}, self.slices()))

    def slices(self) -> Slices:
        """Return which elements of each parameter this rank owns, by name; local."""
        owned = self._step.slices()
        return {name: owned.get(index, (0, 0)) for index, name in enumerate(self._unique_names())}

    def named_state(self) -> NamedState:
        """Return this rank's part; local, shares memory with the optimizer."""
        param_groups, names = self._optimizer.param_groups, self._unique_names()
        shapes = dict(zip(names, (tuple(p.shape) for p in parameters_of(self._optimizer)), strict=True))
        rest = iter(names)
        named: NamedState = {
            "param_groups": [{**group, "params": [next(rest) for _ in group["params"]]} for group in param_groups],
            "slices": self.slices(),
            "shapes": shapes,
            "state": {},
            **({"unnamed": dict(self._step.outer_state)} if self._step.outer_state else {}),
        }
        for index, entry in sorted(self._step.state().items()):
            name = names[index]
            values = named["state"][name] = dict(entry)
            if self._by_element:
                continue
            for key, value in values.items():
                if isinstance(value, Tensor) and tuple(value.shape) == shapes[name] != ():
                    values[key] = value.reshape(-1)
                elif is_slice(named, name, key):
                    named.setdefault("whole", {}).setdefault(name, []).append(key)
        return named

    def load(
        self, wrapper: Optimizer, named_state: NamedState, load_attributes: Callable[[Mapping[str, Any]], object]
    ) -> None:
        """Load this rank's part, copied; local.

        Parameters
        ----------
        wrapper : Optimizer
            Whose groups are loaded.
        named_state : NamedState
            With this rank's slices.
        load_attributes : callable
            Loads what the class of the optimizer keeps elsewhere.
        """
        groups = groups_of(named_state, wrapper.param_groups)
        with aliases_kept(self._optimizer):
            Optimizer.load_state_dict(wrapper, {"state": {}, "param_groups": groups})
        load_attributes(named_state.get("attributes", {}))
        self._load_own(named_state)

    def gather(self, wrapper: Any, *, rank0_only: bool) -> dict[str, Any] | None:
        """Collect the whole state, one tensor at a time, as ``state_dict()`` of one process would give it; collective.

        Hooks of ``state_dict`` run on the ranks that get it.
        """
        for pre_hook in list(wrapper._optimizer_state_dict_pre_hooks.values()):
            pre_hook(wrapper)
        whole = gather_state(self._communicator, wrapper.local_state_dict(), self._devices(), rank0_only=rank0_only)
        if whole is None:
            return None
        state_dict = from_named(whole)
        for post_hook in list(wrapper._optimizer_state_dict_post_hooks.values()):
            state_dict = post_hook(wrapper, state_dict) or state_dict
        return state_dict

    def give_up(self, wrapper: Wrapper) -> NamedState | None:
        """Return the whole state on every rank, and leave the optimizer without one; collective."""
        own = wrapper.local_state_dict()
        whole = gather_state(self._communicator, own, self._devices(), rank0_only=False, drops_torn=True)
        self._optimizer.state = defaultdict(dict)
        return whole

    def _unique_names(self) -> list[str]:
        return unique_names(self._optimizer.param_groups, self._names())

    def _devices(self) -> dict[str, Any]:
        return devices_of(self._optimizer, self._names())

    def _load_own(self, named_state: NamedState) -> None:
        """Take over a state with this rank's slices; local."""
        state: dict[int, State] = {}
        for index, name in enumerate(self._unique_names()):
            entry = named_state["state"].get(name)
            if entry:
                state[index] = {
                    key: value.view(tuple(named_state["shapes"][name]))
                    if not self._by_element and is_slice(named_state, name, key)
                    else value
                    for key, value in entry.items()
                }
        self._options.note()
        self._step.outer_state.clear()
        self._step.outer_state.update(copy.deepcopy(named_state.get("unnamed", {})))
        self._step.load(state)
