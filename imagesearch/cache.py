"""Files that are made once for each model and kept: hashes and rewritten models."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path:
    """`imagesearch` in the user's cache folder; it may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imagesearch"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write to, moved to `path` when the block ends well.

    So `path` is never seen half-written, whoever else reads or writes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    try:
        yield Path(name)
        os.replace(name, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def model_sha256(path: Path) -> str:
    """SHA-256 of the file in hex, remembered for as long as its place, size and time stay the same."""
    status = path.stat()
    key = f"{os.path.realpath(path)}\0{status.st_size}\0{status.st_mtime_ns}"
    remembered = cache_folder() / (hashlib.sha256(os.fsencode(key)).hexdigest() + ".sha256")
    with contextlib.suppress(OSError):
        return remembered.read_text()
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    with contextlib.suppress(OSError), replacing(remembered) as temporary:  # no cache: hashed each time
        temporary.write_text(sha256)
    return sha256
