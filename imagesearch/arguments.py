"""The command lines of both scripts."""

import argparse
import itertools
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from imagesearch.errors import UsageError
from imagesearch.index import INDEX_TYPES
from imagesearch.index.connection import uses_elasticsearch
from imagesearch.locations import kind_of, path_argument, path_to_text, quote_path
from imagesearch.records import MAX_K, Part

DEFAULT_INDEX = "images"

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
  python3 search.py --exclude-self -k 3 images/Osprey
                                                   the three nearest others of each image in a folder
  python3 search.py https://example.com/a.jpg s3://birds/b.jpg - < c.jpg
                                                   images from the web, a bucket and standard input
"""

ENVIRONMENT = """\
environment:
  ES_URL      Elasticsearch, as https://user:password@host:port (special characters percent-encoded);
              if not set: a local index file, see --db
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
        type=path_argument,
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
        help="also delete the documents of files below DIR that no longer exist; refused if these are more than the"
        " images there, as with an unmounted disk; see --prune-all",
    )
    parser.add_argument("--prune-all", action="store_true", help="like --prune, but never refused")
    parser.add_argument(
        "--part",
        metavar="I/N",
        type=part,
        default=Part(),
        help="only the I-th of N parts of the images, for N machines that share the folder and write to one"
        " Elasticsearch, not to one file on a network share (default: 1/1)",
    )
    parser.add_argument(
        "--index-type",
        choices=INDEX_TYPES,
        help="how a new index on Elasticsearch searches its vectors: quantized to 8 bits (int8_hnsw, the default), to 1"
        " bit in a fifth of the memory, or as they are in four times the memory",
    )
    parser.add_index_options()
    arguments, others = parser.parse_known_args()
    if others:
        name = " ".join(itertools.takewhile(lambda word: not word.startswith("-"), others))
        proposal = f"; to index a folder or bucket, use --images {quote_path(name)}" if name else ""
        parser.error(f"unrecognized arguments: {quote_path(' '.join(others))}{proposal}")
    if not arguments.images:
        parser.error("argument --images: must be a folder or the URL of a bucket")
    arguments.prune |= arguments.prune_all
    parser.check_index_options(arguments)
    if arguments.index_type and not uses_elasticsearch(os.environ):
        parser.error("--index-type is for Elasticsearch, and ES_URL is not set; a local index file is exact")
    return arguments


def parse_search_arguments(description: str | None) -> argparse.Namespace:
    """Returns the command line of search.py; ends the process with a line if it is wrong."""
    parser = Parser(description, SEARCH_EXAMPLES)
    parser.add_argument(
        "image",
        metavar="IMAGE",
        nargs="*",
        type=path_argument,
        help="the image to search for: a file, an http(s)://, s3://, gs:// or az:// URL, or - for standard input; a"
        " folder, or a bucket's s3://bucket/folder, stands for each image below it",
    )
    parser.add_argument("-k", metavar="N", type=number_of_images, default=1, help="how many images (default: 1)")
    parser.add_argument("--desc", metavar="NAME", type=path_to_text, help="only images of this class (their folder)")
    parser.add_argument(
        "--min-score", metavar="S", type=score, help="of the N nearest, only those that score at least S, from 0 to 1"
    )
    parser.add_argument(
        "--exclude-self", action="store_true", help="leave out the image itself, if it is indexed; not copies of it"
    )
    parser.add_argument("--html", metavar="FILE", help="also write the results as an HTML page")
    parser.add_argument(
        "--images", metavar="URL", help="with --html: the bucket whose images the page may show, if IMAGE is not in it"
    )
    parser.add_argument("--model", metavar="FILE", help="where the index's ONNX model is now, if it was moved")
    parser.add_index_options()
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)  # parse_intermixed_args would read options after it
    arguments = parser.parse_intermixed_args(words[:end])
    arguments.image += map(path_argument, words[end + 1 :])
    if not arguments.image:
        parser.error("the following arguments are required: IMAGE")
    if arguments.image.count("-") > 1:
        parser.error("argument IMAGE: standard input (-) can be read only once")
    if arguments.images and kind_of(arguments.images) != "bucket":
        parser.error("argument --images: must be the URL of a bucket")
    if arguments.html == "-":
        parser.error("argument --html: must be the name of a file; results go to standard output as JSON")
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
        self.add_argument("--index", metavar="NAME", type=index_name, help=f"the index (default: {DEFAULT_INDEX})")
        self.add_argument(
            "--db",
            metavar="FILE",
            type=database,
            help="the local index file, which is used if ES_URL is not set (default: the index's name and .db)",
        )
        self.add_argument("--insecure", action="store_true", help="do not verify the server's certificate")

    def check_index_options(self, arguments: argparse.Namespace) -> None:
        """Ends the process if --db contradicts another option or ES_URL; sets the defaults of --index and --db."""
        if arguments.db and uses_elasticsearch(os.environ):
            self.error("ES_URL is set, and --db names a local index file: unset ES_URL, or leave out --db")
        if arguments.db and arguments.index:
            self.error("--index and --db both name the index: use one of the two")
        arguments.is_db_given = arguments.db is not None
        arguments.index = arguments.index or (arguments.db.stem if arguments.db else DEFAULT_INDEX)
        arguments.db = arguments.db or Path(f"{arguments.index}.db")

    def error(self, message: str) -> NoReturn:
        self.exit(UsageError.exit_code, f"{self.prog}: {message}. See {self.prog} --help.\n")


def index_name(text: str) -> str:
    """Returns a name that Elasticsearch accepts for an index; the local file has the same rules.

    https://www.elastic.co/docs/api/doc/elasticsearch/operation/operation-indices-create
    """
    if text.endswith(".db"):
        raise argparse.ArgumentTypeError(f"names an index, without .db; for a file, use --db {quote_path(text)}")
    forbidden = set(' \\/*?"<>|,#:') & set(text)
    if not text or forbidden or text != text.lower() or text[0] in "-_+." or len(text.encode()) > 255:
        raise argparse.ArgumentTypeError(
            'must be lowercase, without spaces or any of \\/*?"<>|,#: and not begin with - _ + or a dot'
        )
    return text


def database(text: str) -> Path:
    """Returns the path of an index file; not one of the names that SQLite treats specially."""
    path = Path(text)
    if not text or text.startswith((":", "file:")):
        raise argparse.ArgumentTypeError("must be the path of a file")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{quote_path(text)} is a folder; it must be the path of a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {quote_path(str(path.parent))}")
    return path
