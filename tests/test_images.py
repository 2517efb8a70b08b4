"""Which files are images, what they are called, and how they are read."""

import io
import os
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from imagesearch.folder import FolderSource
from PIL import Image

from imagesearch import images
from imagesearch.images import FORMATS, image_extensions
from imagesearch.paths import file_path_to_local, normalize_folder, path_from_text, path_to_text, quote_path
from imagesearch.records import ImageFile
from tests.pictures import Picture, image, read_image
from tests.server import ROOT


@dataclass
class Notes:
    """A report that keeps what it is told."""

    skipped: list[str]
    unreadable: list[str]

    def count_skipped(self, kind: str) -> None:
        self.skipped.append(kind)

    def count_unreadable(self, path: str, reason: str) -> None:
        self.unreadable.append(path)


def found(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """The images below `folder` and what could not be read, as paths below it, and the kinds of skipped files."""
    notes = Notes([], [])
    images = [image.file_path for image in FolderSource(str(folder), str(folder)).find_images(notes)]
    return sorted(images), sorted(notes.skipped), sorted(notes.unreadable)


def test_images_are_found_at_any_depth_and_the_rest_is_skipped(tmp_path: Path, picture: Picture) -> None:
    for name in ("a.png", "one/b.JPG", "one/two/three/c.webp", ".hidden.png", ".hidden/d.png"):
        picture(name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "README").write_text("no image")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "one" / "up").symlink_to("..")
    (tmp_path / "itself.png").symlink_to("itself.png")
    (tmp_path / "nothing.png").symlink_to("missing.png")
    (tmp_path / "linked.png").symlink_to("a.png")

    paths, skipped, unreadable = found(tmp_path)
    assert paths == ["./a.png", "./linked.png", "./one/b.JPG", "./one/two/three/c.webp"]
    folders = ["link to a folder already found", "link to itself", "not a regular file", "without extension"]
    assert skipped == [".txt", "hidden", "hidden", *folders]
    assert unreadable == ["./nothing.png"]


def test_every_format_that_pillow_decodes_is_an_image_and_those_it_only_names_are_not() -> None:
    extensions = image_extensions()
    assert extensions >= {".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif", ".jp2", ".ppm"}
    assert extensions >= {".heic", ".mpo"}
    assert not extensions & {".pdf", ".h5", ".grib", ".mpg", ".bufr", ".eps", ".ps", ".wmf", ".emf"}


def test_an_image_is_identified_by_the_hash_of_its_path() -> None:
    image_file = ImageFile("/p/images/Bald_Eagle/26897.jpg", "./images/Bald_Eagle/26897.jpg", "Bald_Eagle", 0, 0)
    # printf %s ./images/Bald_Eagle/26897.jpg | sha256sum
    assert image_file.id == "9e0c384358f493648659e69c18a44b8b52d78942c1fd7b57dcf7664041752bc6"


@pytest.mark.parametrize("given", ["images", "images/", "./images", "./images//", "images/../images", "{}/images"])
def test_a_folder_has_one_name_however_it_is_given(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    base = os.path.realpath(tmp_path)
    assert normalize_folder(given.format(tmp_path), base) == "./images"
    monkeypatch.chdir("images")
    assert normalize_folder(".", base) == "./images"
    assert normalize_folder("..", base) == "."
    assert normalize_folder("/srv/photos/", base) == "/srv/photos"


def test_symbolic_links_are_resolved_as_the_shell_does(tmp_path: Path) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "far" / "pics").mkdir()
    (tmp_path / "link").symlink_to("far/away")
    base = os.path.realpath(tmp_path)
    assert normalize_folder(f"{tmp_path}/link/../pics", base) == "./far/pics"


