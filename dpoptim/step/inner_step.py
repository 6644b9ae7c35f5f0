"""InnerStep: how the step of the wrapped optimizer is called, alike on all ranks whatever its class does. Local.

Note [Steps of other classes]
-----------------------------
torch's own classes use what is in their groups, their state and ``p.grad``, which is the same on all ranks. Classes
from elsewhere may do two more things. Some draw random numbers: ranks have seeds of their own, so that their replicas
would part at the first step. Such a step runs with generators that are common to all ranks: they begin as rank 0's, and
go on from step to step; a closure within runs with the rank's own. Others differentiate the gradients once more
(AdaHessian): the graph that ``backward(create_graph=True)`` leaves is that of this rank's own batch. The step is given
gradients without a graph, and what it raises then says why.
"""

import contextlib
import functools
import inspect
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.step.classes import has_own_step, is_known, parameters_of

__all__ = ["InnerStep", "needs_closure"]

_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


class InnerStep:
    """Makes the step of an optimizer beneath torch's hooks, which run on the wrapper (Note [Steps of other classes]).

    Parameters
    ----------
    optimizer : Optimizer
        The wrapped one.
    share : callable, optional
        Returns on every rank what rank 0 gives it; called now, collectively. None if there is one rank.
    """

    def __init__(self, optimizer: Optimizer, share: Callable[[Any], Any] | None) -> None:
        self._optimizer = optimizer
        self._generators: _CommonGenerators | None = None
        if share is not None and not is_known(type(optimizer)):
            self._generators = _CommonGenerators(optimizer, share)

    def __call__(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Make one step; under the gradient mode that the class itself chooses."""
        step = step_of(self._optimizer)
        takes_closure = not has_own_step(self._optimizer) and _accepts_closure(type(self._optimizer).step)
        if closure is not None or args or takes_closure:
            args = (closure, *args)
        if self._generators is None:
            return step(self._optimizer, *args, **kwargs)
        generators = self._generators
        if closure is not None:
            args = (generators.outside(closure), *args[1:])
        with generators.used(), self._gradients_without_graph(closure):
            return step(self._optimizer, *args, **kwargs)

    def with_common_generators(self) -> contextlib.AbstractContextManager[None]:
        """Let random numbers drawn within be the same on all ranks, if the class is not torch's."""
        return contextlib.nullcontext() if self._generators is None else self._generators.used()

    def generators(self) -> dict[str, Any]:
        """Return the states of the common generators, if the class has drawn from them, as plain values."""
        return {} if self._generators is None else self._generators.states()

    def load_generators(self, states: Mapping[str, Any]) -> None:
        """Draw on from what :meth:`generators` returned."""
        if self._generators is not None and states:
            self._generators.load(states)

    @contextlib.contextmanager
    def _gradients_without_graph(self, closure: object) -> Iterator[None]:
        found = [p for p in parameters_of(self._optimizer) if p.grad is not None and p.grad.requires_grad]
        if closure is not None or not found:
            yield
            return
        for parameter in found:
            assert parameter.grad is not None
            parameter.grad = parameter.grad.detach()
        try:
            yield
        except Exception as error:
            message = (
                f"{type(self._optimizer).__name__} can't be stepped on several ranks if it differentiates gradients "
                f"once more: the graph of backward(create_graph=True) is that of each rank's own batch ({error})"
            )
            raise raised_on_all_ranks(RuntimeError(message)) from error


class _CommonGenerators:
    """Generators of random numbers that are in the same state on all ranks."""

    def __init__(self, optimizer: Optimizer, share: Callable[[Any], Any]) -> None:
        devices = {p.device for p in parameters_of(optimizer)}
        self._devices = sorted((d for d in devices if d.type not in ("cpu", "meta")), key=str)
        self._states = self._at_start = share(self._read())
        own = [value for value in vars(optimizer).values() if isinstance(value, (torch.Generator, random.Random))]
        for generator, state in zip(own, share([_state_of(generator) for generator in own]), strict=True):
            _set_state(generator, state)
        self._outside: list[Any] | None = None

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Draw from them within."""
        self._outside = self._read()
        self._write(self._states)
        try:
            yield
        finally:
            self._states = self._read()
            self._write(self._outside)
            self._outside = None

    def states(self) -> dict[str, Any]:
        """Return those that were drawn from, as plain values."""
        (cpu, devices, pythons, numpys), start = self._states, self._at_start
        drawn: dict[str, Any] = {}
        if not torch.equal(cpu, start[0]):
            drawn["torch"] = cpu.clone()
        if any(not torch.equal(now, before) for now, before in zip(devices, start[1], strict=True)):
            drawn["devices"] = [state.cpu().clone() for state in devices]
        if pythons != start[2]:
            drawn["python"] = [pythons[0], list(pythons[1]), pythons[2]]
        if numpys and repr(numpys) != repr(start[3]):
            drawn["numpy"] = [numpys[0], numpys[1].tolist(), *numpys[2:]]
        return drawn

    def load(self, states: Mapping[str, Any]) -> None:
        """Go on with these."""
        cpu, devices, pythons, numpys = self._states
        if "torch" in states:
            cpu = states["torch"].clone()
        if "devices" in states and len(states["devices"]) == len(self._devices):
            devices = states["devices"]
        if "python" in states:
            version, numbers, gauss = states["python"]
            pythons = version, tuple(numbers), gauss
        if "numpy" in states and numpys:
            kind, numbers, *rest = states["numpy"]
            numpys = (kind, _as_numpy(numbers), *rest)
        self._states = [cpu, devices, pythons, numpys]

    def outside(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return a closure that draws from this rank's own generators."""

        def with_own_generators() -> Any:
            common = self._read()
            self._write(self._outside)
            try:
                return closure()
            finally:
                self._outside = self._read()
                self._write(common)

        return with_own_generators

    def _read(self) -> list[Any]:
        numpy = cast("Any", sys.modules.get("numpy"))
        return [
            torch.get_rng_state(),
            [torch.get_device_module(device).get_rng_state(device) for device in self._devices],
            random.getstate(),
            numpy and numpy.random.get_state(),
        ]

    def _write(self, states: Any) -> None:
        on_cpu, on_devices, pythons, numpys = states
        torch.set_rng_state(on_cpu)
        for device, state in zip(self._devices, on_devices, strict=True):
            torch.get_device_module(device).set_rng_state(state, device)
        random.setstate(pythons)
        numpy = cast("Any", sys.modules.get("numpy"))
        if numpys:
            numpy.random.set_state(numpys)


def _as_numpy(numbers: Sequence[int]) -> Any:
    return cast("Any", sys.modules["numpy"]).array(numbers, dtype="uint32")


def step_of(optimizer: Optimizer) -> Callable[..., Any]:
    """Return the step of an optimizer's class, or of this object, beneath the hooks that torch puts around it."""
    if has_own_step(optimizer):
        return functools.partial(_step_of_its_own, vars(optimizer)["step"])
    step: Any = type(optimizer).step
    return cast("Callable[..., Any]", step.__wrapped__ if getattr(step, "hooked", False) else step)


def _step_of_its_own(own: Callable[..., Any], optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the step of one object without its hooks, which have run."""
    hooks = {name: vars(optimizer)[name] for name in _HOOKS if name in vars(optimizer)}
    vars(optimizer).update({name: OrderedDict() for name in hooks})
    try:
        return own(*args, **kwargs)
    finally:
        vars(optimizer).update(hooks)


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether an optimizer steps with a closure only."""
    parameter = _closure_parameter(type(optimizer).step)
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _accepts_closure(step: Callable[..., Any]) -> bool:
    """Whether a step takes a closure as its first argument."""
    return _closure_parameter(step) is not None


@functools.cache
def _closure_parameter(step: Callable[..., Any]) -> inspect.Parameter | None:
    """Return what stands first behind ``self``, if it can be given by its position."""
    parameters = list(inspect.signature(step).parameters.values())[1:]
    first = parameters[0] if parameters else None
    if first is None or first.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
        return None
    if first.kind is inspect.Parameter.VAR_POSITIONAL:
        return first.replace(kind=inspect.Parameter.POSITIONAL_ONLY, default=None)
    return first


def _state_of(generator: torch.Generator | random.Random) -> Any:
    return generator.get_state() if isinstance(generator, torch.Generator) else generator.getstate()


def _set_state(generator: torch.Generator | random.Random, state: Tensor | tuple[Any, ...]) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(cast("Tensor", state))
    else:
        generator.setstate(cast("tuple[Any, ...]", state))
