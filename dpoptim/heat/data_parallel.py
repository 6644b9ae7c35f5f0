"""``DataParallel`` and ``DataParallelMultiGPU`` with the arguments of Heat's classes, in the module of Heat's name.

Tests: ``tests/heat/test_heat.py``.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import heat
from torch import nn

import dpoptim.daso
from dpoptim.comm.roll_call import RollCall
from dpoptim.heat.dp_optimizer import DASO, DataParallelOptimizer
from dpoptim.utils.consistency import raise_together

__all__ = ["DataParallel", "DataParallelMultiGPU"]


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
        Whether gradients are averaged when backward ends, rather than while it goes on where that is faster. With
        several optimizers they are; without this flag a warning says so, as in Heat.

    Raises
    ------
    TypeError
        On all ranks, if an argument has another type on any.
    ValueError
        On all ranks, for what :class:`dpoptim.DataParallelOptimizer` raises one.

    Notes
    -----
    Collective: construction and ``backward()``. An optimizer may be passed on again. Another one that had one of the
    parameters before ends: its ``step`` is an error then. As in Heat the keys of ``state_dict()`` begin with
    ``module.``.
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
        if len(optimizers) > 1 and not blocking_parameter_updates:
            warnings.warn(
                "several optimizers average their gradients when backward ends: blocking_parameter_updates is True",
                stacklevel=2,
            )
            blocking_parameter_updates = True
        self.module = module
        self.comm = comm
        self.blocking_parameter_updates = blocking_parameter_updates
        for one in dict.fromkeys(optimizers):
            assert isinstance(one, DataParallelOptimizer)
            one.attach(comm, module, blocking=blocking_parameter_updates)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Return the model's output."""
        return self.module(*inputs, **kwargs)


class DataParallelMultiGPU(nn.Module):
    """A model for :class:`DASO`, in place of ``heat.nn.DataParallelMultiGPU``; on any number of GPUs or none.

    Parameters
    ----------
    module : torch.nn.Module
        The local model, on the device where it is to stay. Its weights are broadcast, not initialised anew.
    optimizer : DASO
        The one of this package, not Heat's.
    comm : heat.MPICommunication
        For Heat's sake; the ranks are those of ``optimizer``.

    Raises
    ------
    TypeError
        On all ranks, if ``optimizer`` or ``module`` has another type on any.

    Notes
    -----
    Construction is collective.
    """

    def __init__(self, module: nn.Module, optimizer: DASO, comm: Any = heat.MPI_WORLD) -> None:
        super().__init__()
        error = None
        if not isinstance(optimizer, DASO):
            kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
            error = TypeError(f"optimizer must be a dpoptim.heat.DASO, got {kind}")
        raise_together(RollCall.of(comm).communicator, error)
        optimizer.set_model(module)
        self.module = module
        self.comm = comm

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
        if isinstance(optimizer, dpoptim.daso.DASO):
            return TypeError("a DASO optimizer goes to DataParallelMultiGPU(module, optimizer), not to DataParallel")
        if not isinstance(optimizer, DataParallelOptimizer):
            kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
            return TypeError(f"optimizer must be a dpoptim.heat.DataParallelOptimizer, got {kind}")
    owners: dict[int, Any] = {}
    for optimizer in optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if owners.setdefault(id(parameter), optimizer) is not optimizer:
                return ValueError(
                    f"several optimizers must have different parameters, but two have one of shape "
                    f"{tuple(parameter.shape)}: give it to one of them"
                )
    return None
