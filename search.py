#!/usr/bin/env python3
"""Finds the images nearest to a new one and prints Elasticsearch's response, one line of JSON for each image."""

from imagesearch.start import run  # first: Ctrl-C and missing dependencies, before imports that take long

import argparse
import difflib
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imagesearch.arguments import parse_search_arguments
from imagesearch.console import say, write_line
from imagesearch.embed import EmbeddedQuery, embed_queries
from imagesearch.errors import ImageSearchError, UsageError
from imagesearch.index import Index, open_index
from imagesearch.index.connection import get_connection
from imagesearch.models import Model, check_version, load_index_model
from imagesearch.parallel import map_buffered
from imagesearch.paths import BUCKET_URL, index_folder, quote_path
from imagesearch.records import IndexMetadata, ModelInfo, Search, Unreadable, document_id
from imagesearch.sources import find_queries

if TYPE_CHECKING:
    from imagesearch.results_page import Page

CLASSES_SHOWN = 10


@dataclass(frozen=True)
class Result:
    """Elasticsearch's response to a query, or an error in the same form; `image` is the query's name."""

    image: str
    response: dict[str, Any]


def main() -> int:
    arguments = parse_search_arguments(__doc__)
    code = 0
    with open_index(arguments.index, get_connection(arguments.insecure), arguments.db) as index:
        metadata = get_metadata(index, arguments)
        page = open_page(metadata, arguments) if arguments.html is not None else None
        queries = find_queries(arguments.image, index_folder(metadata.folder))
        if page:
            queries = page.keep_previews(queries)
        embedded = embed_queries(queries, index, model_loader(metadata.model, arguments))
        with closing(embedded), closing(search_all(embedded, index, arguments)) as results:  # before the index
            for result in with_count(results, arguments):
                write_line(json.dumps({"image": result.image, **result.response}, ensure_ascii=False))
                code |= say_result(result, arguments)
                if page:
                    page.add(result.image, result.response)
        if page and page.write():
            say(f"The page of results is {quote_path(str(arguments.html))}.")
    return code


def get_metadata(index: Index, arguments: argparse.Namespace) -> IndexMetadata:
    """Returns what the index records about itself. Raises UsageError if there is no such index."""
    if metadata := index.get_metadata():
        check_version(metadata.model)
        if sys.stderr.isatty():
            say(f"Index {arguments.index} in {index.location}, made with {metadata.model.description}.")
        return metadata
    others = ", ".join(f"{name} ({model})" for name, model in index.list_indexes().items())
    if others:
        raise UsageError(
            f"There is no index {arguments.index} in {index.location}, but there are: {others}. Use --index."
        )
    raise UsageError(f"There is no index {arguments.index} in {index.location}: make it with create.py.")


def open_page(metadata: IndexMetadata, arguments: argparse.Namespace) -> "Page":
    """Returns the page that ``--html`` asks for."""
    from imagesearch.results_page import Page, check_page_path  # late, to save time without --html

    limits = [] if arguments.desc is None else [f" of class {arguments.desc}"]
    limits += [] if arguments.min_score is None else [f" with a score of at least {arguments.min_score:g}"]
    return Page(check_page_path(arguments.html, arguments.image), arguments.index, metadata, "".join(limits))


def is_many(arguments: argparse.Namespace) -> bool:
    """Returns True if the command line names several images to search for, or a folder or bucket of them."""
    (first, *others) = arguments.image
    return bool(others) or os.path.isdir(first) or bool(BUCKET_URL.match(first))


def model_loader(info: ModelInfo, arguments: argparse.Namespace) -> Callable[[], Model]:
    """Returns a function that returns the index's model, which it loads when it is first called.

    If ``--model`` is given, the model is loaded here, so that a wrong one is reported first.
    """
    single_image = not is_many(arguments)
    if not arguments.model:
        return lambda: load_index_model(info, None, single_image)
    model = load_index_model(info, arguments.model, single_image)
    return lambda: model


