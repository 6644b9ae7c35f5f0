"""DataParallelOptimizer: any torch optimizer, on the mean gradient of all ranks."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpoptim.comm_hooks import CommHook, allreduce
from dpoptim.communicator import Communicator, available_cores
from dpoptim.preconditions import check_closure, check_loadable, check_one_group, naming_gradients
from dpoptim.reducer import Reducer, is_reduced
from dpoptim.roll_call import RollCall
from dpoptim.signature import check_alike, describe_module, parameter_names, qualified_name
from dpoptim.utils.consistency import raise_together

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
    module : torch.nn.Module, optional
        The model. Its buffers and its frozen parameters are broadcast too, its names appear in error messages, and
        :meth:`average_buffers` becomes available.
    bucket_mb : float
        Small gradients are sent together, at most so many MiB at once.
    overlap : "auto" or bool
        Whether gradients are sent by a thread of their own while backward goes on (needs MPI_THREAD_MULTIPLE and a
        core to spare), or when backward ends. ``"auto"`` overlaps where this node has more cores than its ranks have
        compute threads.
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
    Collective: construction, :meth:`add_param_group`, :meth:`average_buffers`, :meth:`detach`, ``step`` with a
    closure, and ``backward()`` outside of :meth:`no_sync`. Everything else is local. Errors found on one rank are
    raised on all; a rank that dies of an exception ends the job.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        comm: Any = None,
        *,
        module: nn.Module | None = None,
        bucket_mb: float = 25,
        overlap: bool | str = "auto",
        comm_hook: CommHook | None = None,
        accumulate: int = 1,
    ) -> None:
        roll_call = RollCall.of(comm)
        raise_together(
            roll_call.communicator, _argument_error(optimizer, module, bucket_mb, overlap, comm_hook, accumulate)
        )
        self._roll_call = roll_call
        self._optimizer = optimizer
        self._module = module
        self._is_constructed = False
        state = optimizer.state
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.state = state
        for hooks in _HOOK_DICTS:  # hooks registered on the inner optimizer go on working, with the wrapper
            setattr(self, hooks, getattr(optimizer, hooks))
        pre_hooks = cast("OrderedDict[int, Any]", self._optimizer_step_pre_hooks)
        pre_hooks[_FIRST_HOOK] = self._reduce_before_step
        pre_hooks.move_to_end(_FIRST_HOOK, last=False)
        self._is_constructed = True

        settings = {
            "bucket_mb": repr(bucket_mb),
            "comm_hook": repr(comm_hook and qualified_name(comm_hook)),
            "accumulate": repr(accumulate),
        }
        if module is not None:
            settings["module"] = describe_module(module)
        check_alike(roll_call.communicator, optimizer, parameter_names(optimizer.param_groups, module), settings)
        if overlap == "auto":
            overlap = _has_spare_cores(roll_call.communicator)
        self._communicator = roll_call.communicator.duplicate(overlap=bool(overlap))
        self._reducer = Reducer(
            self._communicator,
            roll_call,
            comm_hook=comm_hook or allreduce,
            bucket_bytes=max(1, int(bucket_mb * 2**20)),
            accumulate=accumulate,
        )
        if accumulate > 1:  # around torch's own hooks, which run only when a step is made
            self.step = MethodType(_count_or_step, self)  # type: ignore[method-assign]
        self._reducer.add_parameters(self._parameters(), parameter_names(optimizer.param_groups, module))
        self._broadcast(self._parameters())
        self._broadcast([value for entry in state.values() for value in _tensors(entry)])
        if module is not None:
            self._broadcast([*module.parameters(), *module.buffers()])

    # ---------------------------------------------------------------- what torch.optim.Optimizer is

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The one live list of parameter groups, the wrapped optimizer's."""
        return self._optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self._optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state."""
        return self._optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self._optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults."""
        return self._optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self._optimizer.defaults = value

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step with the global mean gradients.

        Collective only with a closure, or if gradients were not reduced yet (no parameter of this rank had one; they
        were left local by :meth:`no_sync`). Parameters are the same bits on every rank afterwards.

        Parameters
        ----------
        closure : callable, optional
            Clears gradients, computes the loss, calls ``backward()``, returns the loss. Loss and gradients are
            averaged over ranks within it, so that every rank takes the same branch of a line search.

        Returns
        -------
        float, Tensor or None
            The loss of the closure, averaged over ranks with :attr:`batch_weight`.
        """
        wrapped = None if closure is None else self._averaged(closure)
        step = type(self._optimizer).step
        # Step hooks have run on the wrapper; the wrapped class's own step would run the global ones again.
        with naming_gradients(self._optimizer, self._names):
            loss = getattr(step, "__wrapped__", step)(self._optimizer, wrapped)
        self._optimizer._opt_called = True  # type: ignore[attr-defined]  # for a scheduler made on the inner one
        self._reducer.count_step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients, as the wrapped optimizer does; nothing while they are being accumulated."""
        if self._reducer.num_accumulated:
            return
        self._optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to train, with hyper-parameters of their own; collective.

        They are compared across ranks and broadcast from rank 0. See ``torch.optim.Optimizer.add_param_group``.
        """
        if not self._is_constructed:
            super().add_param_group(param_group)
            return
        self._reducer.meet("adding a parameter group", 1.0)
        num_before = len(self._parameters())
        error = None
        try:
            check_one_group(self._optimizer)
            self._optimizer.add_param_group(param_group)
        except (TypeError, ValueError) as caught:
            error = caught
        if error is None:
            error = _already_reduced(param_group["params"])
            if error is not None:
                self.param_groups.pop()
        raise_together(self._communicator, error)
        names = parameter_names(self.param_groups, self._module)
        check_alike(self._communicator, self._optimizer, names, {})
        self._reducer.add_parameters(self._parameters()[num_before:], names[num_before:])
        self._broadcast(self._parameters()[num_before:])

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
        try:
            super().load_state_dict(state_dict)
        finally:
            del hooks[_LAST_HOOK]

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
        return False

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Keep gradients local in every ``backward()`` within; the next one outside reduces their sum.

        All ranks enter and leave it at the same places. Saves communication when gradients are accumulated over
        several batches. Without it accumulation is exact too.
        """
        return self._reducer.no_sync()

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Scale all gradients so that their global norm is at most ``max_norm``; return the norm before.

        Local: the gradients are global already. The same as ``torch.nn.utils.clip_grad_norm_`` on all parameters.
        """
        return nn.utils.clip_grad_norm_(self._parameters(), max_norm, norm_type, error_if_nonfinite)

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
        total = torch.tensor([value * weight], dtype=torch.float64)
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

        Parameters, gradients, the wrapped optimizer and its state stay as they are.
        """
        self._reducer.detach()
        self._communicator.free()

    # ---------------------------------------------------------------- how

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _names(self) -> list[str]:
        return parameter_names(self.param_groups, self._module)

    def _reduce_before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Reduce what backward could not, before the user's step hooks see the gradients."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        check_closure(self._optimizer, closure)
        if closure is None:
            self._reducer.finish()

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


