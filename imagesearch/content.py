"""Contents that are kept in memory, and how large they may be."""

import hashlib
import io

from imagesearch.parallel import MemoryLimit
from imagesearch.records import OpenedImage

MAX_CONTENT_BYTES = 200_000_000  # of an image that is not a local file
MAX_BUFFERED_BYTES = 256_000_000  # of all such images that are in memory together

content_memory = MemoryLimit(MAX_BUFFERED_BYTES)


def check_size(size_bytes: int) -> None:
    """Raises ValueError for content that is too large to be kept in memory."""
    if size_bytes > MAX_CONTENT_BYTES:
        raise ValueError(f"more than {MAX_CONTENT_BYTES // 1_000_000} MB")


def opened_from_memory(name: str, content: bytes, mtime: int = 0) -> OpenedImage:
    """Returns the image with this content; `mtime` is in nanoseconds, 0 if there is none."""
    return OpenedImage(name, io.BytesIO(content), len(content), mtime, hashlib.sha256(content).hexdigest())
