"""Deleting the documents whose files are gone."""

import itertools
import os
from collections.abc import Iterator

from imagesearch.documents import IndexMetadata, OpenedImage, document_id
from imagesearch.errors import UsageError
from imagesearch.index import WritableIndex
from imagesearch.parallel import batch_until_error
from imagesearch.paths import BUCKET_URL, index_folder, quote_path
from imagesearch.sources import Part, Source

BATCH_SIZE = 1000  # documents that are deleted together
SAMPLE_SIZE = 16  # images whose content tells whether the source is the one that was indexed


def prune(index: WritableIndex, source: Source, part: Part) -> Iterator[int]:
    """Deletes the documents below `source` whose files are gone; yields the number deleted, batch by batch."""
    paths = (path for path in index.list_paths(source.name) if part.contains(document_id(path)))
    for gone in batch_until_error(source.find_gone(paths), BATCH_SIZE):
        yield index.delete([document_id(path) for path in gone])


def check_folder(metadata: IndexMetadata, location: str) -> None:
    """Raises UsageError if `location`, a relative path, is another folder than the one of that path in the index."""
    is_relative = not (os.path.isabs(location) or BUCKET_URL.match(location))
    if is_relative and index_folder(metadata.folder) != os.path.realpath(os.curdir):
        raise UsageError(
            f"The paths in the index are relative to {quote_path(metadata.folder)}: run --prune there, or use --images"
            " with an absolute path."
        )


def check_prune(index: WritableIndex, source: Source) -> None:
    """Raises UsageError if `prune` would delete every document below the source, and its images are all new.

    That may be intended; but an unmounted disk, or another folder of the same name, looks the same. If
    the images' contents are in the index, the files were only renamed. What costs least is asked first.
    """
    first = list(itertools.islice(index.list_paths(source.name), BATCH_SIZE))
    if not _are_all_gone(source, first) or _has_known_content(index, source):
        return
    paths = list(index.list_paths(source.name)) if len(first) == BATCH_SIZE else first
    if not _are_all_gone(source, paths):
        return
    images = sum(1 for _ in source.find_images())
    found = f"the {images:,} images there look new" if images else "there are no images at all"
    raise UsageError(
        f"--prune would delete all {len(paths):,} documents below {quote_path(source.name)}: none of their files is"
        f" left, and {found}. If that is intended, use --prune-all."
    )


def _are_all_gone(source: Source, paths: list[str]) -> bool:
    """Returns True if there are paths, and all of their files are gone; looks no further than the first that is not."""
    gone = source.find_gone(paths)
    return bool(paths) and all(path == next(gone, None) for path in paths)


def _has_known_content(index: WritableIndex, source: Source) -> bool:
    """Returns True if the content of one of the first images below the source is in the index."""
    with source.open_images(list(itertools.islice(source.find_images(), SAMPLE_SIZE))) as opened:
        sha256s = [image.sha256 for image in opened if isinstance(image, OpenedImage)]
    return bool(sha256s) and bool(index.find_embeddings(sha256s))
