"""Messages to the user, on stderr, and results, on stdout. Imports the standard library only."""

import os
import sys
from contextlib import suppress

CLEAR_LINE = "\r\x1b[K"  # of a progress bar, which is drawn again when it moves


def say(text: str) -> None:
    """Prints one line for the user, on stderr; nothing if it cannot be written. Safe in a signal handler."""
    with suppress(OSError):
        # Not print: what it could not write, Python would try to write again at its end.
        os.write(2, f"{CLEAR_LINE if os.isatty(2) else ''}{text}\n".encode(errors="backslashreplace"))


class OutputError(Exception):
    """The results could not be written to stdout; the cause is an OSError."""


def write_line(text: str) -> None:
    """Prints one line of results on stdout. Raises OutputError."""
    try:
        sys.stdout.write(f"{text}\n")  # not print, which writes the end of the line by itself: Ctrl-C may come between
        sys.stdout.flush()
    except OSError as error:
        raise OutputError from error
