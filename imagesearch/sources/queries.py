"""The images to search for that a command line names: files, folders, buckets, URLs, standard input."""

import contextlib
import os
import posixpath
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from imagesearch.errors import ImageSearchError, UsageError, describe_error
from imagesearch.images import image_extensions
from imagesearch.locations import file_path_of, kind_of
from imagesearch.records import ImageFile, ListingReport, OpenedImage
from imagesearch.sources import open_source
from imagesearch.sources.folder import open_file, with_status
from imagesearch.sources.memory import MAX_CONTENT_BYTES, check_size


@dataclass(frozen=True, slots=True)
class Query:
    """An image to search for; `name` is shown in messages and results.

    `image` says where it is read; its `file_path` is the one that its document has if it is indexed, empty if it cannot
    be. `is_listed` is True if its size and mtime are known, `sha256` is that of its content, empty if it is not known,
    and `problem` is why it cannot be read.
    """

    name: str
    image: ImageFile
    is_listed: bool = False
    sha256: str = ""
    problem: str = ""


def find_queries(texts: Sequence[str], base: str) -> Iterator[Query]:
    """Yields the images that a command line names, in order; relative names in the index are relative to `base`.

    A folder or a bucket's prefix stands for each image below it, which is named as it is in the index.
    """
    for text in texts:
        query = Query(without_credentials(text), _image(text, file_path_of(text, base)))
        extension = os.path.splitext(text)[1].lower()
        if is_folder_or_prefix(text):
            yield from _find_below(text, base)
        elif kind_of(text) != "file":
            yield query
        elif not os.path.lexists(text) and extension not in image_extensions():
            yield replace(query, problem="no such file; it must be a picture, since this does not search by words")
        elif len(texts) > 1 and os.path.isfile(text):  # for one image, one more look-up would take longer
            yield replace(query, image=with_status(query.image, os.stat(text)), is_listed=True)
        else:
            yield query


def is_folder_or_prefix(text: str) -> bool:
    """Returns True if a text of the command line stands for the images below a folder or a bucket's prefix."""
    match kind_of(text):
        case "folder":
            return True
        case "bucket":
            return posixpath.splitext(text)[1].lower() not in image_extensions()
        case _:
            return False


def _image(location: str, file_path: str = "") -> ImageFile:
    return ImageFile(location, file_path, "", 0, 0)


class _Problems(ListingReport):
    """Keeps what cannot be read, as queries with a problem."""

    def __init__(self) -> None:
        self.queries: list[Query] = []

    def count_unreadable(self, name: str, reason: str) -> None:
        self.queries.append(Query(name, _image(""), problem=reason))

    def take(self) -> list[Query]:
        """Returns what was kept since the last call."""
        taken, self.queries = self.queries, []
        return taken


def _find_below(text: str, base: str) -> Iterator[Query]:
    """Yields a query for each image below a folder or prefix, or one that says why there is none."""
    is_empty = True
    try:
        for query in _list_below(text, base):
            yield query
            is_empty = False
        if is_empty:
            yield Query(text, _image(text), problem="there are no images below it")
    except (ImageSearchError, OSError) as error:
        yield Query(without_credentials(text), _image(""), problem=describe_error(error).rstrip("."))


def _list_below(text: str, base: str) -> Iterator[Query]:
    problems, is_bucket = _Problems(), kind_of(text) == "bucket"
    for image in open_source(text, base).find_images(problems):
        yield from problems.take()
        # A folder's location is its path; a bucket's is a key, and the file_path is the URL.
        location = image.file_path if is_bucket else image.location
        yield Query(image.file_path, replace(image, location=location), is_listed=True)
    yield from problems.take()


def open_query(image: ImageFile) -> AbstractContextManager[OpenedImage]:
    """Returns a context with the content of a file, an object in a bucket, a URL, or standard input (``-``).

    Raises OSError, ValueError or ImageSearchError if it cannot be read. All but files are limited to 200 MB.
    """
    match kind_of(image.location):
        case "standard input":
            return _open_stdin(image)
        case "web":
            from imagesearch.sources.web import open_url

            return open_url(image)
        case "bucket":
            from imagesearch.sources.bucket import open_object

            return open_object(image)
        case "other URL":
            raise UsageError("only http://, https://, s3://, gs:// and az:// URLs are read")
        case _:
            return open_file(image)


@contextlib.contextmanager
def _open_stdin(image: ImageFile) -> Iterator[OpenedImage]:
    content = sys.stdin.buffer.read(MAX_CONTENT_BYTES + 1)
    check_size(len(content))
    if not content:
        raise ValueError("it is empty")
    yield OpenedImage.from_memory(image, content)


def without_credentials(query: str) -> str:
    """Returns a path or URL as messages name it: without a user, a password or a signature."""
    scheme, separator, rest = query.partition("://")
    if not separator or not re.fullmatch(r"[\w+.-]+", scheme):
        return query
    if kind_of(query) == "bucket":
        return f"{scheme}://…" if re.search("(:|%3a).*@", rest, re.IGNORECASE | re.DOTALL) else query
    credentials, at, host_and_path = rest.rpartition("@")
    if at and (re.search("[/?#]", credentials) or kind_of(query) != "web"):  # where such a password ends is unknown
        return f"{scheme}://…"
    return f"{scheme}://{re.split('[?#]', host_and_path)[0]}"
