"""``DataParallelOptimizer`` and ``DASO`` with the arguments of Heat's classes, in the module of Heat's name.

Tests: ``tests/heat/test_heat.py``.
"""

from collections.abc import Callable
from typing import Any, SupportsFloat

import heat
import torch
from torch import nn
from torch.optim import Optimizer

import dpoptim.daso
import dpoptim.optimizer
from dpoptim.comm.roll_call import RollCall
from dpoptim.comm_hooks import CommHook, allreduce, bf16_compress, fp16_compress
from dpoptim.heat.succession import Replaceable, make_way
from dpoptim.modes.mode import Replicated
from dpoptim.modes.replicas import broadcast_tensors
from dpoptim.step.inner_step import InnerStep
from dpoptim.utils.consistency import raise_together

__all__ = ["DASO", "DataParallelOptimizer"]

_HOOKS: dict[torch.dtype, CommHook] = {
    torch.bfloat16: bf16_compress,
    torch.half: fp16_compress,
    torch.float: allreduce,
}


class DataParallelOptimizer(Replaceable):
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
    it is passed on. It may be passed on again, and ends when a later one takes its parameters.
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
        self._mode = Replicated(torch_optimizer, InnerStep(torch_optimizer, None), self._names)
        self._reason = "pass the optimizer to DataParallel(module, comm, optimizer) first, which averages its gradients"
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
        weight = self.batch_weight if self.is_attached else 1.0
        make_way(RollCall.of(comm).communicator, [p for group in self.param_groups for p in group["params"]])
        self.blocking_parameter_updates = blocking
        super().__init__(self._optimizer, comm, module=module, overlap=False if blocking else "auto")
        self.batch_weight = weight
        self._begin()

    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Make one step with the mean gradients; see :meth:`dpoptim.DataParallelOptimizer.step`.

        Raises
        ------
        RuntimeError
            No :class:`DataParallel` has this optimizer, or a later one has taken its parameters.
        """
        self._check_attached()
        step = dpoptim.optimizer.DataParallelOptimizer.step
        # This class's own step has run the hooks.
        return getattr(step, "__wrapped__", step)(self, closure, *args, **kwargs)


class DASO(Replaceable, dpoptim.daso.DASO):
    """:class:`dpoptim.DASO` in place of ``heat.optim.DASO``: the same arguments, attributes and methods.

    Nodes are the ranks that share memory, whatever GPUs each of them sees.

    Parameters
    ----------
    local_optimizer : torch.optim.Optimizer
        The optimizer that makes the step on every rank.
    total_epochs : int
        How many epochs there will be.
    comm : heat.MPICommunication
        The ranks that train together.
    warmup_epochs, cooldown_epochs : int
        How many epochs at the beginning and at the end are blocking.
    scheduler : torch.optim.lr_scheduler.LRScheduler, optional
        A scheduler of ``local_optimizer`` whose ``step()`` is to be called after each step.
    stability_level, max_global_skips, skip_reduction_factor, local_skip_factor
        See :class:`dpoptim.DASO`.
    sending_chunk_size : int
        Parameters travel in messages of at most so many elements.
    downcast_type : torch.dtype
        What travels between nodes: ``torch.bfloat16``, ``torch.half`` or ``torch.float``. Sums are made in float32.
    use_mpi_groups : bool
        Taken for Heat's sake: communicators are split by node, which is what both of its ways come to.
    verbose : bool
        Print the plan of each epoch on rank 0.

    Attributes
    ----------
    last_batch : int
        The number of the last batch of an epoch, counted from 0. To be set before the first step: after this batch all
        ranks are made equal, for an evaluation. Without it :meth:`epoch_loss_logic` would do it, after the evaluation.
    module : torch.nn.Module
        The model, once :meth:`set_model` was called.

    Raises
    ------
    TypeError, ValueError
        Where Heat's class raises them; on all ranks, if on any.

    Notes
    -----
    As in Heat a second one may be made for the same parameters, after :meth:`reset` of the first, which ends: it is
    detached and makes no more steps. Both begin with rank 0's parameters and state.
    """

    def __init__(
        self,
        local_optimizer: torch.optim.Optimizer,
        total_epochs: int,
        comm: Any = heat.MPI_WORLD,
        warmup_epochs: int = 4,
        cooldown_epochs: int = 4,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        stability_level: float = 0.05,
        max_global_skips: int = 8,
        sending_chunk_size: int = 10_000_000,
        downcast_type: torch.dtype = torch.bfloat16,
        use_mpi_groups: bool = True,
        skip_reduction_factor: int = 2,
        local_skip_factor: int = 4,
        verbose: bool = False,
    ) -> None:
        if not isinstance(comm, heat.MPICommunication):
            raise TypeError(f"comm must be a heat MPICommunication, got {type(comm).__name__}")
        error = _argument_error(local_optimizer, scheduler, sending_chunk_size, downcast_type, use_mpi_groups, verbose)
        raise_together(RollCall.of(comm).communicator, error)
        self.last_batch: int | None = None
        self.scheduler = scheduler
        self.verbose = verbose
        self.comm = comm
        super().__init__(
            local_optimizer,
            comm,
            total_epochs=total_epochs,
            warmup_epochs=warmup_epochs,
            cooldown_epochs=cooldown_epochs,
            stability_level=stability_level,
            max_global_skips=max_global_skips,
            skip_reduction_factor=skip_reduction_factor,
            local_skip_factor=local_skip_factor,
            chunk_numel=sending_chunk_size,
            comm_hook=_HOOKS[downcast_type],
        )
        self._own_hooks = [
            self.register_step_pre_hook(self._check_last_batch),
            self.register_step_post_hook(self._after_step),
        ]
        self._begin()

    @property
    def local_optimizer(self) -> torch.optim.Optimizer:
        """The wrapped optimizer."""
        return self._optimizer

    @property
    def module(self) -> nn.Module | None:
        """The model, once :meth:`set_model` was called."""
        return self._module

    def set_model(self, model: nn.Module) -> None:
        """Take the model, whose weights and buffers are broadcast from rank 0; collective.

        :class:`DataParallelMultiGPU` calls it.
        """
        error = None if isinstance(model, nn.Module) else TypeError(f"model must be a torch.nn.Module, got {model!r}")
        raise_together(self._communicator, error)
        self._module = model
        broadcast_tensors(self._communicator, [*model.parameters(), *model.buffers()])

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Make one step; see :meth:`dpoptim.DASO.step`.

        Raises
        ------
        RuntimeError
            A later optimizer has taken the parameters.
        """
        self._check_attached()
        step = dpoptim.daso.DASO.step
        getattr(step, "__wrapped__", step)(self, closure)  # this class's own step has run the hooks

    def epoch_loss_logic(self, loss: SupportsFloat, loss_globally_averaged: bool = False) -> None:
        """End the epoch and decide how the next one goes; collective, see :meth:`dpoptim.DASO.end_epoch`.

        Parameters
        ----------
        loss : float or Tensor of one element
            The training loss of the epoch.
        loss_globally_averaged : bool
            Whether it is the mean over ranks already. Equal losses have themselves as mean, so that this changes
            nothing but rounding.
        """
        mean = self.end_epoch(loss)
        self.print0(
            f"epoch {self.epoch}: loss {float(loss) if loss_globally_averaged else mean:.4f}, next: global exchange "
            f"every {self.global_skip} batches, received after {self.batches_to_wait}"
        )

    def reset(self) -> None:
        """Begin anew at epoch 0, with all nodes made equal and gradients cleared; collective."""
        self.synchronize()
        self.stability.reset()
        self.epoch = self.current_batch = 0
        self.global_skip = self.batches_to_wait = 0
        self._start_epoch()
        self.zero_grad()

    def print0(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank 0, if ``verbose``."""
        if self._communicator.rank == 0 and self.verbose:
            print(*args, **kwargs)

    def detach(self) -> None:
        """End data parallelism and free the communicators; collective. Nodes are not made equal."""
        self._remove_own_hooks()
        super().detach()

    def _make_way(self, optimizer: Optimizer) -> None:
        make_way(self._roll_call.communicator, [p for group in optimizer.param_groups for p in group["params"]])

    def _remove_hooks(self) -> None:
        self._remove_own_hooks()
        super()._remove_hooks()

    def _remove_own_hooks(self) -> None:
        """Take the hooks that this class has added off the wrapped optimizer, which may have another wrapper next."""
        for hook in self._own_hooks:
            hook.remove()

    def _check_last_batch(self, *_: Any) -> None:
        if self.last_batch is None:
            raise ValueError("last_batch must be set before the first step: opt.last_batch = len(loader) - 1")

    def _after_step(self, *_: Any) -> None:
        if self.scheduler is not None:
            self.scheduler.step()
        if self.last_batch is not None and self.current_batch > self.last_batch:
            self.synchronize()


def _argument_error(
    local_optimizer: object,
    scheduler: object,
    sending_chunk_size: object,
    downcast_type: object,
    use_mpi_groups: object,
    verbose: object,
) -> Exception | None:
    """Return what is wrong with those arguments that only Heat's class has, or names so."""
    if not isinstance(local_optimizer, torch.optim.Optimizer):
        return TypeError(f"local_optimizer must be a torch.optim.Optimizer, got {type(local_optimizer).__name__}")
    if isinstance(local_optimizer, dpoptim.optimizer.DataParallelOptimizer):
        return TypeError("local_optimizer is already a DataParallelOptimizer: pass the torch optimizer")
    if scheduler is not None and not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        return TypeError(
            f"scheduler must be a torch learning rate scheduler, an object of the class, got {scheduler!r}"
        )
    if not isinstance(sending_chunk_size, int):
        return TypeError(f"sending_chunk_size must be an int, got {type(sending_chunk_size).__name__}")
    if sending_chunk_size <= 0:
        return ValueError(f"sending_chunk_size must be > 0, got {sending_chunk_size}")
    for name, value in (("use_mpi_groups", use_mpi_groups), ("verbose", verbose)):
        if not isinstance(value, bool):
            return TypeError(f"{name} must be a bool, got {type(value).__name__}")
    if not isinstance(downcast_type, torch.dtype):
        return TypeError(f"downcast_type must be a torch.dtype, got {type(downcast_type).__name__}")
    if downcast_type not in _HOOKS:
        return ValueError(f"downcast_type must be torch.bfloat16, torch.half or torch.float, got {downcast_type}")
    return None
