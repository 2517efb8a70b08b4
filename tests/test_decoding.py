"""Large photos, crafted files, unusual depths and color profiles. Memory is measured in fresh processes."""

import gzip
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms

from imagesearch import images
from imagesearch.images import open_rgb
from imagesearch.results_page import preview
from tests.server import ROOT

RUN_LIMIT_MB = 1000  # "so that a run stays below 1 GB"
pytestmark = pytest.mark.slow


# Files


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def flat_jpeg(width: int, height: int, kind: str = "baseline", subsampling: int = 2) -> bytes:
    """A gray JPEG, made without its pixels: each block has the DC difference 0, then the end of the block.

    `kind` is baseline, progressive, or scans: baseline with one scan for each component, for which libjpeg keeps
    all coefficients too. `subsampling` is Pillow's: 0 is 4:4:4, 2 is 4:2:0.
    """
    data = bytearray(saved(Image.new("RGB", (16, 16), "gray"), "JPEG", subsampling=subsampling))
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    luma = -(-width // 8) * -(-height // 8)
    mcus = -(-width // 16) * -(-height // 16) if subsampling else luma
    end = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4])
    if kind == "progressive":
        data[frame + 1] = 0xC2
        data[end - 3 : end] = b"\0\0\0"  # only the DC coefficients
        content = bytes(data[scan:end]) + bytes(-(-mcus * (12 if subsampling else 6) // 8))
    elif kind == "scans":
        content = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" + b"\x28\xa2\x8a" * -(-luma // 4)
        for component in (2, 3):
            content += b"\xff\xda\0\x08\x01" + bytes([component]) + b"\x11\0\x3f\0" + bytes(-(-mcus // 2))
    else:
        assert subsampling == 2
        content = bytes(data[scan:end]) + b"\x28\xa2\x8a\0" * mcus
    return bytes(data[:scan]) + content + b"\xff\xd9"


def png(width: int, height: int, bits: int, color: int, rows: list[bytes], trns: bytes | None = None) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
        + (b"" if trns is None else chunk(b"tRNS", trns))
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows), 1))
        + chunk(b"IEND", b"")
    )


