"""Deleting the documents whose files are gone."""

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator

from imagesearch.errors import UsageError
from imagesearch.index import Index
from imagesearch.parallel import batched
from imagesearch.paths import quote_path
from imagesearch.sources import Source

PAGE_SIZE = 1000  # documents that are looked at together
SAMPLE_SIZE = 20  # images whose content tells whether the source is the one that was indexed

IsSelected = Callable[[str], bool]  # True for the ids that this run is responsible for


def prune(index: Index, source: Source, is_selected: IsSelected) -> Iterator[int]:
    """Deletes the documents below `source` whose files are gone; yields the number deleted, page by page."""
    return (index.delete(ids) for _, ids in _find_gone(index, source, is_selected))


def check_prune(index: Index, source: Source) -> None:
    """Raises UsageError if `prune` would delete every document below the source, and its images are all new.

    That may be intended; but an unmounted disk, or another folder of the same name, looks the same. If
    the images' contents are in the index, the files were only renamed.
    """
    total = 0
    for page_size, ids in _find_gone(index, source, lambda id_: True):
        if len(ids) < page_size:
            return
        total += page_size
    if total and not _has_known_content(index, source):
        images = sum(1 for _ in source.find_images())
        found = f"the {images:,} images there look new" if images else "there are no images at all"
        raise UsageError(
            f"--prune would delete all {total:,} documents below {quote_path(source.name)}: none of their files is"
            f" left, and {found}. If that is intended, use --prune-all."
        )


def _has_known_content(index: Index, source: Source) -> bool:
    """Returns True if the content of one of the first images below the source is in the index."""
    sha256s = []
    for image in itertools.islice(source.find_images(), SAMPLE_SIZE):
        with contextlib.suppress(OSError, ValueError), source.open_image(image) as (_, stream):
            sha256s.append(hashlib.file_digest(stream, "sha256").hexdigest())  # type: ignore[arg-type]
    return bool(sha256s) and bool(index.find_embeddings(sha256s))


def _find_gone(index: Index, source: Source, is_selected: IsSelected) -> Iterator[tuple[int, list[str]]]:
    """Yields, page by page, the number of documents below the source, and the ids of those whose files are gone."""
    for page in batched(index.list_paths(source.name), PAGE_SIZE):
        ids = {file_path: id_ for id_, file_path in page if is_selected(id_)}
        if ids:
            yield len(ids), [ids[file_path] for file_path in source.find_gone(list(ids))]
