"""``DataParallelOptimizer`` and ``DataParallel`` with the arguments of Heat's classes."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

import dpoptim.optimizer
from dpoptim.daso import DASO
from dpoptim.roll_call import RollCall
from dpoptim.utils.consistency import raise_together

__all__ = ["DataParallel", "DataParallelOptimizer"]


class DataParallelOptimizer(dpoptim.optimizer.DataParallelOptimizer):
    """A torch optimizer for data parallelism, in place of ``heat.optim.DataParallelOptimizer``.

    Pass it to a :class:`DataParallel`, which broadcasts weights and begins to average gradients. From then on it is a
    :class:`dpoptim.DataParallelOptimizer`, with all that it has: schedulers, groups, ``state_dict``, clipping,
    ``batch_weight``. Unlike Heat's, ``step`` makes the step at once, with blocking communication or without.

    Parameters
    ----------
    torch_optimizer : torch.optim.Optimizer
        The optimizer that makes the step on every rank.
    blocking : bool
        Whether gradients are averaged when backward ends, rather than while it goes on where that is faster
        (``overlap=False`` or ``"auto"``). As in Heat, the :class:`DataParallel` decides.

    Attributes
    ----------
    torch_optimizer : torch.optim.Optimizer
        As given.
    blocking_parameter_updates : bool
        Whether communication is blocking.

    Raises
    ------
    TypeError
        ``torch_optimizer`` is not a ``torch.optim.Optimizer``, or ``blocking`` not a bool.

    Notes
    -----
    Construction is local. Learning rate schedulers may be made from this or from ``torch_optimizer``, before or after
    it is passed on.
    """

    def __init__(self, torch_optimizer: torch.optim.Optimizer, blocking: bool = False) -> None:
        if not isinstance(torch_optimizer, torch.optim.Optimizer):
            kind = type(torch_optimizer).__name__
            raise TypeError(f"torch_optimizer must be a torch.optim.Optimizer, got {kind}")
        if isinstance(torch_optimizer, dpoptim.optimizer.DataParallelOptimizer):
            raise TypeError("torch_optimizer is already a DataParallelOptimizer: wrap the torch optimizer, once")
        if not isinstance(blocking, bool):
            raise TypeError(f"blocking must be a bool, got {type(blocking).__name__}")
        self.blocking_parameter_updates = blocking
        self._optimizer = torch_optimizer
        self._is_attached = False
        # What a scheduler, a hook or load_state_dict needs of this before attach() makes it whole.
        self._patch_step_function()
        hooks = {name: value for name, value in vars(torch_optimizer).items() if name.endswith("_hooks")}
        self.__dict__.update(hooks)

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The wrapped optimizer."""
        return self._optimizer

    def attach(self, comm: Any, module: nn.Module, *, blocking: bool) -> None:
        """Begin to average gradients over the ranks of ``comm``; collective. :class:`DataParallel` calls it."""
        self.blocking_parameter_updates = blocking
        super().__init__(self._optimizer, comm, module=module, overlap=False if blocking else "auto")
        self._is_attached = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step with the mean gradients; see :meth:`dpoptim.DataParallelOptimizer.step`.

        Raises
        ------
        RuntimeError
            No :class:`DataParallel` has this optimizer yet.
        """
        if not self._is_attached:
            raise RuntimeError(_NOT_ATTACHED)
        step = dpoptim.optimizer.DataParallelOptimizer.step
        return getattr(step, "__wrapped__", step)(self, closure)  # this class's own step has run the hooks

    def __getattr__(self, name: str) -> NoReturn:
        """Say why there is no such attribute yet."""
        if name.startswith("__") or self.__dict__.get("_is_attached"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r} yet: {_NOT_ATTACHED}")

    def __repr__(self) -> str:
        return super().__repr__() if self._is_attached else f"{type(self).__name__} of {self._optimizer!r}"


_NOT_ATTACHED = "pass the optimizer to DataParallel(module, comm, optimizer) first, which averages its gradients"


class DataParallel(nn.Module):
    """A model whose gradients are averaged over ranks, in place of ``heat.nn.DataParallel``.

    Its weights and buffers are broadcast from rank 0; nothing is initialised anew and no seed is set.

    Parameters
    ----------
    module : torch.nn.Module
        The local model, on the device where it is to stay.
    comm : heat.MPICommunication or mpi4py.MPI.Comm
        The ranks that train together: ``ht.MPI_WORLD``, the ``comm`` of a DNDarray, a ``Split`` of one.
    optimizer : DataParallelOptimizer, or list or tuple of them
        Those of this package, not Heat's.
    blocking_parameter_updates : bool
        Whether gradients are averaged when backward ends, rather than while it goes on where that is faster.

    Raises
    ------
    TypeError
        On all ranks, if an argument has another type on any.
    ValueError
        On all ranks, for what :class:`dpoptim.DataParallelOptimizer` raises one.

    Notes
    -----
    Collective: construction and ``backward()``. As in Heat the keys of ``state_dict()`` begin with ``module.``.
    """

    def __init__(
        self,
        module: nn.Module,
        comm: Any,
        optimizer: DataParallelOptimizer | Sequence[DataParallelOptimizer],
        blocking_parameter_updates: bool = False,
    ) -> None:
        super().__init__()
        optimizers = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
        communicator = RollCall.of(comm).communicator
        raise_together(communicator, _argument_error(module, optimizers, blocking_parameter_updates))
        self.module = module
        self.comm = comm
        self.blocking_parameter_updates = blocking_parameter_updates
        for one in optimizers:
            assert isinstance(one, DataParallelOptimizer)
            one.attach(comm, module, blocking=blocking_parameter_updates)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Return the model's output."""
        return self.module(*inputs, **kwargs)


def _argument_error(module: object, optimizers: Sequence[Any], blocking: object) -> Exception | None:
    if not isinstance(module, nn.Module):
        return TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(blocking, bool):
        return TypeError(f"blocking_parameter_updates must be a bool, got {type(blocking).__name__}")
    if not optimizers:
        return ValueError("optimizer must be a DataParallelOptimizer or several, got none")
    for optimizer in optimizers:
        if isinstance(optimizer, DASO):
            return TypeError("a DASO optimizer goes to DataParallelMultiGPU(module, optimizer), not to DataParallel")
        if not isinstance(optimizer, DataParallelOptimizer):
            kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
            return TypeError(f"optimizer must be a dpoptim.heat.DataParallelOptimizer, got {kind}")
        if optimizer._is_attached:
            return ValueError("optimizer belongs to another DataParallel: make a new one, after detach() of this one")
    return None
