"""DataParallelOptimizer: any torch optimizer, on the mean gradient of all ranks."""

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpoptim.checks.alike import check_alike, check_same_arguments, settings_in_words
from dpoptim.checks.arguments import (
    already_reduced,
    check_closure,
    check_one_group,
    construction_error,
    parameter_error,
)
from dpoptim.checks.hyper_parameters import HyperParameters
from dpoptim.checks.torch_calls import Answers, forget, make_known
from dpoptim.comm.communicator import Communicator
from dpoptim.comm.errors import heard_if_left
from dpoptim.comm.normal_tensors import normal_tensors
from dpoptim.comm.overlap import duplicate_overlapping
from dpoptim.comm.roll_call import RollCall
from dpoptim.comm_hooks import CommHook, allreduce
from dpoptim.modes.choose import choose_mode
from dpoptim.modes.closures import averaged
from dpoptim.modes.mode import Replicated
from dpoptim.modes.replicas import average_buffers, broadcast_replicas, broadcast_tensors
from dpoptim.modes.sharded_stepping import Stepped
from dpoptim.modes.state_access import StateAccess
from dpoptim.modes.whole_state import groups_with
from dpoptim.step.classes import parameters_of
from dpoptim.step.inner_step import InnerStep
from dpoptim.step.kept_attributes import KeptAttributes
from dpoptim.step.step_hooks import FIRST_HOOK
from dpoptim.utils.consistency import raise_together
from dpoptim.utils.state_dict import load_full_form

__all__ = ["DataParallelOptimizer"]


