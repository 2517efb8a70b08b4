"""The contract of a source of images, and which one is used: a folder or a bucket, for queries also others."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from imagesearch.content import MAX_CONTENT_BYTES, check_size, opened_from_memory
from imagesearch.errors import UsageError
from imagesearch.paths import BUCKET_URL, HTTP_URL
from imagesearch.records import ImageFile, OpenedImage, Unreadable
from imagesearch.report import SILENT, Report
from imagesearch.retry import NO_RETRY, Retry


class Source(Protocol):
    """A folder or a bucket that holds images."""

    readers_per_cpu: float
    """How many chunks to open for each CPU while it embeds another one."""

    @property
    def name(self) -> str:
        """What the `file_path` of each of its images begins with: ``./images``, ``/srv/photos``, ``s3://birds``."""

    def check(self) -> None:
        """Raises ImageSearchError if the source cannot be listed."""

    def find_images(self, report: Report = SILENT) -> Iterator[ImageFile]:
        """Yields every image file, at any depth, in the source's own order.

        Hidden files and folders, other files, and folders that were already found are skipped.
        """

    def open_images(self, images: Sequence[ImageFile]) -> AbstractContextManager[list[OpenedImage | Unreadable]]:
        """Returns a context with the content of each image as it is now, or the reason why it cannot be read.

        Raises ImageSearchError if the source cannot be reached.
        """

    def find_gone(self, file_paths: Iterable[str]) -> Iterator[str]:
        """Yields those of these paths below the source that certainly have no file any more, in order.

        The paths are ordered by their UTF-8.
        """


@dataclass(frozen=True)
class Part:
    """The `number`-th of `count` parts of the images; the parts are disjoint and together cover all images."""

    number: int = 1
    count: int = 1

    def contains(self, id_: str) -> bool:
        """Returns True if the document with this ``_id``, a SHA-256 in hex, is in this part."""
        return int(id_[:16], 16) % self.count == self.number - 1


def open_source(location: str, folder: str, retry: Retry) -> Source:
    """Returns the bucket or folder that ``--images`` names.

    `folder` is the absolute path that the index's relative paths are relative to. Reading a bucket is
    retried by `retry`.
    """
    if not location:
        raise UsageError("--images is empty: it takes a folder or the URL of a bucket.")
    if BUCKET_URL.match(location):
        from imagesearch.bucket import BucketSource

        return BucketSource(location, retry)
    from imagesearch.folder import FolderSource

    return FolderSource(location, folder)


def open_location(location: str) -> AbstractContextManager[OpenedImage]:
    """Returns a context with the content of a file, by its path, or of an object, by its URL.

    Raises OSError, ValueError or ImageSearchError if it cannot be read.
    """
    if BUCKET_URL.match(location):
        from imagesearch.bucket import open_object

        return open_object(location, NO_RETRY)
    from imagesearch.folder import open_file

    return open_file(location, location)


OpenQuery = Callable[[str], AbstractContextManager[OpenedImage]]


def is_path(query: str) -> bool:
    """Returns True if a query is a path, not a URL or standard input."""
    return query != "-" and not HTTP_URL.match(query) and not BUCKET_URL.match(query)


def open_query(query: str) -> AbstractContextManager[OpenedImage]:
    """Returns a context with the content of a file, an object in a bucket, a URL, or standard input (``-``).

    Raises OSError, ValueError or ImageSearchError if it cannot be read. All but files are limited to 200 MB,
    downloads from a URL also to 30 seconds.
    """
    if query == "-":
        return _open_stdin()
    if HTTP_URL.match(query):
        from imagesearch.web import open_url

        return open_url(query)
    return open_location(query)


@contextlib.contextmanager
def _open_stdin() -> Iterator[OpenedImage]:
    content = sys.stdin.buffer.read(MAX_CONTENT_BYTES + 1)
    check_size(len(content))
    if not content:
        raise ValueError("it is empty")
    yield opened_from_memory("standard input", content)
