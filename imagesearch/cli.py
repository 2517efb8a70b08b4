"""What both scripts share on the command line: options, messages, exit codes. Imports the standard library only."""

import argparse
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from imagesearch.errors import ImageSearchError, UsageError, describe_error
from imagesearch.paths import quote_path

if TYPE_CHECKING:
    from imagesearch.connection import Connection

DEFAULT_DATABASE = Path("imagesearch.db")

ENVIRONMENT = """\
environment:
  ES_URL      Elasticsearch, as https://user:password@host:port (special characters percent-encoded);
              several nodes of one cluster separated by commas. If not set: a local index file, see --db
  ES_CA_CERT  PEM file of the CA that signed the server's certificate, unless it is a public one
  ES_API_KEY  an API key, instead of user and password in ES_URL
  AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL
              for s3:// URLs; for gs:// and az:// those that their command line tools use
"""


def start() -> None:
    """Call before importing the rest: reports missing dependencies, and makes Ctrl-C end without a traceback."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    if importlib.util.find_spec("imgbeddings") is None:
        say("The dependencies are not installed: run pip install -r requirements.txt, or source .venv/bin/activate.")
        sys.exit(UsageError.exit_code)


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line."""

    def __init__(self, description: str | None, examples: str) -> None:
        super().__init__(
            description=description,
            epilog=f"examples:\n{examples}\n{ENVIRONMENT}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def add_index_options(self) -> None:
        """Adds the options that say which index is used."""
        self.add_argument(
            "--index", metavar="NAME", type=index_name, default="images", help="the index (default: images)"
        )
        self.add_argument(
            "--db",
            metavar="FILE",
            type=database,
            default=DEFAULT_DATABASE,
            help=f"the local index file, used if ES_URL is not set (default: {DEFAULT_DATABASE})",
        )
        self.add_argument("--insecure", action="store_true", help="do not verify the server's certificate")

    def error(self, message: str) -> NoReturn:
        self.exit(UsageError.exit_code, f"{self.prog}: {message}. See {self.prog} --help.\n")


class StoreOnce(argparse.Action):
    """Stores an option's value, and refuses the option if it is given twice."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if getattr(namespace, self.dest) is not self.default:
            parser.error(f"argument {option_string}: given more than once; run the script once for each")
        setattr(namespace, self.dest, values)


def index_name(text: str) -> str:
    """Returns a name that Elasticsearch accepts for an index; the local file has the same rules.

    https://www.elastic.co/docs/api/doc/elasticsearch/operation/operation-indices-create
    """
    forbidden = set(' \\/*?"<>|,#:') & set(text)
    if not text or forbidden or text != text.lower() or text[0] in "-_+." or len(text.encode()) > 255:
        raise argparse.ArgumentTypeError(
            'must be lowercase, without spaces or any of \\/*?"<>|,#: and not begin with - _ + or a dot'
        )
    return text


def location(text: str) -> str:
    """Returns a folder or URL; it must not be empty."""
    if not text:
        raise argparse.ArgumentTypeError("must be a folder or a URL")
    return text


def seconds(text: str) -> float:
    """Returns a number of seconds."""
    with suppress(ValueError):
        if 0 <= float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError("must be a number of seconds")


@dataclass(frozen=True)
class Part:
    """The `number`-th of `count` parts of the images; the parts are disjoint and together cover all images."""

    number: int
    count: int

    def contains(self, id_: str) -> bool:
        """Returns True if the document with this ``_id``, a SHA-256 in hex, is in this part."""
        return int(id_[:16], 16) % self.count == self.number - 1


def part(text: str) -> Part:
    """Returns a part such as 2/5."""
    match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text, re.ASCII)
    if not match or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError("must be I/N with I from 1 to N, for example 2/5")
    return Part(int(match[1]), int(match[2]))


def database(text: str) -> Path:
    """Returns the path of an index file; not one of the names that SQLite treats specially."""
    if not text or text.startswith(":") or text.startswith("file:"):
        raise argparse.ArgumentTypeError("must be the path of a file")
    return Path(text)


def connect(arguments: argparse.Namespace) -> "Connection | None":
    """Returns the connection that the environment and the options name, None for the local index file.

    Says which index is used, unless the options do, and warns about --insecure.
    """
    from imagesearch.connection import Connection

    connection = Connection.from_env(os.environ, verify_certs=not arguments.insecure)
    if connection is None:
        if arguments.db is DEFAULT_DATABASE or not arguments.db.exists():
            say(
                f"Using the local index file {quote_path(os.path.abspath(arguments.db))}."
                " To use Elasticsearch, set ES_URL=https://user:password@host:port."
            )
        if getattr(arguments, "part", Part(1, 1)).count > 1:
            say("Warning: several machines must not write to one index file on a network share: use Elasticsearch.")
    elif arguments.insecure:
        say(
            "Warning: --insecure does not verify the server's certificate: an attacker on the network could intercept"
            " the credentials."
        )
    return connection


def say(text: str) -> None:
    """Prints one line for the user, on stderr; if its reader has closed it, nothing."""
    with suppress(BrokenPipeError):
        print(text, file=sys.stderr)


class OutputError(Exception):
    """The results could not be written to stdout; the cause is an OSError."""


def write_line(text: str) -> None:
    """Prints one line of results on stdout. Raises OutputError."""
    try:
        print(text, flush=True)
    except OSError as error:
        raise OutputError from error


def run(main: Callable[[], int]) -> NoReturn:
    """Runs a script's `main` and exits with its code, or with one line in place of a traceback."""
    program = os.path.basename(sys.argv[0])
    try:
        code = main()
    except ImageSearchError as error:
        say(f"{program}: {error}")
        code = error.exit_code
    except OSError as error:  # of the system, where nothing more specific is known
        place = f": {quote_path(str(error.filename))}" if error.filename else ""
        say(f"{program}: {describe_error(error)}{place}.")
        code = ImageSearchError.exit_code
    except OutputError as error:
        code = 141  # as for a program that SIGPIPE ends: the reader has gone, as `| head -1` does
        cause = error.__cause__
        if cause and not isinstance(cause, BrokenPipeError):
            say(f"{program}: the results cannot be written: {describe_error(cause)}.")
            code = ImageSearchError.exit_code
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
