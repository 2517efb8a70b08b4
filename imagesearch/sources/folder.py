"""Images in a folder."""

import contextlib
import io
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace

from imagesearch.errors import UsageError, describe_error
from imagesearch.files import stream_sha256
from imagesearch.images import image_extensions
from imagesearch.locations import file_path_of, path_to_text, quote_path
from imagesearch.records import ImageFile, ListingReport, OpenedImage, Unreadable

MAX_SMALL_BYTES = 1 << 18  # a smaller file is read at once: each call may have to wait for the GIL
MAX_MTIME = 2**63 - 1  # what an index can store, in nanoseconds


class FolderSource:
    """A `Source` of local files. Symbolic links in it are followed; each folder is searched once."""

    def __init__(self, path: str, base: str) -> None:
        self._root = path
        self.name = file_path_of(path, base)
        # The class of images that are not in a folder below it.
        self._class = os.path.basename(path_to_text(os.path.realpath(path)) if self.name == "." else self.name)
        try:
            os.scandir(path).close()
        except NotADirectoryError:
            raise UsageError(f"{quote_path(self.name)} is a file, not a folder or a bucket.") from None
        except OSError as error:
            raise UsageError(
                f"{quote_path(self.name)}: {describe_error(error)}. Put your images there, or use --images with their"
                " folder."
            ) from None

    def buffered_bytes(self, image: ImageFile) -> int:
        return image.size if image.size <= MAX_SMALL_BYTES else 0

    def find_images(self, report: ListingReport) -> Iterator[ImageFile]:
        folders, links = [""], list[str]()  # below the root
        found = set[tuple[int, int]]()
        while folders or links:
            # Links last: a folder that is reachable both ways has its own name.
            folder = folders.pop() if folders else links.pop(0)
            try:
                status = os.stat(self._path(folder))
                names = sorted(os.listdir(self._path(folder)))
            except OSError as error:
                report.count_unreadable(self._file_path(folder), describe_error(error))
                continue
            inode = (status.st_dev, status.st_ino)
            if inode in found:
                report.count_skipped(f"{quote_path(self._file_path(folder))} (a link to a folder already found)")
                continue
            found.add(inode)
            below = list[str]()
            for name in names:
                path = os.path.join(folder, name)
                try:
                    status = os.stat(self._path(path))
                except FileNotFoundError:
                    if os.path.islink(self._path(path)) and not name.startswith("."):
                        reason = "a link whose target is missing, such as a disk that is not mounted"
                        report.count_unreadable(self._file_path(path), reason)
                    continue  # or deleted since it was listed
                except OSError as error:
                    report.count_unreadable(self._file_path(path), describe_error(error))
                    continue
                if kind := _skipped_kind(name, status):
                    report.count_skipped(kind)
                elif stat.S_ISDIR(status.st_mode):
                    (links if os.path.islink(self._path(path)) else below).append(path)
                elif name != ".gitignore":
                    desc = path_to_text(os.path.basename(folder)) or self._class
                    yield ImageFile(self._path(path), self._file_path(path), desc, status.st_size, _mtime(status))
            folders += reversed(below)

    def _path(self, below: str) -> str:
        return os.path.join(self._root, below) if below else self._root

    def _file_path(self, below: str) -> str:
        return f"{self.name.rstrip('/')}/{path_to_text(below)}" if below else self.name

    @contextlib.contextmanager
    def open_images(self, images: Sequence[ImageFile]) -> Iterator[tuple[list[OpenedImage], list[Unreadable]]]:
        opened, unreadable = list[OpenedImage](), list[Unreadable]()
        with contextlib.ExitStack() as stack:
            for image in images:
                try:
                    opened.append(stack.enter_context(open_file(image)))
                except OSError as error:
                    unreadable.append(Unreadable(image.file_path, describe_error(error)))
            yield opened, unreadable


def _skipped_kind(name: str, status: os.stat_result) -> str:
    """Returns why a file or folder is not looked at, in a word; empty if it is, or is not counted either."""
    if name == ".gitignore":  # images/ has one in a clone
        return ""
    if name.startswith("."):
        return "hidden"
    if stat.S_ISDIR(status.st_mode):
        return ""
    extension = os.path.splitext(name)[1].lower()
    if extension not in image_extensions():
        return quote_path(path_to_text(extension)) if extension else "without extension"
    return "" if stat.S_ISREG(status.st_mode) else "not a regular file"


def _mtime(status: os.stat_result) -> int:
    return max(-MAX_MTIME, min(MAX_MTIME, status.st_mtime_ns))


def with_status(image: ImageFile, status: os.stat_result) -> ImageFile:
    """Returns the image with the size and the time of a file."""
    return replace(image, size=status.st_size, mtime=_mtime(status))


@contextlib.contextmanager
def open_file(image: ImageFile) -> Iterator[OpenedImage]:
    """Yields a regular file, as it is now; opening a pipe could wait forever. Raises OSError."""
    if not stat.S_ISREG(os.stat(image.location).st_mode):
        raise OSError("not a regular file")
    with open(image.location, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        image = with_status(image, status)
        if status.st_size <= MAX_SMALL_BYTES:
            yield OpenedImage.from_memory(image, file.read())
        else:
            stream = io.BufferedReader(file)
            yield OpenedImage(image, stream, stream_sha256(stream))
