"""What an image file is, and decoding one to 8-bit RGB."""

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import pi_heif
from numpy.typing import NDArray
from PIL import Image

from imagesearch.parallel import MemoryLimit

pi_heif.register_heif_opener()
warnings.filterwarnings("ignore", module="PIL")  # about flaws that do not keep Pillow from reading a file

# The formats that Pillow decodes by itself. Pillow identifies a file by its content, whatever its name, and would
# start Ghostscript for a PostScript file named .jpg; EPS, WMF and formats that embed others are left out.
FORMATS = (
    *("AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GBR", "GIF", "HEIF", "ICNS", "ICO"),
    *("IM", "JPEG", "JPEG2000", "MCIDAS", "MSP", "PCD", "PCX", "PIXAR", "PNG", "PPM", "PSD", "QOI", "SGI", "SPIDER"),
    *("SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM", "XVTHUMB"),
)

# JPEGs are decoded at the smallest scale that leaves this many pixels along the longer side: twice the model's 224.
DRAFT_SIZE = 2 * 224

# Larger images of other formats are reduced while they are converted to RGB, to the same size at least.
MAX_FULL_SCALE_PIXELS = 1 << 25

# Peak memory of decoding, measured with Pillow 12; for other formats it is that of the decoded image.
DECODING_BYTES_PER_PIXEL = {"JPEG2000": 20, "WEBP": 17, "AVIF": 10, "HEIF": 10, "DDS": 9, "QOI": 8, "SGI": 7}

# For all images that are in use together, so that a run stays below 1 GB: 150 megapixels of RGBA, for example.
MAX_DECODING_BYTES = 600_000_000

STRIP_PIXELS = 1 << 22

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
    """Returns the file extensions of FORMATS, lowercase with their dot."""
    registered = Image.registered_extensions().items()
    return frozenset(extension for extension, name in registered if name in (*FORMATS, "MPO"))  # MPO is read as JPEG


@contextlib.contextmanager
def open_rgb(stream: BinaryIO) -> Iterator[Image.Image]:
    """Yields the image in `stream` as 8-bit RGB, rotated as its EXIF orientation says.

    JPEGs much larger than the model's 224 pixels are decoded at reduced scale, and images of more than
    33 megapixels are reduced. Transparent parts become white, grayscale of more than 8 bits is scaled
    to 8, and an animation gives its first frame.

    Waits while other threads use so many images that the memory would exceed MAX_DECODING_BYTES: it is
    reserved until the block ends. Raises ValueError for an image that needs more than that alone, and
    whatever Pillow raises for a damaged file, most often OSError, SyntaxError or ValueError.
    """
    image = Image.open(stream, formats=FORMATS)
    full_size = image.size
    longest = max(full_size)
    image.draft("RGB", (max(1, image.width * DRAFT_SIZE // longest), max(1, image.height * DRAFT_SIZE // longest)))
    needed = _decoding_bytes(image, full_size)
    if needed > MAX_DECODING_BYTES:
        raise ValueError(
            f"{image.width}x{image.height} pixels of {image.format} need {needed / 1e6:.0f} MB to decode,"
            f" more than the {MAX_DECODING_BYTES / 1e6:.0f} MB allowed"
        )
    with _decoding_memory.reserve(needed):
        image.load()
        rgb = to_rgb(image)
        transpose = _TRANSPOSE.get(_exif_orientation(image))
        del image
        yield rgb if transpose is None else rgb.transpose(transpose)


def _decoding_bytes(image: Image.Image, full_size: tuple[int, int]) -> int:
    """Returns the peak memory of decoding `image` and converting it to RGB, estimated."""
    pixels = image.width * image.height
    bytes_per_pixel = {"1": 1, "L": 1, "P": 1}.get(image.mode, 2 if image.mode.startswith("I;16") else 4)
    needed = pixels * DECODING_BYTES_PER_PIXEL.get(image.format or "", bytes_per_pixel)
    if image.info.get("progressive"):  # all coefficients are kept, whatever the scale
        needed += full_size[0] * full_size[1] * 2 * len(image.getbands())
    return needed + (4 * pixels if pixels <= MAX_FULL_SCALE_PIXELS else 0)


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
    pixels = image.width * image.height
    if image.mode == "RGB" and "transparency" not in image.info and pixels <= MAX_FULL_SCALE_PIXELS:
        return image
    factor = 1 if pixels <= MAX_FULL_SCALE_PIXELS else max(1, max(image.size) // DRAFT_SIZE)
    limits = _value_range(image) if _is_deep(image) else None
    rgb = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    rows = max(1, STRIP_PIXELS // image.width // factor) * factor
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        if limits:
            strip = Image.fromarray(to_uint8(np.asarray(strip), *limits)).convert("RGB")
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
    if image.mode.startswith("I;16"):
        return 0.0, 65535.0
    low, high = np.inf, -np.inf
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = _finite(np.asarray(image.crop((0, top, image.width, min(top + rows, image.height)))))
        low, high = min(low, float(strip.min())), max(high, float(strip.max()))
    white = 1.0 if image.mode == "F" else 65535.0
    return (0.0, white) if low >= 0 and high <= white else (low, high)


def _finite(values: NDArray[np.generic]) -> NDArray[np.float64]:
    return np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)


def to_uint8(values: NDArray[np.generic], low: float, high: float) -> NDArray[np.uint8]:
    """Returns grayscale values scaled so that `low` becomes 0 and `high` 255."""
    return ((_finite(values) - low) * (255 / ((high - low) or 1)) + 0.5).astype(np.uint8)