class DataParallelOptimizer(StateAccess):
    """Make N ranks train as one process would on the joined batch.

    Construction broadcasts the parameters from rank 0. From then on, when ``backward()`` returns, ``p.grad`` is the
    mean over all ranks, the same bits on each, and everything that reads gradients works as it stands: ``step``,
    ``torch.nn.utils.clip_grad_norm_``, ``torch.amp.GradScaler``, logging. The wrapper is itself a
    ``torch.optim.Optimizer``: give it to schedulers, register hooks on it, save its ``state_dict()``.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        The optimizer that makes the step on every rank; not itself a ``DataParallelOptimizer``.
    comm : mpi4py.MPI.Comm or heat MPICommunication, optional
        The ranks that train together; by default all (``COMM_WORLD``). It is duplicated.
    shard : bool
        Divide the step, and the optimizer's state, among ranks (ZeRO-1/2; Rajbhandari et al. 2020): gradients are
        reduced to the rank that owns them, each rank steps its part, and the parameters are collected. See Notes.
    node_shared : bool
        Keep one copy of the parameters and of the state a node, in memory that its ranks share; each steps its part
        in place. Needs parameters on CPU. Where a node has no memory to share, it is ``shard`` instead (see
        :attr:`mode`). Writes of your own to parameters belong into :meth:`exclusive`.
    module : torch.nn.Module, optional
        The model. Its buffers and its frozen parameters are broadcast too, its names appear in error messages, and
        :meth:`average_buffers` becomes available.
    bucket_mb : float
        Small gradients, and on one node large ones, are sent together, at most so many MiB at once; beside backward at
        most half a MiB, or a quarter where its hooks send.
    overlap : "auto" or bool
        Whether gradients are sent while backward goes on, or when it ends. Where every rank is alone on its node,
        backward's hooks see to it unless a thread does it better; elsewhere a thread does (needs MPI_THREAD_MULTIPLE
        and a core to spare). ``"auto"`` tries what pays (:mod:`dpoptim.comm.overlap`), once for ``comm``.
    comm_hook : callable, optional
        How a bucket is summed; see :mod:`dpoptim.comm_hooks`.
    accumulate : int
        Make one step of so many batches: call ``zero_grad()``, ``backward()`` and ``step()`` for each as ever; all but
        the last ``step()`` of them only count, and ``zero_grad()`` keeps what is being accumulated. The gradient is the
        mean over batches and ranks, reduced once. :attr:`is_accumulating` tells whether the next ``step()`` only
        counts.

    Raises
    ------
    TypeError
        ``optimizer`` is not a ``torch.optim.Optimizer``, is already wrapped, or ``comm`` is no communicator.
    ValueError
        ``bucket_mb <= 0``; ``accumulate < 1``; a communicator that is null, freed or an intercommunicator; a parameter
        that another ``DataParallelOptimizer`` reduces; parameters, their order or hyper-parameters that differ between
        ranks.

    Notes
    -----
    Collective: construction, :meth:`add_param_group`, :meth:`average_buffers`, :meth:`detach`, :meth:`exclusive`,
    :meth:`full_state_dict`, :meth:`load_full_state_dict`, ``step`` with a closure, and ``backward()`` outside of
    :meth:`no_sync`; with ``shard`` or ``node_shared`` every ``step`` and :meth:`clip_grad_norm_`. Everything else is
    local. Errors found on one rank are raised on all; a rank that dies of an exception ends the job.

    With ``shard`` or ``node_shared`` ``p.grad`` holds the global mean in the elements that this rank owns alone, and
    values of no meaning in the rest: use :meth:`clip_grad_norm_` instead of torch's (``clip_grad_value_`` and
    ``GradScaler`` work). The state is this rank's part: :attr:`state` is empty and ``state_dict()`` an error;
    use :meth:`full_state_dict` or :mod:`dpoptim.utils.checkpoint`. Optimizers that treat each element by itself are
    sharded by element: those of torch but Adafactor and Muon, which are sharded by whole parameter. What another class
    does is tried out at construction (Note [Probing] in divisibility.py). The class may say so itself by an attribute
    of its own: ``is_elementwise = True`` (by element) or ``False`` (by whole parameter), ``is_divisible = False``.
    LBFGS, SparseAdam and classes that couple parameters, draw random numbers, need a closure or wrap another optimizer
    stay replicated, with a warning.

    What else the wrapped class has, methods and attributes, is there on the wrapper too, to read, call and set; with
    ``shard`` or ``node_shared`` its methods are collective. Other classes than torch's own draw random numbers in their
    step from generators that are common to all ranks.
    """

    @normal_tensors()
    @heard_if_left("the construction of an optimizer")
    def __init__(
        self,
        optimizer: Optimizer,
        comm: Any = None,
        *,
        module: nn.Module | None = None,
        shard: bool = False,
        node_shared: bool = False,
        bucket_mb: float = 25,
        overlap: bool | str = "auto",
        comm_hook: CommHook | None = None,
        accumulate: int = 1,
    ) -> None:
        roll_call = RollCall.of(comm)
        roll_call.check_in("constructing an optimizer", 1.0)
        ranks = roll_call.communicator  # which all optimizers on them share
        is_alone = ranks.world_size == 1
        how: dict[str, Any] = {
            "bucket_mb": bucket_mb,
            "overlap": overlap,
            "comm_hook": comm_hook,
            "accumulate": accumulate,
        }
        modes = {"shard": shard, "node_shared": node_shared}
        error = construction_error(optimizer, module, **how, **modes, is_alone=is_alone)
        raise_together(ranks, error)

        super().__init__(optimizer)
        self._roll_call, self._module = roll_call, module
        self._arguments = {"comm": comm, **how}

        settings = settings_in_words(module, comm_hook, bucket_mb=bucket_mb, accumulate=accumulate, **modes)
        check_alike(ranks, optimizer, self._names(), settings)
        on_host = all(parameter.device.type == "cpu" for parameter in parameters_of(optimizer))
        self._communicator = duplicate_overlapping(ranks, overlap, on_host=on_host)
        broadcast_replicas(self._communicator, optimizer, module)

        self._inner_step = InnerStep(optimizer, None if is_alone else self._communicator.broadcast_object)
        self._kept_attributes = KeptAttributes(optimizer, self._inner_step)
        hyper_parameters = HyperParameters(lambda: optimizer.param_groups)
        stepped = Stepped(optimizer, self._communicator, self._inner_step, hyper_parameters, self._names)
        self._mode = choose_mode(stepped, shard=shard, node_shared=node_shared)
        self._reducer = self._mode.make_reducer(
            self._communicator,
            roll_call,
            comm_hook=comm_hook or allreduce,
            bucket_bytes=max(1, int(bucket_mb * 2**20)),
            accumulate=accumulate,
            hyper_parameters=hyper_parameters,
        )
        self._accumulates = accumulate > 1
        self._take_over_parameters(0)
        self._mode.take_over_state()
        self._answers = Answers(self, self._reducer, self._mode.partial_norm)
        if not is_alone:
            make_known(self._answers)

    # ---------------------------------------------------------------- what torch.optim.Optimizer is

    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Make one step with the global mean gradients.

        Collective with ``shard``, ``node_shared`` or a closure, or if gradients were not reduced yet (no parameter of
        this rank had one; they were left local by :meth:`no_sync`); else local. Parameters are the same bits on every
        rank afterwards.

        Parameters
        ----------
        closure : callable, optional
            Clears gradients, computes the loss, calls ``backward()``, returns the loss. Loss and gradients are
            averaged over ranks within it, so that every rank takes the same branch of a line search.
        *args, **kwargs
            What else the step of the wrapped class takes, the same on all ranks; collective then.

        Returns
        -------
        float, Tensor or None
            The loss of the closure, averaged over ranks with :attr:`batch_weight`.
        """
        wrapped = None if closure is None else averaged(closure, self._reducer, self.mean)
        if args or kwargs:
            self._reducer.meet("a step with arguments", 1.0)
            self._mode.check_step_arguments()
            check_same_arguments(self._communicator, args, kwargs)
        loss = self._mode.step(wrapped, args, kwargs)
        self._optimizer._opt_called = True  # type: ignore[attr-defined]  # for a scheduler made on the inner one
        self._reducer.count_step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients, as the wrapped optimizer does; nothing while they are being accumulated."""
        if self._reducer.num_accumulated:
            return
        is_torchs = getattr(self._optimizer.zero_grad, "__func__", None) is Optimizer.zero_grad
        if set_to_none and is_torchs and not torch._C._autograd._profiler_enabled():
            # Without its mark for the profiler and its look at each gradient, which take longer than this.
            for parameter in parameters_of(self):
                parameter.grad = None
        else:
            self._optimizer.zero_grad(set_to_none)
        self._reducer.note_cleared()

    @heard_if_left("add_param_group()")
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to train, with hyper-parameters of their own; collective.

        They are compared across ranks and broadcast from rank 0. See ``torch.optim.Optimizer.add_param_group``.
        """
        if not self._is_constructed:
            return  # they are there: torch's constructor adds those of the wrapped optimizer
        self._reducer.meet("adding a parameter group", 1.0)
        num_before = len(parameters_of(self))
        error = None
        try:
            check_one_group(self._optimizer)
            self._optimizer.add_param_group(param_group)
        except (TypeError, ValueError) as caught:
            error = caught
        if error is None:
            error = already_reduced(param_group["params"]) or parameter_error(
                parameters_of(self)[num_before:],
                self._names()[num_before:],
                self._module,
                is_alone=self._communicator.world_size == 1,
            )
            error = error or self._mode.new_parameters_error(parameters_of(self), self._names())
            if error is not None:
                self.param_groups.pop()
        raise_together(self._communicator, error)
        try:
            self._mode.check_new_group()
        except ValueError:
            self.param_groups.pop()
            raise
        check_alike(self._communicator, self._optimizer, self._names(), {})
        broadcast_tensors(self._communicator, parameters_of(self)[num_before:])
        self._take_over_parameters(num_before)
        self._reducer.reduce_new(num_before)

    def __getstate__(self) -> NoReturn:
        """Refuse to be copied or pickled."""
        raise TypeError(
            "a DataParallelOptimizer holds an MPI communicator, so it can't be copied or pickled: save its state_dict()"
        )

    def __repr__(self) -> str:
        inner = repr(self._optimizer)
        return f"{type(self).__name__}[{self._communicator.world_size} ranks] of {inner}"

    # ---------------------------------------------------------------- what data parallelism adds

    @property
    def mode(self) -> str:
        """``"replicated"``, ``"sharded"`` or ``"node-shared"``: what became of ``shard`` and ``node_shared``."""
        return self._mode.name

    @property
    def communicator(self) -> Communicator:
        """The communicator of this optimizer alone; ``rank`` and ``world_size`` are there."""
        return self._communicator

    @property
    def roll_call(self) -> RollCall:
        """Where the ranks of this optimizer meet; shared by all optimizers on the same ranks."""
        return self._roll_call

    @property
    def batch_weight(self) -> float:
        """Weight of this rank's gradients and losses in the mean: its number of samples. 1 by default.

        With the number of samples, batches of different sizes give the exact mean over the joined batch. Set it
        before ``backward()``; it holds until it is set again.

        Raises
        ------
        ValueError
            If set to a value that is not positive and finite, or between a backward in :meth:`no_sync` and the
            reduction of its gradients: they are one sum by then, and can be weighted only together.
        """
        return self._reducer.batch_weight

    @batch_weight.setter
    def batch_weight(self, value: float) -> None:
        if not 0 < value < float("inf"):
            raise ValueError(f"batch_weight must be > 0 and finite, got {value}")
        if value != self._reducer.batch_weight and self._reducer.has_local_gradients:
            raise ValueError(
                f"batch_weight must not change from {self._reducer.batch_weight:g} to {value:g} while gradients of "
                "a backward in no_sync() wait for their reduction"
            )
        self._reducer.batch_weight = float(value)

    @property
    def is_accumulating(self) -> bool:
        """Whether the next ``step()`` only counts a batch, so that ``p.grad`` is not the global mean yet."""
        return self._reducer.is_accumulating

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Say no to ``GradScaler``, which asks before a step, where it would leave out the count of a batch."""
        if self._reducer.accumulate > 1:
            raise RuntimeError(
                "accumulate > 1 does not go with GradScaler, which leaves out steps: use accumulate=1 and no_sync()"
            )
        self._reducer.finish()  # on a rank without gradients, whose infinities it looks for next
        return False

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Keep gradients local in every ``backward()`` within; the next one outside reduces their sum.

        All ranks enter and leave it at the same places. Saves communication when gradients are accumulated over
        several batches. Without it accumulation is exact too.
        """
        return self._reducer.no_sync()

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Scale all gradients so that their global norm is at most ``max_norm``; return the norm before.

        The same as ``torch.nn.utils.clip_grad_norm_`` on all parameters of one process. Local, since gradients are
        global already, unless they still wait for their reduction (all backward passes in :meth:`no_sync`; a rank
        without one), which is made then; with ``shard`` or ``node_shared`` collective, since each rank has the global
        mean of its part. In a batch that only counts (:attr:`is_accumulating`) nothing is clipped, and the norm is this
        rank's.
        """
        if self.is_accumulating:
            gradients = [parameter.grad for parameter in parameters_of(self) if parameter.grad is not None]
            return nn.utils.get_total_norm(gradients, norm_type, error_if_nonfinite)
        self._reducer.finish()
        return self._mode.clip_grad_norm_(parameters_of(self), max_norm, norm_type, error_if_nonfinite)

    @heard_if_left("mean()")
    def mean(self, value: float, *, weight: float | None = None) -> float:
        """Return a number averaged over ranks; collective, the same on every rank.

        Parameters
        ----------
        value : float
            This rank's number, such as its loss.
        weight : float, optional
            This rank's weight, > 0; by default :attr:`batch_weight`.

        Raises
        ------
        RuntimeError
            On every rank, if one is elsewhere or has left the program.
        """
        weight = self._reducer.batch_weight if weight is None else weight
        total_weight = self._meet_all("averaging a number", weight)
        total = torch.tensor([value * weight], dtype=torch.float64, device="cpu")
        self._communicator.all_reduce(total)
        return total.item() / total_weight

    @heard_if_left("average_buffers()")
    def average_buffers(self) -> None:
        """Replace the module's floating point buffers by their mean over ranks, the others by rank 0's; collective.

        The running statistics of BatchNorm follow each rank's own data. Call this before evaluating or saving.

        Raises
        ------
        ValueError
            If the optimizer was constructed without ``module=``.
        """
        if self._module is None:
            raise ValueError("average_buffers needs the model: construct DataParallelOptimizer(..., module=model)")
        self._reducer.meet("averaging buffers", 1.0)
        average_buffers(self._communicator, self._module)

    @heard_if_left("detach()")
    def detach(self) -> None:
        """End data parallelism: take the hooks off the parameters and free the communicator; collective.

        Parameters, gradients, the wrapped optimizer and its state stay as they are. A state that was sharded is put
        together in the wrapped optimizer of every rank, and parameters that a node shared become each rank's own. From
        then on ``step`` is the wrapped optimizer's, and whatever is collective an error. A second call does nothing.
        """
        if self._reducer.is_detached:
            return
        with groups_with(self._optimizer, self._taken_over):
            whole = self._mode.give_up(self)
            self._mode = Replicated(self._optimizer, self._inner_step, self._names)
            if whole is not None:
                load_full_form(self, whole)
        forget(self._answers)
        self._reducer.detach()
        del cast("OrderedDict[int, Any]", self._optimizer_step_pre_hooks)[FIRST_HOOK]
        self._communicator.free()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Let what rank 0 does to parameters within count, whatever the others do; collective.

        With ``node_shared`` the ranks of a node have the same parameters in the same memory: a write by every rank,
        such as ``p.mul_(0.9)``, would be done as often as there are ranks. Within, other ranks than 0 write to private
        copies. On leaving it every rank has rank 0's parameters, in every mode. Writes of the same values by all
        (``load_state_dict``) need no protection.

        Raises
        ------
        RuntimeError
            On every rank, if one is elsewhere or has left the program.
        """
        self._reducer.meet("entering exclusive()", 1.0)
        self._mode.begin_exclusive()
        self._communicator.barrier()
        try:
            yield
        except BaseException:
            self._mode.abandon_exclusive()
            raise
        self._reducer.meet("leaving exclusive()", 1.0)
        if not self._mode.end_exclusive():
            broadcast_tensors(self._communicator, parameters_of(self))

    # ---------------------------------------------------------------- how

    def _wrap_alike(self, optimizer: Optimizer) -> "DataParallelOptimizer":
        """Return a wrapper of another optimizer in this one's mode, with this one's arguments; collective."""
        made = object.__new__(type(self))
        arguments = {**self._arguments, "comm_hook": copy.deepcopy(self._arguments["comm_hook"])}
        arguments |= {"shard": self.mode == "sharded", "node_shared": self.mode == "node-shared"}
        DataParallelOptimizer.__init__(made, optimizer, **arguments)
        for name in vars(self).keys() - vars(made).keys() - {"step"}:  # a subclass's own; a scheduler's step is self's
            made.__dict__[name] = vars(self)[name]
        return made

    def _meet_all(self, purpose: str, weight: float) -> float:
        """Meet all ranks for a purpose; collective. Return the sum of their weights."""
        return self._reducer.meet(purpose, weight)

    def _count_batch(self, closure: Callable[[], Any] | None = None) -> bool:
        """Count a batch, unless it is the last that a step is made of; local. Return whether it was counted."""
        if closure is not None:
            raise ValueError("accumulate > 1 takes no closure: call backward() before step()")
        if self.is_accumulating:
            self._reducer.count_batch()
            return True
        return False

    def _before_step(self, stepped: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check what is to be stepped, and reduce what backward could not."""
        if stepped is not self:
            self._mode.check_inner_step(stepped)
            return  # the wrapped class's step calls that of its parent, which runs the hooks once more
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        check_closure(self._optimizer, closure)
        self._mode.check_step(self, self._taken_over)
        if closure is None:
            self._reducer.finish()

    def _take_over_parameters(self, start: int) -> None:
        """Reduce, in this mode, the parameters from this one on, which are equal on all ranks; collective."""
        parameters, names = parameters_of(self), self._names()
        self._taken_over = [list(group["params"]) for group in self.param_groups]
        groups = [number for number, group in enumerate(self.param_groups) for _ in group["params"]]
        known = set(map(id, self._reducer.all_buckets))
        self._reducer.add_parameters(parameters[start:], names[start:], groups[start:])
        new = [bucket for bucket in self._reducer.all_buckets if id(bucket) not in known]
        self._mode.add(new, parameters, groups)

    def _note_new_state(self) -> None:
        self._mode.take_over_state()

    def _call_method(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of the wrapped optimizer; collective if its parameters are sharded."""
        return self._mode.call(partial(method, *args, **kwargs), name)
