"""The limits on images that are kept in memory, since they are no local files."""

from imagesearch.parallel import MemoryLimit

MAX_CONTENT_BYTES = 200_000_000  # limit for one image
MAX_BUFFERED_BYTES = 256_000_000  # limit for all such images together

content_memory = MemoryLimit(MAX_BUFFERED_BYTES)


def check_size(size_bytes: int) -> None:
    """Raises ValueError for content that is too large to be kept in memory."""
    if size_bytes > MAX_CONTENT_BYTES:
        raise ValueError(f"more than {MAX_CONTENT_BYTES // 1_000_000} MB")
