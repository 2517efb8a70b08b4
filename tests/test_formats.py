"""What an image file is, how each format is decoded, and what it may cost."""

import gzip
import io
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from imagesearch import images
from imagesearch.images import FORMATS, image_extensions, open_rgb
from imagesearch.locations import local_path, path_from_text, path_to_text, quote_path
from imagesearch.records import ImageFile
from imagesearch.sources.folder import FolderSource
from tests.pictures import Picture, image, read_image
from tests.server import ROOT


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def read(content: bytes) -> np.ndarray:
    picture = read_image(io.BytesIO(content))
    assert picture.mode == "RGB"
    return np.asarray(picture)


# Files and their names


class Report:
    """Keeps what a listing leaves out: the kinds that are skipped, and why something cannot be read."""

    def __init__(self) -> None:
        self.skipped: list[str] = []
        self.unreadable: dict[str, str] = {}

    def count_skipped(self, kind: str) -> None:
        self.skipped.append(kind)

    def count_unreadable(self, name: str, reason: str) -> None:
        self.unreadable[name] = reason


def test_images_are_found_at_any_depth_and_the_rest_is_skipped(tmp_path: Path, picture: Picture) -> None:
    for name in ("a.png", "one/b.JPG", "one/two/three/c.webp", ".hidden.png", ".hidden/d.png"):
        picture(name)
    for name in ("notes.txt", "README", ".gitignore"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "one" / "up").symlink_to("..")
    (tmp_path / "itself.png").symlink_to("itself.png")
    (tmp_path / "nothing.png").symlink_to("missing.png")
    (tmp_path / "linked.png").symlink_to("a.png")
    report = Report()
    paths = [each.file_path for each in FolderSource(str(tmp_path), str(tmp_path)).find_images(report)]
    assert paths == ["./a.png", "./linked.png", "./one/b.JPG", "./one/two/three/c.webp"]
    link = "./one/up (a link to a folder already found)"
    assert sorted(report.skipped) == [link, ".txt", "hidden", "hidden", "not a regular file", "without extension"]
    assert sorted(report.unreadable) == ["./itself.png", "./nothing.png"]


def test_an_image_is_identified_by_the_hash_of_its_path() -> None:
    image_file = ImageFile("/p/images/Bald_Eagle/26897.jpg", "./images/Bald_Eagle/26897.jpg", "Bald_Eagle", 0, 0)
    # printf %s ./images/Bald_Eagle/26897.jpg | sha256sum
    assert image_file.id == "9e0c384358f493648659e69c18a44b8b52d78942c1fd7b57dcf7664041752bc6"


