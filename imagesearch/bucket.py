"""Images in a bucket: S3, Google Cloud Storage or Azure, read with obstore."""

import contextlib
import functools
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any, TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import from_url

from imagesearch.content import MAX_CONTENT_BYTES, check_size, content_memory, opened_from_memory
from imagesearch.errors import UsageError, describe_error
from imagesearch.images import image_extensions
from imagesearch.parallel import batch_until_error
from imagesearch.paths import quote_path
from imagesearch.records import BATCH_SIZE, ImageFile, OpenedImage, Unreadable
from imagesearch.report import SILENT, Report
from imagesearch.retry import Retry, RetryableError

T = TypeVar("T")

# obstore's own retries cover brief failures; Retry, which the user sees, covers longer ones.
RETRY_CONFIG: Any = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}
# TIMEOUT is for a whole request: obstore's 30 seconds are too short for many large objects at once. READ_TIMEOUT is for
# a server that is silent. They are set as variables, since client_options would replace all of the user's own.
for _store in ("AWS", "GOOGLE", "AZURE"):
    os.environ.setdefault(f"{_store}_TIMEOUT", "10m")
    os.environ.setdefault(f"{_store}_READ_TIMEOUT", "30s")
READERS = 64  # objects that are read at once, however many CPUs there are

CREDENTIALS_HINT = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION, and AWS_ENDPOINT_URL unless it is AWS",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
HTTP_HINT = {"s3": "AWS_ALLOW_HTTP=true", "gs": "GOOGLE_ALLOW_HTTP=true", "az": "AZURE_ALLOW_HTTP=true"}

# What is raised in place of obstore's errors, which show XML and a debug dump. Each pattern is searched in the
# text "one object TYPE: MESSAGE" or "bucket TYPE: MESSAGE"; the first counts. OSError concerns one object only.
ERRORS: tuple[tuple[str, type[Exception], str], ...] = (
    ("NoSuchBucket|ContainerNotFound", UsageError, "There is no bucket {bucket} ({reason})."),
    ("^[^:]*FileNotFoundError", FileNotFoundError, "No such object"),
    # The metadata servers are asked for credentials if none are set.
    (r"169\.254\.169\.254|metadata\.google\.internal", UsageError, "No credentials for {bucket}: set {credentials}."),
    (
        "InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|InvalidToken|status code: 401",
        UsageError,
        "{bucket} denied access ({reason}): check {credentials}.",
    ),
    ("^[^:]*PermissionDeniedError", PermissionError, "access denied ({reason})"),
    ("BadScheme", UsageError, "{bucket} cannot be reached over http://: set {http}, or use https://."),
    (
        "status code: 404(?!.*<Code>)",
        UsageError,
        "There is no bucket {bucket}, or no object store answers ({reason}).",
    ),
    # Encrypted with a key of its own, for example.
    ("^one object.*status code: 4(?!08|29)", OSError, "the store refuses to send it ({reason})"),
    ("status code: 4(?!08|29)", UsageError, "{bucket} denied access ({reason}): check {credentials}."),
)