def gray_png(bits: int, values: list[int], transparent: int) -> bytes:
    raw = "".join(f"{value:0{bits}b}" for value in values)
    raw += "0" * (-len(raw) % 8)
    row = int(raw, 2).to_bytes(len(raw) // 8, "big")
    return png(len(values), 1, bits, 0, [row], struct.pack(">H", transparent))


def tiff(tags: dict[int, tuple[int, int]], data: bytes) -> bytes:
    """A little-endian TIFF of one strip or tile; `tags` gives type (3 or 4) and value, the offset is filled in."""
    offset = 8 + 2 + 12 * len(tags) + 4
    entries = b""
    for tag, (kind, value) in sorted(tags.items()):
        entries += struct.pack("<HHII", tag, kind, 1, offset if tag in (273, 324) else value)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0\0\0\0" + data


def gray_tiff(values: np.ndarray, bits: int, photometric: int, compressed: bool = False) -> bytes:
    """`values`: of one row or more; packed to 12 bits, or in 16, or 32-bit floats."""
    height, width = values.shape
    if bits == 12:
        first, second = values.astype(np.uint32).reshape(-1, 2).T
        both = first << 12 | second
        data = np.stack([both >> 16, both >> 8 & 255, both & 255], 1).astype(np.uint8).tobytes()
    else:
        data = values.astype("<u2" if bits == 16 else "<f4").tobytes()
    if compressed:
        data = zlib.compress(data)
    tags = {256: (4, width), 257: (4, height), 258: (3, bits), 259: (3, 8 if compressed else 1), 262: (3, photometric)}
    tags |= {273: (4, 0), 277: (3, 1), 278: (4, height), 279: (4, len(data)), 339: (3, 3 if bits == 32 else 1)}
    return tiff(tags, data)


def read(content: bytes) -> np.ndarray:
    with open_rgb(io.BytesIO(content)) as picture:
        assert picture.mode == "RGB"
        return np.asarray(picture).copy()


def measure(path: Path, preprocess: bool = False) -> tuple[str, float, float]:
    """The outcome, the additional peak memory in MB, and the seconds of reading a file in a fresh process."""
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from PIL import Image
from imagesearch.images import open_rgb
from imagesearch.clip import Clip
def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
Clip.preprocess(None, Image.new("RGB", (300, 300)))
open("/proc/self/clear_refs", "w").write("5")
before, started = status("VmRSS"), time.monotonic()
try:
    with open({str(path)!r}, "rb") as stream, open_rgb(stream) as picture:
        if {preprocess}:
            Clip.preprocess(None, picture)
        outcome = "x".join(map(str, picture.size))
except Exception as error:
    outcome = f"{{type(error).__name__}}: {{error}}"
print(outcome)
print((status("VmHWM") - before) / 1000, time.monotonic() - started)
"""
    command = ["sh", "-c", 'ulimit -v 4000000; exec "$@"', "sh", sys.executable, "-c", code]
    output = subprocess.run(command, stdout=subprocess.PIPE, timeout=60, check=True).stdout
    outcome, numbers = output.decode().strip().rsplit("\n", 1)
    memory, seconds = map(float, numbers.split())
    return outcome, memory, seconds


# Ordinary large photos are refused


def test_a_jpeg_of_200_megapixels_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(flat_jpeg(16384, 12288))
    outcome, memory, _ = measure(tmp_path / "a.jpg")
    assert outcome == "2048x1536"
    assert memory < 100


def test_a_progressive_jpeg_of_108_megapixels_is_read(tmp_path: Path) -> None:
    """Its coefficients take 2 bytes each, and with 4:2:0 there are 1.5 of them a pixel, not 3: 332 MB."""
    (tmp_path / "a.jpg").write_bytes(flat_jpeg(12000, 9000, "progressive"))
    assert measure(tmp_path / "a.jpg")[0] == "1500x1125"


def test_the_size_in_the_refusal_is_the_files_own() -> None:
    with pytest.raises(ValueError, match="15000x11000 pixels"):
        read(flat_jpeg(15000, 11000, "progressive", subsampling=0))


@pytest.fixture
def a_16th(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 16th of the memory limit, for images with a 16th of the pixels: to make the large ones takes long."""
    monkeypatch.setattr(images, "MAX_DECODING_BYTES", images.MAX_DECODING_BYTES // 16)


def test_a_heif_of_61_megapixels_is_read(a_16th: None) -> None:
    """Sony's 9504x6336, 4:2:0 like nearly all: 7 bytes a pixel with 8 bits, 7.7 with 10."""
    stream = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (9504 // 4, 6336 // 4), "teal")).save(
        stream, quality=20, enc_params={"preset": "ultrafast"}
    )
    with open_rgb(io.BytesIO(stream.getvalue())) as picture:
        assert max(picture.size) >= 448


@pytest.mark.parametrize("size", [(6250, 4160), (7003, 5005), (9999, 7777), (12001, 9001)])
def test_a_large_jpeg_2000_is_decoded_at_reduced_scale(size: tuple[int, int], a_16th: None) -> None:
    """Of 26 megapixels, which fit, to 108; Pillow rounds the reduced size otherwise than OpenJPEG."""
    small = size[0] // 4, size[1] // 4
    picture = Image.new("RGB", small, "teal")
    picture.paste("orange", (small[0] // 2, 0, *small))
    reduced = read(saved(picture, "JPEG2000")).astype(int)
    height, width, _ = reduced.shape
    assert 448 <= width <= small[0] and (width == small[0]) == (size == (6250, 4160))
    assert abs(width / height - small[0] / small[1]) < 0.01
    assert np.abs(reduced[:, -1] - (255, 165, 0)).max() <= 3
    assert np.abs(reduced[:, 0] - (0, 128, 128)).max() <= 3


def test_a_jpeg_2000_of_32_megapixels_takes_little_memory(tmp_path: Path) -> None:
    Image.new("RGB", (6500, 5000), "teal").save(tmp_path / "a.jp2")
    outcome, memory, _ = measure(tmp_path / "a.jp2")
    assert outcome == "3250x2500"
    assert memory < 600


def test_a_grayscale_jpeg_2000_needs_a_third() -> None:
    """6 bytes a pixel, not 20: 40 megapixels are read."""
    assert read(saved(Image.new("L", (8000, 5000), 100), "JPEG2000"))[0, 0].tolist() == [100] * 3


# Small crafted files exhaust memory


@pytest.mark.parametrize("size", [(5_000_000, 1), (1, 1_000_000), (1, 65_535)])
def test_a_long_narrow_png_takes_little_time_and_memory(size: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(*size, 8, 2, [bytes(size[0] * 3)] * size[1]))
    _, memory, seconds = measure(tmp_path / "a.png", preprocess=True)
    assert memory < 300
    assert seconds < 5


def test_strips_of_a_wide_image_are_small(tmp_path: Path) -> None:
    """7,000,000x25 pixels of a palette with transparency: one byte a pixel, but 12 as each strip is laid on white."""
    row = bytes(7_000_000)
    plte = struct.pack(">I", 3) + b"PLTE" + bytes(3) + struct.pack(">I", zlib.crc32(b"PLTE" + bytes(3)))
    content = png(len(row), 25, 8, 3, [row] * 25, b"\x80")
    at = content.index(b"tRNS") - 4
    (tmp_path / "a.png").write_bytes(content[:at] + plte + content[at:])
    _, memory, _ = measure(tmp_path / "a.png")
    assert memory < RUN_LIMIT_MB


def test_an_icon_that_embeds_a_large_jpeg_2000_is_not_decoded(tmp_path: Path) -> None:
    j2k = saved(Image.new("RGB", (4000, 4000)), "JPEG2000")
    content = b"icns" + struct.pack(">I", 16 + len(j2k)) + b"ic10" + struct.pack(">I", 8 + len(j2k)) + j2k
    assert len(content) < 1000
    (tmp_path / "a.jpg").write_bytes(content)  # Pillow goes by the content
    assert measure(tmp_path / "a.jpg")[1] < 100


def test_an_icon_that_embeds_a_large_png_is_not_decoded(tmp_path: Path) -> None:
    content = png(12_000, 12_000, 8, 6, [bytes(48_000)] * 12_000)
    content = b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 32, 32, 0, 0, 1, 32, len(content), 22) + content
    (tmp_path / "a.jpg").write_bytes(content)
    assert measure(tmp_path / "a.jpg")[1] < 500


def test_a_texture_that_embeds_a_large_jpeg_is_not_decoded(tmp_path: Path) -> None:
    jpeg = flat_jpeg(12_000, 12_000)
    head = b"BLP1" + struct.pack("<iIIIii", 0, 0, 32, 32, 5, 0)
    head += struct.pack("<16I", 28 + 128 + 4 + 2, *[0] * 15) + struct.pack("<16I", len(jpeg) - 2, *[0] * 15)
    (tmp_path / "a.jpg").write_bytes(head + struct.pack("<I", 2) + jpeg)
    assert measure(tmp_path / "a.jpg")[1] < 600


def test_the_strip_of_a_compressed_tiff_is_counted(tmp_path: Path) -> None:
    """96 megapixels of RGBA, 16 bits a sample, in one strip: 4 bytes a pixel for the image, 8 for the strip."""
    data = zlib.compress(bytes(12_000 * 8_000 * 8), 1)
    tags = {256: (4, 12_000), 257: (4, 8_000), 258: (3, 16), 259: (3, 8), 262: (3, 2), 273: (4, 0), 277: (3, 4)}
    tags |= {278: (4, 8_000), 279: (4, len(data)), 338: (3, 2)}
    (tmp_path / "a.tif").write_bytes(tiff(tags, data))
    outcome, memory, _ = measure(tmp_path / "a.tif")
    assert "MB to decode" in outcome
    assert memory < 600


def test_the_tile_of_a_compressed_tiff_is_counted(tmp_path: Path) -> None:
    """An image of 64x64 in a tile of 30,000x30,000: a file of 4 MB that needs 900 MB."""
    data = zlib.compress(bytes(30_000 * 30_000), 1)
    tags = {256: (4, 64), 257: (4, 64), 258: (3, 8), 259: (3, 8), 262: (3, 1), 277: (3, 1)}
    tags |= {322: (4, 30_000), 323: (4, 30_000), 324: (4, 0), 325: (4, len(data))}
    (tmp_path / "a.tif").write_bytes(tiff(tags, data))
    assert measure(tmp_path / "a.tif")[1] < 600


def test_a_tiff_that_is_turned_is_counted_twice(tmp_path: Path) -> None:
    """Pillow turns a TIFF itself as it loads it: 4 bytes a pixel for the image, and 4 for the turned one."""
    Image.new("RGB", (12_000, 10_000), "teal").save(tmp_path / "a.tif", tiffinfo={274: 6})
    assert measure(tmp_path / "a.tif")[1] < 600


def test_the_coefficients_of_a_jpeg_of_several_scans_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(flat_jpeg(15000, 11000, "scans", subsampling=0))
    outcome, memory, _ = measure(tmp_path / "a.jpg")
    assert "MB to decode" in outcome
    assert memory < 100


def test_a_gzipped_fits_is_not_decompressed_in_python(tmp_path: Path) -> None:
    def card(key: str, value: object) -> bytes:
        return f"{key:8}= {value:>20}".ljust(80).encode()

    side = 5000  # 15 bytes a pixel: 375 MB, from 0.1 MB; the estimate is 125
    head = (card("SIMPLE", "T") + card("BITPIX", 8) + card("NAXIS", 0) + b"END".ljust(80)).ljust(2880)
    head += b"XTENSION= 'BINTABLE'".ljust(80) + card("BITPIX", 8) + card("NAXIS", 2)
    head += card("NAXIS1", 0) + card("NAXIS2", 0) + b"ZIMAGE  = T".ljust(80) + b"ZCMPTYPE= 'GZIP_1  '".ljust(80)
    head += card("ZBITPIX", 8) + card("ZNAXIS", 2) + card("ZNAXIS1", side) + card("ZNAXIS2", side) + b"END".ljust(80)
    (tmp_path / "a.fits").write_bytes(head.ljust(-(-len(head) // 2880) * 2880) + gzip.compress(bytes(side * side * 4)))
    assert measure(tmp_path / "a.fits")[1] < 150


# Grayscale of other depths

RAMP = np.linspace(0, 1, 256).reshape(16, 16)
EIGHT = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_tiff_of_12_bits_is_as_bright_as_one_of_16(compressed: bool) -> None:
    gray = read(gray_tiff(np.round(RAMP * 4095), 12, 1, compressed))[..., 0]
    assert np.abs(gray.astype(int) - EIGHT).max() <= 1


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("bits", [16, 32])
def test_a_tiff_where_0_is_white_is_no_negative(bits: int, compressed: bool) -> None:
    values = RAMP if bits == 32 else np.round(RAMP * 65535)
    gray = read(gray_tiff(values, bits, 0, compressed))[..., 0]
    assert np.abs(gray.astype(int) - (255 - EIGHT)).max() <= 1


@pytest.mark.parametrize("transparent", [0, 1000])
def test_transparent_gray_of_16_bits_becomes_white(transparent: int) -> None:
    values = [0, 1000, 1001, 30000, 65535]
    gray = read(gray_png(16, values, transparent))[0, :, 0].tolist()
    assert gray == [255 if value == transparent else round(value / 257) for value in values]


@pytest.mark.parametrize("bits", [2, 4])
def test_transparent_gray_of_2_and_4_bits_becomes_white(bits: int) -> None:
    values = list(range(1 << bits))
    for transparent in values:
        gray = read(gray_png(bits, values, transparent))[0, :, 0].tolist()
        step = 255 // values[-1]
        assert gray == [255 if value == transparent else value * step for value in values], transparent


def test_a_transparent_color_of_16_bits_becomes_white() -> None:
    row = struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0x2000, 0x4000, 0x6000)
    pixels = read(png(2, 1, 16, 2, [row], row[:6]))
    assert pixels[0].tolist() == [[255, 255, 255], [0x20, 0x40, 0x60]]


# Thumbnails


def display_p3() -> bytes:
    """LittleCMS's sRGB profile with the colorants of Display P3, adapted to D50; the transfer curve is the same."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    colorants = {
        b"rXYZ": (0.5151, 0.2412, -0.0011),
        b"gXYZ": (0.2920, 0.6922, 0.0419),
        b"bXYZ": (0.1571, 0.0666, 0.7841),
    }
    for n in range(int.from_bytes(profile[128:132])):
        tag, offset, _ = struct.unpack_from(">4sII", profile, 132 + 12 * n)
        if tag in colorants:
            struct.pack_into(">3i", profile, offset + 8, *(round(value * 65536) for value in colorants[tag]))
    return bytes(profile)


def lab(picture: Image.Image) -> np.ndarray:
    """The colors that a viewer shows, which takes an image without a profile as sRGB."""
    profile = picture.info.get("icc_profile")
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile("sRGB")
    target = ImageCms.createProfile("LAB")
    transform = ImageCms.buildTransform(source, target, "RGB", "LAB", ImageCms.Intent.RELATIVE_COLORIMETRIC)
    encoded = np.asarray(ImageCms.applyTransform(picture.convert("RGB"), transform)).astype(float)
    encoded[..., 1:] = (encoded[..., 1:] + 128) % 256 - 128
    return encoded


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P")])
def test_the_colors_of_a_thumbnail_are_those_of_the_file(kind: str, mode: str) -> None:
    picture = Image.new("RGB", (400, 300), (190, 80, 70))  # within sRGB
    if mode != "RGB":
        picture = picture.convert(mode, palette=Image.Palette.ADAPTIVE)
    content = saved(picture, kind, icc_profile=display_p3())
    with Image.open(io.BytesIO(preview(io.BytesIO(content)))) as small, Image.open(io.BytesIO(content)) as original:
        difference = lab(small)[100, 100] - lab(original)[100, 100]
    assert np.linalg.norm(difference) < 4
