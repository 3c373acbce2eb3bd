"""The streams that train.py and every script print to: a reader may end, a terminal may lack letters."""

import contextlib
import errno
import io
import os
import sys
from typing import Any


def steady_streams() -> None:
    """Let no end of stdout's or stderr's reader and no letter end the process; the first call of a command.

    A pipe's reader that ends (`| head`, a killed tee) or a terminal that is closed takes what is printed from
    then on to nowhere: what counts is on disk, and the exit status is what it would be. Rich would end the
    process from its print, without a word. A letter that stdout's encoding lacks becomes "?".
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed by who started us: the next file that is opened would be taken for it
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    # One that somebody has put in their place is left to him. stderr's own errors never raise.
    if sys.stdout is sys.__stdout__:
        sys.stdout = _steady(sys.stdout, 1, "replace")
    if sys.stderr is sys.__stderr__:
        sys.stderr = _steady(sys.stderr, 2, "backslashreplace")


def _steady(stream: io.TextIOWrapper | None, number: int, errors: str) -> io.TextIOWrapper:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8", errors=errors)
    raw = _Descriptor(number)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # as Python does it
        stream.encoding,
        errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Descriptor(io.FileIO):
    """An open stream; once nobody reads it any more, it takes what is written and drops it."""

    def __init__(self, number: int):
        super().__init__(number, "w", closefd=False)
        self.terminal = self.isatty()  # one that was closed is none any more

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if isinstance(error, ConnectionError) or (self.terminal and error.errno == errno.EIO):
                return len(data)
            raise


def write_at_once(number: int, text: str) -> None:
    """Write to a descriptor past all buffers and locks, from any thread; to nowhere where nobody reads."""
    with contextlib.suppress(OSError):
        os.write(number, text.encode())
