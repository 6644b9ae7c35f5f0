"""How an error on one rank ends: alike on all ranks, or with the whole job."""

import sys
from collections.abc import Callable
from types import TracebackType

__all__ = ["abort_on_uncaught_exception", "raised_on_all_ranks"]

_hooked: list[Callable[[], None]] = []


def raised_on_all_ranks(error: BaseException) -> BaseException:
    """Mark an error that every rank raises at the same place, so that each may end by itself and say why."""
    error.__dict__["raised_on_all_ranks"] = True
    return error


def abort_on_uncaught_exception(abort: Callable[[], None]) -> None:
    """Call ``abort`` when this rank dies of an exception, or the others would wait for it for ever.

    The traceback is printed first, by whatever ``sys.excepthook`` was there. Errors marked with
    :func:`raised_on_all_ranks` do not abort. A second call does nothing.
    """
    if _hooked:
        return
    _hooked.append(abort)
    previous = sys.excepthook

    def report_and_abort(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        previous(kind, error, traceback)
        if getattr(error, "raised_on_all_ranks", False):
            return
        sys.stdout.flush()
        sys.stderr.flush()
        abort()

    sys.excepthook = report_and_abort
