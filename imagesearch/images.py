"""What an image file is, and decoding one to 8-bit RGB."""

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from imagesearch.parallel import MemoryLimit

warnings.filterwarnings("ignore", module="PIL")  # about flaws that do not keep Pillow from reading a file

# The formats that Pillow decodes by itself, the commonest first: it imports the modules of all formats for the others.
# Pillow identifies a file by its content, whatever its name, and would start Ghostscript for a PostScript file named
# .jpg. EPS and WMF are left out, and BLP, ICNS and ICO, which embed files of other formats and sizes, and FITS, which
# is decompressed in Python with 50 bytes a pixel; and JPEG 2000, whose header does not tell the memory of its tiles and
# components.
FORMATS = (
    *("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF"),
    *("CUR", "DCX", "DDS", "DIB", "FLI", "FTEX", "GBR", "IM", "MCIDAS", "MSP", "PCD", "PCX"),
    *("PIXAR", "PSD", "QOI", "SGI", "SPIDER", "SUN", "TGA", "XBM", "XPM", "XVTHUMB"),
)

# JPEGs are decoded at the smallest scale that leaves this many pixels along the longer side: twice the model's 224.
DRAFT_SIZE = 2 * 224

# Images of more pixels, or a longer side, are reduced before they are converted to RGB.
MAX_FULL_SCALE_PIXELS = 1 << 25
MAX_FULL_SCALE_SIDE = 1 << 14

# Pillow's limit is far below the size of JPEGs that are decoded at reduced scale in little memory.
Image.MAX_IMAGE_PIXELS = None
MAX_SIDE = 65_535  # the longest side that a JPEG can have

# At the peak of decoding and converting, measured with Pillow 13. A baseline JPEG is decoded at reduced scale; of a
# progressive one, all coefficients are kept.
BYTES_PER_PIXEL = {"JPEG": 1, "MPO": 1, "HEIF": 20, "WEBP": 17, "AVIF": 17}
PROGRESSIVE_JPEG_BYTES_PER_PIXEL = 6
OTHER_BYTES_PER_PIXEL = 12

# For all images that are decoded at a time: 200 megapixels of a progressive JPEG, 104 of a PNG or TIFF, 62 of a HEIC.
MAX_DECODING_BYTES = 1_250_000_000

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
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags and a value of TIFF 6.0
_TILE_WIDTH, _TILE_LENGTH = 322, 323

_decoding_memory = MemoryLimit(MAX_DECODING_BYTES)


@functools.cache
def image_extensions() -> frozenset[str]:
    """Returns the file extensions of all formats that are read, lowercase with their dot."""
    read = {*FORMATS, *heif_format(), "MPO"}  # MPO is read as JPEG
    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in read)


@functools.cache
def heif_format() -> tuple[str, ...]:
    """Returns the name of the format of HEIC files, after making Pillow read them."""
    import pi_heif  # imported here: it takes longer than decoding a JPEG

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
    longest = max(image.size)
    needed = max(image.width * image.height, _tile_pixels(image)) * _bytes_per_pixel(image)
    if longest > MAX_SIDE or needed > MAX_DECODING_BYTES:
        megapixels = image.width * image.height / 1e6
        raise ValueError(f"{image.width}x{image.height} pixels of {image.format} ({megapixels:.0f} MP) are too many")
    image.draft("RGB", (max(1, image.width * DRAFT_SIZE // longest), max(1, image.height * DRAFT_SIZE // longest)))
    with _decoding_memory.reserve(needed):
        image.load()
        rgb = to_rgb(image)
        transpose = _TRANSPOSE.get(_exif_orientation(image))
        del image
        yield rgb if transpose is None else rgb.transpose(transpose)


def _tile_pixels(image: Image.Image) -> int:
    """Returns the pixels of a TIFF's tile, which may be larger than the image; 0 if it has none."""
    tags = getattr(image, "tag_v2", {})
    return int(tags.get(_TILE_WIDTH, 0)) * int(tags.get(_TILE_LENGTH, 0))


def _bytes_per_pixel(image: Image.Image) -> int:
    if image.info.get("progressive"):
        return PROGRESSIVE_JPEG_BYTES_PER_PIXEL
    return BYTES_PER_PIXEL.get(image.format or "", OTHER_BYTES_PER_PIXEL)


def _exif_orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 if there is none that can be parsed."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF data raises nearly anything, and says nothing of the pixels
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns `image`, of any mode, as 8-bit RGB; reduced if it has more than MAX_FULL_SCALE_PIXELS."""
    profile = image.info.get("icc_profile")
    longest = max(image.size)
    is_large = image.width * image.height > MAX_FULL_SCALE_PIXELS or longest > MAX_FULL_SCALE_SIDE
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _to_grayscale(image)
    if is_large:
        if image.mode in ("1", "P", "PA"):  # Pillow cannot reduce these
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        image = image.reduce(max(1, longest // DRAFT_SIZE))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    if profile:
        rgb.info["icc_profile"] = profile
    return rgb


def _to_grayscale(image: Image.Image) -> Image.Image:
    """Returns grayscale of more than 8 bits as 8-bit grayscale; what a PNG declares transparent becomes white.

    Integers within 16 bits keep their full scale, and floats within 0…1 theirs. For any other range no white is agreed
    on, so the image's own minimum and maximum are used.
    """
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # only a TIFF has them
    if image.mode.startswith("I;16"):
        low, high = 0.0, float(2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1)
    else:
        finite = _finite(values)
        low, high = float(np.min(finite)), float(np.max(finite))
        white = 1.0 if image.mode == "F" else 65535.0
        if low >= 0 and high <= white:
            low, high = 0.0, white
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        low, high = high, low
    # Some rows at a time: as 64-bit floats all of them would take eight times the memory.
    gray = np.concatenate([to_uint8(rows, low, high) for rows in np.array_split(values, values.size // (1 << 22) + 1)])
    if isinstance(clear := image.info.get("transparency"), int):  # only a PNG has it
        gray[values == clear] = 255
    return Image.fromarray(gray)


def _finite(values: NDArray[Any]) -> NDArray[Any]:
    return values if values.dtype.kind in "iu" else np.nan_to_num(values, posinf=0, neginf=0)


def to_uint8(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Returns grayscale values scaled so that `low` becomes 0 and `high` 255."""
    scale = 255 / ((high - low) or 1)
    return ((_finite(values).astype(np.float64) - low) * scale + 0.5).astype(np.uint8)
