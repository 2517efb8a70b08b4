"""Which files are images, and how they are read."""

import io
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagesearch.files import File, clean, extensions, local_path, read, shown, walk
from tests.conftest import Picture, image


def found(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """The images below `folder`, what was passed over and what could not be looked at, as relative paths."""
    passed: list[str] = []
    unreadable: list[str] = []
    files = [file.path for file in walk(str(folder), passed.append, lambda path, reason: unreadable.append(path))]
    first, second, third = (
        sorted(os.path.relpath(path, folder) for path in paths) for paths in (files, passed, unreadable)
    )
    return first, second, third


def test_walk_takes_images_at_any_depth_and_passes_over_the_rest(tmp_path: Path, picture: Picture) -> None:
    for name in ("a.png", "one/b.JPG", "one/two/three/c.webp", ".hidden.png", ".hidden/d.png"):
        picture(name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "one" / "up").symlink_to("..")
    (tmp_path / "itself.png").symlink_to("itself.png")
    (tmp_path / "nothing.png").symlink_to("missing.png")
    (tmp_path / "linked.png").symlink_to("a.png")

    images, passed, unreadable = found(tmp_path)
    assert images == ["a.png", "linked.png", "one/b.JPG", "one/two/three/c.webp"]
    assert passed == [".hidden", ".hidden.png", "itself.png", "notes.txt", "one/up", "pipe.jpg"]
    assert unreadable == ["nothing.png"]


def test_every_format_that_pillow_decodes_is_an_image_and_those_it_only_names_are_not() -> None:
    assert extensions() >= {".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif", ".jp2", ".ppm"}
    assert not extensions() & {".pdf", ".h5", ".grib", ".mpg", ".bufr"}


def test_a_file_is_known_by_the_hash_of_its_path_and_classed_by_its_folder() -> None:
    file = File("./images/Bald_Eagle/26897.jpg", 0, 0)
    # printf %s ./images/Bald_Eagle/26897.jpg | sha256sum
    assert file.id == "9e0c384358f493648659e69c18a44b8b52d78942c1fd7b57dcf7664041752bc6"
    assert file.desc == "Bald_Eagle"


@pytest.mark.parametrize("given", ["images", "images/", "./images", "./images//", "images/../images"])
def test_a_folder_has_one_name_however_it_is_given(given: str) -> None:
    assert clean(given) == "./images"


def test_folders_elsewhere_keep_their_way_there() -> None:
    assert [clean(folder) for folder in (".", "../photos/", "/srv/photos/")] == [".", "../photos", "/srv/photos"]


def test_a_name_that_is_no_utf8_has_a_text_and_a_way_back(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9.png")
    image((8, 8), 1).save(path)
    file = File(path, 0, 0)
    assert file.file_path.endswith("/caf\\xe9.png")
    assert local_path(file.file_path) == path


def test_shown_paths_are_one_line_that_a_shell_takes() -> None:
    for path in ("plain.jpg", "two words.jpg", "it's.jpg", "new\nline'.jpg", "\udcff\u202e.jpg"):
        assert "\n" not in shown(path)
        printed = subprocess.run(["bash", "-c", f"printf %s {shown(path)}"], stdout=subprocess.PIPE, check=True)
        assert os.fsdecode(printed.stdout) == path


def reread(picture: Image.Image, kind: str, **options: object) -> np.ndarray:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    stream.seek(0)
    result = read(stream)
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


def test_deep_greyscale_is_scaled_and_not_clipped() -> None:
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
    sizes = {(895, 600): (895, 600), (896, 600): (448, 300), (4000, 3000): (500, 375), (1, 20000): (1, 20000)}
    for size, expected in sizes.items():
        stream = io.BytesIO()
        image(size, 2).save(stream, "JPEG")
        assert read(stream).size == expected
