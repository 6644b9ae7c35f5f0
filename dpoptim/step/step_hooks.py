"""The hooks around a step of the wrapper: its own first, then the user's, as torch runs them. Local.

Tests: ``tests/test_optimizer.py``.

Note [A step without its mark]
------------------------------
torch wraps the ``step`` of an optimizer's class when the first object of it is made. The wrapper runs the hooks, and
leaves a mark for the profiler, also where none runs: of a small model's step that is a good part. The class is wrapped
here, at the same time, by what asks first: with a profiler, a compiler that reads the code, or a hook of the user's all
is as torch does it; else the wrapper's own hook and the step are all that runs. Where a step is to be made of several
batches nothing of this runs in all but the last of them, which are only counted.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

__all__ = ["FIRST_HOOK", "bare_step", "run_hooks_around_step"]

# Key of the wrapper's own step hook among the user's, which torch numbers from 0.
FIRST_HOOK = -1


def run_hooks_around_step(kind: type[Optimizer]) -> None:
    """Wrap the step of a class, unless it is wrapped already.

    Its objects have a hook of their own before it, and ``_accumulates``: if that is true, ``_count_batch`` is asked
    first, with the arguments of the step, and returns whether that was all there is to do.
    """
    step: Any = kind.step
    if getattr(step, "hooked", False):
        return

    @functools.wraps(step)
    def in_place(self: Any, closure: Any = None, *args: Any, **options: Any) -> Any:
        if closure is not None or not _is_elsewhere():
            return step(self, closure, *args, **options)
        with torch.device("cpu"):  # where torch makes its counters, whatever the user's default device is
            return step(self, closure, *args, **options)

    marked = Optimizer.profile_hook_step(in_place)

    @functools.wraps(step)
    def wrapper(self: Any, *args: Any, **options: Any) -> Any:
        if self._accumulates and self._count_batch(*args, **options):
            return None
        is_watched = torch.compiler.is_compiling() or torch._C._autograd._profiler_enabled()
        own = None if is_watched else _only_hook(self)
        if own is None:
            return marked(self, *args, **options)
        own(self, (self, *args), options)
        return in_place(self, *args, **options)

    wrapper.hooked = True  # type: ignore[attr-defined]  # torch asks for it
    kind.step = wrapper  # type: ignore[method-assign]


def _is_elsewhere() -> bool:
    """Whether tensors are made on another device than the CPU, unless one is named."""
    # A default device is a mode of this kind; asking for it takes many microseconds.
    return bool(torch._C._len_torch_function_stack()) and torch.get_default_device().type != "cpu"


def bare_step(torch_class: type[Optimizer]) -> Callable[[Any], Any]:
    """Return the step of a class of ``torch.optim`` alone: without hooks, mark, and the choice of gradient mode."""
    step: Any = torch_class.step
    while hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    bare: Callable[[Any], Any] = step
    return bare


def _only_hook(optimizer: Any) -> Callable[..., None] | None:
    """Return the wrapper's own hook, if there is no other."""
    before = optimizer._optimizer_step_pre_hooks
    if (
        len(before) > 1
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    ):
        return None
    own: Callable[..., None] | None = before.get(FIRST_HOOK)
    return own
