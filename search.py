#!/usr/bin/env python3
"""Finds the images nearest to a new one and prints a response as Elasticsearch's, a line of JSON for each image."""

from imagesearch.start import run  # first: Ctrl-C and missing dependencies, before imports that take long

import argparse
import difflib
import json
import sys
import unicodedata
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from imagesearch.arguments import parse_search_arguments
from imagesearch.console import say, write_line
from imagesearch.embed import Embedder, UnreadableError
from imagesearch.errors import ImageSearchError, UsageError, describe_error
from imagesearch.files import raise_open_file_limit
from imagesearch.index import Index, open_index
from imagesearch.index.connection import get_connection
from imagesearch.locations import bucket_of, file_path_of, kind_of, quote_path
from imagesearch.models import Model, check_version, load_index_model
from imagesearch.parallel import batch_until_error, make_chunks, map_buffered
from imagesearch.records import BATCH_SIZE, Embedding, ModelInfo, OpenedImage, Search
from imagesearch.sources.queries import Query, find_queries, is_folder_or_prefix, open_query

if TYPE_CHECKING:
    from imagesearch.results_page import Page

CLASSES_SHOWN = 10
WORKERS = 16  # most of a download is waiting
MAX_OPENED_AT_ONCE = 16  # by a worker
MAX_HITS_AT_ONCE = 20_000  # limit on the hits of all searches of one worker

