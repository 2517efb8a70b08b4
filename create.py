#!/usr/bin/env python3
"""Makes a CLIP embedding of every image in a folder or bucket and indexes it, for search.py to find."""

from imagesearch.start import exit_on_signals, run  # first: Ctrl-C and missing dependencies

import argparse
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

from imagesearch.arguments import parse_create_arguments
from imagesearch.console import say
from imagesearch.embed import embed_images
from imagesearch.errors import ImageSearchError, UsageError
from imagesearch.index import WritableIndex, open_writable_index
from imagesearch.index.connection import get_connection
from imagesearch.models import Model, check_compatible, load_index_model, load_model
from imagesearch.parallel import batch_until_error, call_on_thread, map_buffered
from imagesearch.paths import index_folder, path_to_text, quote_path
from imagesearch.progress import Progress
from imagesearch.records import BATCH_SIZE, Candidate, ImageFile, IndexMetadata, Part, Skipped, Unreadable, document_id
from imagesearch.sources import Source, open_source

GONE_CHECKS = 64  # files or objects that are looked at once more at the same time


@dataclass(frozen=True)
class Found:
    """What a run has found: images by the first 8 bytes of their ``_id``, and the names of what it could not read."""

    ids: set[int] = field(default_factory=set)
    unreadable: set[str] = field(default_factory=set)

    def covers(self, file_path: str) -> bool:
        """Returns True if an image was found, or may be below a folder that could not be read."""
        folders = (file_path[:end] for end, character in enumerate(file_path) if character == "/")
        return _short_id(document_id(file_path)) in self.ids or any(
            path in self.unreadable for path in (file_path, *folders)
        )


def _short_id(id_: str) -> int:
    return int(id_[:16], 16)


def main() -> int:
    arguments = parse_create_arguments(__doc__)
    progress = Progress()
    exit_on_signals(progress.say_interrupted)
    return call_on_thread(lambda: index_images(arguments, progress))


def index_images(arguments: argparse.Namespace, progress: Progress) -> int:
    """Brings the index up to date with the source; returns the exit code."""
    connection = get_connection(arguments.insecure)
    with open_writable_index(arguments.index, connection, arguments.db, arguments.index_type) as index:
        metadata = index.get_metadata()
        base = index_folder(metadata.folder if metadata else None)
        if metadata and path_to_text(base) != metadata.folder:
            say(f"{quote_path(metadata.folder)}, where the index was made, is not here: ./ is now {quote_path(base)}.")
        source = open_source(arguments.images, base)
        listing = list_source(source, may_be_empty=arguments.prune_all and metadata is not None)
        metadata, model = prepare_index(index, metadata, arguments)
        index.refresh()  # what an interrupted run has written is not embedded again
        found = Found()
        progress.start(f"; index {arguments.index}, {metadata.model.description}", count_images(source, arguments.part))
        with progress:
            images = find_images(listing, arguments.part, found, progress)
            candidates = find_changed(images, index, progress)
            with closing(embed_images(candidates, source, model, index, progress)) as documents:
                for document in index.write(documents):
                    progress.count_written(document)
            index.refresh()
            gone = find_gone(source, index, arguments.part, found)
            if arguments.prune:
                delete(gone, source, index, progress, arguments.prune_all)
        is_whole = not arguments.prune and arguments.part.count == 1
        if is_whole and index.count_below(source.name) > progress.stored and (number := sum(1 for _ in gone)):
            say(f"Documents without an image: {number:,}; --prune deletes them.")
    if progress.unreadable:
        say("Some images cannot be read. Fix or move them, or leave them: the others are indexed.")
    return int(progress.unreadable > 0)


def list_source(source: Source, may_be_empty: bool) -> Iterator[ImageFile | Skipped | Unreadable]:
    """Returns what is in the source. Raises UsageError if there are no images, before an index is made for them."""
    listing = source.find_images()
    first: list[ImageFile | Skipped | Unreadable] = []
    for item in listing:
        first.append(item)
        if isinstance(item, ImageFile):
            break
    else:
        if not may_be_empty:
            for item in first:
                if isinstance(item, Unreadable):
                    say(f"Cannot read {quote_path(item.name)}: {item.reason}")
            raise UsageError(
                f"There are no images below {quote_path(source.name)}. Put some there, or use --images with their"
                " folder."
            )
    return itertools.chain(first, listing)


