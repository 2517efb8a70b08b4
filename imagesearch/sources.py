"""Where images come from: a folder or a bucket to index; a file, a URL or standard input to search for."""

import contextlib
import errno
import io
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import BinaryIO, Protocol

from imagesearch.documents import ImageFile
from imagesearch.errors import UsageError, describe_error
from imagesearch.images import MAX_CONTENT_BYTES, OnError, OnSkip, check_size, ignore, image_extensions
from imagesearch.paths import (
    BUCKET_URL,
    HTTP_URL,
    file_path_to_local,
    normalize_folder,
    path_to_text,
    quote_path,
)
from imagesearch.retry import NO_RETRY, RetryPolicy

MAX_MTIME = 2**63 - 1  # what an index can store, in nanoseconds


class Source(Protocol):
    """A folder or a bucket that holds images."""

    @property
    def name(self) -> str:
        """What the `file_path` of each of its images begins with: ``./images``, ``/srv/photos``, ``s3://birds``."""

    def check(self) -> None:
        """Raises UsageError if the source cannot be listed."""

    def find_images(self, on_skip: OnSkip = ignore, on_error: OnError = ignore) -> Iterator[ImageFile]:
        """Yields every image file, at any depth, in the source's own order.

        Hidden files and folders, other files, and links back to a folder above are skipped.
        """

    def open_image(self, image: ImageFile) -> AbstractContextManager[tuple[ImageFile, BinaryIO]]:
        """Returns a context with the image as it is now and its content. Raises OSError if it cannot be read."""

    def find_gone(self, file_paths: Sequence[str]) -> set[str]:
        """Returns those of these sorted paths below the source that certainly have no file any more."""


def open_source(location: str, folder: str, retry: RetryPolicy) -> Source:
    """Returns the bucket or folder that ``--images`` names.

    `folder` is the absolute path that the index's relative paths are relative to. Reading a bucket is
    retried by `retry`.
    """
    if BUCKET_URL.match(location):
        from imagesearch.bucket import BucketSource

        return BucketSource(location, retry)
    return FolderSource(location, folder)


class FolderSource:
    """A `Source` of local files. Symbolic links in it are followed."""

    def __init__(self, path: str, folder: str) -> None:
        self._root = os.path.realpath(path)
        self._folder = path_to_text(folder)
        self.name = path_to_text(normalize_folder(path, folder))

    def check(self) -> None:
        try:
            os.scandir(self._root).close()
        except OSError as error:
            raise UsageError(
                f"{quote_path(self.name)}: {describe_error(error)}. Put your images there, or use --images with their"
                " folder."
            ) from None

    def find_images(self, on_skip: OnSkip = ignore, on_error: OnError = ignore) -> Iterator[ImageFile]:
        pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [(self._root, ())]
        while pending:
            path, above = pending.pop()
            try:
                status = os.stat(path)
                here = (status.st_dev, status.st_ino)
                if here in above:
                    on_skip("link to a folder above")
                    continue
                with os.scandir(path) as entries:
                    for entry in entries:
                        kind = self._kind(entry, on_error)
                        if kind == "folder":
                            pending.append((entry.path, (*above, here)))
                        elif kind == "image":
                            yield self._image(entry.path, entry.stat())
                        elif kind:
                            on_skip(kind)
            except OSError as error:
                on_error(self._file_path(path), describe_error(error))

    def _kind(self, entry: os.DirEntry[str], on_error: OnError) -> str:
        """Returns "folder", "image", or the kind of file to skip; nothing if `on_error` was called."""
        try:
            if entry.name.startswith("."):
                return "hidden"
            if entry.is_dir():
                return "folder"
            extension = os.path.splitext(entry.name)[1].lower()
            if extension not in image_extensions():
                return path_to_text(extension) or "without extension"
            return "image" if stat.S_ISREG(entry.stat().st_mode) else "not a regular file"
        except OSError as error:
            if error.errno == errno.ELOOP:
                return "link to itself"
            on_error(self._file_path(entry.path), describe_error(error))
            return ""

    def _image(self, path: str, status: os.stat_result) -> ImageFile:
        desc = path_to_text(os.path.basename(os.path.dirname(path)))
        return ImageFile(path, self._file_path(path), desc, status.st_size, _mtime(status))

    def _file_path(self, path: str) -> str:
        return os.path.join(self.name, path_to_text(os.path.relpath(path, self._root)))

    @contextlib.contextmanager
    def open_image(self, image: ImageFile) -> Iterator[tuple[ImageFile, BinaryIO]]:
        with _open_with_metadata(image.location) as (size, mtime, stream):
            yield replace(image, size=size, mtime=mtime), stream

    def find_gone(self, file_paths: Sequence[str]) -> set[str]:
        return {file_path for file_path in file_paths if self._is_gone(file_path)}

    def _is_gone(self, file_path: str) -> bool:
        """Returns True if there is no such file; one whose folder cannot be read may be there."""
        try:
            os.stat(file_path_to_local(file_path, self._folder))
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False
        return False


def _mtime(status: os.stat_result) -> int:
    return max(-MAX_MTIME, min(MAX_MTIME, status.st_mtime_ns))


def _open_file(path: str) -> BinaryIO:
    """Opens a regular file; opening a pipe could wait forever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a regular file")
    return open(path, "rb")


@contextlib.contextmanager
def _open_with_metadata(path: str) -> Iterator[tuple[int, int, BinaryIO]]:
    """Yields size in bytes, mtime in nanoseconds and content of a file, as they are when it is read."""
    with _open_file(path) as stream:
        status = os.fstat(stream.fileno())
        yield status.st_size, _mtime(status), stream


def open_indexed(location: str) -> AbstractContextManager[tuple[int, int, BinaryIO]]:
    """Returns a context with size in bytes, mtime in nanoseconds and content of a path or an object's URL."""
    if BUCKET_URL.match(location):
        from imagesearch.bucket import open_object

        return open_object(location, NO_RETRY)
    return _open_with_metadata(location)


def open_query(query: str) -> AbstractContextManager[BinaryIO]:
    """Returns a context with the content of a file, an object in a bucket, a URL, or standard input (``-``).

    Raises OSError, ValueError or ImageSearchError if it cannot be read. All but files are limited to 200 MB,
    downloads from a URL also to 30 seconds.
    """
    if query == "-":
        return _open_stdin()
    if HTTP_URL.match(query):
        from imagesearch.web import open_url

        return open_url(query)
    if BUCKET_URL.match(query):
        return _open_object(query)
    return _open_file(query)


@contextlib.contextmanager
def _open_object(url: str) -> Iterator[BinaryIO]:
    with open_indexed(url) as (_, _, stream):
        yield stream


@contextlib.contextmanager
def _open_stdin() -> Iterator[BinaryIO]:
    content = sys.stdin.buffer.read(MAX_CONTENT_BYTES + 1)
    check_size(len(content))
    if not content:
        raise ValueError("it is empty")
    yield io.BytesIO(content)
