"""Documents whose image is gone: the source is listed once more, and the documents below it are compared with that."""

from array import array
from collections.abc import Iterator

import numpy as np

from imagesearch.index import Index
from imagesearch.parallel import batch_until_error
from imagesearch.records import BATCH_SIZE, ListingReport, Part, document_id, short_id
from imagesearch.sources import Source


class Listing(ListingReport):
    """The images of a source at one moment, 8 bytes each, and what could not be read."""

    def __init__(self, source: Source, part: Part) -> None:
        self._source = source
        self._part = part
        self._unreadable = set[str]()
        ids = array("Q", (short_id(image.id) for image in source.find_images(self) if part.contains(image.id)))
        self._ids = np.sort(np.frombuffer(ids, np.uint64))
        self.number_of_images = len(self._ids)

    def count_unreadable(self, name: str, reason: str) -> None:
        """Keeps the name: there may be images below it."""
        self._unreadable.add(name)

    def find_gone(self, index: Index) -> Iterator[str]:
        """Yields the `file_path` of each document of the part, below the source, whose image is not in the listing.

        Those below a folder or a link that could not be read are left out.
        """
        paths = (path for path in index.list_paths(self._source.name) if self._part.contains(document_id(path)))
        for batch in batch_until_error(paths, BATCH_SIZE):
            ids = np.array([short_id(document_id(path)) for path in batch], np.uint64)
            places = np.searchsorted(self._ids, ids)
            for path, id_, place in zip(batch, ids, places, strict=True):
                is_listed = place < len(self._ids) and self._ids[place] == id_
                if not is_listed and not self._may_be_below_unreadable(path):
                    yield path

    def _may_be_below_unreadable(self, file_path: str) -> bool:
        folders = (file_path[:end] for end, character in enumerate(file_path) if character == "/")
        return bool(self._unreadable) and any(path in self._unreadable for path in (file_path, *folders))