# Key of the wrapper's own step hook among the user's, which torch numbers from 0.
_FIRST_HOOK = -1
# Key of its own load_state_dict hook, which is there while a state is loaded, behind the user's.
_LAST_HOOK = -2

_HOOK_DICTS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def _argument_error(
    optimizer: object, module: object, bucket_mb: float, overlap: bool | str, comm_hook: object, accumulate: object
) -> Exception | None:
    """Return what is wrong with the arguments of this rank, if anything is."""
    if isinstance(optimizer, DataParallelOptimizer):
        return TypeError("optimizer is already a DataParallelOptimizer: wrap the torch optimizer, once")
    if not isinstance(optimizer, Optimizer):
        return TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if module is not None and not isinstance(module, nn.Module):
        return TypeError(f"module must be a torch.nn.Module or None, got {type(module).__name__}")
    if not isinstance(bucket_mb, (int, float)) or not bucket_mb > 0:
        return ValueError(f"bucket_mb must be > 0, got {bucket_mb!r}")
    if overlap not in ("auto", True, False):
        return ValueError(f'overlap must be "auto", True or False, got {overlap!r}')
    if comm_hook is not None and not callable(comm_hook):
        return TypeError(f"comm_hook must be callable, got {type(comm_hook).__name__}")
    if not isinstance(accumulate, int) or accumulate < 1:
        return ValueError(f"accumulate must be an integer >= 1, got {accumulate!r}")
    return _already_reduced([parameter for group in optimizer.param_groups for parameter in group["params"]])


def _already_reduced(parameters: Sequence[Tensor]) -> ValueError | None:
    for index, parameter in enumerate(parameters):
        if is_reduced(parameter):
            return ValueError(
                f"parameter {index} of shape {tuple(parameter.shape)} belongs to another DataParallelOptimizer: "
                "detach() that one first"
            )
    return None


def _tensors(entry: Any) -> Iterator[Tensor]:
    """Yield the tensors in one parameter's optimizer state."""
    values = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, (list, tuple)) else [entry]
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)):
            yield from _tensors(value)


def _has_spare_cores(communicator: Communicator) -> bool:
    """Whether every node has a core left for a thread of each of its ranks; the same on all ranks, collective."""
    wanted = communicator.all_gather_object((available_cores(), torch.get_num_threads() + 1))
    return all(
        len(set[int]().union(*(wanted[rank][0] for rank in node))) >= sum(wanted[rank][1] for rank in node)
        for node in communicator.topology.nodes
    )
