#!/usr/bin/env python3
# ruff: noqa: E402
"""Makes a CLIP embedding of every image in a folder or bucket and indexes it, for search.py to find."""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback, from here on

from imagesearch import cli

cli.start()  # before the imports that take long

import argparse
import os
from collections.abc import Iterable, Iterator
from contextlib import closing

from imagesearch.documents import FileMetadata, ImageFile, IndexMetadata
from imagesearch.embed import embed_images
from imagesearch.errors import UsageError
from imagesearch.index import Index, open_index
from imagesearch.interrupt import Interrupt
from imagesearch.models import Model, check_compatible, load_index_model, load_model
from imagesearch.parallel import batched
from imagesearch.paths import BUCKET_URL, index_folder, path_to_text, quote_path
from imagesearch.progress import Progress
from imagesearch.prune import check_prune, prune
from imagesearch.retry import RetryPolicy
from imagesearch.sources import Source, open_source

EXAMPLES = """\
  python3 create.py                            index ./images
  python3 create.py --images ~/photos --prune  also delete the documents of photos that are gone
  python3 create.py --images s3://birds/photos index a bucket
  python3 create.py --model thumbnail --index tryout
                                               try it without downloading CLIP
"""

PAGE_SIZE = 1000  # images that are looked up in the index at once


def main() -> int:
    arguments = parse_arguments()
    progress, interrupt = Progress(), Interrupt()
    retry = RetryPolicy(arguments.retry_timeout, interrupt.sleep, progress.on_retry)
    with open_index(arguments.index, cli.connect(arguments), arguments.db, retry) as index:
        metadata = index.get_metadata()
        source = open_source(arguments.images, index_folder(metadata.folder if metadata else None), retry)
        check_source(source, index, metadata, arguments)
        metadata, model = prepare_index(index, metadata, arguments.model)
        source = open_source(arguments.images, index_folder(metadata.folder), retry)  # the folder is recorded now
        with interrupt, progress:
            if progress.is_terminal:
                progress.start_bar(sum(1 for _ in interrupt.until_interrupted(find_images(source, arguments.part))))
            index.refresh()  # what an interrupted run has written is not embedded again
            images = find_images(source, arguments.part, progress)
            changed = find_changed(interrupt.until_interrupted(images), index, progress)
            changed = interrupt.until_interrupted(changed)
            with closing(
                embed_images(changed, source, model, index.find_embeddings, progress.count_unreadable)
            ) as documents:  # its threads end before the index is closed
                for document in index.write(documents):
                    progress.count_written(document)
            index.refresh()
            if arguments.prune and not interrupt.signal:
                check_source(source, index, metadata, arguments)  # again: the disk may have been unmounted since
                for deleted in interrupt.until_interrupted(prune(index, source, arguments.part.contains)):
                    progress.deleted += deleted
                index.refresh()
    if interrupt.signal:
        return 128 + interrupt.signal
    return 1 if progress.unreadable else 0


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--images",
        metavar="DIR|URL",
        type=cli.location,
        action=cli.StoreOnce,
        default="images",
        help="a folder, or a bucket as s3://bucket/folder, gs://… or az://… (default: images)",
    )
    parser.add_argument(
        "--model",
        metavar="NAME|FILE",
        help="clip (downloaded once), thumbnail (built in, 16x16 pixels), or an ONNX file with imgbeddings' input and"
        " output (default: the model of the index; clip for a new index)",
    )
    parser.add_argument(
        "--prune",
        action="store_true",
        help="also delete the documents of files below DIR that no longer exist; refused if that would delete all of"
        " them and the images look new",
    )
    parser.add_argument("--prune-all", action="store_true", help="like --prune, but never refused")
    parser.add_argument(
        "--part",
        metavar="I/N",
        type=cli.part,
        default=cli.Part(1, 1),
        help="only the I-th of N parts of the images, for N machines that share the folder (default: 1/1)",
    )
    parser.add_argument(
        "--retry-timeout",
        metavar="SECONDS",
        type=cli.seconds,
        default=120,
        help="how long to keep retrying if Elasticsearch or the bucket becomes unreachable during the run; not"
        " at its start (default: 120)",
    )
    parser.add_index_options()
    arguments = parser.parse_args()
    arguments.prune |= arguments.prune_all
    return arguments


def check_source(source: Source, index: Index, metadata: IndexMetadata | None, arguments: argparse.Namespace) -> None:
    """Raises UsageError if there are no images, or if --prune might delete what it should not."""
    source.check()
    if arguments.prune and metadata:
        is_relative = not (os.path.isabs(arguments.images) or BUCKET_URL.match(arguments.images))
        if is_relative and index_folder(metadata.folder) != os.path.realpath(os.curdir):
            raise UsageError(
                f"The paths in the index {arguments.index} are relative to {quote_path(metadata.folder)}:"
                " run --prune there, or use --images with an absolute path."
            )
        if not arguments.prune_all:
            check_prune(index, source)
    if next(find_images(source), None) is None and not (arguments.prune_all and metadata):
        raise UsageError(
            f"There are no images below {quote_path(source.name)}. Put some there, or use --images with their folder."
        )


def prepare_index(index: Index, metadata: IndexMetadata | None, name: str | None) -> tuple[IndexMetadata, Model]:
    """Returns the index's metadata and model; creates the index if there is none.

    Raises UsageError if `name` is not the index's model.
    """
    if metadata:
        return metadata, load_index_model(metadata.model, name, threads=1)
    model = load_model(name or "clip", threads=1)
    index.create(IndexMetadata(model.info, path_to_text(index_folder(None))))
    created = index.get_metadata()  # perhaps another run's, with another model or in another folder
    if created is None:
        raise UsageError("The index was deleted as soon as it was created. Run the command again.")
    check_compatible(created.model, model.info)
    return created, model


def find_images(source: Source, part: cli.Part | None = None, progress: Progress | None = None) -> Iterator[ImageFile]:
    """Yields the images of the source that are in this part; tells `progress`, if given, about other files."""
    callbacks = (progress.count_skipped, progress.count_unreadable) if progress else ()
    return (image for image in source.find_images(*callbacks) if part is None or part.contains(image.id))


def find_changed(
    images: Iterable[ImageFile], index: Index, progress: Progress
) -> Iterator[tuple[ImageFile, FileMetadata | None]]:
    """Yields new and changed images, each with what the index holds of it, None for a new one."""
    for page in batched(images, PAGE_SIZE):
        indexed = index.get_file_metadata([image.id for image in page])
        for image in page:
            known = indexed.get(image.id)
            if known and (known.size, known.mtime) == (image.size, image.mtime):
                progress.count_unchanged()
            else:
                progress.start_embedding()
                yield image, known


if __name__ == "__main__":
    cli.run(main)
