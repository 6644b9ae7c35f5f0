"""DataParallelOptimizer: any torch optimizer, on the mean gradient of all ranks."""

import contextlib
import copy
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpoptim.checks.alike import check_alike, describe_module, parameter_names, qualified_name
from dpoptim.checks.arguments import (
    already_reduced,
    argument_error,
    check_closure,
    check_one_group,
    division_error,
    parameter_error,
)
from dpoptim.checks.hyper_parameters import HyperParameters
from dpoptim.checks.loadable import check_loadable
from dpoptim.checks.torch_calls import forget, make_known
from dpoptim.comm.communicator import Communicator
from dpoptim.comm.normal_tensors import normal_tensors
from dpoptim.comm.overlap import has_spare_cores, try_overlap
from dpoptim.comm.roll_call import RollCall
from dpoptim.comm_hooks import CommHook, allreduce
from dpoptim.modes.mode import Mode, Replicated
from dpoptim.modes.sharded import choose_mode
from dpoptim.modes.whole_state import scatter_state
from dpoptim.step.inner_step import InnerStep
from dpoptim.step.kept_attributes import KeptAttributes, aliases_kept
from dpoptim.step.step_hooks import FIRST_HOOK, run_hooks_around_step
from dpoptim.utils.consistency import digest, raise_together
from dpoptim.utils.state_dict import (
    NamedState,
    Slices,
    load_full_form,
    to_named,
    unique_names,
)

__all__ = ["DataParallelOptimizer"]


