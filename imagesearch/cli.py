"""What both scripts have in common on the command line: options, the index they name, how they end."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from imagesearch.connection import connection
from imagesearch.errors import Failure, Misuse
from imagesearch.files import shown
from imagesearch.index import Index, Pause

ENVIRONMENT = """\
environment:
  ES_URL      Elasticsearch, as https://user:password@host:port (special characters percent-encoded);
              several nodes of one cluster separated by commas. Not set: a local index file, see --db
  ES_CA_CERT  PEM file of the CA that signed the server's certificate, where it is not a public one
  ES_API_KEY  an API key, in place of user and password in ES_URL
"""


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def __init__(self, description: str, examples: str) -> None:
        super().__init__(
            description=description,
            epilog=f"examples:\n{examples}\n{ENVIRONMENT}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def add_index_options(self) -> None:
        """The options that say which index is used."""
        self.add_argument(
            "--index", metavar="NAME", type=index_name, default="images", help="the index (default: images)"
        )
        self.add_argument(
            "--db",
            metavar="FILE",
            type=Path,
            default=Path("imagesearch.db"),
            help="the local index file, used when ES_URL is not set (default: imagesearch.db)",
        )
        self.add_argument("--insecure", action="store_true", help="do not verify the server's certificate")

    def error(self, message: str) -> NoReturn:
        self.exit(Misuse.exit_code, f"{self.prog}: {message}. See {self.prog} --help.\n")


def index_name(text: str) -> str:
    """A name that Elasticsearch takes for an index; its rules hold for the local file as well.

    https://www.elastic.co/docs/api/doc/elasticsearch/operation/operation-indices-create
    """
    forbidden = set(' \\/*?"<>|,#:') & set(text)
    if not text or forbidden or text != text.lower() or text[0] in "-_+." or len(text.encode()) > 255:
        raise argparse.ArgumentTypeError(
            'must be lower case, without spaces or any of \\/*?"<>|,#: and not begin with - _ + or a dot'
        )
    return text


def open_index(arguments: argparse.Namespace, pause: Pause, patience: float) -> Index:
    """The index that the environment and the options name, of either kind; says which, where that is not plain."""
    place = connection(os.environ, arguments.insecure)
    if place is None:
        from imagesearch.local import Local

        say(
            f"Using the local index file {shown(str(arguments.db))}."
            " To use Elasticsearch, set ES_URL=https://user:password@host:port."
        )
        return Local(arguments.db, arguments.index)
    from imagesearch.elastic import Elastic

    if arguments.insecure:
        say("Warning: --insecure does not verify the server's certificate: anyone between can read the password.")
    return Elastic(place, arguments.index, pause, patience)


def say(text: str) -> None:
    """One line for the user, on stderr."""
    print(text, file=sys.stderr)


def run(main: Callable[[], int]) -> NoReturn:
    """Runs a script's `main` and exits with its code, or with a line in place of a traceback."""
    program = os.path.basename(sys.argv[0])
    try:
        code = main()
        sys.stdout.flush()
    except Failure as failure:
        say(f"{program}: {failure}")
        code = failure.exit_code
    except KeyboardInterrupt:
        code = 130
    except OSError as error:  # of stdout: a full disk, or whoever read it has gone, as `| head -1` does
        code = 141
        if not isinstance(error, BrokenPipeError):
            say(f"{program}: the results cannot be written: {error.strerror}.")
            code = Failure.exit_code
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
