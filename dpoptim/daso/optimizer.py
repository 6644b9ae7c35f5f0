"""DASO: exchange between nodes every few batches, and only in part, where the network between them is slow.

Tests: ``tests/daso/test_daso.py``.

Note [Phases of training]
------------------------
In the blocking phases (warm-up and cool-down) gradients are averaged over all ranks in every step, as a
:class:`~dpoptim.DataParallelOptimizer` does. While cycling they are averaged over the ranks of a node, and the nodes
exchange parameters in the background. The reducer is told at each change of phase over which ranks to reduce. Whether
an exchange follows a step depends on numbers that all ranks compute from the same losses, and the ranks meet
(Note [Roll call]) before each exchange begins: what is under way is never waited for in vain.

Note [Nodes end alike]
----------------------
At the end of each epoch the nodes' parameters are averaged in a blocking exchange, and so is the optimizer's state
(momentum, second moments). So every epoch begins with equal replicas, rank 0 may save what it has, and the first step
of the cool-down, which averages gradients, leaves replicas equal.
"""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpoptim.checks.alike import qualified_name
from dpoptim.comm.roll_call import RollCall
from dpoptim.comm_hooks import CommHook, allreduce
from dpoptim.daso.arguments import argument_error, check_settings, checked_loss, nodes_of
from dpoptim.daso.exchange import Exchange
from dpoptim.daso.scaler import agree_on_scale, unscales_for_step
from dpoptim.daso.schedule import Cycle, Schedule
from dpoptim.daso.state_average import average_state
from dpoptim.optimizer import DataParallelOptimizer
from dpoptim.step.classes import parameters_of
from dpoptim.utils.consistency import raise_together
from dpoptim.utils.plateau import DetectMetricPlateau

__all__ = ["DASO"]

logger = logging.getLogger(__name__)


