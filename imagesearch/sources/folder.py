"""Images in a folder."""

import contextlib
import io
import os
import stat
from collections.abc import Iterator, Sequence

from imagesearch.errors import UsageError, describe_error
from imagesearch.files import stream_sha256
from imagesearch.images import image_extensions
from imagesearch.paths import file_path_to_local, normalize_path, path_to_text, quote_path
from imagesearch.records import ImageFile, OpenedImage, Skipped, Unreadable

MAX_SMALL_BYTES = 1 << 18  # of a file that is read at once: each call may have to wait for the GIL
MAX_MTIME = 2**63 - 1  # what an index can store, in nanoseconds


class FolderSource:
    """A `Source` of local files. Symbolic links in it are followed; each folder is searched once."""

    readers_per_cpu = 0.5  # more threads would only wait for the GIL

    def __init__(self, path: str, folder: str) -> None:
        self._root = os.path.realpath(path)
        self._folder = folder
        self.name = path_to_text(normalize_path(self._root, folder))
        try:
            os.scandir(self._root).close()
        except NotADirectoryError:
            raise UsageError(f"{quote_path(self.name)} is a file, not a folder or a bucket.") from None
        except OSError as error:
            raise UsageError(
                f"{quote_path(self.name)}: {describe_error(error)}. Put your images there, or use --images with their"
                " folder."
            ) from None

    def find_images(self) -> Iterator[ImageFile | Skipped | Unreadable]:
        folders, links = [self._root], list[str]()
        found = set[tuple[int, int]]()
        while folders or links:
            # Links last: a folder that is reachable both ways has its own name.
            path = folders.pop() if folders else links.pop()
            try:
                status = os.stat(path)
                inode = (status.st_dev, status.st_ino)
                if inode in found:
                    yield Skipped(f"{quote_path(self._file_path(path))} (a link to a folder already found)")
                    continue
                found.add(inode)
                with os.scandir(path) as entries:
                    for entry in entries:
                        try:
                            if entry.is_dir() and not entry.name.startswith("."):
                                (links if entry.is_symlink() else folders).append(entry.path)
                            else:
                                yield from self._look_at(entry)
                        except OSError as error:
                            yield Unreadable(self._file_path(entry.path), describe_error(error))
            except OSError as error:
                yield Unreadable(self._file_path(path), describe_error(error))

    def _look_at(self, entry: os.DirEntry[str]) -> Iterator[ImageFile | Skipped]:
        """Yields a file as what it is; nothing for .gitignore, which images/ has in a clone. Raises OSError."""
        if entry.name.startswith("."):
            if entry.name != ".gitignore":
                yield Skipped("hidden")
            return
        extension = os.path.splitext(entry.name)[1].lower()
        if entry.is_symlink() and not os.path.exists(entry.path):
            raise OSError("a link whose target is missing, such as a disk that is not mounted")
        if extension not in image_extensions():
            yield Skipped(quote_path(path_to_text(extension)) if extension else "without extension")
        elif not stat.S_ISREG((status := entry.stat()).st_mode):
            yield Skipped("not a regular file")
        else:
            desc = path_to_text(os.path.basename(os.path.dirname(entry.path)))
            yield ImageFile(entry.path, self._file_path(entry.path), desc, status.st_size, _mtime(status))

    def _file_path(self, path: str) -> str:
        return self.name.rstrip("/") + path_to_text(path.removeprefix(self._root.rstrip("/")))

    @contextlib.contextmanager
    def open_images(self, images: Sequence[ImageFile]) -> Iterator[list[OpenedImage | Unreadable]]:
        with contextlib.ExitStack() as stack:
            opened: list[OpenedImage | Unreadable] = []
            for image in images:
                try:
                    opened.append(stack.enter_context(open_file(image.location, image.file_path)))
                except OSError as error:
                    opened.append(Unreadable(image.file_path, describe_error(error)))
            yield opened

    def exists(self, file_path: str) -> bool:
        try:
            os.stat(file_path_to_local(file_path, self._folder))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True
        return True


def _mtime(status: os.stat_result) -> int:
    return max(-MAX_MTIME, min(MAX_MTIME, status.st_mtime_ns))


@contextlib.contextmanager
def open_file(path: str, name: str) -> Iterator[OpenedImage]:
    """Yields a regular file, called `name` in messages; opening a pipe could wait forever. Raises OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a regular file")
    with open(path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if status.st_size <= MAX_SMALL_BYTES:
            yield OpenedImage.from_memory(name, file.read(), _mtime(status))
        else:
            stream = io.BufferedReader(file)
            yield OpenedImage(name, stream, status.st_size, _mtime(status), stream_sha256(stream))
