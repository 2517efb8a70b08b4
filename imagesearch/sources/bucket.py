"""Images in a bucket: S3, Google Cloud Storage or Azure, read with obstore."""

import contextlib
import functools
import posixpath
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import obstore
from obstore.exceptions import BaseError, GenericError, PermissionDeniedError, UnauthenticatedError
from obstore.store import from_url

from imagesearch.console import say_now_and_then
from imagesearch.errors import ImageSearchError, UsageError, describe_error
from imagesearch.images import image_extensions
from imagesearch.locations import quote_path
from imagesearch.records import ImageFile, ListingReport, OpenedImage, Unreadable
from imagesearch.sources.memory import MAX_CONTENT_BYTES, check_size, content_memory

LISTED_TOGETHER = 1000
READERS = 64  # objects that are read at once, however many CPUs there are
POLL_SECONDS = 0.5
SILENT_SECONDS = 10  # after which a store that does not answer is mentioned
# Obstore's own limit of 30 seconds for a request is too short for many large objects at once. Plain http is used only
# if the endpoint's URL says so.
CLIENT_OPTIONS: Any = {"connect_timeout": "10s", "read_timeout": "30s", "timeout": "10m", "allow_http": True}
RETRY_SECONDS_OF_A_RUN, RETRY_SECONDS_OF_A_QUERY = 120, 5
# Each wait is drawn at random between the first one and three times the last; with twice the last they would shrink.
FIRST_WAIT_SECONDS, WAIT_BASE = 0.3, 3
WAITS = 15  # how many of the longest waits fill the time
MAX_RETRIES = 1000  # never reached: the time is the limit

CREDENTIALS_HINT = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION, and AWS_ENDPOINT_URL unless it is AWS",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
OBSTORE_ERRORS = (BaseError, OSError, ValueError)


class BucketSource:
    """A `Source` of the objects below a URL such as ``s3://birds/photos``; prefixes are its folders."""

    def __init__(self, url: str) -> None:
        self._bucket_url, self._prefix = split_url(url)
        self.name = f"{self._bucket_url}/{self._prefix}".rstrip("/")
        self._store = _open_store(self._bucket_url, RETRY_SECONDS_OF_A_RUN)
        self._readers = ThreadPoolExecutor(READERS)
        self._unreachable: ImageSearchError | None = None
        # With few retries, so that a wrong address is reported soon.
        next(self._list(_open_store(self._bucket_url, RETRY_SECONDS_OF_A_QUERY), 1), None)

    def buffered_bytes(self, image: ImageFile) -> int:
        return min(image.size, MAX_CONTENT_BYTES)

    def find_images(self, report: ListingReport) -> Iterator[ImageFile]:
        for meta in self._list(self._store, LISTED_TOGETHER):
            key = meta["path"]
            extension = posixpath.splitext(key)[1].lower()
            if any(part.startswith(".") for part in key.removeprefix(self._prefix).split("/")):
                report.count_skipped("hidden")
            elif extension not in image_extensions():
                report.count_skipped(quote_path(extension) if extension else "without extension")
            elif meta["size"] == 0:  # some tools make such objects as folders; obstore drops the slash at their end
                report.count_skipped("empty object")
            else:
                desc = posixpath.basename(posixpath.dirname(key)) or self._bucket_url.rpartition("/")[2]
                file_path, mtime = f"{self._bucket_url}/{key}", _mtime(meta["last_modified"])
                yield ImageFile(key, file_path, desc, meta["size"], mtime)

    def _list(self, store: Any, chunk_size: int) -> Iterator[Any]:
        """Yields the metadata of the objects below the prefix. Raises ImageSearchError if they cannot be listed."""
        try:
            for chunk in obstore.list(store, self._prefix or None, chunk_size=chunk_size):
                yield from chunk
        except OBSTORE_ERRORS as error:
            raise self._listing_error(error) from None

    def _listing_error(self, error: Exception) -> ImageSearchError:
        if key := re.search(r'Path "(.*?)"(?:: Encountered| contained)', str(error), re.DOTALL):
            return UsageError(
                f"{self._bucket_url} has the key {key[1]!r}, which obstore cannot list (an empty part, '.', '..' or a"
                " control character): rename it, or use --images with another prefix."
            )
        return _explain(error, self._bucket_url)

    @contextlib.contextmanager
    def open_images(self, images: Sequence[ImageFile]) -> Iterator[tuple[list[OpenedImage], list[Unreadable]]]:
        # All at once: if each object were to wait for room, two chunks could wait for each other.
        with content_memory.reserve(sum(map(self.buffered_bytes, images))):
            reads = [self._readers.submit(self._read, image) for image in images]
            waiting, answered_at = set(reads), time.monotonic()
            while waiting:
                done, waiting = wait(waiting, POLL_SECONDS)
                if self._unreachable:  # without waiting for the others, which would be retried for two minutes
                    raise self._unreachable
                if done:
                    answered_at = time.monotonic()
                elif time.monotonic() - answered_at > SILENT_SECONDS:
                    say_now_and_then(f"Retrying requests to {self._bucket_url}: no answer yet.")
            opened, unreadable = list[OpenedImage](), list[Unreadable]()
            for image, read in zip(images, reads, strict=True):
                try:
                    opened.append(read.result())
                except OBSTORE_ERRORS as error:
                    unreadable.append(Unreadable(image.file_path, _short_reason(error)))
            yield opened, unreadable

    def _read(self, image: ImageFile) -> OpenedImage:
        if self._unreachable:  # by now
            raise self._unreachable
        try:
            return _read(self._store, image.location, image)
        except OBSTORE_ERRORS as error:
            if _is_unreachable(error):
                self._unreachable = _explain(error, self._bucket_url)
            raise


