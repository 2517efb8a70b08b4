"""What both scripts share on the command line: options and messages. Imports the standard library only."""

import argparse
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from imagesearch.errors import UsageError

if TYPE_CHECKING:
    from imagesearch.connection import Connection

DEFAULT_DATABASE = "imagesearch.db"

ENVIRONMENT = """\
environment:
  ES_URL      Elasticsearch, as https://user:password@host:port (special characters percent-encoded);
              several nodes of one cluster separated by commas. If not set: a local index file, see --db
  ES_CA_CERT  PEM file of the CA that signed the server's certificate, unless it is a public one
  ES_API_KEY  an API key, instead of user and password in ES_URL
  for s3://   AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, and AWS_ENDPOINT_URL unless it is AWS
  for gs://   GOOGLE_APPLICATION_CREDENTIALS
  for az://   AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY
"""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line."""

    def __init__(self, description: str | None, examples: str, **options: Any) -> None:
        super().__init__(
            description=description,
            epilog=f"examples:\n{examples}\n{ENVIRONMENT}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
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
            help=f"a local index file, which is used if ES_URL is not set (default: {DEFAULT_DATABASE})",
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


def database(text: str) -> Path:
    """Returns the path of an index file; not one of the names that SQLite treats specially."""
    if not text or text.startswith(":") or text.startswith("file:"):
        raise argparse.ArgumentTypeError("must be the path of a file")
    return Path(text)


def seconds(text: str) -> float:
    """Returns a number of seconds."""
    with suppress(ValueError):
        if 0 <= float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError("must be a number of seconds")


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