def prepare_index(
    index: WritableIndex, metadata: IndexMetadata | None, arguments: argparse.Namespace
) -> tuple[IndexMetadata, Model]:
    """Returns the index's metadata and model; creates the index if there is none, and says which are used.

    Raises ImageSearchError if ``--model`` is not the index's model, or another run creates or deletes the index now.
    """
    if metadata:
        model = load_index_model(metadata.model, arguments.model)
    else:
        model = load_model(arguments.model or "clip")
        metadata = IndexMetadata(model.info, path_to_text(index_folder(None)))
        index.create(metadata)
        created = index.get_metadata()
        if created is None:
            raise ImageSearchError("The index was deleted as soon as it was created. Run the command again.")
        check_compatible(created.model, model.info)
        if created.folder != metadata.folder:
            raise ImageSearchError("Another run has just created the index in another folder. Run the command again.")
    say(f"Index {arguments.index} in {index.location}, made with {metadata.model.description}.")
    return metadata, model


def count_images(source: Source, part: Part) -> Iterator[object]:
    """Yields each image of the part, for the progress to count them."""
    return (item for item in source.find_images() if isinstance(item, ImageFile) and part.contains(item.id))


def find_images(
    listing: Iterator[ImageFile | Skipped | Unreadable], part: Part, found: Found, progress: Progress
) -> Iterator[ImageFile]:
    """Yields the images that are in this part, and remembers them; counts what else is listed."""
    for item in listing:
        if isinstance(item, Skipped):
            progress.count_skipped(item)
        elif isinstance(item, Unreadable):
            progress.count_unreadable(item)
            found.unreadable.add(item.name)
        elif part.contains(item.id):
            found.ids.add(_short_id(item.id))
            yield item


def find_changed(images: Iterator[ImageFile], index: WritableIndex, progress: Progress) -> Iterator[Candidate]:
    """Yields new and changed images."""
    for batch in batch_until_error(images, BATCH_SIZE):
        indexed = index.get_file_metadata([image.id for image in batch])
        for image in batch:
            known = indexed.get(image.id)
            if known and known.matches(image):
                progress.count_unchanged()
            else:
                yield Candidate(image, known)


def find_gone(source: Source, index: WritableIndex, part: Part, found: Found) -> Iterator[str]:
    """Yields the `file_path` of each document below the source that has no image.

    These are the ones that this run has not found, and that are not there when each is looked at once more: another run
    may have added them.
    """
    paths = (path for path in index.list_paths(source.name) if part.contains(document_id(path)))
    missing = (path for path in paths if not found.covers(path))
    with ThreadPoolExecutor(GONE_CHECKS) as pool:
        checked = map_buffered(pool, lambda path: (path, source.exists(path)), missing, 2 * GONE_CHECKS)
        yield from (path for path, exists in checked if not exists)


def delete(gone: Iterator[str], source: Source, index: WritableIndex, progress: Progress, is_forced: bool) -> None:
    """Deletes the documents of images that are gone.

    Raises UsageError, unless it `is_forced`, if this run knew none of the images it found, by their names or by their
    contents: an unmounted disk, or another folder of the same name, looks the same.
    """
    is_known = progress.unchanged + progress.updated + progress.copied_from_index > 0
    for batch in batch_until_error(gone, BATCH_SIZE):
        if not is_known and not is_forced:
            raise UsageError(
                f"--prune would delete all other documents below {quote_path(source.name)}: their files are gone, and"
                " none of the images found now was indexed before. If that is intended, use --prune-all."
            )
        progress.deleted += index.delete([document_id(path) for path in batch])
    index.refresh()


if __name__ == "__main__":
    run(main)
