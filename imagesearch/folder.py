"""Images in a folder."""

import contextlib
import errno
import functools
import io
import os
import stat
from collections.abc import Iterable, Iterator, Sequence

from imagesearch.content import opened_from_memory
from imagesearch.errors import UsageError, describe_error
from imagesearch.files import stream_sha256
from imagesearch.images import image_extensions
from imagesearch.paths import file_path_to_local, is_ambiguous, normalize_folder, path_to_text, quote_path
from imagesearch.records import ImageFile, OpenedImage, Unreadable
from imagesearch.report import SILENT, Report

MAX_SMALL_BYTES = 1 << 18  # of a file that is read at once: each call may have to wait for the GIL
MAX_MTIME = 2**63 - 1  # what an index can store, in nanoseconds


class FolderSource:
    """A `Source` of local files. Symbolic links in it are followed; each folder is searched once."""

    readers_per_cpu = 0.5  # more threads would only wait for the GIL

    def __init__(self, path: str, folder: str) -> None:
        self._root = os.path.realpath(path)
        self._folder = path_to_text(folder)
        self.name = path_to_text(normalize_folder(path, folder))

    def check(self) -> None:
        try:
            os.scandir(self._root).close()
        except NotADirectoryError:
            raise UsageError(f"{quote_path(self.name)} is a file; --images takes a folder or a bucket.") from None
        except OSError as error:
            raise UsageError(
                f"{quote_path(self.name)}: {describe_error(error)}. Put your images there, or use --images with their"
                " folder."
            ) from None

    def find_images(self, report: Report = SILENT) -> Iterator[ImageFile]:
        folders, links = [self._root], list[str]()
        found: set[tuple[int, int]] = set()
        while folders or links:
            # Links last: a folder that is reachable both ways has its own name.
            path = folders.pop() if folders else links.pop()
            try:
                status = os.stat(path)
                inode = (status.st_dev, status.st_ino)
                if inode in found:
                    report.count_skipped("link to a folder already found")
                    continue
                found.add(inode)
                with os.scandir(path) as entries:
                    for entry in entries:
                        try:
                            if _is_folder(entry):
                                (links if entry.is_symlink() else folders).append(entry.path)
                            elif entry.name == ".gitignore":  # of images/ in a clone
                                continue
                            elif kind := _skipped_kind(entry):
                                report.count_skipped(kind)
                            elif stat.S_ISREG((status := entry.stat()).st_mode):
                                yield self._image(entry.path, status)
                            else:
                                report.count_skipped("not a regular file")
                        except OSError as error:
                            if error.errno == errno.ELOOP:
                                report.count_skipped("link to itself")
                            else:
                                report.count_unreadable(self._file_path(entry.path), describe_error(error))
            except OSError as error:
                report.count_unreadable(self._file_path(path), describe_error(error))

    def _image(self, path: str, status: os.stat_result) -> ImageFile:
        if is_ambiguous(path.removeprefix(self._root)):
            raise OSError(r"names with \x80 to \xff stand for bytes that are not UTF-8; rename it")
        desc = path_to_text(os.path.basename(os.path.dirname(path)))
        return ImageFile(path, self._file_path(path), desc, status.st_size, _mtime(status))

    def _file_path(self, path: str) -> str:
        return self.name + path_to_text(path.removeprefix(self._root))

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

    def find_gone(self, file_paths: Iterable[str]) -> Iterator[str]:
        _names.cache_clear()
        return filter(self._is_gone, file_paths)

    def _is_gone(self, file_path: str) -> bool:
        """Returns True if there is no such file; one whose folder cannot be read may be there."""
        path = file_path_to_local(file_path, self._folder)
        try:
            os.stat(path)
            return _has_other_case(path, self._root)
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False


def _has_other_case(path: str, root: str) -> bool:
    """Returns True if the file's name, or that of a folder below `root`, has another letter case now.

    A file system that ignores case finds the file all the same.
    """
    while len(path) > len(root):
        path, name = os.path.split(path)
        names = _names(path)
        if name not in names and name.casefold() in map(str.casefold, names):
            return True
    return False


@functools.lru_cache(maxsize=64)  # paths come in order
def _names(folder: str) -> frozenset[str]:
    return frozenset(os.listdir(folder))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".") and entry.is_dir()


def _skipped_kind(entry: os.DirEntry[str]) -> str:
    """Returns the kind of a file whose name says that it is not an image, empty for an image."""
    if entry.name.startswith("."):
        return "hidden"
    extension = os.path.splitext(entry.name)[1].lower()
    if extension not in image_extensions():
        return path_to_text(extension) or "without extension"
    return ""


def _mtime(status: os.stat_result) -> int:
    return max(-MAX_MTIME, min(MAX_MTIME, status.st_mtime_ns))


@contextlib.contextmanager
def open_file(path: str, name: str) -> Iterator[OpenedImage]:
    """Yields a regular file, called `name` in messages; opening a pipe could wait forever. Raises OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("is a folder; give the images in it" if os.path.isdir(path) else "not a regular file")
    with open(path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if status.st_size <= MAX_SMALL_BYTES:
            yield opened_from_memory(name, file.read(), _mtime(status))
        else:
            stream = io.BufferedReader(file)
            yield OpenedImage(name, stream, status.st_size, _mtime(status), stream_sha256(stream))
