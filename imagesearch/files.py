"""Files: written atomically, hashed, and how many may be open."""

import contextlib
import glob
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

STALE_SECONDS = 3600
MAX_OPEN_FILES = 4096  # more is of no use


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, which replaces `path` when the block succeeds.

    So `path` is never seen half-written, whoever else reads or writes it. What killed processes have left is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f"{glob.escape(path.name)}.imagesearch-*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                stale.unlink()
    temporary = path.with_name(f"{path.name}.imagesearch-{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def stream_sha256(stream: BinaryIO) -> str:
    """Returns the SHA-256, in hex, of what is left to read."""
    return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def cache_folder() -> Path:
    """Returns `imagesearch` in the user's cache folder; it may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "imagesearch"


def raise_open_file_limit() -> int:
    """Raises the number of files that this process may open to 4096, if it may; returns it. macOS begins with 256."""
    try:
        import resource  # not on Windows
    except ImportError:
        return 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(MAX_OPEN_FILES, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