@pytest.mark.parametrize("name", ["caf\udce9", "plain", "ünï", "back\\slash"])
def test_a_folder_has_one_name_however_it_is_given(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / name
    (folder / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder / "deep")
    image((8, 8), 1).save(folder / "x.png")
    for place, given in ((folder, "."), (folder / "deep", ".."), (tmp_path, name), (tmp_path, "link/..")):
        monkeypatch.chdir(place)
        (found,) = FolderSource(given, os.path.realpath(tmp_path)).find_images(Report())
        assert (found.desc, found.file_path) == (path_to_text(name), f"./{path_to_text(name)}/x.png")
        assert local_path(found.file_path, str(tmp_path)) == str(folder / "x.png")
        assert path_from_text(path_to_text(str(folder))) == str(folder)


def test_quoted_paths_are_one_line_that_a_shell_takes() -> None:
    for path in ("plain.jpg", "two words.jpg", "it's.jpg", "i't$\"s.jpg", "new\nline'.jpg", "\udcff\u202e.jpg"):
        assert "\n" not in quote_path(path)
        printed = subprocess.run(["bash", "-c", f"printf %s {quote_path(path)}"], stdout=subprocess.PIPE, check=True)
        assert os.fsdecode(printed.stdout) == path
    assert quote_path("Omas Küche's") == '"Omas Küche\'s"'


def test_a_far_future_mtime_fits_into_an_index(tmp_path: Path) -> None:
    image((8, 8), 1).save(tmp_path / "a.png")
    subprocess.run(["touch", "-d", "2300-01-01", tmp_path / "a.png"], check=True)
    (found,) = FolderSource(str(tmp_path), "/").find_images(Report())
    assert found.mtime == 2**63 - 1


# Formats


def test_every_format_that_pillow_decodes_is_an_image_and_those_it_only_names_are_not() -> None:
    extensions = image_extensions()
    assert extensions >= {".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif", ".ppm"}
    assert extensions >= {".heic", ".mpo"}
    assert not extensions & {".pdf", ".h5", ".grib", ".mpg", ".bufr", ".eps", ".ps", ".wmf", ".emf"}
    assert not {"EPS", "WMF", "PDF", "IPTC", "JPEG2000"} & set(FORMATS)


@pytest.mark.parametrize(
    ("kind", "mode", "size", "options"),
    [
        ("PNG", "RGB", (1, 1), {}),
        ("PNG", "RGB", (1, 20000), {}),
        ("PNG", "L", (20000, 1), {}),
        ("JPEG", "CMYK", (50, 40), {}),
        ("JPEG", "L", (500, 400), {"progressive": True}),
        ("JPEG", "RGB", (50, 40), {"icc_profile": b"no profile at all"}),
        *(("PNG", mode, (50, 40), {}) for mode in ("P", "1", "LA", "RGBA", "I;16")),
        ("GIF", "P", (50, 40), {"interlace": 1}),
        *(("TIFF", mode, (50, 40), {}) for mode in ("I", "F", "YCbCr", "CMYK")),
        ("TIFF", "RGB", (50, 40), {"compression": "tiff_lzw"}),
        *((kind, "RGB", (50, 40), {}) for kind in ("WEBP", "BMP", "TGA", "PPM", "AVIF", "MPO")),
    ],
)
def test_what_pillow_reads_is_read(kind: str, mode: str, size: tuple[int, int], options: dict[str, Any]) -> None:
    picture = image(size, 1)
    picture = picture.convert("L").convert(mode) if mode == "I;16" else picture.convert(mode)
    pixels = read(saved(picture, kind, **options))
    assert max(pixels.shape) > 0 and min(pixels.shape) > 0


def test_a_heic_is_read() -> None:
    upright = image((60, 40), 3)
    stream = io.BytesIO()
    pillow_heif.from_pillow(upright).save(stream, quality=95)
    assert np.abs(read(stream.getvalue()).astype(int) - np.asarray(upright)).mean() < 8


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        b"\xff\xd8\xff\xe0",
        b"\x89PNG\r\n\x1a\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF",
    ]
    + [saved(image((300, 200), 1), kind)[:2000] for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")],
)
def test_what_is_no_whole_image_is_an_error(content: bytes) -> None:
    with pytest.raises((OSError, ValueError, SyntaxError)):
        read(content)


def test_every_exif_orientation_is_turned_upright() -> None:
    upright = np.asarray(image((60, 40), 3))
    turned = np.swapaxes(upright, 0, 1)
    stored = {  # by the side of the picture that the first row and the first column are (Exif 2.32, 4.6.4)
        1: upright,  # top, left
        2: upright[:, ::-1],  # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: turned,  # left, top
        6: turned[::-1],  # right, top
        7: turned[::-1, ::-1],  # right, bottom
        8: turned[:, ::-1],  # left, bottom
    }
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert np.array_equal(read(saved(Image.fromarray(pixels.copy()), "PNG", exif=exif)), upright), orientation


def test_odd_exif_does_not_make_an_image_unreadable() -> None:
    """Orientation 6 beside a tag of an unusual type, which Pillow cannot write again."""
    entries = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), (0x9C9C, 13, 1, b"\0\0\0\0"), (0xC4A5, 0xFFFF, 9, b"????")]
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHL", tag, kind, count) + value for tag, kind, count, value in entries)
    content = saved(image((60, 40), 3), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + directory + b"\0\0\0\0")
    assert read(content).shape == (60, 40, 3)
    random = np.random.default_rng(1)
    start = content.index(b"Exif\0\0") + 6
    for _ in range(200):
        damaged = bytearray(content)
        for place in random.integers(start, start + len(directory) + 8, 4):
            damaged[place] = random.integers(256)
        assert set(read(bytes(damaged)).shape) == {40, 60, 3}


def test_transparency_is_laid_on_white() -> None:
    palette = Image.new("P", (10, 10), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert (read(saved(Image.new("RGBA", (10, 10), (255, 0, 0, 0)), "PNG")) == 255).all()
    assert (read(saved(Image.new("LA", (10, 10), (0, 128)), "PNG")) == 127).all()
    assert (read(saved(palette, "PNG", transparency=0)) == 255).all()
    assert (read(saved(Image.new("RGB", (10, 10), (1, 2, 3)), "PNG", transparency=(1, 2, 3))) == 255).all()


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (12, 12), color) for color in ("red", "blue")]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("PNG", {})):
        pixels = read(saved(frames[0], kind, save_all=True, append_images=frames[1:], **options))
        assert pixels[5, 5].tolist() == [255, 0, 0], kind


