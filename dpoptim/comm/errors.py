"""How an error on one rank ends: alike on all ranks, or with the whole job."""

import contextlib
import fcntl
import os
import stat
import struct
import sys
import termios
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

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
        for stream in (sys.stdout, sys.stderr):
            _wait_until_read(stream)
        abort()

    sys.excepthook = report_and_abort


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
