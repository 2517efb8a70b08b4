"""The contract of a source of images, and which one is used: a folder or a bucket, for queries also others."""

import contextlib
import os
import posixpath
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from imagesearch.errors import ImageSearchError, UsageError, describe_error
from imagesearch.images import image_extensions
from imagesearch.parallel import MemoryLimit
from imagesearch.paths import BUCKET_URL, HTTP_URL, normalize_path, path_to_text, without_credentials
from imagesearch.records import ImageFile, OpenedImage, Skipped, Unreadable

MAX_CONTENT_BYTES = 200_000_000  # of an image that is not a local file, which is kept in memory
MAX_BUFFERED_BYTES = 256_000_000  # of all such images that are in memory together

content_memory = MemoryLimit(MAX_BUFFERED_BYTES)


class Source(Protocol):
    """A folder or a bucket that holds images."""

    readers_per_cpu: float
    """How many chunks to open for each CPU while it embeds another one."""

    @property
    def name(self) -> str:
        """What the `file_path` of each of its images begins with: ``./images``, ``/srv/photos``, ``s3://birds``."""

    def find_images(self) -> Iterator[ImageFile | Skipped | Unreadable]:
        """Yields every image at any depth, in the source's own order.

        Yields `Skipped` for hidden files and folders, other files, and folders that were already found. Raises
        ImageSearchError if the source cannot be listed.
        """

    def open_images(self, images: Sequence[ImageFile]) -> AbstractContextManager[list[OpenedImage | Unreadable]]:
        """Returns a context with the content of each image as it is now, or the reason why it cannot be read.

        Raises ImageSearchError if the source cannot be reached.
        """

    def exists(self, file_path: str) -> bool:
        """Returns False if there is certainly no such file any more; one that cannot be looked at may be there."""


def open_source(location: str, folder: str) -> Source:
    """Returns the bucket or folder that ``--images`` names.

    `folder` is the absolute path that the index's relative paths are relative to. Raises UsageError if it cannot be
    listed.
    """
    if BUCKET_URL.match(location):
        from imagesearch.sources.bucket import BucketSource

        return BucketSource(location)
    from imagesearch.sources.folder import FolderSource

    return FolderSource(location, folder)


@dataclass(frozen=True)
class Query:
    """An image to search for.

    `name` is that in messages and results, `file_path` the one that its document has if it is indexed, empty if it
    cannot be. `open` returns a context with its content; it raises OSError, ValueError or ImageSearchError.
    """

    name: str
    file_path: str
    open: Callable[[], AbstractContextManager[OpenedImage]]


def find_queries(texts: Iterable[str], folder: str) -> Iterator[Query | Unreadable]:
    """Yields the images to search for that a command line names, in order.

    A folder or a bucket's prefix stands for each image below it, which is named as it is in the index: `folder` is that
    of `open_source`.
    """
    for text in texts:
        is_prefix = BUCKET_URL.match(text) and posixpath.splitext(text)[1].lower() not in image_extensions()
        if is_prefix or os.path.isdir(text):
            yield from _find_queries_below(text, folder)
        else:
            yield Query(without_credentials(text), _file_path(text, folder), partial(open_query, text))


def _find_queries_below(location: str, folder: str) -> Iterator[Query | Unreadable]:
    is_empty = True
    try:
        source = open_source(location, folder)
        for found in source.find_images():
            if isinstance(found, ImageFile):
                # A folder's location is its path; a bucket's is a key, and the file_path is the URL.
                text = found.file_path if BUCKET_URL.match(location) else found.location
                yield Query(found.file_path, found.file_path, partial(open_query, text))
            elif isinstance(found, Unreadable):
                yield found
            is_empty &= isinstance(found, Skipped)
    except (ImageSearchError, OSError) as error:
        yield Unreadable(without_credentials(location), describe_error(error).rstrip("."))
    else:
        if is_empty:
            yield Unreadable(location, "there are no images below it")


def _file_path(query: str, folder: str) -> str:
    """Returns the `file_path` of the document that a query has if it is indexed; empty if it cannot be."""
    if BUCKET_URL.match(query):
        return query
    return "" if query == "-" or HTTP_URL.match(query) else path_to_text(normalize_path(query, folder))


def open_query(query: str) -> AbstractContextManager[OpenedImage]:
    """Returns a context with the content of a file, an object in a bucket, a URL, or standard input (``-``).

    Raises OSError, ValueError or ImageSearchError if it cannot be read. All but files are limited to 200 MB.
    """
    if query == "-":
        return _open_stdin()
    if HTTP_URL.match(query):
        from imagesearch.sources.web import open_url

        return open_url(query)
    if BUCKET_URL.match(query):
        from imagesearch.sources.bucket import open_object

        return open_object(query)
    if re.match(r"\w+://", query):
        raise UsageError("only http://, https://, s3://, gs:// and az:// URLs are read")
    from imagesearch.sources.folder import open_file

    return open_file(query, query)


@contextlib.contextmanager
def _open_stdin() -> Iterator[OpenedImage]:
    content = sys.stdin.buffer.read(MAX_CONTENT_BYTES + 1)
    check_size(len(content))
    if not content:
        raise ValueError("it is empty")
    yield OpenedImage.from_memory("standard input", content)


def check_size(size_bytes: int) -> None:
    """Raises ValueError for content that is too large to be kept in memory."""
    if size_bytes > MAX_CONTENT_BYTES:
        raise ValueError(f"more than {MAX_CONTENT_BYTES // 1_000_000} MB")