class DataParallelOptimizer(Optimizer):
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
    divided by element: those of torch but Adafactor and Muon, which are divided by whole parameter. What another class
    does is tried out at construction (Note [Probing] in divisibility.py). The class may say so itself by an attribute
    of its own: ``is_elementwise = True`` (by element) or ``False`` (by whole parameter), ``is_divisible = False``.
    LBFGS, SparseAdam and classes that couple parameters, draw random numbers, need a closure or wrap another optimizer
    stay replicated, with a warning.

    What else the wrapped class has, methods and attributes, is there on the wrapper too, to read, call and set; with
    ``shard`` or ``node_shared`` its methods are collective. Other classes than torch's own draw random numbers in their
    step from generators that are common to all ranks.
    """

    _is_constructed = True  # but while __init__ runs

    @normal_tensors()
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
        raise_together(
            roll_call.communicator,
            _wrapped_twice(optimizer)
            or argument_error(optimizer, module, bucket_mb, overlap, comm_hook, accumulate)
            or parameter_error(
                _parameters_of(optimizer),
                parameter_names(optimizer.param_groups, module),
                module,
                is_alone=roll_call.communicator.world_size == 1,
            )
            or division_error(optimizer, shard, node_shared),
        )
        self._roll_call = roll_call
        self._optimizer = optimizer
        self._module = module
        self._arguments: dict[str, Any] = {
            "comm": comm,
            "bucket_mb": bucket_mb,
            "overlap": overlap,
            "comm_hook": comm_hook,
            "accumulate": accumulate,
        }
        self._is_constructed = False
        state = optimizer.state
        super().__init__(optimizer.param_groups, getattr(optimizer, "defaults", {}))
        for hooks in _HOOK_DICTS:  # hooks registered on the inner optimizer go on working, with the wrapper
            setattr(self, hooks, getattr(optimizer, hooks, OrderedDict()))
        pre_hooks = cast("OrderedDict[int, Any]", self._optimizer_step_pre_hooks)
        pre_hooks[FIRST_HOOK] = self._reduce_before_step
        pre_hooks.move_to_end(FIRST_HOOK, last=False)
        self._is_constructed = True

        settings = {
            "bucket_mb": repr(bucket_mb),
            "comm_hook": repr(comm_hook and qualified_name(comm_hook)),
            "accumulate": repr(accumulate),
            "shard": repr(shard),
            "node_shared": repr(node_shared),
        }
        if module is not None:
            settings["module"] = describe_module(module)
        check_alike(roll_call.communicator, optimizer, parameter_names(optimizer.param_groups, module), settings)
        base = roll_call.communicator
        on_host = all(parameter.device.type == "cpu" for parameter in self._parameters())
        if overlap == "auto":
            overlap = try_overlap(base).pays if on_host else has_spare_cores(base)
        how = {}
        if overlap and on_host and base.topology.num_nodes > 1:
            trial = try_overlap(base)
            how = {"patient": trial.sleeps, "polled": trial.polls}
        self._communicator = base.duplicate(overlap=bool(overlap), **how)
        self._broadcast(self._parameters())
        self._broadcast([value for entry in state.values() for value in _tensors(entry)])
        if module is not None:
            own = {id(parameter) for parameter in self._parameters()}
            self._broadcast([t for t in (*module.parameters(), *module.buffers()) if id(t) not in own])
        is_alone = self._communicator.world_size == 1
        self._inner_step = InnerStep(optimizer, None if is_alone else self._communicator.broadcast_object)
        self._kept_attributes = KeptAttributes(optimizer, self._inner_step)
        hyper_parameters = HyperParameters(lambda: self.param_groups)
        self._mode: Mode = choose_mode(
            optimizer,
            self._communicator,
            self._inner_step,
            hyper_parameters,
            self._names,
            shard=shard,
            node_shared=node_shared,
        )
        self._reducer = self._mode.make_reducer(
            self._communicator,
            roll_call,
            comm_hook=comm_hook or allreduce,
            bucket_bytes=max(1, int(bucket_mb * 2**20)),
            accumulate=accumulate,
            hyper_parameters=hyper_parameters,
        )
        if accumulate > 1:  # around torch's own hooks, which run only when a step is made
            self.step = MethodType(_count_or_step, self)  # type: ignore[method-assign]
        self._take_over_parameters(0)
        self._mode.take_over_state()
        if self._communicator.world_size > 1:
            make_known(self)

    # ---------------------------------------------------------------- what torch.optim.Optimizer is

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The one live list of parameter groups, the wrapped optimizer's."""
        return self._optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        if self._is_constructed:  # before, torch's constructor sets what is there
            self._optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state."""
        return self._optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        if self._is_constructed:
            self._optimizer.state = value
            self._mode.take_over_state()

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults."""
        return self._optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        if self._is_constructed:
            self._optimizer.defaults = value

    def __getattr__(self, name: str) -> Any:
        """Return what the wrapped optimizer has and this class has not.

        With ``shard`` or ``node_shared`` a method of it acts on what each rank owns; calling it is collective.
        """
        optimizer = self.__dict__.get("_optimizer")
        if optimizer is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        try:
            value = getattr(optimizer, name)
        except AttributeError as error:
            kinds = f"neither {type(self).__name__} nor the wrapped {type(optimizer).__name__}"
            raise AttributeError(f"{kinds} has an attribute {name!r}") from error
        is_method = getattr(value, "__self__", None) is optimizer and not name.startswith("_")
        return partial(self._call_method, name, value) if is_method else value

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the wrapped optimizer, unless it is one of this class."""
        attributes = self.__dict__
        is_own = name.startswith("_") or name in attributes or name in _own_names(cast("Any", type(self)))
        if is_own or not attributes.get("_is_constructed"):
            super().__setattr__(name, value)
        else:
            setattr(self._optimizer, name, value)

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
        wrapped = None if closure is None else self._averaged(closure)
        if args or kwargs:
            self._check_step_arguments(args, kwargs)
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
            for parameter in self._parameters():
                parameter.grad = None
        else:
            self._optimizer.zero_grad(set_to_none)
        self._reducer.note_cleared()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to train, with hyper-parameters of their own; collective.

        They are compared across ranks and broadcast from rank 0. See ``torch.optim.Optimizer.add_param_group``.
        """
        if not self._is_constructed:
            return  # they are there: torch's constructor adds those of the wrapped optimizer
        self._reducer.meet("adding a parameter group", 1.0)
        num_before = len(self._parameters())
        error = None
        try:
            check_one_group(self._optimizer)
            self._optimizer.add_param_group(param_group)
        except (TypeError, ValueError) as caught:
            error = caught
        if error is None:
            error = already_reduced(param_group["params"]) or parameter_error(
                self._parameters()[num_before:],
                self._names()[num_before:],
                self._module,
                is_alone=self._communicator.world_size == 1,
            )
            error = error or self._mode.new_parameters_error(self._parameters(), self._names())
            if error is not None:
                self.param_groups.pop()
        raise_together(self._communicator, error)
        try:
            self._mode.check_new_group()
        except ValueError:
            self.param_groups.pop()
            raise
        check_alike(self._communicator, self._optimizer, self._names(), {})
        self._broadcast(self._parameters()[num_before:])
        self._take_over_parameters(num_before)
        self._reducer.reduce_new(num_before)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, which is compared with the optimizer before anything is changed; local.

        Call it on every rank with the same state. See ``torch.optim.Optimizer.load_state_dict``; hooks registered for
        it see the state before the comparison.

        Raises
        ------
        ValueError
            The state has other groups, other shapes, or is one of another optimizer.
        """
        hooks = cast("OrderedDict[int, Any]", self._optimizer_load_state_dict_pre_hooks)
        hooks[_LAST_HOOK] = self._check_loadable
        overrides = _overrides(self._optimizer, "load_state_dict")
        if overrides:  # whatever the class itself loads is right
            self._kept_attributes.load(state_dict.get("attributes", {}))
        try:
            with aliases_kept(self._optimizer):
                if overrides:
                    self._optimizer.load_state_dict(state_dict)
                else:
                    super().load_state_dict(state_dict)
        finally:
            del hooks[_LAST_HOOK]
        if not overrides:
            self._kept_attributes.load(state_dict.get("attributes", {}))
        self._mode.take_over_state()

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's form, as ``torch.optim.Optimizer.state_dict``; local.

        Raises
        ------
        RuntimeError
            The state is divided among ranks (``shard``, ``node_shared``).
        """
        self._mode.check_has_whole_state()
        return self._whole_state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what ``load_state_dict`` has prepared, with the wrapped class's own adjustments."""
        self._optimizer.__setstate__(state)

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
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._optimizer

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
            gradients = [parameter.grad for parameter in self._parameters() if parameter.grad is not None]
            return nn.utils.get_total_norm(gradients, norm_type, error_if_nonfinite)
        self._reducer.finish()
        return self._mode.clip_grad_norm_(self._parameters(), max_norm, norm_type, error_if_nonfinite)

    # What torch's own functions ask (Note [Functions of torch] in torch_calls.py).

    @property
    def number(self) -> int:
        """Which optimizer on these ranks this is, in the order in which they were made."""
        return self._reducer.number

    def own_gradients_among(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return those of these gradients of which each rank has a part; local."""
        own = {id(parameter.grad) for parameter in self._parameters() if parameter.grad is not None}
        return [
            gradient for gradient in gradients if id(gradient) in own and self._reducer.gradients.is_partial(gradient)
        ]

    def partial_norm(self, gradients: Sequence[Tensor], norm_type: float) -> Tensor:
        """Return the global norm of such gradients, in float64; collective."""
        return self._mode.partial_norm(gradients, norm_type)

    def join_reduction(self, parameters: Sequence[Tensor]) -> None:
        """Join a reduction for which this rank had no gradient, if it is one of some of these parameters."""
        if self._reducer.waits_for_gradients and not set(map(id, parameters)).isdisjoint(map(id, self._parameters())):
            self._reducer.finish()

    def trains(self, parameter: Tensor) -> bool:
        """Whether this is one of its parameters; local."""
        return any(own is parameter for own in self._parameters())

    def while_infinities_are_sought(self) -> contextlib.AbstractContextManager[None]:
        """Let gradients have no infinite element within that was not computed; they are reduced before."""
        self._reducer.finish()
        return self._reducer.gradients.without_marks()

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
        total_weight = self._reducer.meet("averaging a number", weight)
        total = torch.tensor([value * weight], dtype=torch.float64, device="cpu")
        self._communicator.all_reduce(total)
        return total.item() / total_weight

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
        for buffer in self._module.buffers():
            if buffer.is_floating_point():
                mean = buffer.detach().contiguous().clone().div_(self._communicator.world_size)
                self._communicator.all_reduce(mean)
                buffer.detach().copy_(mean)
            else:
                self._broadcast([buffer])

    def detach(self) -> None:
        """End data parallelism: take the hooks off the parameters and free the communicator; collective.

        Parameters, gradients, the wrapped optimizer and its state stay as they are. A state that was divided is put
        together in the wrapped optimizer of every rank, and parameters that a node shared become each rank's own. From
        then on ``step`` is the wrapped optimizer's, and whatever is collective an error. A second call does nothing.
        """
        if self._reducer.is_detached:
            return
        with self._groups_as_taken_over():
            form = self._mode.give_up(self)
            self._mode = Replicated(self._optimizer, self._inner_step, self._names)
            if form is not None:
                load_full_form(self, form)
        forget(self)
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
            self._broadcast(self._parameters())

    # ---------------------------------------------------------------- a state in parts

    @property
    def mode(self) -> str:
        """``"replicated"``, ``"sharded"`` or ``"node-shared"``: what became of ``shard`` and ``node_shared``."""
        return self._mode.name

    def local_slices(self) -> Slices:
        """Return the elements of each parameter, flattened, whose state this rank holds; by name, local."""
        return self._mode.slices()

    def local_state_dict(self) -> NamedState:
        """Return the state that this rank holds, by name, in the form of :mod:`dpoptim.utils.state_dict`; local.

        It shares memory with the optimizer.
        """
        return {**self._mode.form(self._whole_state_dict), **self._kept_attributes.entry()}

    def load_local_state_dict(self, form: NamedState) -> None:
        """Load this rank's part of a state, copied, in the dtypes that it has; local.

        Parameters
        ----------
        form : NamedState
            With the slices and names of :meth:`local_state_dict`.
        """
        self._mode.load(self, form, self._kept_attributes.load)

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
        form = None
        if self._communicator.rank == 0:
            try:
                form = self._checked_form(state_dict)
            except (TypeError, ValueError) as caught:
                error = caught
        raise_together(self._communicator, error)
        self.load_local_state_dict(scatter_state(self._communicator, form, self.local_slices(), self._devices()))

    # ---------------------------------------------------------------- how

    def _parameters(self) -> list[Tensor]:
        return _parameters_of(self)

    def _wrap_alike(self, optimizer: Optimizer) -> "DataParallelOptimizer":
        """Return a wrapper of another optimizer in this one's mode, with this one's arguments; collective."""
        made = object.__new__(type(self))
        arguments = {**self._arguments, "comm_hook": copy.deepcopy(self._arguments["comm_hook"])}
        arguments |= {"shard": self.mode == "sharded", "node_shared": self.mode == "node-shared"}
        DataParallelOptimizer.__init__(made, optimizer, **arguments)
        for name in vars(self).keys() - vars(made).keys() - {"step"}:  # a subclass's own; a scheduler's step is self's
            made.__dict__[name] = vars(self)[name]
        return made

    def _names(self) -> list[str]:
        return parameter_names(self.param_groups, self._module)

    def _patch_step_function(self) -> None:
        """Wrap this class's step, as torch does here (Note [A step without its mark] in step_hooks.py)."""
        run_hooks_around_step(type(self))
        super()._patch_step_function()

    def _reduce_before_step(self, stepped: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Reduce what backward could not, before the user's step hooks see the gradients."""
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
        parameters, names = self._parameters(), self._names()
        self._taken_over = [list(group["params"]) for group in self.param_groups]
        groups = [number for number, group in enumerate(self.param_groups) for _ in group["params"]]
        known = set(map(id, self._reducer.all_buckets))
        self._reducer.add_parameters(parameters[start:], names[start:], groups[start:])
        new = [bucket for bucket in self._reducer.all_buckets if id(bucket) not in known]
        self._mode.add(new, parameters, groups)

    @contextlib.contextmanager
    def _groups_as_taken_over(self) -> Iterator[None]:
        """Have the parameters in the groups within that are divided, whatever the user has made of the groups since."""
        groups = self._optimizer.param_groups
        now = [group["params"] for group in groups]
        if list(map(len, now)) == list(map(len, self._taken_over)) and all(
            own is known
            for members, others in zip(now, self._taken_over, strict=True)
            for own, known in zip(members, others, strict=True)
        ):
            yield
            return
        options = {key: value for key, value in (groups or [self.defaults])[0].items() if key != "param_names"}
        self._optimizer.param_groups = [{**options, "params": members} for members in self._taken_over]
        try:
            yield
        finally:
            self._optimizer.param_groups = groups

    def _whole_state_dict(self) -> dict[str, Any]:
        """Return the state of a replicated optimizer as its class gives it, with what it keeps elsewhere."""
        own = self._optimizer.state_dict if _overrides(self._optimizer, "state_dict") else super().state_dict
        return {**own(), **self._kept_attributes.entry()}

    def _call_method(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of the wrapped optimizer; collective if its parameters are divided."""
        return self._mode.call(partial(method, *args, **kwargs), name)

    def _check_step_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise on all ranks if the further arguments of a step are not the same, or can't be divided; collective."""
        self._reducer.meet("a step with arguments", 1.0)
        self._mode.check_step_arguments()
        own = [digest(value) if isinstance(value, Tensor) else repr(value) for value in _leaves((args, kwargs))]
        different = [rank for rank, other in enumerate(self._communicator.all_gather_object(own)) if other != own]
        error = None
        if different:
            error = ValueError(
                f"the arguments of step() must be the same on all ranks, not so on ranks 0 and {different}"
            )
        raise_together(self._communicator, error)

    def _devices(self) -> dict[str, torch.device]:
        names = unique_names(self.param_groups, self._names())
        return {name: parameter.device for name, parameter in zip(names, self._parameters(), strict=True)}

    def _checked_form(self, state_dict: object) -> NamedState:
        """Return the form of a whole state that fits, as its hooks leave it, in the dtypes of the parameters."""
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping on rank 0, got {type(state_dict).__name__}")
        state_dict = dict(state_dict)
        for hook in list(cast("Any", self)._optimizer_load_state_dict_pre_hooks.values()):
            state_dict = hook(self, state_dict) or state_dict
        check_loadable(self._optimizer, state_dict, self._names())
        names = unique_names(self.param_groups, self._names())
        form = to_named(state_dict, [parameter.shape for parameter in self._parameters()], names)
        for name, parameter in zip(names, self._parameters(), strict=True):
            entry = form["state"].get(name, {})
            for key, value in entry.items():
                if isinstance(value, Tensor) and key != "step" and parameter.is_floating_point():
                    entry[key] = value.to(parameter.dtype)
        return form

    def _check_loadable(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        check_loadable(self._optimizer, state_dict, self._names())

    def _averaged(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def averaged_closure() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._reducer.finish()
            own = loss.detach() if isinstance(loss, Tensor) else loss
            value = self.mean(float("nan") if own is None else float(own))
            self._reducer.expect_backward()
            if own is None:
                return None
            return own.new_tensor(value) if isinstance(own, Tensor) else value

        return averaged_closure

    @torch.no_grad()
    def _broadcast(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if tensor.is_contiguous():
                self._communicator.broadcast(tensor)
            else:
                values = tensor.contiguous()
                self._communicator.broadcast(values)
                tensor.copy_(values)


def _count_or_step(opt: DataParallelOptimizer, closure: Callable[[], Any] | None = None) -> Any:
    """Make the step of an optimizer that accumulates: count a batch, or step if it is the last."""
    if closure is not None:
        raise ValueError("accumulate > 1 takes no closure: call backward() before step()")
    if opt.is_accumulating:
        opt._reducer.count_batch()
        return None
    return type(opt).step(opt)


# Key of the wrapper's own load_state_dict hook, which is there while a state is loaded, behind the user's.
_LAST_HOOK = -2

_HOOK_DICTS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


@functools.cache
def _own_names(kind: Any) -> frozenset[str]:
    """Return the names of attributes that are the wrapper's own: of its classes, also what they only annotate."""
    annotated = (name for base in kind.__mro__ for name in inspect.get_annotations(base))
    return frozenset((*dir(kind), *annotated))


def _overrides(optimizer: Optimizer, name: str) -> bool:
    return getattr(type(optimizer), name) is not getattr(Optimizer, name)


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what is in nested tuples, lists and dicts, with the keys."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield key
            yield from _leaves(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def _parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _wrapped_twice(optimizer: object) -> TypeError | None:
    if isinstance(optimizer, DataParallelOptimizer):
        return TypeError("optimizer is already a DataParallelOptimizer: wrap the torch optimizer, once")
    return None


def _tensors(entry: Any) -> Iterator[Tensor]:
    """Yield the tensors in one parameter's optimizer state."""
    values = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, (list, tuple)) else [entry]
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)):
            yield from _tensors(value)
