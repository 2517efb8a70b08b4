#!/usr/bin/env python3
"""Makes a CLIP embedding of every image in a folder or bucket and indexes it, for search.py to find."""

from imagesearch.start import exit_on_signals, run  # first: Ctrl-C and missing dependencies

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial

from imagesearch.arguments import parse_create_arguments
from imagesearch.console import say
from imagesearch.embed import Embedder, UnreadableError
from imagesearch.errors import ImageSearchError, UsageError
from imagesearch.files import raise_open_file_limit
from imagesearch.gone import Listing
from imagesearch.index import Index, open_index
from imagesearch.index.connection import get_connection
from imagesearch.locations import path_to_text, quote_path
from imagesearch.models import MODEL_NAMES, Model, check_compatible, load_index_model, load_model
from imagesearch.parallel import available_cpus, batch_until_error, call_on_thread, make_chunks, map_buffered
from imagesearch.progress import NoReport, Progress
from imagesearch.records import BATCH_SIZE, Document, ImageFile, IndexMetadata, Part, Unreadable, document_id
from imagesearch.sources import Source, open_source

EXTRA_WORKERS = 4  # beyond one for each CPU: they open images and write documents while others embed
WRITE_SECONDS = 2  # after which a worker writes what it has embedded: large images take their time
MAX_BUFFERED_BYTES = 256_000_000  # limit on the contents that all workers keep in memory together


def main() -> int:
    arguments = parse_create_arguments(__doc__)
    progress = Progress()
    exit_on_signals(progress.say_interrupted)
    return call_on_thread(lambda: index_images(arguments, progress))


def index_images(arguments: argparse.Namespace, progress: Progress) -> int:
    """Brings the index up to date with the source; returns the exit code."""
    connection, part = get_connection(arguments.insecure), arguments.part
    with open_index(
        arguments.index, connection, arguments.db, index_type=arguments.index_type, long_retries=True
    ) as index:
        source = open_source(arguments.images, index.base)
        listing = list_images(source, progress, may_be_empty=arguments.prune_all and index.metadata is not None)
        model = prepare_index(index, arguments)
        counted = (image for image in source.find_images(NoReport()) if part.contains(image.id))
        progress.start(f"; index {arguments.index}, {model.info.description}", counted)
        with progress:
            images = (image for image in listing if part.contains(image.id))
            index_images_in_chunks(find_changed(images, index, progress), source, index, model, progress)
            index.refresh()
            if arguments.prune:
                prune(source, index, part, progress, arguments.prune_all)
        if not arguments.prune and part.count == 1:
            say_gone(source, index, progress)
    if progress.unreadable:
        say("Some images cannot be read. Fix or move them, or leave them: the others are indexed.")
    return int(progress.unreadable > 0)


def list_images(source: Source, progress: Progress, may_be_empty: bool) -> Iterator[ImageFile]:
    """Returns the images in the source. Raises UsageError if there are none, before an index is made for them."""
    images = source.find_images(progress)
    first = list(itertools.islice(images, 1))
    if not first and not may_be_empty:
        raise UsageError(
            f"There are no images below {quote_path(source.name)}. Put some there, or use --images with their folder."
        )
    return itertools.chain(first, images)


def prepare_index(index: Index, arguments: argparse.Namespace) -> Model:
    """Returns the index's model; creates the index if there is none, and says which are used.

    Raises ImageSearchError if ``--model`` is not the index's model, or another run creates or deletes the index now.
    """
    if index.metadata:
        recorded = index.metadata
        model = load_index_model(recorded.model, arguments.model)
        if path_to_text(index.base) != recorded.base:
            base = quote_path(index.base)
            say(f"The index was made in {quote_path(recorded.base)}, which does not exist here: ./ is now {base}.")
        if recorded.model.name not in (*MODEL_NAMES, model.info.name):
            with suppress(ImageSearchError):  # An API key may lack this privilege: search.py then needs --model.
                index.record_model(model.info)
        index.refresh()  # what an interrupted run has written is not embedded again
    else:
        model = load_model(arguments.model or "clip")
        wanted = IndexMetadata(model.info, path_to_text(index.base))
        index.create(wanted)
        if index.metadata is None:
            raise ImageSearchError("The index was deleted as soon as it was created. Run the command again.")
        check_compatible(index.metadata.model, model.info)
        if index.metadata.base != wanted.base:
            raise ImageSearchError("Another run has just created the index in another folder. Run the command again.")
    say(f"Index {arguments.index} in {index.location}, made with {model.info.description}.")
    return model


