"""How an error on one rank ends: alike on all ranks, or with the whole job."""

import contextlib
import fcntl
import os
import stat
import struct
import sys
import termios
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

__all__ = [
    "abort_on_uncaught_exception",
    "heard_if_left",
    "left_within",
    "note_under_way",
    "print_and_abort",
    "raised_on_all_ranks",
]

_hooked: list[Callable[[], None]] = []
_left: list[str] = []
_under_way: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()


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
        _abort_when_read(abort)

    sys.excepthook = report_and_abort


class heard_if_left(contextlib.ContextDecorator):  # noqa: N801  used as a function is
    """Take note if this rank ends its program within, as a signal's handler does that calls ``sys.exit``.

    The others wait for it there. An error ends the job by itself where it is not caught (above).

    Parameters
    ----------
    place : str
        Where it is, in words.
    """

    def __init__(self, place: str) -> None:
        self._place = place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is not None and issubclass(kind, SystemExit):
            _left.append(f"by {kind.__name__} in the middle of {self._place}")


def note_under_way(owner: object, place: str | None) -> None:
    """Take note that a collective of this object's goes on beside the program, until its place is None."""
    if place is None:
        _under_way.pop(owner, None)
    else:
        _under_way[owner] = f"in the middle of {place}"


def left_within() -> str | None:
    """Return how and where this rank has left a collective, None if it has not."""
    return next(iter((*_left, *_under_way.values())), None)


def print_and_abort(message: str, abort: Callable[[], None]) -> None:
    """Print a line to stderr, and end every rank of the job when it was read."""
    print(message, file=sys.stderr, flush=True)
    _abort_when_read(abort)


def _abort_when_read(abort: Callable[[], None]) -> None:
    for stream in (sys.stdout, sys.stderr):
        _wait_until_read(stream)
    abort()


def _wait_until_read(stream: Any, limit_s: float = 1.0) -> None:
    """Flush a stream and, if it is a pipe, wait until its reader has emptied it.

    A launcher reads its ranks' output from pipes. An abort reaches it by another way, and may be seen first: what
    is in the pipe then is lost, and with it the reason of the abort.
    """
    with contextlib.suppress(OSError, ValueError):  # closed, or not a file: nothing to wait for
        stream.flush()
        descriptor = stream.fileno()
        end = time.monotonic() + limit_s
        while stat.S_ISFIFO(os.fstat(descriptor).st_mode) and time.monotonic() < end:
            (num_bytes,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, b"\0" * 4))
            if num_bytes == 0:
                break
            time.sleep(0.01)
