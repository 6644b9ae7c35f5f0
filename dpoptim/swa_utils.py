"""Averages of weights: the names of ``torch.optim.swa_utils``, under data parallelism.

They are torch's own, except :func:`update_bn`. Averages are taken by every rank for itself and communicate nothing:
replicas are the same bits on all ranks, so their averages are too. ``SWALR`` takes a ``DataParallelOptimizer`` as any
torch optimizer.

What differs between ranks while they train are the running statistics of BatchNorm, in the model's buffers. An
``AveragedModel`` copies them (or averages them, with ``use_buffers=True``) as they are on each rank: call
:func:`update_bn` at the end, or ``DataParallelOptimizer.average_buffers`` before each ``update_parameters``.

Note [Whole data set]
---------------------
BatchNorm measures a batch: its mean and its unbiased variance, over all values of a feature. torch's ``update_bn``
leaves the plain average of these over all batches. A loader's last batch is often smaller, all the more with one last
batch a rank, and would count as much as a full one. Here a batch counts as much as it has values: the running mean
is ``sum(n * mean) / sum(n)`` and the running variance ``sum(n * var) / sum(n)``, over all batches of all ranks. The
mean is thus the mean of the whole data set, however it is divided; with batches of equal size both are torch's.
As in torch, the variance is the one within batches, which the layer has trained with.

Each batch's statistics are read from the layer itself, which with ``momentum = 1`` leaves them in its buffers. They
are summed in float64, on every rank and over ranks.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.optim.swa_utils
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import (
    SWALR,
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.comm.roll_call import RollCall
from dpoptim.fall_through import fall_through
from dpoptim.utils.consistency import raise_together

__all__ = [
    "SWALR",
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = fall_through(__name__, torch.optim.swa_utils)


@torch.no_grad()
def update_bn(
    loader: Iterable[Any], model: nn.Module, device: int | torch.device | None = None, *, comm: Any = None
) -> None:
    """Measure the running statistics of all BatchNorm layers anew, on the data of all ranks; collective, blocks.

    Every rank makes one pass over its own part of the data, without communication and with as many batches as it
    has, none included. Then ``running_mean``, ``running_var`` and ``num_batches_tracked`` of every BatchNorm layer
    are those of all batches of all ranks, weighted by size (Note [Whole data set]), the same bits on every rank. With
    batches of equal size they are what ``torch.optim.swa_utils.update_bn`` gives in one process on all of them.

    Collective whether the model has BatchNorm layers or not; without any, the loader is not touched. The model is in
    training mode during the pass; momenta and the training flag of each module are as before at the end.

    Parameters
    ----------
    loader : iterable
        This rank's part of the data: batches that are a tensor, or a list or tuple whose first element is. The parts
        should not overlap; ``torch.utils.data.DistributedSampler`` repeats samples to make them equal unless
        ``drop_last=True``, and repeated samples count twice.
    model : torch.nn.Module
        The same on all ranks, for example an :class:`AveragedModel`.
    device : torch.device or int, optional
        Where batches are moved before the model is called.
    comm : mpi4py.MPI.Comm or heat MPICommunication, optional
        The ranks that have a part of the data; by default all (``COMM_WORLD``).

    Raises
    ------
    TypeError
        ``model`` is no module, or ``comm`` is no communicator.
    ValueError
        The BatchNorm layers differ between ranks, or are lazy and have no shape yet.
    RuntimeError
        A rank is elsewhere: in ``backward()``, at the end of the program.

    Notes
    -----
    Whatever the loader or the model raises on one rank is raised on all, a ``TypeError`` or ``ValueError`` as such,
    anything else as ``RuntimeError`` on the other ranks. The statistics are then as before.
    """
    roll_call = RollCall.of(comm)
    communicator = roll_call.communicator
    roll_call.check_in("update_bn", 1.0)
    raise_together(communicator, _model_error(model))
    layers = _tracking_layers(model)
    _check_layers_agree(communicator, layers)
    if not layers:
        return
    with _measuring(model, layers) as measured:
        error = None
        try:
            with _eager():
                _pass_over(loader, model, device)
            for statistics in measured:
                statistics.check_complete()
        except Exception as caught:  # raised below, on all ranks
            error = caught
        roll_call.check_in("the end of update_bn", 1.0)
        raise_together(communicator, error)
        totals = torch.cat([statistics.flat() for statistics in measured])
        communicator.all_reduce(totals)
        for statistics, total in zip(measured, totals.split([s.numel for s in measured]), strict=True):
            statistics.write_back(total)


class _LayerStatistics:
    """Sums what one BatchNorm layer measures of each batch of this rank."""

    def __init__(self, name: str, layer: _BatchNorm) -> None:
        assert layer.running_mean is not None
        self._name = name
        self._layer = layer
        self._num_values = 0
        self._num_batches = 0
        self._sums = torch.zeros(2, layer.num_features, dtype=torch.float64, device=layer.running_mean.device)
        self.numel = 2 + self._sums.numel()

    def add_batch(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        """Take up the batch that the layer has just seen; a forward hook."""
        if not layer.training:
            return  # its statistics were used, not measured
        batch: Tensor = args[0] if args else next(iter(kwargs.values()))
        num_values = batch.numel() // self._layer.num_features
        assert self._layer.running_mean is not None
        assert self._layer.running_var is not None
        self._num_values += num_values
        self._num_batches += 1
        self._sums[0].add_(self._layer.running_mean.double(), alpha=num_values)
        self._sums[1].add_(self._layer.running_var.double(), alpha=num_values)

    def check_complete(self) -> None:
        """Raise if the layer has seen batches that its forward hook has not."""
        tracked = self._layer.num_batches_tracked
        if tracked is not None and int(tracked) > self._num_batches:
            raise RuntimeError(
                f"BatchNorm layer '{self._name}' has seen {int(tracked)} batches, its forward hook only "
                f"{self._num_batches}: call the layer itself, not its forward method"
            )

    def flat(self) -> Tensor:
        """Return the sums as one float64 tensor on the CPU: number of values, of batches, then the features'."""
        counts = torch.tensor([self._num_values, self._num_batches], dtype=torch.float64, device="cpu")
        return torch.cat([counts, self._sums.cpu().view(-1)])

    def write_back(self, total: Tensor) -> None:
        """Give the layer its statistics, from the sum of all ranks' flat tensors."""
        num_values, num_batches = total[:2].tolist()
        if not num_batches:
            return  # no rank has called it: it stays reset, as in torch
        mean, var = (total[2:] / num_values).view_as(self._sums)
        for buffer, value in (
            (self._layer.running_mean, mean),
            (self._layer.running_var, var),
            (self._layer.num_batches_tracked, torch.tensor(int(num_batches), device="cpu")),
        ):
            if buffer is not None:
                buffer.copy_(value)