class BucketSource:
    """A `Source` of the objects below a URL such as ``s3://birds/photos``; prefixes are its folders."""

    readers_per_cpu = 2.0  # reading is mostly waiting

    def __init__(self, url: str, retry: Retry) -> None:
        self._bucket_url, self._prefix = _split_url(url)
        self.name = f"{self._bucket_url}/{self._prefix}".rstrip("/")
        self._store = _open_store(self._bucket_url)
        self._retry = retry
        self._readers = ThreadPoolExecutor(READERS)

    def check(self) -> None:
        with contextlib.suppress(InvalidKeyError):  # find_images reports it
            self._listed(lambda: next(iter(obstore.list(self._store, self._prefix or None)), None), once=True)

    def find_images(self, report: Report = SILENT) -> Iterator[ImageFile]:
        found: set[int] = set()  # hashes of keys, which may be millions
        for meta in self._list(report):
            key = meta["path"]
            below = key.removeprefix(self._prefix + "/") if self._prefix else key
            extension = posixpath.splitext(key)[1].lower()
            file_path = f"{self._bucket_url}/{key}"
            if any(part.startswith(".") for part in below.split("/")):
                report.count_skipped("hidden")
            elif extension not in image_extensions():
                report.count_skipped(extension or "without extension")
            elif meta["size"] == 0:  # some tools make such objects as folders; obstore drops the slash at their end
                report.count_skipped("empty object")
            elif hash(key) in found:
                report.count_unreadable(
                    file_path, "there are several such keys, with and without slashes at their ends; rename them"
                )
            else:
                found.add(hash(key))
                desc = posixpath.basename(posixpath.dirname(key)) or self._bucket_url.rpartition("/")[2]
                yield ImageFile(key, file_path, desc, meta["size"], _mtime(meta["last_modified"]))

    @contextlib.contextmanager
    def open_images(self, images: Sequence[ImageFile]) -> Iterator[list[OpenedImage | Unreadable]]:
        def read(image: ImageFile) -> OpenedImage | Unreadable:
            try:
                return _read(self._bucket_url, image.location, self._retry)
            except FileNotFoundError:
                reason = "no such object: it was deleted, or its key begins or ends with a slash; then rename it"
                return Unreadable(image.file_path, reason)
            except (OSError, ValueError) as error:
                return Unreadable(image.file_path, describe_error(error))

        # All at once: if each object were to wait for room, two chunks could wait for each other.
        needed = sum(min(image.size, MAX_CONTENT_BYTES) for image in images)
        with content_memory.reserve(needed):
            yield list(self._readers.map(read, images))

    def find_gone(self, file_paths: Iterable[str]) -> Iterator[str]:
        listing = self._list(SILENT)  # once, alongside the sorted paths
        listed, last = {""}, ""
        for batch in batch_until_error(file_paths, BATCH_SIZE):
            keys = [file_path.removeprefix(self._bucket_url + "/") for file_path in batch]
            while last < keys[-1] and (meta := next(listing, None)):
                last = meta["path"]
                listed.add(last)
            # A listing alone is no proof: some stores do not list in order.
            missing = [key for key in keys if key not in listed]
            are_gone = self._readers.map(self._is_gone, missing)
            yield from (f"{self._bucket_url}/{key}" for key, gone in zip(missing, are_gone, strict=True) if gone)
            listed = {last}

    def _is_gone(self, key: str) -> bool:
        try:
            _call(lambda: obstore.head(self._store, key), self._bucket_url, self._retry, is_one_object=True)
        except OSError as error:  # if access is denied, it may exist
            return isinstance(error, FileNotFoundError)
        return False

    def _list(self, report: Report) -> Iterator[Any]:
        """Yields the metadata of the objects below the prefix, ordered by their keys."""
        last = ""
        try:
            for meta in self._list_flat(self._prefix, ""):
                last = meta["path"]
                yield meta
        except InvalidKeyError:
            yield from self._list_by_folder(self._prefix, last, report)

    def _list_flat(self, prefix: str, offset: str) -> Iterator[Any]:
        """Yields the metadata of the objects below `prefix` whose keys are after `offset`, in their order."""
        stream: Iterator[Sequence[Any]] | None = None

        def next_chunk() -> Sequence[Any] | None:
            nonlocal stream
            try:
                if stream is None:
                    stream = iter(
                        obstore.list(self._store, prefix or None, offset=offset or None, chunk_size=BATCH_SIZE)
                    )
                return next(stream, None)
            except BaseException:
                stream = None  # the next attempt lists from the last key on
                raise

        while chunk := self._listed(next_chunk):
            yield from chunk
            offset = chunk[-1]["path"]

    def _list_by_folder(self, prefix: str, offset: str, report: Report) -> Iterator[Any]:
        """Yields what `_list_flat` yields, folder by folder: obstore drops a page that has an invalid key."""
        try:
            listing = self._listed(lambda: obstore.list_with_delimiter(self._store, prefix or None))
        except InvalidKeyError:
            yield from self._list_around(prefix, offset, report)
            return
        yield from (meta for meta in listing["objects"] if meta["path"] > offset)
        for folder in listing["common_prefixes"]:
            if folder:  # of keys that begin with a slash, which are listed without it
                yield from self._list_by_folder(folder, offset, report)

    def _list_around(self, prefix: str, offset: str, report: Report) -> Iterator[Any]:
        """Yields what `_list_flat` yields, but for pages with an invalid key up to it; tells `report` of each key."""
        while True:
            try:
                for meta in self._list_flat(prefix, offset):
                    offset = meta["path"]
                    yield meta
                return
            except InvalidKeyError as error:
                report.count_unreadable(
                    f"{self._bucket_url}/{error.key}",
                    f"obstore cannot read keys with {error.problem}; up to 1,000 objects listed with it are skipped,"
                    " too: rename it",
                )
                offset = max(offset, error.next_key)

    def _listed(self, function: Callable[[], T], once: bool = False) -> T:
        """Returns ``function()``, which lists objects; retried unless it is to be tried `once`.

        Raises UsageError if the bucket cannot be listed.
        """
        call = self._retry.call_without_retry if once else self._retry.call
        service = f"The bucket {self._bucket_url}"
        try:
            return call(
                service,
                lambda: self._retry.run_interruptibly(service, lambda: _translated(function, self._bucket_url)),
            )
        except OSError as error:
            hint = CREDENTIALS_HINT[self._bucket_url.partition("://")[0]]
            raise UsageError(f"{quote_path(self.name)}: {describe_error(error)}. Check {hint}.") from None