# C1 controls and DEL, and those that change the direction of the text after them.
CONTROL_CHARACTERS = {
    code: f"\\u{code:04x}"
    for code in (*range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


def main() -> int:
    arguments = parse_search_arguments(__doc__)
    is_complete = True
    with open_index(arguments.index, get_connection(arguments.insecure), arguments.db) as index:
        model = model_loader(check_index(index, arguments), arguments)
        page = open_page(index, arguments) if arguments.html is not None else None
        queries = find_queries(arguments.image, index.base)
        with closing(search_all(queries, index, Embedder(model), page, arguments)) as results:
            for result in with_bar(check_hits(results, index, arguments), index, arguments):
                write_line(json_line(result))
                say_result(result, arguments)
                if page:
                    page.add(result.query, result.response, leave_out_empty=arguments.min_score is not None)
                is_complete &= result.is_complete
        if page and page.write():
            say(f"The page of results is {quote_path(str(arguments.html))}.")
    return 0 if is_complete else 1


def check_index(index: Index, arguments: argparse.Namespace) -> ModelInfo:
    """Returns the model that made the index. Raises UsageError if there is no such index."""
    if index.metadata:
        model = index.metadata.model
        check_version(model)
        if sys.stderr.isatty():
            say(f"Index {arguments.index} in {index.location}, made with {model.description}.")
        return model
    others = index.list_indexes()
    if others:
        option = "--db with its file" if arguments.is_db_given else "--index"
        names = ", ".join(f"{name} ({model})" for name, model in others.items())
        raise UsageError(
            f"There is no index {arguments.index} in {index.location}, but there are: {names}. Use {option}."
        )
    raise UsageError(f"There is no index {arguments.index} in {index.location}: make it with create.py.")


def model_loader(info: ModelInfo, arguments: argparse.Namespace) -> Callable[[], Model]:
    """Returns a function that returns the index's model, which it loads when it is first called.

    If ``--model`` is given, the model is loaded here, so that a wrong one is reported first.
    """
    single_image = not is_many(arguments)
    if not arguments.model:
        return lambda: load_index_model(info, None, single_image)
    model = load_index_model(info, arguments.model, single_image)
    return lambda: model


def is_many(arguments: argparse.Namespace) -> bool:
    """Returns True if the command line names several images to search for, or a folder or bucket of them."""
    first, *others = arguments.image
    return bool(others) or is_folder_or_prefix(first)


def open_page(index: Index, arguments: argparse.Namespace) -> "Page":
    """Returns the page that ``--html`` asks for."""
    from imagesearch.results_page import Page, check_page_path  # imported here: without --html it is not needed

    assert index.metadata
    path = check_page_path(arguments.html, arguments.image)
    description = f"Index {arguments.index}, made with {index.metadata.model.description}"
    limits = "" if arguments.desc is None else f" of class {arguments.desc}"
    limits += "" if arguments.min_score is None else f" with a score of at least {arguments.min_score:g}"
    named = [file_path_of(text, index.base) for text in (*arguments.image, arguments.images or "-")]
    buckets = [bucket_of(file_path) for file_path in named if kind_of(file_path) == "bucket"]
    return Page(path, index.base, description, limits, buckets)


@dataclass(frozen=True)
class Result:
    """Elasticsearch's response to a query, or an error in the same form."""

    query: Query
    response: dict[str, Any]

    @property
    def is_complete(self) -> bool:
        """True if the query could be read and all shards have answered."""
        response = self.response
        return "hits" in response and not response["_shards"]["failed"] and not response["timed_out"]


def search_all(
    queries: Iterator[Query], index: Index, embedder: Embedder, page: "Page | None", arguments: argparse.Namespace
) -> Generator[Result, None, None]:
    """Yields the result of each query, in order; many are opened, embedded and searched for together."""
    size = max(1, min(index.searches_at_once, MAX_HITS_AT_ONCE // arguments.k))
    opened_at_once = max(1, min(MAX_OPENED_AT_ONCE, raise_open_file_limit() // 2 // WORKERS))

    def weight(query: Query) -> int:
        if query.sha256:  # it is not opened
            return 0
        # A remote image gets its own chunk: two chunks that hold memory and wait for more would wait for each other.
        return opened_at_once if kind_of(query.image.location) in ("web", "bucket") else 1

    chunks = make_chunks(look_up(queries, index), size, 0, weight, opened_at_once)
    search_one = partial(search_chunk, index=index, embedder=embedder, page=page, arguments=arguments)
    with ThreadPoolExecutor(WORKERS) as pool, closing(map_buffered(pool, search_one, chunks, WORKERS)) as outcomes:
        for results in outcomes:
            yield from results


def look_up(queries: Iterator[Query], index: Index) -> Iterator[Query]:
    """Yields the queries; those that are listed and unchanged with the hash of their content, from the index."""
    for batch in batch_until_error(queries, BATCH_SIZE):
        ids = [query.image.id for query in batch if query.is_listed]
        indexed = index.get_file_metadata(ids) if ids else {}
        for query in batch:
            file = indexed.get(query.image.id)
            yield replace(query, sha256=file.sha256) if file and file.matches(query.image) else query


def search_chunk(
    queries: Sequence[Query], index: Index, embedder: Embedder, page: "Page | None", arguments: argparse.Namespace
) -> list[Result]:
    """Opens, embeds and searches for some images; on a worker, from start to end."""
    known = index.find_embeddings([query.sha256 for query in queries if query.sha256])
    embeddings = {query: known[query.sha256] for query in queries if query.sha256 in known}
    problems = {query: query.problem for query in queries if query.problem}
    with ExitStack() as stack:
        opened: dict[Query, OpenedImage] = {}
        for query in queries:
            if query not in embeddings and query not in problems:
                try:
                    opened[query] = stack.enter_context(open_query(query.image))
                except (OSError, ValueError, ImageSearchError) as error:
                    problems[query] = describe_error(error).rstrip(".")
        known = index.find_embeddings([content.sha256 for content in opened.values()])
        with embedder.cpu_slots:
            for query, content in opened.items():
                try:
                    embeddings[query], _ = embedder.embed(content, known)
                    if page:
                        page.keep_preview(query, content)
                except UnreadableError as error:
                    problems[query] = str(error)
    searches = [to_search(query, embedding, arguments) for query, embedding in embeddings.items()]
    responses = dict(zip(embeddings, index.search(searches) if searches else [], strict=True))
    return [Result(query, responses.get(query) or to_error(query, problems[query])) for query in queries]


def to_search(query: Query, embedding: Embedding, arguments: argparse.Namespace) -> Search:
    """Returns what the index is asked for a query."""
    excluded_id = query.image.id if arguments.exclude_self and query.image.file_path else None
    return Search(embedding, arguments.k, arguments.desc, arguments.min_score, excluded_id)


def to_error(query: Query, problem: str) -> dict[str, Any]:
    """Returns the response to a query that cannot be read, in the form of Elasticsearch's errors."""
    name = "standard input" if query.name == "-" else quote_path(query.name)
    return {"error": {"type": "image_error", "reason": f"Cannot read {name}: {problem}"}, "status": 400}


def with_bar(results: Iterator[Result], index: Index, arguments: argparse.Namespace) -> Iterator[Result]:
    """Yields the results; on a terminal, if there are many, shows how many are done and the time left."""
    if not is_many(arguments) or sys.stdout.isatty() or not sys.stderr.isatty():
        yield from results
        return
    from imagesearch.progress import open_bar  # imported here: it takes some 30 ms

    with open_bar(find_queries(arguments.image, index.base)) as bar:
        for result in results:
            yield result
            bar.update(1)


def check_hits(results: Iterator[Result], index: Index, arguments: argparse.Namespace) -> Iterator[Result]:
    """Yields the results; at the first one without a hit, checks that there can be any."""
    is_checked = False
    for result in results:
        if not is_checked and result.is_complete and not result.response["hits"]["hits"]:
            check_hits_are_possible(index, arguments)
            is_checked = True
        yield result


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


def json_line(result: Result) -> str:
    """Returns a result as JSON, in which no character controls a terminal."""
    line = json.dumps({"image": result.query.name, **result.response}, ensure_ascii=False)
    return line.translate(CONTROL_CHARACTERS)


def say_result(result: Result, arguments: argparse.Namespace) -> None:
    """Tells the user what the JSON does not show at a glance."""
    if "error" in result.response:
        if not sys.stdout.isatty():  # a terminal shows the line of JSON already
            say(result.response["error"]["reason"])
        return
    if sys.stdout.isatty():
        if is_many(arguments):
            say(f"{quote_path(result.query.name)}:")
        if not result.response["hits"]["hits"]:
            say("no image")
        for hit in result.response["hits"]["hits"]:
            fields = hit["fields"]
            say(f"{hit['_score']:.7f}  {quote_path(fields['desc'][0])}  {quote_path(fields['file_path'][0])}")
    if not result.is_complete:
        say("Warning: some shards failed or timed out; there may be nearer images.")


if __name__ == "__main__":
    run(main)