def test_large_jpegs_are_decoded_at_reduced_scale_and_small_ones_are_not() -> None:
    sizes = {(895, 600): (895, 600), (896, 600): (448, 300), (4000, 3000): (500, 375), (1, 20000): (1, 455)}
    for size, expected in sizes.items():
        assert read_image(io.BytesIO(saved(image(size, 2), "JPEG"))).size == expected


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "CMYK", "I;16"])
def test_large_images_are_reduced(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = image((700, 500), 5).convert("L" if mode == "I;16" else mode).convert(mode)
    if mode in ("RGBA", "LA"):
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    whole = images.to_rgb(picture)
    monkeypatch.setattr(images, "MAX_FULL_SCALE_PIXELS", 1000)
    monkeypatch.setattr(images, "DRAFT_SIZE", 200)
    difference = np.asarray(images.to_rgb(picture)).astype(int) - np.asarray(whole.reduce(3))
    assert np.abs(difference).max() <= (0 if mode in ("RGB", "L", "I;16") else 3), mode


# Grayscale of other depths

RAMP = np.linspace(0, 1, 256).reshape(16, 16)
EIGHT = np.arange(256).reshape(16, 16)


def gray_tiff(values: np.ndarray, bits: int, photometric: int) -> bytes:
    """A little-endian TIFF of one strip, packed to 12 bits, or in 16, or 32-bit floats."""
    height, width = values.shape
    if bits == 12:
        data = np.packbits(np.unpackbits(values.astype(">u2")[..., None].view(np.uint8), axis=-1)[..., 4:]).tobytes()
    else:
        data = values.astype("<u2" if bits == 16 else "<f4").tobytes()
    tags = {256: (4, width), 257: (4, height), 258: (3, bits), 259: (3, 1), 262: (3, photometric)}
    tags |= {273: (4, 0), 277: (3, 1), 278: (4, height), 279: (4, len(data)), 339: (3, 3 if bits == 32 else 1)}
    offset = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(
        struct.pack("<HHII", tag, kind, 1, offset if tag == 273 else value) for tag, (kind, value) in tags.items()
    )
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0\0\0\0" + data


def test_deep_grayscale_is_scaled_and_not_clipped() -> None:
    sixteen = np.round(RAMP * 65535)
    for content in (
        saved(Image.fromarray(sixteen.astype(np.uint16)), "PNG"),
        saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
        saved(Image.fromarray((sixteen * 40 - 1000).astype(np.float32)), "TIFF"),
        saved(Image.fromarray((sixteen * 1000).astype(np.int32)), "TIFF"),
        gray_tiff(np.round(RAMP * 4095), 12, 1),
        gray_tiff(65535 - sixteen, 16, 0),  # where 0 is white
        gray_tiff(1 - RAMP, 32, 0),
    ):
        assert np.abs(read(content)[..., 0].astype(int) - EIGHT).max() <= 1
    holes = np.full((4, 4), 0.5, np.float32)
    holes[0] = np.nan, np.inf, -np.inf, 1
    assert read(saved(Image.fromarray(holes), "TIFF"))[1, 0].tolist() == [128] * 3


def test_transparent_gray_of_16_bits_becomes_white() -> None:
    sixteen = np.array([[0, 1000, 1001, 30000, 65535]], np.uint16)
    gray = read(saved(Image.fromarray(sixteen), "PNG", transparency=1000))[0, :, 0].tolist()
    assert gray == [0, 255, 4, 117, 255]


# What it may cost


def flat_jpeg(width: int, height: int, progressive: bool) -> bytes:
    """A gray JPEG, made without its pixels: each block has the DC difference 0, then the end of the block."""
    data = bytearray(saved(Image.new("RGB", (16, 16), "gray"), "JPEG", subsampling=2))
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    blocks = -(-width // 16) * -(-height // 16)
    end = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4])
    if progressive:
        data[frame + 1] = 0xC2
        data[end - 3 : end] = b"\0\0\0"  # only the DC coefficients
    content = bytes(-(-blocks * 12 // 8)) if progressive else b"\x28\xa2\x8a\0" * blocks
    return bytes(data[:end]) + content + b"\xff\xd9"


def peak_memory(path: Path, threads: int = 1) -> tuple[str, float]:
    """What comes of decoding a file for CLIP on several threads, and the memory that it takes, in MB."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from concurrent.futures import ThreadPoolExecutor
from PIL import Image
from imagesearch.images import open_rgb
from imagesearch.models.clip import Clip
def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1000
def work(_):
    try:
        with open({str(path)!r}, "rb") as stream, open_rgb(stream) as picture:
            Clip.preprocess(None, picture)
            return picture.size
    except Exception as error:
        return error
Clip.preprocess(None, Image.new("RGB", (300, 300)))
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
with ThreadPoolExecutor({threads}) as pool:
    print(list(pool.map(work, range({threads})))[0])
print(status("VmHWM") - before)
"""
    command = ["sh", "-c", 'ulimit -v 8000000; exec "$@"', "sh", sys.executable, "-c", code]
    outcome, memory = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return outcome, float(memory)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode", "size", "most"),
    [
        ("baseline.jpg", "", (16_384, 12_288), 100),
        ("progressive.jpg", "", (16_384, 12_288), 1300),
        ("a.png", "RGB", (12_000, 8_500), 1300),
        ("a.png", "RGBA", (12_000, 8_500), 1300),
        ("a.png", "I;16", (12_000, 8_500), 1300),
        ("a.tif", "RGB", (12_000, 8_500), 1300),
        ("long.png", "RGB", (1, 65_535), 200),  # which needs no square of its length
        ("long.png", "RGB", (60_000, 30), 200),
    ],
)
def test_decoding_memory_is_bounded(name: str, mode: str, size: tuple[int, int], most: float, tmp_path: Path) -> None:
    """Two large PNGs at once as well: the second waits."""
    path = tmp_path / name
    if name.endswith(".jpg"):
        path.write_bytes(flat_jpeg(*size, progressive=name == "progressive.jpg"))
    else:
        picture = Image.new(mode, size) if mode == "I;16" else Image.new(mode, size, "teal")
        picture.save(path, compress_level=1, compression="tiff_lzw", tiffinfo={274: 6})
        del picture
    outcome, memory = peak_memory(path, threads=2 if mode else 1)
    assert outcome.startswith("(") and memory < most


def test_an_image_that_would_need_too_much_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A HEIC of 61 megapixels is read; here a hundredth of each."""
    monkeypatch.setattr(images, "MAX_DECODING_BYTES", images.MAX_DECODING_BYTES // 100)
    stream = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (950, 633), "teal")).save(stream, quality=20)
    assert read(stream.getvalue()).shape == (633, 950, 3)
    for kind in ("WEBP", "PNG", "TIFF"):
        with pytest.raises(ValueError, match=rf"1100x1000 pixels of {kind} \(1 MP\) are too many"):
            read(saved(Image.new("RGB", (1100, 1000)), kind))


@pytest.mark.slow
def test_files_that_embed_others_or_are_bombs_are_not_decoded(tmp_path: Path) -> None:
    """Pillow goes by the content, whatever the name: icons with a large picture, a gzipped FITS, 786 megapixels."""
    j2k = saved(Image.new("RGB", (4000, 4000)), "JPEG2000")
    icon = b"icns" + struct.pack(">I", 16 + len(j2k)) + b"ic10" + struct.pack(">I", 8 + len(j2k)) + j2k
    cards = [f"{key:8}= {value:>20}".ljust(80) for key, value in (("SIMPLE", "T"), ("BITPIX", 8), ("NAXIS", 0))]
    fits = "".join([*cards, "END".ljust(80)]).ljust(2880).encode() + gzip.compress(bytes(10_000_000))
    bomb = saved(Image.new("1", (65_500, 12_000)), "PNG")
    for content in (icon, fits, bomb):
        (tmp_path / "a.jpg").write_bytes(content)
        outcome, memory = peak_memory(tmp_path / "a.jpg")
        assert ("not an image that Pillow can read" in outcome or "are too many" in outcome) and memory < 100


def test_a_tile_that_is_larger_than_its_tiff_counts() -> None:
    """3 kB by its header, and 388 MB when it is decoded."""
    tags = {256: 16, 257: 16, 258: 8, 259: 5, 262: 1, 277: 1, 322: 16_384, 323: 16_384, 324: 200, 325: 3}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(100)
    with pytest.raises(ValueError, match=r"16x16 pixels of TIFF .* are too many"):
        read(content)


def test_what_is_reserved_is_given_back() -> None:
    content = saved(image((300, 200), 1), "PNG")
    for _ in range(3):
        with open_rgb(io.BytesIO(content)) as picture:
            assert picture.size == (300, 200)
        with pytest.raises(OSError):
            read(content[:2000])
    assert images._decoding_memory._reserved_bytes == 0
