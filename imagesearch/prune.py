"""Deleting the documents whose files are gone."""

from collections.abc import Callable, Iterator

from imagesearch.errors import UsageError
from imagesearch.index import Index
from imagesearch.parallel import batched
from imagesearch.paths import quote_path
from imagesearch.sources import Source

PAGE_SIZE = 1000  # documents that are looked at together

IsSelected = Callable[[str], bool]  # True for the ids that this run is responsible for


def prune(index: Index, source: Source, is_selected: IsSelected) -> int:
    """Deletes the documents below `source` whose files are gone; returns the number deleted."""
    return sum(index.delete(ids) for _, ids in _find_gone(index, source, is_selected))


def check_prune(index: Index, source: Source) -> None:
    """Raises UsageError if `prune` would delete every document below the source.

    That may be intended; but an unmounted disk, or another folder of the same name, looks the same.
    """
    total = 0
    for page_size, ids in _find_gone(index, source, lambda id_: True):
        if len(ids) < page_size:
            return
        total += page_size
    if total:
        images = sum(1 for _ in source.find_images(lambda kind: None, lambda path, reason: None))
        raise UsageError(
            f"--prune would delete all {total:,} documents below {quote_path(source.name)}: none of their files is"
            f" there, and its {images:,} images are all new. If that is intended, use --prune-all."
        )


def _find_gone(index: Index, source: Source, is_selected: IsSelected) -> Iterator[tuple[int, list[str]]]:
    """Yields, page by page, the number of documents below the source, and the ids of those whose files are gone."""
    for page in batched(index.list_paths(source.name), PAGE_SIZE):
        ids = {file_path: id_ for id_, file_path in page if is_selected(id_)}
        if ids:
            yield len(ids), [ids[file_path] for file_path in source.find_gone(list(ids))]
