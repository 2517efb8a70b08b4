"""Whether the images that create.py finds are those of its index: else it would mix, replace or delete others."""

import argparse
import itertools
import os

from imagesearch.embed import CHUNK_BYTES
from imagesearch.errors import UsageError
from imagesearch.index import WritableIndex
from imagesearch.interrupt import Interrupt
from imagesearch.parallel import make_chunks
from imagesearch.paths import BUCKET_URL, index_folder, path_from_text, quote_path
from imagesearch.records import BATCH_SIZE, IndexMetadata, OpenedImage
from imagesearch.sources import Source

SAMPLE_SIZE = 16  # images whose content tells whether the source is the one that was indexed


def check_source(
    arguments: argparse.Namespace,
    source: Source,
    index: WritableIndex,
    metadata: IndexMetadata | None,
    interrupt: Interrupt,
) -> None:
    """Raises UsageError if there are no images, or they are not those of the index."""
    try:
        source.check()
    except UsageError as error:
        is_bucket = BUCKET_URL.match(arguments.images)
        if is_bucket or not (arguments.prune and metadata and index.count_below(source.name)):
            raise
        raise UsageError(
            f"{error} To delete the documents of a folder that is gone for good, make an empty one in its place and use"
            " --prune-all."
        ) from None
    if metadata:
        check_same_machine(index, metadata, source)
    if arguments.prune and metadata:
        check_prune_folder(metadata, arguments.images)
        if not arguments.prune_all:
            check_prune(index, source, interrupt)
    if next(source.find_images(), None) is None and not (arguments.prune_all and metadata):
        raise UsageError(
            f"There are no images below {quote_path(source.name)}. Put some there, or use --images with their folder."
        )


def check_prune_folder(metadata: IndexMetadata, location: str) -> None:
    """Raises UsageError if `location`, a relative path, is another folder than the one of that path in the index."""
    is_relative = not (os.path.isabs(location) or BUCKET_URL.match(location))
    if is_relative and index_folder(metadata.folder) != os.path.realpath(os.curdir):
        raise UsageError(
            f"The paths in the index are relative to {quote_path(metadata.folder)}: run --prune there, or use --images"
            " with an absolute path."
        )


def check_same_machine(index: WritableIndex, metadata: IndexMetadata, source: Source) -> None:
    """Raises UsageError if the images are those of another machine than the index's.

    The folder that the index has recorded may be missing because it was moved: then its images are in the index. Or
    this is another machine: then other images would replace those with the same relative paths.
    """
    is_here = index_folder(metadata.folder) == path_from_text(metadata.folder)
    is_relative = source.name == "." or source.name.startswith("./")
    if not is_here and is_relative and index.count_below(".") and not _has_known_image(index, source):
        raise UsageError(
            f"The paths in the index are relative to {quote_path(metadata.folder)}, which is not here, and the images"
            f" in {quote_path(source.name)} look new: use another --index for them."
        )


def check_prune(index: WritableIndex, source: Source, interrupt: Interrupt) -> None:
    """Raises UsageError if --prune would delete every document below the source, and its images are all new.

    That may be intended; but an unmounted disk, or another folder of the same name, looks the same. If
    the images' contents are in the index, the files were only renamed. What costs least is asked first.
    """
    if not _count_all_gone(index, source, interrupt, BATCH_SIZE) or _has_known_image(index, source):
        return
    number = _count_all_gone(index, source, interrupt)
    if not number or interrupt.signal:
        return
    images = sum(1 for _ in source.find_images())
    found = f"the {images:,} images there look new" if images else "there are no images at all"
    raise UsageError(
        f"--prune would delete all {number:,} documents below {quote_path(source.name)}: none of their files is"
        f" left, and {found}. If that is intended, use --prune-all."
    )


def _count_all_gone(index: WritableIndex, source: Source, interrupt: Interrupt, limit: int | None = None) -> int:
    """Returns the number of documents below `source`, of the first `limit`, if all of their files are gone, else 0.

    Looks no further than the first file that is not, or than an interruption.
    """
    paths, looked_for = itertools.tee(
        interrupt.until_interrupted(itertools.islice(index.list_paths(source.name), limit))
    )
    gone = source.find_gone(looked_for)  # in the same order
    number = 0
    for path in paths:
        if path != next(gone, None):
            return 0
        number += 1
    return number


def _has_known_image(index: WritableIndex, source: Source) -> bool:
    """Returns True if one of the first images below the source is in the index: by name, size and mtime, or content."""
    images = list(itertools.islice(source.find_images(), BATCH_SIZE))
    indexed = index.get_file_metadata([image.id for image in images])
    if any((found := indexed.get(image.id)) and found.matches(image) for image in images):
        return True
    for chunk in make_chunks(images[:SAMPLE_SIZE], SAMPLE_SIZE, 0, lambda image: image.size, CHUNK_BYTES):
        with source.open_images(chunk) as opened:
            sha256s = [image.sha256 for image in opened if isinstance(image, OpenedImage)]
        if sha256s and index.find_embeddings(sha256s):
            return True
    return False
