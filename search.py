#!/usr/bin/env python3
"""Finds the images nearest to a new one and prints Elasticsearch's response, one line of JSON for each IMAGE."""

import argparse
import json
from pathlib import Path
from typing import Any

from imagesearch import cli
from imagesearch.embed import Unreadable, cores, embed
from imagesearch.errors import Failure, Misuse
from imagesearch.files import File, as_text, reason, shown
from imagesearch.models import Model, ModelRecord, load_model

EXAMPLES = """\
  python3 search.py myimage.jpg                    the nearest image
  python3 search.py -k 10 --desc Bald_Eagle a.jpg  the ten nearest in one class
  python3 search.py -k 12 --html results.html a.jpg
                                                   a page of the twelve nearest
  python3 search.py *.jpg | jq '.hits.hits[0].fields.file_path[0]'
"""

GREATEST_K = 10_000  # Elasticsearch's limit on num_candidates and on the size of a result


def main() -> int:
    arguments = parse()
    answers = []
    code = 0
    with cli.open_index(arguments, lambda seconds, why: False, 0) as index:
        made_by = index.model()
        if made_by is None:
            raise Misuse(
                f"There is no index {arguments.index} yet: make it with create.py, or name another with --index."
            )
        one = len(arguments.image) == 1
        model = load(made_by, arguments.model, threads=cores() if one else 1)
        queries = ((File(path, 0, 0), None) for path in arguments.image)
        for query in embed(queries, model, workers=1 if one else cores()):
            if isinstance(query, Unreadable):
                cli.say(f"Cannot read {shown(query.path)}: {query.reason}")
                code = 1
                continue
            assert query.embedding is not None
            response = index.search(query.embedding, arguments.k, arguments.desc)
            if not response["hits"]["hits"]:
                if arguments.desc is None:
                    raise Misuse(f"The index {arguments.index} is empty: fill it with create.py.")
                cli.say(f"There is no image of class {shown(arguments.desc)} in the index {arguments.index}.")
            if response["_shards"]["failed"] or response["timed_out"]:
                cli.say("Warning: a part of the index did not answer: there may be nearer images.")
                code = 1
            print(json.dumps(response), flush=True)
            answers.append((query.file.path, response))
    if arguments.html:
        write_html(arguments.html, answers)
    return code


def parse() -> argparse.Namespace:
    parser = cli.Parser(__doc__, EXAMPLES)
    parser.add_argument("image", metavar="IMAGE", nargs="+", help="an image file to search for")
    parser.add_argument("-k", metavar="N", type=neighbours, default=1, help="how many nearest images (default: 1)")
    parser.add_argument("--desc", metavar="NAME", type=as_text, help="search only images of this class (their folder)")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write the results as a page to look at, too")
    parser.add_argument(
        "--model", metavar="FILE", help="where the index's ONNX model is, if not where create.py found it"
    )
    parser.add_index_options()
    return parser.parse_args()


def neighbours(text: str) -> int:
    """A number for -k that Elasticsearch takes."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= GREATEST_K):
        raise argparse.ArgumentTypeError(f"must be a number from 1 to {GREATEST_K}")
    return int(text)


def load(made_by: ModelRecord, name: str | None, threads: int) -> Model:
    """The model that made the index. Raises Misuse where it cannot be had, or `name` is another."""
    try:
        model = load_model(name or made_by.model, threads)
    except Misuse as misuse:
        if name or made_by.model in ("clip", "thumbnail"):
            raise
        raise Misuse(
            f"The index was made with the model {shown(made_by.model)}: say where it is now with --model FILE."
        ) from misuse
    if not made_by.same_as(model.record):
        raise Misuse(
            f"The index was made with --model {shown(made_by.model)}, and {shown(model.record.model)} is not the same:"
            " give that model with --model FILE, or make an index with this one."
        )
    return model


def write_html(path: Path, answers: list[tuple[str, dict[str, Any]]]) -> None:
    """Writes the page of results. Raises Failure where that cannot be."""
    from imagesearch.gallery import write_page

    try:
        write_page(path, answers)
    except OSError as error:
        raise Failure(f"{shown(str(path))} cannot be written: {reason(error)}. Give another file to --html.") from None
    cli.say(f"The page of results is {shown(str(path))}.")


if __name__ == "__main__":
    cli.run(main)
