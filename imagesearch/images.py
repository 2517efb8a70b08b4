"""What an image file is, and decoding one to 8-bit RGB."""

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from imagesearch.decoding_memory import (
    BITS_PER_SAMPLE,
    MAX_FULL_SCALE_PIXELS,
    PHOTOMETRIC,
    WHITE_IS_ZERO,
    decoding_bytes,
    jpeg2000_levels,
)
from imagesearch.parallel import MemoryLimit

warnings.filterwarnings("ignore", module="PIL")  # about flaws that do not keep Pillow from reading a file

# The formats that Pillow decodes by itself, the commonest first: it imports the modules of all formats for the others.
# Pillow identifies a file by its content, whatever its name, and would start Ghostscript for a PostScript file named
# .jpg. EPS and WMF are left out, and BLP, ICNS and ICO, which embed files of other formats and sizes, and FITS, which
# is decompressed in Python with 50 bytes a pixel.
FORMATS = (
    *("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF"),
    *("CUR", "DCX", "DDS", "DIB", "FLI", "FTEX", "GBR", "IM", "JPEG2000", "MCIDAS", "MSP", "PCD", "PCX"),
    *("PIXAR", "PSD", "QOI", "SGI", "SPIDER", "SUN", "TGA", "XBM", "XPM", "XVTHUMB"),
)

# JPEGs are decoded at the smallest scale that leaves this many pixels along the longer side: twice the model's 224.
DRAFT_SIZE = 2 * 224

# Pillow's limit is far below the size of JPEGs that are decoded at reduced scale in little memory.
Image.MAX_IMAGE_PIXELS = None
MAX_SIDE = 65_535  # of a JPEG; strips of wider images would be large

# Images with a longer side are reduced, too: the time of Clip.preprocess grows with its square.
MAX_FULL_SCALE_SIDE = 1 << 14

# For all images that are in use together, so that a run stays below 1 GB: 150 megapixels of RGBA, for example.
MAX_DECODING_BYTES = 600_000_000

STRIP_PIXELS = 1 << 22  # of a strip of rows: 16 MB as Pillow keeps them

_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {  # Exif 2.32, 4.6.4
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_decoding_memory = MemoryLimit(MAX_DECODING_BYTES)


@functools.cache
def image_extensions() -> frozenset[str]:
    """Returns the file extensions of all formats that are read, lowercase with their dot."""
    read = {*FORMATS, *heif_format(), "MPO"}  # MPO is read as JPEG
    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in read)


@functools.cache
def heif_format() -> tuple[str, ...]:
    """Returns the name of the format of HEIC files, after making Pillow read them."""
    import pi_heif  # late, since it takes longer to import than a JPEG to decode

    pi_heif.register_heif_opener()
    return ("HEIF",)


