"""How much memory Pillow needs to decode an image, so that no file exhausts it."""

import os
from typing import BinaryIO

from PIL import ImageFile

# Images of more pixels are reduced while they are converted to RGB (images.py).
MAX_FULL_SCALE_PIXELS = 1 << 25

# Bytes a pixel at the peak of decoding, measured with Pillow 13; for other formats it is that of the decoded image.
BYTES_PER_PIXEL = {"WEBP": 17, "AVIF": 15, "DDS": 9, "QOI": 8, "SGI": 7, "XPM": 4}
BYTES_PER_PIXEL |= {"BMP": 4, "DIB": 4, "CUR": 4}  # run-length encoded

# Tags and values of TIFF 6.0
BITS_PER_SAMPLE, PHOTOMETRIC, _ORIENTATION, _SAMPLES, _ROWS_PER_STRIP = 258, 262, 274, 277, 278
_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 322, 323
WHITE_IS_ZERO, _YCBCR = 0, 6


def decoding_bytes(
    image: ImageFile.ImageFile, size: tuple[int, int], full_size: tuple[int, int], stream: BinaryIO
) -> int:
    """Returns the peak memory of decoding `image` at `size` and converting it to RGB, estimated."""
    pixels = size[0] * size[1]
    bands = len(image.getbands())
    bytes_per_pixel = {"1": 1, "L": 1, "P": 1}.get(image.mode, 2 if image.mode.startswith("I;16") else 4)
    needed = pixels * BYTES_PER_PIXEL.get(image.format or "", bytes_per_pixel)
    if image.format in ("JPEG", "MPO"):
        if image.info.get("progressive") or not _is_one_scan(stream, bands):  # all coefficients are kept
            layers = image.layer  # type: ignore[attr-defined]  # (id, horizontal and vertical sampling, table)
            across, down = (max(layer[n] for layer in layers) for n in (1, 2))
            samples = sum(layer[1] * layer[2] for layer in layers)  # 1.5 a pixel for 4:2:0
            needed += full_size[0] * full_size[1] * 2 * samples // (across * down)
    elif image.format == "HEIF" and "A" in image.mode:
        needed = pixels * 21
    elif image.format == "HEIF":  # 4:2:0, or gray, which has no chroma
        needed = pixels * (8 if image.info.get("chroma", 420) == 420 else 16)
    elif image.format == "JPEG2000":
        needed = pixels * (5 * bands + bytes_per_pixel + 1)
        if pixels < full_size[0] * full_size[1]:
            needed += full_size[0] * full_size[1] // 2 + 2 * stream.seek(0, os.SEEK_END)
    elif image.format == "TIFF":
        needed += _tiff_bytes(image, bytes_per_pixel)
    # The decoder's own memory is free again when the image, if it is not reduced, is converted to RGB.
    return max(needed, pixels * (bytes_per_pixel + 4) if pixels <= MAX_FULL_SCALE_PIXELS else 0)


def _is_one_scan(stream: BinaryIO, components: int) -> bool:
    """Returns True if the first scan of a JPEG holds all its components."""
    stream.seek(2)
    while len(marker := stream.read(2)) == 2 and marker[0] == 0xFF:
        length = int.from_bytes(stream.read(2))
        if marker[1] == 0xDA:
            return stream.read(1) == bytes([components])
        stream.seek(max(0, length - 2), os.SEEK_CUR)
    return False


def _tiff_bytes(image: ImageFile.ImageFile, bytes_per_pixel: int) -> int:
    """Returns the memory that a TIFF needs beside the image: for a strip or tile, and for turning the image."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    needed = image.width * image.height * bytes_per_pixel if tags.get(_ORIENTATION, 1) != 1 else 0
    if image.tile and image.tile[0].codec_name == "libtiff":  # compressed: each strip or tile is decoded as a whole
        width, rows = tags[_WIDTH], min(tags[_HEIGHT], tags.get(_ROWS_PER_STRIP, tags[_HEIGHT]))
        if _TILE_WIDTH in tags:
            width, rows = tags[_TILE_WIDTH], tags[_TILE_HEIGHT]  # beyond the image's edges, too
        bits = max(tags.get(BITS_PER_SAMPLE, (1,))) * tags.get(_SAMPLES, 1)
        needed += width * rows * max(bits, 32 if tags.get(PHOTOMETRIC) == _YCBCR else 0) // 8  # YCbCr becomes RGBA
    return needed


def jpeg2000_levels(stream: BinaryIO) -> int:
    """Returns how often the size of a JPEG 2000 image can be halved as it is decoded."""
    stream.seek(0)
    header = stream.read(1 << 16)
    start = at = header.find(b"\xff\x4f\xff\x51") + 2  # the markers SOC and SIZ
    while header[at : at + 2] not in (b"", b"\xff\x52", b"\xff\x90"):  # COD, or the start of a tile
        at += 2 + int.from_bytes(header[at + 2 : at + 4])
    if start == 1 or header[at : at + 2] != b"\xff\x52" or any(header[start + 14 : start + 22]):
        return 0  # Pillow cannot reduce an image that is not at the origin of its reference grid
    return header[at + 9]
