"""Images in a bucket: S3, Google Cloud Storage or Azure, read with obstore."""

import contextlib
import errno
import functools
import io
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, BinaryIO, TypeVar

import obstore
from obstore.exceptions import BaseError, InvalidPathError, PermissionDeniedError
from obstore.store import from_url

from imagesearch.documents import ImageFile
from imagesearch.errors import UsageError, describe_error
from imagesearch.images import OnError, OnSkip, check_size, content_memory, ignore, image_extensions
from imagesearch.paths import BUCKET_URL, quote_path
from imagesearch.retry import RetryableError, RetryPolicy

Result = TypeVar("Result")

# obstore's own retries cover brief failures; RetryPolicy, which the user sees, covers longer ones.
RETRY_CONFIG: Any = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}
# For a whole request, whose default of 30 seconds is too short for many large objects at once; and without any data.
TIMEOUTS = {
    f"{store}_{name}": value
    for store in ("AWS", "GOOGLE", "AZURE")
    for name, value in (("TIMEOUT", "10m"), ("READ_TIMEOUT", "30s"))
}
HEAD_THREADS = 32

CREDENTIALS_HINT = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_BAD_CREDENTIALS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")
_METADATA_SERVERS = ("169.254.169.254", "metadata.google.internal")  # asked for credentials if none are set


class BucketSource:
    """A `Source` of the objects below a URL such as ``s3://birds/photos``; prefixes are its folders."""

    def __init__(self, url: str, retry: RetryPolicy) -> None:
        self._bucket_url, self._prefix = _split_url(url)
        self.name = f"{self._bucket_url}/{self._prefix}".rstrip("/")
        self._store = _open_store(self._bucket_url)
        self._retry = retry

    def check(self) -> None:
        hint = _credentials_hint(self._bucket_url)
        try:
            _translated(lambda: next(iter(obstore.list(self._store, self._prefix or None)), None), self._bucket_url)
        except RetryableError as error:
            raise UsageError(f"The bucket cannot be reached: {error}. Check {hint}.") from None
        except OSError as error:
            raise UsageError(f"{quote_path(self.name)}: {describe_error(error)}. Check {hint}.") from None

    def find_images(self, on_skip: OnSkip = ignore, on_error: OnError = ignore) -> Iterator[ImageFile]:
        for objects in self._list(None):
            for meta in objects:
                key = meta["path"]
                below = key.removeprefix(self._prefix + "/") if self._prefix else key
                extension = posixpath.splitext(key)[1].lower()
                if any(part.startswith(".") for part in below.split("/")):
                    on_skip("hidden")
                elif extension not in image_extensions():
                    on_skip(extension or "without extension")
                else:
                    desc = posixpath.basename(posixpath.dirname(key)) or self._bucket_url.rpartition("/")[2]
                    file_path = f"{self._bucket_url}/{key}"
                    yield ImageFile(key, file_path, desc, meta["size"], _mtime(meta["last_modified"]))

    @contextlib.contextmanager
    def open_image(self, image: ImageFile) -> Iterator[tuple[ImageFile, BinaryIO]]:
        with _open(self._bucket_url, image.location, image.size, self._retry) as (size, mtime, stream):
            yield replace(image, size=size, mtime=mtime), stream

    def find_gone(self, file_paths: Sequence[str]) -> set[str]:
        keys = [file_path.removeprefix(self._bucket_url + "/") for file_path in file_paths]
        listed: set[str] = set()
        for objects in self._list(keys[0]):  # which begins after that key
            listed.update(meta["path"] for meta in objects)
            if objects[-1]["path"] >= keys[-1]:
                break
        # A listing alone is no proof: some stores do not list in order.
        missing = [key for key in keys if key not in listed]
        with ThreadPoolExecutor(HEAD_THREADS) as pool:
            gone = pool.map(self._is_gone, missing)
            return {f"{self._bucket_url}/{key}" for key, is_gone in zip(missing, gone, strict=True) if is_gone}

    def _is_gone(self, key: str) -> bool:
        try:
            _call(lambda: obstore.head(self._store, key), self._bucket_url, self._retry, is_one_object=True)
        except OSError as error:  # if access is denied, it may exist
            return isinstance(error, FileNotFoundError)
        return False

    def _list(self, offset: str | None) -> Iterator[Sequence[Any]]:
        """Yields the metadata of the objects below the prefix, in chunks; after the key `offset`, if given."""
        stream: Iterator[Sequence[Any]] | None = None

        def next_chunk() -> Sequence[Any] | None:
            nonlocal stream
            try:
                stream = stream or iter(obstore.list(self._store, self._prefix or None, offset=offset))
                return next(stream, None)
            except BaseException:
                stream = None  # the next attempt lists from the last key on
                raise

        while chunk := _call(next_chunk, self._bucket_url, self._retry):
            yield chunk
            offset = chunk[-1]["path"]


@contextlib.contextmanager
def open_object(url: str, retry: RetryPolicy) -> Iterator[tuple[int, int, BinaryIO]]:
    """Yields size in bytes, mtime in nanoseconds and content of the object with this URL.

    Raises OSError or ValueError if it cannot be read, ImageSearchError if the bucket cannot be reached.
    """
    bucket_url, key = _split_url(url)
    meta = _call(lambda: obstore.head(_open_store(bucket_url), key), bucket_url, retry, is_one_object=True)
    with _open(bucket_url, key, meta["size"], retry) as found:
        yield found