@contextlib.contextmanager
def open_rgb(stream: BinaryIO) -> Iterator[Image.Image]:
    """Yields the image in `stream` as 8-bit RGB, rotated as its EXIF orientation says.

    JPEGs much larger than the model's 224 pixels are decoded at reduced scale, and images of more than
    33 megapixels, or with a side of more than 16,384, are reduced. Transparent parts become white, grayscale
    of more than 8 bits is scaled to 8, and an animation gives its first frame.

    Waits while other threads use so many images that the memory would exceed MAX_DECODING_BYTES: it is
    reserved until the block ends. Raises ValueError for an image that needs more than that alone, and
    whatever Pillow raises for a damaged file, most often OSError, SyntaxError or ValueError.
    """
    stream.seek(4)
    is_heif = stream.read(4) == b"ftyp"  # or AVIF
    try:
        image = Image.open(stream, formats=(*FORMATS, *heif_format()) if is_heif else FORMATS)
    except UnidentifiedImageError:
        raise ValueError("not an image that Pillow can read") from None
    full_size, longest = image.size, max(image.size)
    pixels = f"{image.width}x{image.height} pixels of {image.format}"
    if longest > MAX_SIDE:
        raise ValueError(f"{pixels}: a side of more than {MAX_SIDE} pixels")
    image.draft("RGB", (max(1, image.width * DRAFT_SIZE // longest), max(1, image.height * DRAFT_SIZE // longest)))
    size = _reduce_jpeg2000(image, stream) if image.format == "JPEG2000" else image.size
    needed = decoding_bytes(image, size, full_size, stream)
    if needed > MAX_DECODING_BYTES:
        raise ValueError(
            f"{pixels} need {needed / 1e6:.0f} MB to decode, more than the {MAX_DECODING_BYTES / 1e6:.0f} MB allowed"
        )
    _scale_transparency(image)
    with _decoding_memory.reserve(needed):
        image.load()
        rgb = to_rgb(image)
        transpose = _TRANSPOSE.get(_exif_orientation(image))
        del image
        yield rgb if transpose is None else rgb.transpose(transpose)


def _reduce_jpeg2000(image: ImageFile.ImageFile, stream: BinaryIO) -> tuple[int, int]:
    """Makes an image that is too large for MAX_DECODING_BYTES be decoded at reduced scale; returns its new size."""
    full_size = size = image.size
    level = 0
    while decoding_bytes(image, size, full_size, stream) > MAX_DECODING_BYTES and level < jpeg2000_levels(stream):
        level += 1
        size = -(-full_size[0] >> level), -(-full_size[1] >> level)
    if level:
        image.reduce = level  # type: ignore[method-assign, assignment]  # so Pillow's plugin has it
        # Pillow divides by 2**level and rounds to the nearest; OpenJPEG rounds up.
        image._size = size[0] << level, size[1] << level
    return size


def _scale_transparency(image: ImageFile.ImageFile) -> None:
    """Makes the transparent color of a PNG one of the 8-bit values that its samples of other depths become."""
    color = image.info.get("transparency")
    rawmode = image.tile[0].args if image.format == "PNG" and image.tile else ""
    if isinstance(color, int) and rawmode in ("L;2", "L;4"):
        image.info["transparency"] = color * (85 if rawmode == "L;2" else 17)
    elif isinstance(color, tuple) and rawmode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in color)


def _exif_orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 if there is none that can be parsed."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF data raises nearly anything, and says nothing of the pixels
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns `image`, of any mode, as 8-bit RGB; reduced if it has more than MAX_FULL_SCALE_PIXELS.

    It is converted in strips of rows, so that copies in other modes stay small.
    """
    longest = max(image.size)
    large = image.width * image.height > MAX_FULL_SCALE_PIXELS or longest > MAX_FULL_SCALE_SIDE
    if image.mode == "RGB" and "transparency" not in image.info and not large:
        return image
    factor = max(1, longest // DRAFT_SIZE) if large else 1
    limits = _value_range(image) if _is_deep(image) else None
    rgb = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    if "icc_profile" in image.info:
        rgb.info["icc_profile"] = image.info["icc_profile"]
    rows = max(1, STRIP_PIXELS // image.width // factor) * factor
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        if limits:
            values = np.asarray(strip)
            gray = to_uint8(values, *limits)
            if isinstance(clear := image.info.get("transparency"), int):  # of a PNG
                gray[values == clear] = 255
            strip = Image.fromarray(gray).convert("RGB")
        elif image.has_transparency_data:
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip).convert("RGB")
        else:
            strip = strip.convert("RGB")
        rgb.paste(strip.reduce(factor) if factor > 1 else strip, (0, top // factor))
    return rgb


def _is_deep(image: Image.Image) -> bool:
    """Returns True for grayscale of more than 8 bits."""
    return image.mode.startswith("I;16") or image.mode in ("I", "F")


def _value_range(image: Image.Image) -> tuple[float, float]:
    """Returns the values of a deep grayscale image that become black and white.

    Integers within 16 bits keep their full scale, and floats within 0…1 theirs. For any other range
    no white is agreed on, so the image's own minimum and maximum are used.
    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    is_white_zero = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
    if image.mode.startswith("I;16"):
        white = float(2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1)
        return (white, 0.0) if is_white_zero else (0.0, white)
    low, high = np.inf, -np.inf
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = _finite(np.asarray(image.crop((0, top, image.width, min(top + rows, image.height)))))
        low, high = min(low, float(strip.min())), max(high, float(strip.max()))
    white = 1.0 if image.mode == "F" else 65535.0
    if low >= 0 and high <= white:
        low, high = 0.0, white
    return (high, low) if is_white_zero else (low, high)


def _finite(values: NDArray[np.generic]) -> NDArray[np.float64]:
    return np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)


def to_uint8(values: NDArray[np.generic], low: float, high: float) -> NDArray[np.uint8]:
    """Returns grayscale values scaled so that `low` becomes 0 and `high` 255."""
    return ((_finite(values) - low) * (255 / ((high - low) or 1)) + 0.5).astype(np.uint8)