@pytest.mark.parametrize("name", ["caf\udce9", "plain", "ünï", "back\\slash"])
def test_the_class_is_the_name_of_the_folder_however_it_is_given(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name
    (folder / "deep").mkdir(parents=True)
    image((8, 8), 1).save(folder / "x.png")
    for place, given in ((folder, "."), (folder / "deep", ".."), (tmp_path, name)):
        monkeypatch.chdir(place)
        source = FolderSource(given, os.path.realpath(tmp_path))
        (found,) = source.find_images()
        assert (found.desc, found.file_path) == (path_to_text(name), f"./{path_to_text(name)}/x.png")
        assert file_path_to_local(found.file_path, str(tmp_path)) == str(folder / "x.png")


def test_a_name_that_is_not_utf8_has_a_text_and_a_way_back(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9.png")
    image((8, 8), 1).save(path)
    assert path_to_text(path).endswith("/caf\\xe9.png")
    assert path_from_text(path_to_text(path)) == path


def test_quoted_paths_are_one_line_that_a_shell_takes() -> None:
    for path in ("plain.jpg", "two words.jpg", "it's.jpg", "new\nline'.jpg", "\udcff\u202e.jpg"):
        assert "\n" not in quote_path(path)
        printed = subprocess.run(["bash", "-c", f"printf %s {quote_path(path)}"], stdout=subprocess.PIPE, check=True)
        assert os.fsdecode(printed.stdout) == path


def test_a_far_future_mtime_fits_into_an_index(tmp_path: Path) -> None:
    image((8, 8), 1).save(tmp_path / "a.png")
    subprocess.run(["touch", "-d", "2300-01-01", tmp_path / "a.png"], check=True)
    (found,) = FolderSource(str(tmp_path), "/").find_images()
    assert found.mtime == 2**63 - 1


def reread(picture: Image.Image, kind: str, **options: object) -> np.ndarray:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    stream.seek(0)
    result = read_image(stream)
    assert result.mode == "RGB"
    return np.asarray(result)


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
        assert np.array_equal(reread(Image.fromarray(pixels.copy()), "PNG", exif=exif), upright), orientation


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (10, 10), (255, 0, 0, 0))
    half = Image.new("LA", (10, 10), (0, 128))
    palette = Image.new("P", (10, 10), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert (reread(clear, "PNG") == 255).all()
    assert (reread(half, "PNG") == 127).all()
    assert (reread(palette, "PNG", transparency=0) == 255).all()
    assert (reread(Image.new("RGB", (10, 10), (1, 2, 3)), "PNG", transparency=(1, 2, 3)) == 255).all()


def test_deep_grayscale_is_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    eight = np.arange(256).reshape(16, 16)
    assert np.abs(reread(Image.fromarray(ramp), "PNG")[..., 0].astype(int) - eight).max() <= 1
    for floats in (ramp / np.float32(65535), ramp.astype(np.float32) * 40 - 1000):
        assert np.abs(reread(Image.fromarray(floats.astype(np.float32)), "TIFF")[..., 0].astype(int) - eight).max() <= 1
    wide = Image.fromarray(ramp.astype(np.int32) * 1000)
    assert np.abs(reread(wide, "TIFF")[..., 0].astype(int) - eight).max() <= 1


def test_a_float_picture_with_holes_is_read() -> None:
    values = np.full((4, 4), 0.5, np.float32)
    values[0] = np.nan, np.inf, -np.inf, 1
    assert reread(Image.fromarray(values), "TIFF")[1, 0].tolist() == [128] * 3


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (12, 12), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        pixels = reread(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert pixels[5, 5].tolist() == [255, 0, 0], kind


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode: str) -> None:
    kind = {"CMYK": "TIFF", "YCbCr": "TIFF"}.get(mode, "PNG")
    white = Image.new("RGB", (10, 10), "white").convert(mode)
    assert (reread(white, kind) >= 254).all()


def test_large_jpegs_are_decoded_at_reduced_scale_and_small_ones_are_not() -> None:
    sizes = {(895, 600): (895, 600), (896, 600): (448, 300), (4000, 3000): (500, 375), (1, 20000): (1, 455)}
    for size, expected in sizes.items():
        stream = io.BytesIO()
        image(size, 2).save(stream, "JPEG")
        assert read_image(stream).size == expected


def test_an_mpo_and_a_heic_are_read(tmp_path: Path) -> None:
    upright = image((60, 40), 3)
    upright.save(tmp_path / "a.mpo", save_all=True, append_images=[image((60, 40), 4)])
    with (tmp_path / "a.mpo").open("rb") as stream:
        assert read_image(stream).size == (60, 40)
    heif = pillow_heif.from_pillow(upright)
    heif.save(tmp_path / "a.heic", quality=95)
    with (tmp_path / "a.heic").open("rb") as stream:
        difference = np.asarray(read_image(stream)).astype(int) - np.asarray(upright)
    assert np.abs(difference).mean() < 8


def test_postscript_named_jpg_starts_no_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\nsleep 60\n')
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(ValueError, match="not an image that Pillow can read"):
        read_image(io.BytesIO(postscript))
    assert not {"EPS", "WMF", "PDF", "IPTC"} & set(FORMATS)
    assert not (tmp_path / "called").exists()


def test_odd_exif_does_not_make_an_image_unreadable() -> None:
    """Orientation 6 beside a tag of an unusual type, which Pillow cannot write again."""
    entries = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), (0x9C9C, 13, 1, b"\0\0\0\0"), (0xC4A5, 0xFFFF, 9, b"????")]
    directory = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHL", tag, kind, count) + value for tag, kind, count, value in entries
    )
    exif = b"Exif\0\0II*\0\x08\0\0\0" + directory + b"\0\0\0\0"
    stream = io.BytesIO()
    image((60, 40), 3).save(stream, "JPEG", exif=exif)
    assert read_image(stream).size == (40, 60)
    random = np.random.default_rng(1)
    for _ in range(300):
        content = bytearray(stream.getvalue())
        start = content.index(b"Exif\0\0") + 6
        for place in random.integers(start, start + len(directory) + 8, 4):
            content[place] = random.integers(256)
        assert set(read_image(io.BytesIO(bytes(content))).size) == {40, 60}