def find_changed(images: Iterator[ImageFile], index: Index, progress: Progress) -> Iterator[ImageFile]:
    """Yields new and changed images, with what the index holds of them."""
    for batch in batch_until_error(images, BATCH_SIZE):
        indexed = index.get_file_metadata([image.id for image in batch])
        for image in batch:
            file = indexed.get(image.id)
            if file is None:
                yield image
            elif file.matches(image):
                progress.count_unchanged()
            else:
                yield replace(image, indexed=file)


def index_images_in_chunks(
    images: Iterator[ImageFile], source: Source, index: Index, model: Model, progress: Progress
) -> None:
    """Embeds and writes images on all CPUs, some together, and counts them."""
    embedder, cpus = Embedder(lambda: model), available_cpus()
    workers = cpus + EXTRA_WORKERS
    size = max(1, min(model.chunk_size, raise_open_file_limit() // 2 // workers))
    chunks = make_chunks(images, size, cpus, source.buffered_bytes, MAX_BUFFERED_BYTES // workers)
    with ThreadPoolExecutor(workers) as pool:
        index_one = partial(index_chunk, source=source, index=index, embedder=embedder, progress=progress)
        for unreadable in map_buffered(pool, index_one, chunks, workers + cpus):
            for each in unreadable:
                progress.count_unreadable(each.name, each.reason)


def index_chunk(
    images: Sequence[ImageFile], source: Source, index: Index, embedder: Embedder, progress: Progress
) -> list[Unreadable]:
    """Opens, embeds and writes some images, on a worker from start to end; returns those that cannot be read."""
    documents: list[Document] = []
    with source.open_images(images) as (opened, unreadable):
        progress.advance(len(unreadable))
        changed = [each.sha256 for each in opened if not each.is_indexed]
        known = index.find_embeddings(changed)
        with embedder.cpu_slots:
            written_at = time.monotonic()
            for each in opened:
                if each.is_indexed:  # only its size or time has changed
                    documents.append(Document(each.image, each.sha256, None))
                else:
                    try:
                        embedding, is_copy = embedder.embed(each, known)
                        documents.append(Document(each.image, each.sha256, embedding, is_copy))
                    except UnreadableError as error:
                        unreadable.append(Unreadable(each.image.file_path, str(error)))
                progress.advance(1)
                if time.monotonic() - written_at > WRITE_SECONDS:
                    progress.count_stored(index.write(documents))
                    documents, written_at = [], time.monotonic()
    progress.count_stored(index.write(documents))
    return unreadable


def prune(source: Source, index: Index, part: Part, progress: Progress, is_forced: bool) -> None:
    """Deletes the documents of images that are gone.

    Raises UsageError, unless it `is_forced`, if these are more than there are images: an unmounted disk looks the same.
    """
    listing = Listing(source, part)
    number = sum(1 for _ in listing.find_gone(index))  # not kept: there may be millions
    if number > listing.number_of_images and not is_forced:
        raise UsageError(
            f"--prune would delete {number:,} documents below {quote_path(source.name)}, more than the number of images"
            f" there ({listing.number_of_images:,}): a disk that is not mounted looks the same. If that is intended,"
            " use --prune-all."
        )
    for batch in batch_until_error(listing.find_gone(index), BATCH_SIZE):
        progress.deleted += index.delete([document_id(path) for path in batch])
    index.refresh()


def say_gone(source: Source, index: Index, progress: Progress) -> None:
    """Says how many documents have no image, if there are any."""
    if index.count_below(source.name) > progress.stored:
        number = sum(1 for _ in Listing(source, Part()).find_gone(index))
        if number:
            say(f"Documents without an image: {number:,}; --prune deletes them.")


if __name__ == "__main__":
    run(main)
