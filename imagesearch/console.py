"""Messages to the user, on stderr, and results, on stdout. Imports the standard library only."""

import os
import sys
import time
from contextlib import suppress

from imagesearch.errors import OutputError

CLEAR_LINE = "\r\x1b[K"  # clears a progress bar, which is drawn again when it moves
SAY_SECONDS = 10

_last_said_at = float(-SAY_SECONDS)


def say(text: str) -> None:
    """Prints one line for the user, on stderr; nothing if it cannot be written. Safe in a signal handler.

    What is not printable, as in a text of a library or a server, is escaped.
    """
    line = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
    with suppress(OSError):
        # Not print: what it could not write, Python would try to write again at its end.
        os.write(2, f"{CLEAR_LINE if os.isatty(2) else ''}{line}\n".encode(errors="backslashreplace"))


def say_now_and_then(text: str) -> None:
    """Prints one line as `say` does, unless it printed one in the last 10 seconds."""
    global _last_said_at
    if time.monotonic() - _last_said_at >= SAY_SECONDS:
        _last_said_at = time.monotonic()
        say(text)


def write_line(text: str) -> None:
    """Prints one line of results on stdout. Raises OutputError."""
    try:
        sys.stdout.write(f"{text}\n")  # not print, which writes the end of the line by itself: Ctrl-C may come between
        sys.stdout.flush()
    except OSError as error:
        raise OutputError from error