def _split_url(url: str) -> tuple[str, str]:
    """Returns the bucket's URL and the key or prefix after it, which is not percent-encoded."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    if not bucket or not BUCKET_URL.match(url):
        raise UsageError(f"{quote_path(url)} names no bucket: it must look like s3://bucket/folder.")
    return f"{scheme}://{bucket}", key.strip("/")


@functools.cache
def _open_store(bucket_url: str) -> Any:
    for name, value in TIMEOUTS.items():  # as client_options, they would replace all of the user's own variables
        os.environ.setdefault(name, value)
    try:
        return from_url(bucket_url, retry_config=RETRY_CONFIG)
    except (BaseError, OSError, ValueError) as error:
        raise UsageError(
            f"{bucket_url} cannot be opened ({_short_reason(error)}): check {_credentials_hint(bucket_url)}."
        ) from None


@contextlib.contextmanager
def _open(bucket_url: str, key: str, size: int, retry: RetryPolicy) -> Iterator[tuple[int, int, BinaryIO]]:
    """Yields size, mtime and content of an object, which had `size` bytes when it was found."""

    def get() -> tuple[Any, bytes]:
        result = obstore.get(_open_store(bucket_url), key)
        check_size(result.meta["size"])
        return result.meta, bytes(result.bytes())

    check_size(size)
    with content_memory.reserve(size):
        meta, content = _call(get, bucket_url, retry, is_one_object=True)
        yield meta["size"], _mtime(meta["last_modified"]), io.BytesIO(content)


def _call(function: Callable[[], Result], bucket_url: str, retry: RetryPolicy, is_one_object: bool = False) -> Result:
    """Returns ``function()``, retried, with obstore's errors translated."""
    return retry.call(f"The bucket {bucket_url}", lambda: _translated(function, bucket_url, is_one_object))


def _mtime(last_modified: datetime) -> int:
    """Returns nanoseconds since 1970, in whole seconds: the response to GET has no more.

    IBM Cloud Object Storage, MinIO and Google list milliseconds, which would never compare as equal.
    """
    return int(last_modified.timestamp()) * 1_000_000_000


def _translated(function: Callable[[], Result], bucket_url: str, is_one_object: bool = False) -> Result:
    """Returns ``function()`` with obstore's errors, which show XML and a debug dump, translated.

    Raises UsageError for what waiting does not change, OSError if that concerns one object only, and
    RetryableError for the rest.
    """
    hint = _credentials_hint(bucket_url)
    try:
        return function()
    except (BaseError, FileNotFoundError, ValueError) as error:
        text, reason = str(error), _short_reason(error)
        if "NoSuchBucket" in text:
            raise UsageError(f"There is no bucket {bucket_url} ({reason}).") from None
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
        has_bad_credentials = any(code in text for code in _BAD_CREDENTIALS) or reason.startswith("HTTP 401")
        if isinstance(error, PermissionDeniedError) and not has_bad_credentials:
            raise PermissionError(errno.EACCES, f"access denied ({reason})") from None
        if key := re.search(r'[Pp]ath "([^"]*)"', text if isinstance(error, InvalidPathError | ValueError) else ""):
            raise UsageError(
                f"{bucket_url}: the key {quote_path(key[1])} has a part that is empty, '.' or '..', which obstore"
                " cannot read: rename the object, or use --images with another folder of the bucket."
            ) from None
        if not isinstance(error, BaseError):
            raise
        if any(server in text for server in _METADATA_SERVERS):
            raise UsageError(f"No credentials for {bucket_url}: set {hint}.") from None
        if "BadScheme" in text:
            raise UsageError(
                f"{bucket_url} cannot be reached: AWS_ENDPOINT_URL must begin with https://, or with http:// and"
                " AWS_ALLOW_HTTP=true."
            ) from None
        if reason == "HTTP 404":
            raise UsageError(f"There is no bucket {bucket_url}, or no object store answers ({reason}).") from None
        if re.match(r"HTTP 4(?!08|29)", reason):
            if is_one_object and not has_bad_credentials:  # encrypted with a key of its own, for example
                raise OSError(f"the store refuses to send it ({reason})") from None
            raise UsageError(f"{bucket_url} denied access ({reason}): check {hint}.") from None
        raise RetryableError(f"no answer from {bucket_url} ({reason})") from None


def _credentials_hint(bucket_url: str) -> str:
    """Returns the names of the environment variables with the credentials for this kind of store."""
    return CREDENTIALS_HINT[bucket_url.partition("://")[0]]


def _short_reason(error: Exception) -> str:
    """Returns the HTTP status and the store's error code, or the reason of a network error."""
    text = str(error)
    status = re.search(r"status code: (\d{3})", text)
    code = re.search(r"<Code>(\w+)</Code>", text)
    if status:
        return " ".join(["HTTP", status[1], *([code[1]] if code else [])])
    line = text.partition("\n")[0].rpartition(" - ")[2]
    return line.removeprefix("HTTP error: ").removeprefix("Generic ")[:100]