@contextlib.contextmanager
def open_object(image: ImageFile) -> Iterator[OpenedImage]:
    """Yields the object whose URL is the image's location.

    Raises OSError, ValueError or ImageSearchError if it cannot be read.
    """
    bucket_url, key = split_url(image.location)
    store = _open_store(bucket_url, RETRY_SECONDS_OF_A_QUERY)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(content_memory.reserve(min(obstore.head(store, key)["size"], MAX_CONTENT_BYTES)))
            opened = _read(store, key, image)
        except FileNotFoundError as error:
            _check_bucket(store, bucket_url)
            raise FileNotFoundError(_short_reason(error)) from None
        except OBSTORE_ERRORS as error:
            if _is_unreachable(error) or isinstance(error, (PermissionDeniedError, UnauthenticatedError)):
                raise _explain(error, bucket_url) from None
            raise OSError(_short_reason(error)) from None
        yield opened


def _check_bucket(store: Any, bucket_url: str) -> None:
    """Raises UsageError if there is no such bucket, which the response to HEAD for an object does not tell."""
    try:
        next(iter(obstore.list(store, chunk_size=1)), None)
    except OBSTORE_ERRORS as error:
        if "NoSuchBucket" in str(error):
            raise _explain(error, bucket_url) from None


def _read(store: Any, key: str, image: ImageFile) -> OpenedImage:
    result = obstore.get(store, key)
    size = result.meta["size"]
    check_size(size)
    image = replace(image, size=size, mtime=_mtime(result.meta["last_modified"]))
    return OpenedImage.from_memory(image, bytes(result.bytes()))


def split_url(url: str) -> tuple[str, str]:
    """Returns the bucket's URL and the key or prefix after it, which is not percent-encoded. Raises UsageError."""
    match = re.fullmatch(r"(\w+)://([A-Za-z0-9$][A-Za-z0-9._-]*)(?:/(.*))?", url, re.DOTALL | re.ASCII)
    if not match:  # not echoed: it may hold a password
        raise UsageError("The URL of a bucket must look like s3://bucket/folder, without a user, port, ? or #.")
    return f"{match[1].lower()}://{match[2]}", (match[3] or "").strip("/")


@functools.cache
def _open_store(bucket_url: str, retry_seconds: int) -> Any:
    """Returns the store, configured by the usual environment variables. Raises UsageError."""
    first, longest = timedelta(seconds=FIRST_WAIT_SECONDS), timedelta(seconds=retry_seconds / WAITS)
    backoff = {"init_backoff": first, "max_backoff": longest, "base": WAIT_BASE}
    retry: Any = {"max_retries": MAX_RETRIES, "retry_timeout": timedelta(seconds=retry_seconds), "backoff": backoff}
    try:
        return from_url(bucket_url, client_options=CLIENT_OPTIONS, retry_config=retry)
    except OBSTORE_ERRORS as error:
        hint = CREDENTIALS_HINT[bucket_url.partition("://")[0]]
        raise UsageError(f"{bucket_url} cannot be opened ({_short_reason(error)}): check {hint}.") from None


def _mtime(last_modified: datetime) -> int:
    """Returns nanoseconds since 1970, in whole seconds: the response to GET has no more.

    IBM Cloud Object Storage, MinIO and Google list milliseconds, which would never compare as equal.
    """
    return int(last_modified.timestamp()) * 1_000_000_000


def _is_unreachable(error: Exception) -> bool:
    """Returns True if the store gave no answer, or is overloaded, and so will not for other objects either."""
    status = re.search(r"status code: (\d{3})", str(error))
    return isinstance(error, GenericError) and (status is None or status[1] in ("429", "502", "503", "504"))


def _explain(error: Exception, bucket_url: str) -> ImageSearchError:
    """Returns the exception to raise in place of one of obstore's, which shows XML and a debug dump."""
    reason, hint = _short_reason(error), CREDENTIALS_HINT[bucket_url.partition("://")[0]]
    if re.search("NoSuchBucket|ContainerNotFound|status code: 404", str(error)):
        return UsageError(f"There is no bucket {bucket_url}, or no object store answers ({reason}). Check {hint}.")
    # The metadata servers are asked for credentials if none are set.
    if re.search(r"169\.254\.169\.254|metadata\.google\.internal", str(error)):
        return UsageError(f"No credentials for {bucket_url}: set {hint}.")
    if re.search("status code: 4", str(error)):
        return UsageError(f"{bucket_url} denied access ({reason}): check {hint}.")
    return ImageSearchError(f"No answer from {bucket_url} ({reason}). Check {hint}, then run the command again.")


def _short_reason(error: Exception) -> str:
    """Returns the HTTP status and the store's error code, or the reason of a network error."""
    text = str(error)
    if isinstance(error, FileNotFoundError):
        return "no such object"
    status, code = re.search(r"status code: (\d{3})", text), re.search(r"<Code>(\w+)</Code>", text)
    if status:
        return " ".join(["HTTP", status[1], *([code[1]] if code else [])])
    if not isinstance(error, BaseError):
        return describe_error(error)
    line = text.partition("\n")[0].rpartition(" - ")[2]
    return line.removeprefix("HTTP error: ").removeprefix("Generic ")[:100]
