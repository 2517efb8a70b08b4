"""Which index the command line names, and messages to the user. Imports the standard library only."""

import argparse
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from imagesearch.errors import UsageError

if TYPE_CHECKING:
    from imagesearch.connection import Connection

DEFAULT_DATABASE = "imagesearch.db"


def connect(arguments: argparse.Namespace) -> "Connection | None":
    """Returns the connection that the environment and the options name, None for the local index file.

    Warns about --insecure. Raises UsageError if ES_URL and --db contradict each other.
    """
    from imagesearch.connection import Connection

    connection = Connection.from_env(os.environ, verify_certs=not arguments.insecure)
    if connection and arguments.db:
        raise UsageError("ES_URL is set, and --db names a local index file: unset ES_URL, or leave out --db.")
    if connection and arguments.insecure:
        say(
            "Warning: --insecure does not verify the server's certificate: an attacker on the network could intercept"
            " the credentials."
        )
    return connection


def say(text: str) -> None:
    """Prints one line for the user, on stderr; nothing if it cannot be written."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))  # a print would try again at the end


class OutputError(Exception):
    """The results could not be written to stdout; the cause is an OSError."""


def write_line(text: str) -> None:
    """Prints one line of results on stdout. Raises OutputError."""
    try:
        print(text, flush=True)
    except OSError as error:
        raise OutputError from error
