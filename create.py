#!/usr/bin/env python3
"""Makes a CLIP embedding of every image in a folder or bucket and indexes it, for search.py to find."""

from imagesearch.start import run  # first: Ctrl-C and missing dependencies, before imports that take long

import argparse
from collections.abc import Iterator
from contextlib import closing, suppress

from imagesearch import console
from imagesearch.arguments import parse_create_arguments
from imagesearch.connection import connect
from imagesearch.embed import embed_images
from imagesearch.errors import ImageSearchError
from imagesearch.index import WritableIndex, open_writable_index
from imagesearch.interrupt import Interrupt
from imagesearch.models import Model, check_compatible, load_index_model, load_model
from imagesearch.parallel import batch_until_error
from imagesearch.paths import index_folder, path_to_text
from imagesearch.progress import Progress
from imagesearch.records import BATCH_SIZE, Candidate, ImageFile, IndexMetadata, document_id
from imagesearch.report import SILENT, Report
from imagesearch.retry import Retry
from imagesearch.source_checks import check_prune, check_source
from imagesearch.sources import Part, Source, open_source


def main() -> int:
    arguments = parse_create_arguments(__doc__)
    interrupt, progress = Interrupt(), Progress()
    retry = Retry(arguments.retry_timeout, interrupt, progress.say)
    connection = connect(arguments.insecure)
    if arguments.part.count > 1 and connection is None:
        console.say("Warning: several machines must not write to one index file on a network share: use Elasticsearch.")
    with open_writable_index(arguments.index, connection, arguments.db, retry) as index:
        metadata = index.get_metadata()
        source = open_source(arguments.images, index_folder(metadata.folder if metadata else None), retry)
        check_source(arguments, source, index, metadata, interrupt)
        metadata, model = prepare_index(index, metadata, arguments)
        with interrupt, progress:
            index.refresh()  # what an interrupted run has written is not embedded again
            progress.start(arguments.index, metadata.model, find_images(source, arguments.part))
            changed = find_changed(find_images(source, arguments.part, progress), index, interrupt, progress)
            with closing(embed_images(changed, source, model, index, progress, interrupt)) as documents:
                for document in index.write(documents):
                    progress.count_written(document)
            index.refresh()
            if arguments.prune and not interrupt.signal:
                delete_gone(source, index, interrupt, progress, arguments)
        say_what_is_left(index, source, interrupt, progress, arguments)
    return 128 + interrupt.signal if interrupt.signal else int(progress.unreadable > 0)


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
    console.say(f"Index {arguments.index} in {index.location}, made with {metadata.model.description}.")
    return metadata, model


def find_images(source: Source, part: Part, report: Report = SILENT) -> Iterator[ImageFile]:
    """Returns the images of the source that are in this part; `report` is told about other files."""
    return (image for image in source.find_images(report) if part.contains(image.id))


def find_changed(
    images: Iterator[ImageFile], index: WritableIndex, interrupt: Interrupt, progress: Progress
) -> Iterator[Candidate]:
    """Yields new and changed images, until the run is interrupted."""
    for batch in batch_until_error(interrupt.until_interrupted(images), BATCH_SIZE):
        indexed = index.get_file_metadata([image.id for image in batch])
        for image in batch:
            known = indexed.get(image.id)
            if known and known.matches(image):
                progress.count_unchanged()
            else:
                progress.start_embedding()
                yield Candidate(image, known)


def delete_gone(
    source: Source, index: WritableIndex, interrupt: Interrupt, progress: Progress, arguments: argparse.Namespace
) -> None:
    """Deletes the documents below the source whose files are gone.

    It checks the source again, since a disk may have been unmounted by now. After an interruption it looks no further;
    what was found by then is still deleted.
    """
    source.check()
    if not arguments.prune_all:
        check_prune(index, source, interrupt)
    listed = interrupt.until_interrupted(index.list_paths(source.name))
    paths = (path for path in listed if arguments.part.contains(document_id(path)))
    for gone in batch_until_error(source.find_gone(paths), BATCH_SIZE):
        progress.deleted += index.delete([document_id(path) for path in gone])
    index.refresh()


def say_what_is_left(
    index: WritableIndex, source: Source, interrupt: Interrupt, progress: Progress, arguments: argparse.Namespace
) -> None:
    """Says how many images are left after an interruption, or how many documents have no file any more."""
    if interrupt.signal:
        left = f" with the {progress.left:,} images that are left" if progress.left else ""
        console.say(f"Run the command again to continue{left}.")
    elif arguments.part.count == 1 and not arguments.prune:
        with suppress(ImageSearchError):  # the run itself is complete
            gone = index.count_below(source.name) - progress.done
            if gone > 0:
                at_least = "at least " if progress.unreadable else ""
                console.say(f"Documents without an image: {at_least}{gone:,}; --prune deletes those of deleted files.")


if __name__ == "__main__":
    run(main)