class DASO(DataParallelOptimizer):
    """Distributed, Asynchronous and Selective Optimization (Coquelin et al. 2021, arXiv:2104.05588).

    Within a node gradients are averaged in every step. Between nodes there are three phases:

    - *warm-up*, for ``warmup_epochs``: blocking, as a :class:`~dpoptim.DataParallelOptimizer` of all ranks;
    - *cycling*: every ``global_skip`` batches the nodes start to exchange their parameters, train on, and take the mean
      over when ``batches_to_wait`` further batches are done. With S batches waited and P nodes a parameter x becomes
      ``(2 S x + P mean) / (2 S + P)``. ``global_skip`` begins at 4; whenever the loss stops improving it is divided by
      ``skip_reduction_factor``, and from 1 it goes back to ``max_global_skips``;
    - *cool-down*, for the last ``cooldown_epochs``: blocking again.

    Call :meth:`end_epoch` with the training loss after each epoch: it averages parameters and optimizer state over the
    nodes and decides how the next epoch goes. For a GradScaler see :meth:`add_scaler`. All else is as with a
    :class:`~dpoptim.DataParallelOptimizer`, except that ``p.grad`` after ``backward()`` is the mean over the ranks of
    this *node* while cycling, and that replicas on different nodes differ between exchanges.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        The optimizer that makes the step on every rank.
    comm : mpi4py.MPI.Comm or heat MPICommunication, optional
        The ranks that train together; by default all. They may be placed on nodes in any way and number.
    total_epochs : int
        How many epochs there will be, > 0.
    warmup_epochs, cooldown_epochs : int
        How many of them at the beginning and at the end are blocking, >= 0.
    stability_level : float
        By which fraction a loss must beat the best to count as an improvement; three epochs without one are a plateau.
    max_global_skips : int
        Largest ``global_skip``; with 0 all epochs are blocking.
    skip_reduction_factor : int
        > 0.
    local_skip_factor : int
        After a reset ``batches_to_wait`` is ``max_global_skips // local_skip_factor``, at least 1; > 0.
    node : int, optional
        Ranks that give the same number count as one node; by default those that share memory. For other islands of fast
        network than a node.
    chunk_numel : int
        Parameters travel between nodes in messages of at most so many elements, > 0.
    comm_hook : callable, optional
        How what travels between nodes is summed: gradients in the blocking phases, and while cycling the changes of
        parameters since the last exchange. :func:`~dpoptim.comm_hooks.bf16_compress` halves the bytes. Within a node
        nothing is compressed.
    module, bucket_mb, overlap
        See :class:`~dpoptim.DataParallelOptimizer`.

    Attributes
    ----------
    epoch, current_batch : int
        Epochs ended, and steps made in the present one.
    global_skip, batches_to_wait : int
        The present cycle; 0 in the blocking phases.
    stability : DetectMetricPlateau
        What decides that the loss has stopped improving.

    Raises
    ------
    TypeError, ValueError
        On all ranks, for an argument of another type or out of its range on any of them, or that differs between ranks.

    Notes
    -----
    Collective, besides what is so in :class:`~dpoptim.DataParallelOptimizer`: :meth:`end_epoch`, :meth:`synchronize`,
    :meth:`mean`, and while cycling every step that starts or ends an exchange. ``step`` takes no closure.

    The mean over nodes is weighted by each node's sum of :attr:`batch_weight` since the last exchange.

    ``state_dict()`` is local. At the end of an epoch all ranks have the same, plain torch form with one entry more. In
    the middle of a cycle every rank has its own, and its own parameters: each saves both and loads its own, in a job
    with the same ranks on the same nodes, and goes on as if there had been no interruption. To save less, call
    :meth:`synchronize` first.
    """

    total_epochs: int
    warmup_epochs: int
    cooldown_epochs: int
    max_global_skips: int
    skip_reduction_factor: int
    local_skip_factor: int
    stability: DetectMetricPlateau
    epoch: int
    current_batch: int
    global_skip: int
    batches_to_wait: int
    # GradScaler sets them.
    grad_scale: Tensor | None
    found_inf: Tensor
    _step_supports_amp_scaling = True  # so that GradScaler.step() leaves skipping a step to this class

    def __init__(
        self,
        optimizer: Optimizer,
        comm: Any = None,
        *,
        total_epochs: int,
        warmup_epochs: int = 4,
        cooldown_epochs: int = 4,
        stability_level: float = 0.05,
        max_global_skips: int = 8,
        skip_reduction_factor: int = 2,
        local_skip_factor: int = 4,
        node: int | None = None,
        chunk_numel: int = 10_000_000,
        module: nn.Module | None = None,
        bucket_mb: float = 25,
        overlap: bool | str = "auto",
        comm_hook: CommHook | None = None,
    ) -> None:
        self._roll_call = RollCall.of(comm)
        world = self._roll_call.communicator
        settings = {
            "total_epochs": total_epochs,
            "warmup_epochs": warmup_epochs,
            "cooldown_epochs": cooldown_epochs,
            "stability_level": stability_level,
            "max_global_skips": max_global_skips,
            "skip_reduction_factor": skip_reduction_factor,
            "local_skip_factor": local_skip_factor,
            "chunk_numel": chunk_numel,
        }
        raise_together(world, argument_error(settings, node, comm_hook))
        check_settings(world, {**settings, "comm_hook": comm_hook and qualified_name(comm_hook)})
        self._make_way(optimizer)
        super().__init__(optimizer, comm, module=module, bucket_mb=bucket_mb, overlap=overlap, comm_hook=comm_hook)

        self.total_epochs = total_epochs
        self.warmup_epochs = warmup_epochs
        self.cooldown_epochs = cooldown_epochs
        self.max_global_skips = max_global_skips
        self.skip_reduction_factor = skip_reduction_factor
        self.local_skip_factor = local_skip_factor
        self.stability = DetectMetricPlateau(patience=2, threshold=stability_level)
        self.epoch = 0
        self.current_batch = 0
        self.global_skip = 0
        self.batches_to_wait = 0
        self._scaler: torch.amp.GradScaler | None = None
        self._number = self._roll_call.enroll()
        self._nodes = nodes_of(world, node)
        self._exchange = Exchange(
            self._communicator,
            self._roll_call,
            self._nodes,
            comm_hook=comm_hook or allreduce,
            chunk_numel=chunk_numel,
            parameters=partial(parameters_of, optimizer),
            hyper_parameters=self._reducer.hyper_parameters,
            place=self._place,
        )
        self._start_epoch()

    # ---------------------------------------------------------------- the loop

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Make one step, and start or end an exchange between nodes where one is due; collective then.

        Parameters
        ----------
        closure : None
            Not supported: a closure's several evaluations would each have to be averaged over all ranks.

        Raises
        ------
        ValueError
            On all ranks, if parameters have become infinite or NaN on one, found when the next exchange is due.
        """
        if closure is not None:
            raise TypeError("DASO takes no closure: call backward() first, then step()")
        if "found_inf" in self.__dict__:
            raise RuntimeError(
                "DASO makes the GradScaler's step itself: call opt.add_scaler(scaler) once, then opt.step() in place "
                "of scaler.step(opt) and scaler.update()"
            )
        if self.is_cycling:
            self._exchange.before_step()
        if self._scaler is None or unscales_for_step(self._scaler, self):
            plain_step = DataParallelOptimizer.step
            getattr(plain_step, "__wrapped__", plain_step)(self)  # this class's own step has run the hooks
        if self._scaler is not None:
            self._scaler.update()
        if self.is_cycling:
            self._exchange.after_step(self.current_batch, self.batch_weight, self._cycle)
        self.current_batch += 1

    @property
    def is_cycling(self) -> bool:
        """Whether nodes differ between exchanges: in the cycling phase, with more than one node."""
        return self.global_skip > 0 and len(self._nodes) > 1

    def end_epoch(self, loss: SupportsFloat) -> float:
        """Make all nodes equal and decide how the next epoch goes; collective, blocks, the same on all ranks.

        Parameters
        ----------
        loss : float or Tensor of one element
            This rank's training loss in the epoch.

        Returns
        -------
        float
            Its mean over ranks.

        Raises
        ------
        ValueError
            On all ranks, if the loss or a parameter is infinite or NaN on one.
        """
        mean = self._mean_loss(loss)
        self.synchronize()
        self._exchange.check_finite()
        self.epoch += 1
        self.current_batch = 0
        self._cycle = self._schedule.next_cycle(self.epoch, self._cycle, mean, self.stability)
        self._start_epoch()
        logger.info(
            "rank %d: epoch %d: a global exchange every %d batches, received after %d",
            *(self._communicator.rank, self.epoch, self.global_skip, self.batches_to_wait),
        )
        return mean

    def synchronize(self) -> None:
        """Average parameters and optimizer state over the nodes, so that all ranks have the same bits.

        Collective, blocks. Does nothing where they have already.
        """
        if self._exchange.is_synchronised:
            return
        share = self._exchange.equalise(self.current_batch, self.batch_weight)
        states = {parameter: self.state.get(parameter, {}) for parameter in parameters_of(self)}
        average_state(self._communicator, list(states.values()), share)
        self.state.update({parameter: state for parameter, state in states.items() if state})
        if self._scaler is not None:
            agree_on_scale(self._communicator, self._scaler)
        self._exchange.is_synchronised = True

    def add_scaler(self, scaler: torch.amp.GradScaler) -> None:
        """Let :meth:`step` make the step of this GradScaler.

        The loop becomes ``scaler.scale(loss).backward(); opt.step()``, without ``scaler.step`` and ``scaler.update``:
        a step that one node skips because of an overflow still counts as a batch there, or the nodes' exchanges would
        not meet. ``scaler.unscale_(opt)`` before clipping works as usual.
        """
        if not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
        self._scaler = scaler

    # ---------------------------------------------------------------- what DataParallelOptimizer has

    def average_buffers(self) -> None:
        """Replace the module's floating point buffers by their mean over all ranks, the others by rank 0's; collective.

        See :meth:`DataParallelOptimizer.average_buffers`.
        """
        self._meet_all("averaging buffers", 1.0)
        super().average_buffers()

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state in torch's form, with an entry ``"daso"``; local, see the notes of the class."""
        state: dict[str, Any] = super().state_dict()
        state["daso"] = {
            "epoch": self.epoch,
            "current_batch": self.current_batch,
            "global_skip": self.global_skip,
            "batches_to_wait": self.batches_to_wait,
            "stability": self.stability.get_state(),
            "cycle": None if self._exchange.is_synchronised else self._exchange.state_dict(),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, or the state of a plain torch optimizer; local, on every rank.

        Raises
        ------
        ValueError
            The state was saved in the middle of a cycle by another rank or in a job of other nodes.
        """
        saved = state_dict.get("daso")
        cycle = None if saved is None else saved["cycle"]
        if cycle is not None:
            self._exchange.check_loadable(cycle)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "daso"})
        if saved is None:
            return
        self.epoch, self.current_batch = saved["epoch"], saved["current_batch"]
        self.global_skip, self.batches_to_wait = saved["global_skip"], saved["batches_to_wait"]
        self.stability.set_state(saved["stability"])
        self._start_epoch()
        if cycle is not None:
            self._exchange.load_state_dict(cycle)

    def detach(self) -> None:
        """End data parallelism and free the communicators; collective. Nodes are not made equal.

        A second call does nothing.
        """
        if self._reducer.is_detached:
            return
        self._exchange.free()
        super().detach()
        self._roll_call.dismiss()

    # ---------------------------------------------------------------- how

    def _make_way(self, optimizer: Optimizer) -> None:
        """Do, when all arguments are right, what must come before parameters are taken over; here nothing."""

    def _start_epoch(self) -> None:
        """Begin an epoch with equal nodes, in whatever phase it is."""
        self._exchange.restart()
        if self.is_cycling:
            self._reducer.reduce_over(self._exchange.node, self._exchange.node_roll_call, allreduce)
        else:
            self._reducer.reduce_over(self._communicator, self._roll_call, self._arguments["comm_hook"] or allreduce)

    @property
    def _schedule(self) -> Schedule:
        return Schedule(
            self.total_epochs,
            self.warmup_epochs,
            self.cooldown_epochs,
            self.max_global_skips,
            self.skip_reduction_factor,
            self.local_skip_factor,
        )

    @property
    def _cycle(self) -> Cycle:
        return Cycle(self.global_skip, self.batches_to_wait)

    @_cycle.setter
    def _cycle(self, cycle: Cycle) -> None:
        self.global_skip, self.batches_to_wait = cycle.global_skip, cycle.batches_to_wait

    def _meet_all(self, purpose: str, weight: float) -> float:
        return self._roll_call.check_in(self._place(purpose), weight)

    def _mean_loss(self, loss: SupportsFloat) -> float:
        own, error = checked_loss(loss)
        mean = self.mean(own, weight=1.0)
        if not math.isfinite(mean):
            raise_together(self._communicator, error)
        return mean

    def _place(self, purpose: str) -> str:
        return f"DASO {self._number}, epoch {self.epoch}, batch {self.current_batch}, {purpose}"
