"""Images in a bucket: S3, Google Cloud Storage or Azure, read with obstore."""

import contextlib
import functools
import posixpath
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import obstore
from obstore.exceptions import BaseError, GenericError, PermissionDeniedError, UnauthenticatedError
from obstore.store import from_url

from imagesearch.errors import ImageSearchError, UsageError, describe_error
from imagesearch.images import image_extensions
from imagesearch.paths import quote_path
from imagesearch.records import ImageFile, OpenedImage, Skipped, Unreadable
from imagesearch.sources import MAX_CONTENT_BYTES, check_size, content_memory

LISTED_TOGETHER = 1000
READERS = 64  # objects that are read at once, however many CPUs there are
# Obstore's own limit of 30 seconds for a request is too short for many large objects at once. Plain http is used only
# if the endpoint's URL says so.
CLIENT_OPTIONS: Any = {"connect_timeout": "10s", "read_timeout": "30s", "timeout": "10m", "allow_http": True}
RETRIES_OF_A_RUN, RETRIES_OF_A_QUERY = 20, 2  # with waits of 8 seconds, 20 last two minutes

CREDENTIALS_HINT = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION, and AWS_ENDPOINT_URL unless it is AWS",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
OBSTORE_ERRORS = (BaseError, OSError, ValueError)


class BucketSource:
    """A `Source` of the objects below a URL such as ``s3://birds/photos``; prefixes are its folders."""

    readers_per_cpu = 2.0  # reading is mostly waiting

    def __init__(self, url: str) -> None:
        self._bucket_url, self._prefix = _split_url(url)
        self.name = f"{self._bucket_url}/{self._prefix}".rstrip("/")
        self._store = _open_store(self._bucket_url, RETRIES_OF_A_RUN)
        self._readers = ThreadPoolExecutor(READERS)
        self._unreachable: ImageSearchError | None = None
        # With few retries, so that a wrong address is reported soon.
        next(self._list(_open_store(self._bucket_url, RETRIES_OF_A_QUERY), 1), None)

    def find_images(self) -> Iterator[ImageFile | Skipped | Unreadable]:
        for meta in self._list(self._store, LISTED_TOGETHER):
            key = meta["path"]
            extension = posixpath.splitext(key)[1].lower()
            if any(part.startswith(".") for part in key.removeprefix(self._prefix).split("/")):
                yield Skipped("hidden")
            elif extension not in image_extensions():
                yield Skipped(quote_path(extension) if extension else "without extension")
            elif meta["size"] == 0:  # some tools make such objects as folders; obstore drops the slash at their end
                yield Skipped("empty object")
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
    def open_images(self, images: Sequence[ImageFile]) -> Iterator[list[OpenedImage | Unreadable]]:
        def read(image: ImageFile) -> OpenedImage | Unreadable:
            if self._unreachable:  # by now: each object would be retried for two minutes
                raise self._unreachable
            try:
                return _read(self._store, self._bucket_url, image.location)
            except OBSTORE_ERRORS as error:
                if _is_unreachable(error):
                    self._unreachable = _explain(error, self._bucket_url)
                    raise self._unreachable from None
                return Unreadable(image.file_path, _short_reason(error))

        # All at once: if each object were to wait for room, two chunks could wait for each other.
        with content_memory.reserve(sum(min(image.size, MAX_CONTENT_BYTES) for image in images)):
            yield list(self._readers.map(read, images))

    def exists(self, file_path: str) -> bool:
        try:
            obstore.head(self._store, file_path.removeprefix(self._bucket_url + "/"))
        except FileNotFoundError:
            return False
        except OBSTORE_ERRORS:
            return True
        return True


@contextlib.contextmanager
def open_object(url: str) -> Iterator[OpenedImage]:
    """Yields the object with this URL. Raises OSError, ValueError or ImageSearchError if it cannot be read."""
    bucket_url, key = _split_url(url)
    store = _open_store(bucket_url, RETRIES_OF_A_QUERY)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(content_memory.reserve(min(obstore.head(store, key)["size"], MAX_CONTENT_BYTES)))
            image = _read(store, bucket_url, key)
        except FileNotFoundError as error:
            raise FileNotFoundError(_short_reason(error)) from None
        except OBSTORE_ERRORS as error:
            if _is_unreachable(error) or isinstance(error, (PermissionDeniedError, UnauthenticatedError)):
                raise _explain(error, bucket_url) from None
            raise OSError(_short_reason(error)) from None
        yield image


def _read(store: Any, bucket_url: str, key: str) -> OpenedImage:
    result = obstore.get(store, key)
    check_size(result.meta["size"])
    return OpenedImage.from_memory(f"{bucket_url}/{key}", bytes(result.bytes()), _mtime(result.meta["last_modified"]))


def _split_url(url: str) -> tuple[str, str]:
    """Returns the bucket's URL and the key or prefix after it, which is not percent-encoded."""
    match = re.fullmatch(r"(\w+)://([A-Za-z0-9$][A-Za-z0-9._-]*)(?:/(.*))?", url, re.DOTALL | re.ASCII)
    if not match:  # not echoed: it may hold a password
        raise UsageError("The URL of a bucket must look like s3://bucket/folder, without a user, port, ? or #.")
    return f"{match[1].lower()}://{match[2]}", (match[3] or "").strip("/")


@functools.cache
def _open_store(bucket_url: str, max_retries: int) -> Any:
    """Returns the store, configured by the usual environment variables. Raises UsageError."""
    backoff = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=8), "base": 2}
    retry: Any = {"max_retries": max_retries, "retry_timeout": timedelta(minutes=2), "backoff": backoff}
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
    """Returns True if the store gave no answer, and so will not for other objects either."""
    return isinstance(error, GenericError) and "status code" not in str(error)


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