class InvalidKeyError(Exception):
    """A bucket has a key that obstore cannot read.

    `next_key` comes after all keys that begin like `key` up to its first problem, and can be read.
    """

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key
        match = re.search(r"[\x00-\x1f\x7f]|(?:^|(?<=/))\.{0,2}(?=/|$)", key)
        bad, start = (match[0], match.start()) if match else ("", len(key))
        if bad and not bad.startswith("."):
            self.problem = "control characters"
            self.next_key = key[:start] + (" " if bad < " " else "\x80")
        else:
            self.problem = "a part that is empty, '.' or '..'"
            self.next_key = f"{key[:start]}{bad}0"  # the character after a slash


@contextlib.contextmanager
def open_object(url: str, retry: Retry) -> Iterator[OpenedImage]:
    """Yields the object with this URL.

    Raises OSError or ValueError if it cannot be read, ImageSearchError if the bucket cannot be reached.
    """
    bucket_url, key = _split_url(url)
    meta = _call(lambda: obstore.head(_open_store(bucket_url), key), bucket_url, retry, is_one_object=True)
    check_size(meta["size"])
    with content_memory.reserve(meta["size"]):
        yield _read(bucket_url, key, retry)


def _read(bucket_url: str, key: str, retry: Retry) -> OpenedImage:
    """Returns an object. Raises as `open_object` does."""

    def get() -> tuple[Any, bytes]:
        result = obstore.get(_open_store(bucket_url), key)
        check_size(result.meta["size"])
        return result.meta, bytes(result.bytes())

    meta, content = _call(get, bucket_url, retry, is_one_object=True)
    return opened_from_memory(f"{bucket_url}/{key}", content, _mtime(meta["last_modified"]))


def _split_url(url: str) -> tuple[str, str]:
    """Returns the bucket's URL and the key or prefix after it, which is not percent-encoded."""
    match = re.fullmatch(r"(\w+)://([A-Za-z0-9$][A-Za-z0-9._-]*)(?:/(.*))?", url, re.DOTALL | re.ASCII)
    if not match:  # not echoed: it may hold a password
        raise UsageError("The URL of a bucket must look like s3://bucket/folder, without a user, port, ? or #.")
    return f"{match[1].lower()}://{match[2]}", (match[3] or "").strip("/")


@functools.cache
def _open_store(bucket_url: str) -> Any:
    try:
        return from_url(bucket_url, retry_config=RETRY_CONFIG)
    except (BaseError, OSError, ValueError) as error:
        hint = CREDENTIALS_HINT[bucket_url.partition("://")[0]]
        raise UsageError(f"{bucket_url} cannot be opened ({_short_reason(error)}): check {hint}.") from None


def _call(function: Callable[[], T], bucket_url: str, retry: Retry, is_one_object: bool = False) -> T:
    """Returns ``function()``, retried, with obstore's errors translated."""
    return retry.call(f"The bucket {bucket_url}", lambda: _translated(function, bucket_url, is_one_object))


def _mtime(last_modified: datetime) -> int:
    """Returns nanoseconds since 1970, in whole seconds: the response to GET has no more.

    IBM Cloud Object Storage, MinIO and Google list milliseconds, which would never compare as equal.
    """
    return int(last_modified.timestamp()) * 1_000_000_000


def _translated(function: Callable[[], T], bucket_url: str, is_one_object: bool = False) -> T:
    """Returns ``function()`` with obstore's errors, which show XML and a debug dump, translated.

    Raises UsageError or ImageSearchError for what waiting does not change, OSError if that concerns one object only,
    InvalidKeyError for a key that obstore cannot read, and RetryableError for the rest.
    """
    try:
        return function()
    except (BaseError, FileNotFoundError, ValueError) as error:
        raise _translate(error, bucket_url, is_one_object) from None


def _translate(error: Exception, bucket_url: str, is_one_object: bool) -> Exception:
    """Returns the exception to raise in place of one of obstore's."""
    if key := re.search(r'Path "(.*?)"(?:: Encountered| contained)', str(error), re.DOTALL):
        return OSError("obstore cannot read such keys") if is_one_object else InvalidKeyError(key[1])
    if isinstance(error, ValueError):  # of content that is too large, for example
        return error
    text = f"{'one object' if is_one_object else 'bucket'} {type(error).__name__}: {error}"
    scheme, reason = bucket_url.partition("://")[0], _short_reason(error)
    words = {"bucket": bucket_url, "reason": reason, "credentials": CREDENTIALS_HINT[scheme], "http": HTTP_HINT[scheme]}
    for pattern, kind, message in ERRORS:
        if re.search(pattern, text, re.DOTALL):
            return kind(message.format(**words))
    return RetryableError(f"no answer from {bucket_url} ({reason})", f"Check {CREDENTIALS_HINT[scheme]}.")


def _short_reason(error: Exception) -> str:
    """Returns the HTTP status and the store's error code, or the reason of a network error."""
    text = str(error)
    status = re.search(r"status code: (\d{3})", text)
    code = re.search(r"<Code>(\w+)</Code>", text)
    if status:
        return " ".join(["HTTP", status[1], *([code[1]] if code else [])])
    line = text.partition("\n")[0].rpartition(" - ")[2]
    return line.removeprefix("HTTP error: ").removeprefix("Generic ")[:100]