@contextlib.contextmanager
def _measuring(model: nn.Module, layers: dict[str, _BatchNorm]) -> Iterator[list[_LayerStatistics]]:
    """Let the layers measure each batch by itself; put everything else, and on an error all, back at the end."""
    training = {module: module.training for module in model.modules()}
    momenta = {layer: layer.momentum for layer in layers.values()}
    buffers = [buffer for layer in layers.values() for buffer in layer.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    measured = [_LayerStatistics(name, layer) for name, layer in layers.items()]
    handles = [
        layer.register_forward_hook(statistics.add_batch, with_kwargs=True)
        for layer, statistics in zip(layers.values(), measured, strict=True)
    ]
    try:
        model.train()
        for layer in layers.values():
            layer.reset_running_stats()
            layer.momentum = 1.0
        yield measured
    except BaseException:
        for buffer, values in zip(buffers, before, strict=True):
            buffer.copy_(values)
        raise
    finally:
        for handle in handles:
            handle.remove()
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        model.train(training[model])
        for module, flag in training.items():
            module.training = flag


def _pass_over(loader: Iterable[Any], model: nn.Module, device: int | torch.device | None) -> None:
    for item in loader:
        batch = item[0] if isinstance(item, (list, tuple)) else item
        model(batch if device is None else batch.to(device))


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Run compiled models uncompiled: they would be compiled anew for each batch, because of the hooks."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled then, and importing it takes seconds
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _tracking_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers that have running statistics, by name."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.track_running_stats
    }
    return dict(sorted(found.items()))


def _model_error(model: object) -> Exception | None:
    if not isinstance(model, nn.Module):
        return TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, layer in _tracking_layers(model).items():
        if layer.running_mean is not None and is_lazy(layer.running_mean):
            return ValueError(
                f"BatchNorm layer '{name}' must know its number of features, but is lazy: call the model once before"
            )
    return None


def _check_layers_agree(communicator: Communicator, layers: dict[str, _BatchNorm]) -> None:
    """Raise ``ValueError`` on every rank if the ranks have different layers; collective."""
    everybody = communicator.all_gather_object({name: layer.num_features for name, layer in layers.items()})
    for rank, other in enumerate(everybody):
        for name in sorted(everybody[0].keys() | other.keys()):
            here, there = (f"{e[name]} features" if name in e else "no statistics" for e in (everybody[0], other))
            if here != there:
                raise raised_on_all_ranks(
                    ValueError(
                        f"BatchNorm layer '{name}' has {here} on rank 0 but {there} on rank {rank}: every rank must "
                        "pass the same model"
                    )
                )
