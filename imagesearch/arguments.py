"""The command lines of both scripts."""

import argparse
import itertools
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from imagesearch.connection import uses_elasticsearch
from imagesearch.errors import UsageError
from imagesearch.paths import local_path, path_to_text, quote_path
from imagesearch.sources import Part

DEFAULT_DATABASE = "imagesearch.db"
MAX_K = 10_000  # Elasticsearch's limit on num_candidates and on the size of a result

CREATE_EXAMPLES = """\
  python3 create.py                            index ./images
  python3 create.py --images ~/photos --prune  also delete the documents of photos that are gone
  python3 create.py --images s3://birds/photos index a bucket
  python3 create.py --model thumbnail --index tryout
                                               try it without downloading CLIP
"""

SEARCH_EXAMPLES = """\
  python3 search.py myimage.jpg                    the nearest image
  python3 search.py -k 10 --desc Bald_Eagle a.jpg  the ten nearest in one class
  python3 search.py -k 12 --html results.html a.jpg
                                                   a page with the twelve nearest
  python3 search.py https://example.com/a.jpg s3://birds/b.jpg - < c.jpg
                                                   images from the web, a bucket and standard input
  python3 search.py @names.txt | jq '.hits.hits[0].fields.file_path[0]'
                                                   images whose names are in a file, one a line
"""

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


def parse_create_arguments(description: str | None) -> argparse.Namespace:
    """Returns the command line of create.py; ends the process with a line if it is wrong."""
    parser = Parser(description, CREATE_EXAMPLES)
    parser.add_argument(
        "--images",
        metavar="DIR|URL",
        type=local_path,
        action=StoreOnce,
        default="images",
        help="a folder, or a bucket as s3://bucket/folder, gs://… or az://… (default: images)",
    )
    parser.add_argument(
        "--model",
        metavar="NAME|FILE",
        help="clip (downloaded once), thumbnail (a baseline: 16x16 pixels), or an ONNX file with imgbeddings' input"
        " and output (default: the model of the index; clip for a new index)",
    )
    parser.add_argument(
        "--prune",
        action="store_true",
        help="also delete the documents of files below DIR that no longer exist; refused if none of the indexed"
        " files is left, as with an unmounted disk; see --prune-all",
    )
    parser.add_argument("--prune-all", action="store_true", help="like --prune, but never refused")
    parser.add_argument(
        "--part",
        metavar="I/N",
        type=part,
        default=Part(),
        help="only the I-th of N parts of the images, for N machines that share the folder (default: 1/1)",
    )
    parser.add_argument(
        "--retry-timeout",
        metavar="SECONDS",
        type=seconds,
        default=120,
        help="how long to keep retrying if Elasticsearch or the bucket becomes unreachable during the run; not"
        " at its start (default: 120)",
    )
    parser.add_index_options()
    arguments, others = parser.parse_known_args()
    if others:
        name = " ".join(itertools.takewhile(lambda word: not word.startswith("-"), others))
        proposal = f"; to index a folder or bucket, use --images {quote_path(name)}" if name else ""
        parser.error(f"unrecognized arguments: {quote_path(' '.join(others))}{proposal}")
    arguments.prune |= arguments.prune_all
    parser.check_index_options(arguments)
    return arguments


def parse_search_arguments(description: str | None) -> argparse.Namespace:
    """Returns the command line of search.py; ends the process with a line if it is wrong."""
    parser = Parser(description, SEARCH_EXAMPLES, fromfile_prefix_chars="@")
    parser.add_argument(
        "image",
        metavar="IMAGE",
        nargs="+",
        type=local_path,
        help="the image to search for: a file, an http(s)://, s3://, gs:// or az:// URL, or - for standard input;"
        " @FILE reads such names from FILE, one a line",
    )
    parser.add_argument("-k", metavar="N", type=number_of_images, default=1, help="how many images (default: 1)")
    parser.add_argument("--desc", metavar="NAME", type=path_to_text, help="only images of this class (their folder)")
    parser.add_argument("--min-score", metavar="S", type=score, help="only images that score at least S, from 0 to 1")
    parser.add_argument("--html", metavar="FILE", help="also write the results as an HTML page")
    parser.add_argument("--model", metavar="FILE", help="where the index's ONNX model is now, if it was moved")
    parser.add_index_options()
    try:
        arguments = parser.parse_intermixed_args()
    except UnicodeDecodeError:
        parser.error("the names in @FILE must be UTF-8: give others on the command line")
    if arguments.image.count("-") > 1:
        parser.error("argument IMAGE: standard input (-) can be read only once")
    parser.check_index_options(arguments)
    return arguments


def part(text: str) -> Part:
    """Returns the part of --part, such as 2/5."""
    match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text, re.ASCII)
    if not match or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError("must be I/N with I from 1 to N, for example 2/5")
    return Part(int(match[1]), int(match[2]))


def number_of_images(text: str) -> int:
    """Returns the number of -k, which Elasticsearch limits."""
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= MAX_K:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {MAX_K:,}")
    return int(text)


def score(text: str) -> float:
    """Returns the score of --min-score."""
    with suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError("must be a number from 0 to 1")


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

    def check_index_options(self, arguments: argparse.Namespace) -> None:
        """Ends the process if --db contradicts ES_URL; sets the default of --db."""
        if arguments.db and uses_elasticsearch(os.environ):
            self.error("ES_URL is set, and --db names a local index file: unset ES_URL, or leave out --db")
        arguments.db = arguments.db or Path(DEFAULT_DATABASE)

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        """Returns the argument in a line of ``@FILE``: a name, even if it looks like an option or another ``@FILE``."""
        return [f"./{line}" if line.startswith(("-", "@")) and line != "-" else line] if line else []

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^\[Errno \d+\] ", "", message)  # of an @FILE that cannot be read
        self.exit(UsageError.exit_code, f"{self.prog}: {message}. See {self.prog} --help.\n")


class StoreOnce(argparse.Action):
    """Stores an option's value, and refuses the option if it is given twice."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given: set[str] = getattr(namespace, "given", set())
        if self.dest in given:
            parser.error(f"argument {option_string}: given more than once; run the script once for each")
        namespace.given = given | {self.dest}
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