def peak_memory(path: Path, threads: int) -> float:
    """The peak memory in MB of a process that reads an image on several threads at once."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from concurrent.futures import ThreadPoolExecutor
from imagesearch.images import open_rgb
def read(_):
    with open({str(path)!r}, "rb") as stream, open_rgb(stream) as image:
        return image.size
with ThreadPoolExecutor({threads}) as pool:
    list(pool.map(read, range({threads})))
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""
    return int(subprocess.check_output([sys.executable, "-c", code])) / 1000


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="measures memory with /proc; that leaves the limit of 1 GB untested"
)
@pytest.mark.parametrize(("mode", "name"), [("I;16", "a.png"), ("RGBA", "a.png"), ("RGB", "a.webp")])
def test_memory_stays_below_1_gb_whatever_the_image(mode: str, name: str, tmp_path: Path) -> None:
    size = {"I;16": (13_377, 13_377), "RGBA": (12_200, 12_200), "RGB": (5_300, 5_300)}[mode]  # the largest accepted
    picture = Image.fromarray(np.zeros(size, np.uint16)) if mode == "I;16" else Image.new(mode, size)
    picture.save(tmp_path / name, compress_level=1, lossless=True, method=0)
    del picture
    assert peak_memory(tmp_path / name, threads=2 if mode == "RGBA" else 1) < 1000


def test_an_image_that_would_need_too_much_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_DECODING_BYTES", 60_000_000)
    Image.new("RGB", (2_000, 2_000)).save(tmp_path / "a.webp", lossless=True, method=0, quality=0)
    with (tmp_path / "a.webp").open("rb") as stream, pytest.raises(ValueError, match="2000x2000 pixels of WEBP need"):
        read_image(stream)


def test_large_images_are_reduced_and_conversion_in_strips_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("RGBA", "LA", "L", "P", "CMYK"):
        picture = image((700, 500), 5).convert(mode)
        if mode in ("RGBA", "LA"):
            picture.putalpha(Image.linear_gradient("L").resize(picture.size))
        whole = np.asarray(images.to_rgb(picture))
        monkeypatch.setattr(images, "STRIP_PIXELS", 7000)
        assert np.array_equal(np.asarray(images.to_rgb(picture)), whole), mode
        monkeypatch.setattr(images, "MAX_FULL_SCALE_PIXELS", 1000)
        monkeypatch.setattr(images, "DRAFT_SIZE", 200)
        assert np.array_equal(np.asarray(images.to_rgb(picture)), np.asarray(Image.fromarray(whole).reduce(3))), mode
        monkeypatch.undo()