def search_all(
    queries: Iterable[EmbeddedQuery], index: Index, arguments: argparse.Namespace
) -> Generator[Result, None, None]:
    """Yields the result of each query, in order; several searches are under way at a time."""

    def search(query: EmbeddedQuery) -> Result:
        if isinstance(query.embedded, Unreadable):
            name = "standard input" if query.name == "-" else quote_path(query.name)
            reason = f"Cannot read {name}: {query.embedded.reason}"
            return Result(query.name, {"error": {"type": "image_error", "reason": reason}, "status": 400})
        excluded = document_id(query.file_path) if arguments.exclude_self and query.file_path else None
        embedding = query.embedded.embedding
        return Result(
            query.name, index.search(Search(embedding, arguments.k, arguments.desc, arguments.min_score, excluded))
        )

    with ThreadPoolExecutor(index.max_searches) as pool:
        is_checked = False
        for result in map_buffered(pool, search, queries, 2 * index.max_searches):
            if not is_checked and is_complete(result) and not result.response["hits"]["hits"]:
                check_hits_are_possible(index, arguments)
                is_checked = True
            yield result


def with_count(results: Iterable[Result], arguments: argparse.Namespace) -> Iterable[Result]:
    """Returns the results; shows how many are done, if only stderr is a terminal and there may be many."""
    if not is_many(arguments) or sys.stdout.isatty() or not sys.stderr.isatty():
        return results
    from tqdm import tqdm  # late: it takes some 30 ms

    bar: Iterable[Result] = tqdm(results, unit=" images", leave=False, delay=1)
    return bar


def is_complete(result: Result) -> bool:
    """Returns True if the query could be read and all shards have answered."""
    response = result.response
    return "hits" in response and not response["_shards"]["failed"] and not response["timed_out"]


def check_hits_are_possible(index: Index, arguments: argparse.Namespace) -> None:
    """Raises UsageError if the index is empty, ImageSearchError if it has no such class."""
    classes = index.list_classes()
    if not classes:
        raise UsageError(f"The index {arguments.index} is empty: fill it with create.py.")
    if arguments.desc is None or arguments.desc in classes:
        return
    wanted = comparable(arguments.desc)
    spellings = {comparable(name): name for name in classes}
    similar = [wanted] if wanted in spellings else difflib.get_close_matches(wanted, spellings, cutoff=0.5)
    hint = f"; did you mean {' or '.join(quote_path(spellings[name]) for name in similar)}?" if similar else "."
    names = f" ({', '.join(map(quote_path, sorted(classes)))})" if len(classes) <= CLASSES_SHOWN and not similar else ""
    raise ImageSearchError(
        f"The index {arguments.index} has no image of class {quote_path(arguments.desc)} among its {len(classes):,}"
        f" {'class' if len(classes) == 1 else 'classes'}{names}{hint} An image's class is the innermost folder that it"
        " is in."
    )


def comparable(name: str) -> str:
    """Returns a class's name without the differences that are hard to see: of case, or in how accents are encoded."""
    return unicodedata.normalize("NFC", name).casefold()


def say_result(result: Result, arguments: argparse.Namespace) -> int:
    """Tells the user what the JSON does not show at a glance; returns 1 if the query was not answered in full."""
    if "error" in result.response:
        if not sys.stdout.isatty():  # which shows it already
            say(result.response["error"]["reason"])
        return 1
    if sys.stdout.isatty():
        if is_many(arguments):
            say(f"{quote_path(result.image)}:")
        for hit in result.response["hits"]["hits"]:
            fields = hit["fields"]
            say(f"{hit['_score']:.7f}  {quote_path(fields['desc'][0])}  {quote_path(fields['file_path'][0])}")
    if not is_complete(result):
        say("Warning: some shards failed or timed out; there may be nearer images.")
    return 0 if is_complete(result) else 1


if __name__ == "__main__":
    run(main)
