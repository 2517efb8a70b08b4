"""From files to embeddings: whatever a file holds, it is embedded or reported; the window is bounded."""

import io
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from imagesearch.embed import Document, Stored, Unreadable, ahead, batched, cores, embed
from imagesearch.files import File, extensions
from imagesearch.models import ModelRecord, Thumbnail
from tests.conftest import image


def one(path: Path) -> Document | Unreadable:
    """What becomes of one file."""
    (result,) = embed([(File(str(path), 0, 0), None)], Thumbnail(), workers=1)
    return result


def embedded(path: Path) -> Document:
    result = one(path)
    assert isinstance(result, Document), result
    assert result.embedding is not None
    assert result.embedding.shape == (768,)
    assert np.isfinite(result.embedding).all()
    return result


def unreadable(path: Path) -> str:
    result = one(path)
    assert isinstance(result, Unreadable), result
    assert "\n" not in result.reason
    return result.reason


GOOD: dict[str, tuple[tuple[int, int], str, dict[str, Any]]] = {
    "one-pixel.png": ((1, 1), "RGB", {}),
    "thin.png": ((1, 20000), "RGB", {}),
    "wide.png": ((20000, 1), "L", {}),
    "thin.jpg": ((1, 20000), "RGB", {}),
    "cmyk.jpg": ((50, 40), "CMYK", {}),
    "palette.png": ((50, 40), "P", {}),
    "bilevel.png": ((50, 40), "1", {}),
    "la.png": ((50, 40), "LA", {}),
    "rgba.webp": ((50, 40), "RGBA", {}),
    "interlaced.gif": ((50, 40), "P", {"interlace": 1}),
    "progressive.jpg": ((500, 400), "L", {"progressive": True}),
    "profile.jpg": ((50, 40), "RGB", {"icc_profile": b"no profile at all"}),
    "deep.png": ((50, 40), "I;16", {}),
    "int.tif": ((50, 40), "I", {}),
    "float.tif": ((50, 40), "F", {}),
    "lzw.tif": ((50, 40), "RGB", {"compression": "tiff_lzw"}),
    "frames.tif": ((50, 40), "RGB", {"save_all": True, "append_images": [Image.new("RGB", (9, 9))]}),
    "a.bmp": ((50, 40), "RGB", {}),
    "a.ico": ((48, 48), "RGBA", {}),
    "a.tga": ((50, 40), "RGB", {}),
    "a.ppm": ((50, 40), "RGB", {}),
    "a.jp2": ((50, 40), "RGB", {}),
    "a.avif": ((50, 40), "RGB", {}),
    "UPPER.JPEG": ((50, 40), "RGB", {}),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_pillow_reads_is_embedded(name: str, tmp_path: Path) -> None:
    size, mode, options = GOOD[name]
    path = tmp_path / name
    picture = image(size, 1)
    (picture.convert("L").convert(mode) if mode == "I;16" else picture.convert(mode)).save(path, **options)
    assert path.suffix.lower() in extensions()
    embedded(path)


def test_pa_is_embedded(tmp_path: Path) -> None:
    picture = image((50, 40), 1).convert("P")
    picture.info["transparency"] = bytes([0, 128] * 128)
    picture.save(tmp_path / "pa.png", transparency=picture.info["transparency"])
    embedded(tmp_path / "pa.png")


def test_a_png_named_jpg_is_embedded(tmp_path: Path) -> None:
    image((50, 40), 1).save(tmp_path / "real.png")
    (tmp_path / "real.png").rename(tmp_path / "a.jpg")
    embedded(tmp_path / "a.jpg")


def test_what_is_no_image_is_reported(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    for content in (b"", b"text", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"):
        bad.write_bytes(content)
        unreadable(bad)
    assert unreadable(tmp_path / "missing.jpg") == "No such file or directory"
    assert unreadable(tmp_path) == "not a regular file"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_truncated_image_is_reported(kind: str, tmp_path: Path) -> None:
    stream = io.BytesIO()
    image((300, 200), 1).save(stream, kind)
    path = tmp_path / "cut"
    path.write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    unreadable(path)


def test_a_decompression_bomb_is_reported_and_what_pillow_allows_is_not(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert "decompression bomb" in unreadable(tmp_path / "bomb.png")
    Image.new("L", (13_000, 13_000), 77).save(tmp_path / "large.png")  # Pillow's limit is 13,377 squared
    embedded(tmp_path / "large.png")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    started = time.monotonic()
    assert unreadable(tmp_path / "pipe.jpg") == "not a regular file"
    assert time.monotonic() - started < 1


class Odd:
    """A model that gives what no model should."""

    record = ModelRecord("odd")

    def __init__(self, value: float) -> None:
        self.value = value

    def pixels(self, picture: Image.Image) -> np.ndarray:
        return np.asarray(picture)

    def embed(self, batch: list[np.ndarray]) -> np.ndarray:
        embeddings = np.ones((len(batch), 768), np.float32)
        embeddings[1] = self.value
        return embeddings


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_an_embedding_that_cannot_be_compared_is_reported(value: float, tmp_path: Path) -> None:
    for number in range(3):
        image((9, 9), number).save(tmp_path / f"{number}.png")
    files = [(File(str(tmp_path / f"{number}.png"), 0, 0), None) for number in range(3)]
    kinds = [type(result) for result in embed(files, Odd(value), workers=1)]
    assert kinds == [Document, Unreadable, Document]


def test_the_same_content_is_not_embedded_again(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    image((20, 20), 1).save(path)
    first = embedded(path)
    stored = Stored(1, 1, first.sha256)
    (second,) = embed([(File(str(path), 1, 1), stored)], Thumbnail(), workers=1)
    assert isinstance(second, Document)
    assert second.embedding is None
    assert (second.file.size, second.file.mtime) == (path.stat().st_size, path.stat().st_mtime_ns)


def test_the_order_is_kept_and_the_window_is_bounded() -> None:
    running, most, lock = 0, 0, threading.Lock()
    pulled = 0

    def items() -> Iterator[int]:
        nonlocal pulled
        for number in range(200):
            pulled += 1
            yield number

    def slow(number: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.001 * (number % 3))
        with lock:
            running -= 1
        return number * number

    with ThreadPoolExecutor(4) as pool:
        results = ahead(pool, slow, items(), window=10)
        for number in range(200):
            assert next(results) == number * number
            assert pulled <= number + 11
    assert 1 < most <= 4


def test_a_reader_that_stops_early_cancels_the_rest() -> None:
    done: list[int] = []

    def slow(number: int) -> None:
        time.sleep(0.01)
        done.append(number)

    with ThreadPoolExecutor(1) as pool:
        results = ahead(pool, slow, range(1000), window=50)
        next(results)
        results.close()  # type: ignore[attr-defined]
    assert len(done) < 10


def test_batches_are_full_but_for_the_last() -> None:
    assert [len(batch) for batch in batched(range(10), 4)] == [4, 4, 2]


V1 = {"/proc/self/cgroup": "5:memory:/user\n4:cpu,cpuacct:/user/app\n"}
V2 = {"/proc/self/cgroup": "0::/user/app\n"}
ROOT_V1, ROOT_V2 = "/sys/fs/cgroup/cpu/", "/sys/fs/cgroup/"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 6),
        (V2, 6),
        (V2 | {ROOT_V2 + "user/app/cpu.max": "max 100000\n"}, 6),
        (V2 | {ROOT_V2 + "user/app/cpu.max": "250000 100000\n"}, 2),
        (V2 | {ROOT_V2 + "user/app/cpu.max": "max 100000\n", ROOT_V2 + "user/cpu.max": "50000 100000\n"}, 1),
        (V2 | {ROOT_V2 + "cpu.max": "900000 100000\n"}, 6),
        (V1 | {ROOT_V1 + "user/app/cpu.cfs_quota_us": "-1\n", ROOT_V1 + "user/app/cpu.cfs_period_us": "100000\n"}, 6),
        (V1 | {ROOT_V1 + "cpu.cfs_quota_us": "300000\n", ROOT_V1 + "cpu.cfs_period_us": "100000\n"}, 3),
        (V1 | {ROOT_V1 + "user/cpu.cfs_quota_us": "50000\n", ROOT_V1 + "user/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_cores_are_those_that_this_process_may_use(
    files: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError
        return files[str(path)]

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert cores() == expected


def seeds() -> list[bytes]:
    """Small whole files to be mutated."""
    contents = []
    for number, kind in enumerate(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"]):
        exif = Image.Exif()
        exif[0x0112] = number + 1
        stream = io.BytesIO()
        extra: dict[str, Any] = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}
        image((40, 30), number).save(stream, kind, **extra)
        contents.append(stream.getvalue())
    return contents


@settings(max_examples=400, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.sampled_from(seeds()),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=8),
    cut=st.floats(0.1, 1),
)
def test_mutated_images_load_or_are_reported(
    seed: bytes, flips: list[tuple[float, int]], cut: float, tmp_path: Path
) -> None:
    content = bytearray(seed)
    for place, mask in flips:
        content[int(place * len(content))] ^= mask
    path = tmp_path / "mutated"
    path.write_bytes(content[: int(cut * len(content))])
    result = one(path)
    if isinstance(result, Document):
        assert result.embedding is not None
        assert np.isfinite(result.embedding).all()
    else:
        assert result.reason
        assert "\n" not in result.reason
