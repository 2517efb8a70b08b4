#!/usr/bin/env python3
# ruff: noqa: E402
"""Finds the images nearest to a new one and prints Elasticsearch's response, one line of JSON for each IMAGE."""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback, from here on

from imagesearch import cli

cli.start()  # before the imports that take long

import argparse
import difflib
import json
from contextlib import suppress
from typing import Any

from imagesearch.embed import embed_queries
from imagesearch.errors import UsageError
from imagesearch.index import Index, open_index
from imagesearch.models import load_index_model
from imagesearch.parallel import available_cpus
from imagesearch.paths import index_folder, path_to_text, query_name, quote_path
from imagesearch.results_page import Page, check_page_path
from imagesearch.sources import open_query

EXAMPLES = """\
  python3 search.py myimage.jpg                    the nearest image
  python3 search.py -k 10 --desc Bald_Eagle a.jpg  the ten nearest in one class
  python3 search.py -k 12 --html results.html a.jpg
                                                   a page with the twelve nearest
  python3 search.py https://example.com/a.jpg s3://birds/b.jpg - < c.jpg
                                                   images from the web, a bucket and standard input
  python3 search.py *.jpg | jq '.hits.hits[0].fields.file_path[0]'
"""

MAX_K = 10_000  # Elasticsearch's limit on num_candidates and on the size of a result


def main() -> int:
    arguments = parse_arguments()
    code = 0
    with open_index(arguments.index, cli.connect(arguments), arguments.db) as index:
        metadata = index.get_metadata()
        if metadata is None:
            raise UsageError(
                f"There is no index {arguments.index} yet: make it with create.py, or use --index with another name."
            )
        threads = available_cpus() if len(arguments.image) == 1 else 1
        model = load_index_model(metadata.model, arguments.model, threads)
        page = Page(arguments.html, index, path_to_text(index_folder(metadata.folder))) if arguments.html else None
        opener = page.open_query if page else open_query
        for query, embedding in embed_queries(arguments.image, opener, model):
            if isinstance(embedding, str):
                reason = f"Cannot read {quote_path(query_name(query))}: {embedding}"
                cli.say(reason)
                response = {"error": {"type": "image_error", "reason": reason}, "status": 400}
                code = 1
            else:
                response = index.search(embedding, arguments.k, arguments.desc, arguments.min_score)
                code |= check_response(response, index, arguments)
            cli.write_line(json.dumps(response))
            if page:
                page.add(query, response)
        if page and page.write():
            cli.say(f"The page of results is {quote_path(str(arguments.html))}.")
    return code


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(__doc__, EXAMPLES)
    parser.add_argument(
        "image",
        metavar="IMAGE",
        nargs="+",
        help="the image to search for: a file, an http(s)://, s3://, gs:// or az:// URL, or - for standard input",
    )
    parser.add_argument("-k", metavar="N", type=number_of_images, default=1, help="how many images (default: 1)")
    parser.add_argument("--desc", metavar="NAME", type=path_to_text, help="only images of this class (their folder)")
    parser.add_argument("--min-score", metavar="S", type=score, help="only images that score at least S, from 0 to 1")
    parser.add_argument("--html", metavar="FILE", help="also write the results as an HTML page")
    parser.add_argument("--model", metavar="FILE", help="where the index's ONNX model is now, if it was moved")
    parser.add_index_options()
    arguments = parser.parse_args()
    if arguments.image.count("-") > 1:
        parser.error("argument IMAGE: standard input (-) can be read only once")
    if arguments.html is not None:
        arguments.html = check_page_path(arguments.html, arguments.image)
    return arguments


def number_of_images(text: str) -> int:
    """Returns the number of -k, which Elasticsearch limits."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_K):
        raise argparse.ArgumentTypeError(f"must be a number from 1 to {MAX_K}")
    return int(text)


def score(text: str) -> float:
    """Returns the score of --min-score."""
    with suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError("must be a number from 0 to 1")


def check_response(response: dict[str, Any], index: Index, arguments: argparse.Namespace) -> int:
    """Says what is missing from a response; returns the exit code. Raises UsageError if the index is empty."""
    if response["_shards"]["failed"] or response["timed_out"]:
        cli.say("Warning: some shards failed or timed out; there may be nearer images.")
        return 1
    if response["hits"]["hits"] or (arguments.desc is None and arguments.min_score is not None):
        return 0
    classes = index.count_classes()
    if not classes:
        raise UsageError(f"The index {arguments.index} is empty: fill it with create.py.")
    if arguments.desc in classes:  # with no image that scores enough
        return 0
    spellings = {name.casefold(): name for name in classes}
    similar = difflib.get_close_matches((arguments.desc or "").casefold(), spellings, cutoff=0.5)
    hint = f"; did you mean {' or '.join(quote_path(spellings[name]) for name in similar)}?" if similar else "."
    cli.say(
        f"The index {arguments.index} has no image of class {quote_path(arguments.desc or '')}"
        f" among its {len(classes):,} classes{hint}"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
