"""Which files are images, and reading one into pixels."""

import errno
import functools
import hashlib
import os
import re
import shlex
import stat
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import EpsImagePlugin, Image, ImageOps, _imaging

try:
    from pillow_heif import register_heif_opener
except ImportError:
    pass
else:
    register_heif_opener()

warnings.filterwarnings("ignore", module="PIL")  # they are about what it can still read

# Formats that Pillow can name but not decode.
NAMED_ONLY = {"BUFR", "GRIB", "HDF5", "MPEG"}

# JPEGs are decoded at the smallest scale that leaves this many times the pixels
# of the model's 224 along the longer side.
DRAFT_SIDE = 2 * 224


@dataclass(frozen=True, slots=True)
class File:
    """An image file as the walk found it.

    `path` is the operating system's (bytes that are no UTF-8 are surrogates, as `os.fsdecode`
    has them), `size` is in bytes, `mtime` in nanoseconds since 1970.
    """

    path: str
    size: int
    mtime: int

    @property
    def file_path(self) -> str:
        """The path as the index has it: text, where a byte that is no UTF-8 reads `\\xff`."""
        return as_text(self.path)

    @property
    def id(self) -> str:
        """SHA-256 of `file_path` in hex: the document's `_id`."""
        return hashlib.sha256(self.file_path.encode()).hexdigest()

    @property
    def desc(self) -> str:
        """The name of the folder that the image is in: its class."""
        folder = os.path.dirname(self.file_path)
        return os.path.basename(os.path.abspath(folder) if folder in (".", "..") else folder)


def as_text(name: str) -> str:
    """A name of the operating system as text, where a byte that is no UTF-8 reads `\\xff`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def local_path(file_path: str) -> str:
    """The operating system's path for a `file_path` of the index (the way back of `File.file_path`)."""
    if os.path.lexists(file_path):
        return file_path
    raw = re.sub(rb"\\x([89a-f][0-9a-f])", lambda byte: bytes.fromhex(byte[1].decode()), file_path.encode())
    return os.fsdecode(raw)


def shown(path: str) -> str:
    """`path` on one line, quoted so that a shell takes it when pasted."""
    if path.isprintable():
        return shlex.quote(path)
    return "$'" + os.fsencode(path).decode("latin-1").encode("unicode_escape").decode().replace("'", "\\'") + "'"


def clean(folder: str) -> str:
    """`folder` in the one form that paths in the index begin with: `images/` and `./images` are `./images`."""
    folder = os.path.normpath(folder)
    if folder == "." or os.path.isabs(folder) or folder.split(os.sep)[0] == "..":
        return folder
    return os.path.join(".", folder)


@functools.cache
def extensions() -> frozenset[str]:
    """The extensions, in lower case with their dot, of every format that the installed Pillow can decode."""
    unreadable = set(NAMED_ONLY)
    if not EpsImagePlugin.has_ghostscript():
        unreadable.add("EPS")
    if not hasattr(_imaging, "drawwmf"):  # Windows only
        unreadable.add("WMF")
    known = Image.registered_extensions().items()
    return frozenset(extension for extension, name in known if name in Image.OPEN and name not in unreadable)


def walk(
    folder: str,
    passed_over: Callable[[str], None],
    unreadable: Callable[[str, str], None],
) -> Iterator[File]:
    """Every image file below `folder`, at any depth, links followed; its order is the file system's.

    `passed_over(path)` hears of hidden files and folders, links that lead back to a folder above
    them, and whatever is not an image file; `unreadable(path, reason)` of what cannot be looked at.
    """
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [(folder, ())]
    while pending:
        path, above = pending.pop()
        try:
            status = os.stat(path)
            here = (status.st_dev, status.st_ino)
            if here in above:
                passed_over(path)
                continue
            with os.scandir(path) as entries:
                for entry in entries:
                    found = look(entry, passed_over, unreadable)
                    if isinstance(found, File):
                        yield found
                    elif found:
                        pending.append((entry.path, (*above, here)))
        except OSError as error:
            unreadable(path, reason(error))


def look(
    entry: os.DirEntry[str],
    passed_over: Callable[[str], None],
    unreadable: Callable[[str, str], None],
) -> File | bool:
    """The image file that `entry` is; True for a folder to walk; False for all else, which is reported."""
    try:
        hidden = entry.name.startswith(".")
        if not hidden and entry.is_dir():
            return True
        if hidden or os.path.splitext(entry.name)[1].lower() not in extensions():
            passed_over(entry.path)
            return False
        status = entry.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            passed_over(entry.path)
        else:
            unreadable(entry.path, reason(error))
        return False
    if not stat.S_ISREG(status.st_mode):  # a pipe or a device named like an image
        passed_over(entry.path)
        return False
    return File(entry.path, status.st_size, status.st_mtime_ns)


def reason(error: Exception) -> str:
    """Why a file could not be read, in a few words on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return "not an image that Pillow can read" if "cannot identify image file" in text else text


def read(stream: BinaryIO) -> Image.Image:
    """The image in `stream` as 8-bit RGB, the way up that its EXIF orientation says.

    JPEGs far larger than the model's 224 pixels are decoded at reduced scale; transparency is laid
    on white; greyscale of more than 8 bits is scaled to 8; an animation gives its first frame.
    Raises what Pillow raises for a damaged file, most often OSError, SyntaxError or ValueError.
    """
    image = Image.open(stream)
    longest = max(image.size)
    image.draft("RGB", (max(1, image.width * DRAFT_SIDE // longest), max(1, image.height * DRAFT_SIDE // longest)))
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return rgb(image)


def rgb(image: Image.Image) -> Image.Image:
    """`image` of any mode as 8-bit RGB."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(eight_bit(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def eight_bit(grey: np.ndarray) -> np.ndarray:
    """Greyscale values, integers of up to 32 bits or floats, scaled to uint8.

    Integers within 16 bits keep their full scale, and floats within 0…1 theirs; any other range
    has no agreed white, so the picture's own least and greatest values become black and white.
    """
    values = np.nan_to_num(grey.astype(np.float64), posinf=0, neginf=0)
    low, high = float(values.min()), float(values.max())
    white = 1.0 if grey.dtype.kind == "f" else 65535.0
    if low >= 0 and high <= white:
        low, high = 0.0, white
    return ((values - low) * (255 / ((high - low) or 1)) + 0.5).astype(np.uint8)
