"""StateAccess: how the state of a wrapped optimizer is read and loaded, whole or in the parts that ranks have of it.

Tests: ``tests/behaviour/test_sharded.py``.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dpoptim.checks.alike import parameter_names
from dpoptim.checks.loadable import check_loadable
from dpoptim.comm.communicator import Communicator
from dpoptim.comm.errors import heard_if_left
from dpoptim.gradients.reducer import Reducer
from dpoptim.modes.mode import Mode
from dpoptim.modes.whole_state import devices_of, scatter_state
from dpoptim.step.classes import parameters_of
from dpoptim.step.kept_attributes import KeptAttributes, aliases_kept
from dpoptim.utils.consistency import raise_together
from dpoptim.utils.state_dict import NamedState, Slices, to_named, unique_names
from dpoptim.wrapping_optimizer import WrappingOptimizer

__all__ = ["StateAccess"]

# Key of the hook that compares a state with the optimizer while it is loaded, behind the user's own hooks.
_LAST_HOOK = -2


class StateAccess(WrappingOptimizer):
    """A wrapping optimizer whose state is whole on each rank, or in parts on all of them.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        The wrapped one.
    """

    _communicator: Communicator
    _kept_attributes: KeptAttributes
    _mode: Mode
    _module: nn.Module | None
    _reducer: Reducer

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's form, as ``torch.optim.Optimizer.state_dict``; local.

        Raises
        ------
        RuntimeError
            The state is sharded among ranks (``shard``, ``node_shared``).
        """
        self._mode.check_has_whole_state()
        return self._whole_state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, which is compared with the optimizer before anything is changed; local.

        Call it on every rank with the same state. See ``torch.optim.Optimizer.load_state_dict``; hooks registered for
        it see the state before the comparison.

        Raises
        ------
        ValueError
            The state has other groups, other shapes, or is one of another optimizer.
        """
        hooks: dict[int, Any] = self._optimizer_load_state_dict_pre_hooks
        hooks[_LAST_HOOK] = self._check_loadable
        is_torchs = type(self._optimizer).load_state_dict is Optimizer.load_state_dict
        if not is_torchs:  # whatever the class itself loads is right
            self._kept_attributes.load(state_dict.get("attributes", {}))
        try:
            with aliases_kept(self._optimizer):
                if is_torchs:
                    super().load_state_dict(state_dict)
                else:
                    self._optimizer.load_state_dict(state_dict)
        finally:
            del hooks[_LAST_HOOK]
        if is_torchs:
            self._kept_attributes.load(state_dict.get("attributes", {}))
        self._mode.take_over_state()

    def local_slices(self) -> Slices:
        """Return the elements of each parameter, flattened, whose state this rank holds; by name, local."""
        return self._mode.slices()

    def local_state_dict(self) -> NamedState:
        """Return the state that this rank holds, by name, in the form of :mod:`dpoptim.utils.state_dict`; local.

        It shares memory with the optimizer.
        """
        return {**self._mode.named_state(self._whole_state_dict), **self._kept_attributes.entry()}

    def load_local_state_dict(self, form: NamedState) -> None:
        """Load this rank's part of a state, copied, in the dtypes that it has; local.

        Parameters
        ----------
        form : NamedState
            With the slices and names of :meth:`local_state_dict`.
        """
        self._mode.load(self, form, self._kept_attributes.load)

    @heard_if_left("full_state_dict()")
    def full_state_dict(self, *, rank0_only: bool = True) -> dict[str, Any] | None:
        """Return the whole state in torch's form, as ``state_dict()`` of one process would; collective.

        One tensor is collected at a time, so that ranks that keep nothing need memory for one.

        Parameters
        ----------
        rank0_only : bool
            Whether rank 0 alone gets it.

        Returns
        -------
        dict or None
            None on ranks that get nothing.
        """
        self._reducer.meet("collecting the optimizer state", 1.0)
        return self._mode.gather(self, rank0_only=rank0_only)

    @heard_if_left("load_full_state_dict()")
    def load_full_state_dict(self, state_dict: Mapping[str, Any] | None) -> None:
        """Load rank 0's whole state, such as a plain torch ``state_dict()``, into all ranks; collective.

        Parameters
        ----------
        state_dict : mapping or None
            In torch's form; looked at on rank 0 only, where hooks of ``load_state_dict`` see it first.

        Raises
        ------
        ValueError, TypeError
            On every rank: the state has other groups, other shapes, or is one of another optimizer.
        """
        self._reducer.meet("loading an optimizer state", 1.0)
        error: Exception | None = None
        whole = None
        if self._communicator.rank == 0:
            try:
                whole = self._named(state_dict)
            except (TypeError, ValueError) as caught:
                error = caught
        raise_together(self._communicator, error)
        devices = devices_of(self._optimizer, self._names())
        self.load_local_state_dict(scatter_state(self._communicator, whole, self.local_slices(), devices))

    def _names(self) -> list[str]:
        """Return what to call each parameter."""
        return parameter_names(self.param_groups, self._module)

    def _whole_state_dict(self) -> dict[str, Any]:
        """Return a whole state as the class of the optimizer gives it, with what it keeps elsewhere; local."""
        is_torchs = type(self._optimizer).state_dict is Optimizer.state_dict
        own = super().state_dict if is_torchs else self._optimizer.state_dict
        return {**own(), **self._kept_attributes.entry()}

    def _named(self, state_dict: object) -> NamedState:
        """Return a whole state that fits, as its hooks leave it, by name and in the dtypes of the parameters; local."""
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping on rank 0, got {type(state_dict).__name__}")
        state_dict = dict(state_dict)
        for hook in list(self._optimizer_load_state_dict_pre_hooks.values()):
            state_dict = hook(self, state_dict) or state_dict
        self._check_loadable(self, state_dict)
        names, parameters = unique_names(self.param_groups, self._names()), parameters_of(self)
        whole = to_named(state_dict, [parameter.shape for parameter in parameters], names)
        for name, parameter in zip(names, parameters, strict=True):
            entry = whole["state"].get(name, {})
            for key, value in entry.items():
                if isinstance(value, Tensor) and key != "step" and parameter.is_floating_point():
                    entry[key] = value.to(parameter.dtype)
        return whole

    def _check_loadable(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        check_loadable(self._optimizer, state_dict, self._names())
