"""From files to embeddings: every file is embedded, copied or reported; what is under way is bounded."""

import io
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imagesearch.folder import FolderSource, open_file
from imagesearch.interrupt import Interrupt
from imagesearch.queries import embed_queries
from PIL import Image

from imagesearch import embed
from imagesearch.embed import Embedder, embed_images
from imagesearch.errors import ImageSearchError
from imagesearch.images import image_extensions
from imagesearch.models import Model, Thumbnail
from imagesearch.parallel import available_cpus
from imagesearch.records import (
    Candidate,
    Document,
    FileMetadata,
    ImageFile,
    MetadataUpdate,
    ModelInfo,
    Unreadable,
)
from imagesearch.sources import Source, open_query
from tests.pictures import image


def image_file(path: Path) -> ImageFile:
    return ImageFile(str(path), str(path), path.parent.name, 0, 0)


class Known:
    """An index that has some embeddings."""

    def __init__(self, embeddings: dict[str, np.ndarray] | None = None, fails: bool = False) -> None:
        self.embeddings = embeddings or {}
        self.fails = fails
        self.asked: list[int] = []

    def find_embeddings(self, sha256s: Sequence[str]) -> dict[str, np.ndarray]:
        self.asked.append(len(sha256s))
        if self.fails:
            raise ImageSearchError("silent")
        return {sha256: self.embeddings[sha256] for sha256 in sha256s if sha256 in self.embeddings}


class Errors:
    """The reasons for what cannot be read, by path."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def count_skipped(self, kind: str) -> None: ...

    def count_unreadable(self, path: str, reason: str) -> None:
        self.reasons[path] = reason


def embed_all(
    paths: list[Path],
    model: Model | None = None,
    indexed: FileMetadata | None = None,
    index: Known | None = None,
    source: Source | None = None,
) -> tuple[list[Document | MetadataUpdate], dict[str, str]]:
    """The documents of these files, and the reasons for those that cannot be read, by path."""
    errors = Errors()
    candidates = (Candidate(image_file(path), indexed) for path in paths)
    used: Any = index or Known()
    source = source or FolderSource("/", "/")
    documents = embed_images(candidates, source, model or Thumbnail(), used, errors, Interrupt())
    return list(documents), errors.reasons


def embedded(path: Path) -> Document:
    documents, errors = embed_all([path])
    assert errors == {}
    (document,) = documents
    assert isinstance(document, Document)
    assert document.embedding.shape == (768,)
    assert document.embedding.dtype == np.float32
    assert np.isfinite(document.embedding).all()
    return document


def unreadable(path: Path) -> str:
    documents, errors = embed_all([path])
    assert documents == []
    (reason,) = errors.values()
    assert "\n" not in reason
    return reason


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
    assert path.suffix.lower() in image_extensions()
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
    assert unreadable(tmp_path) == "is a folder; give the images in it"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_truncated_image_is_reported(kind: str, tmp_path: Path) -> None:
    stream = io.BytesIO()
    image((300, 200), 1).save(stream, kind)
    path = tmp_path / "cut"
    path.write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    unreadable(path)


@pytest.mark.slow
def test_a_decompression_bomb_is_reported(tmp_path: Path) -> None:
    Image.new("1", (65_500, 12_000)).save(tmp_path / "bomb.png")  # 96 kB
    assert unreadable(tmp_path / "bomb.png").startswith("65500x12000 pixels of PNG need 786 MB to decode, more than")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    started = time.monotonic()
    assert unreadable(tmp_path / "pipe.jpg") == "not a regular file"
    assert time.monotonic() - started < 1


class Counting:
    """The thumbnail model, which counts how many images it embeds, and how many at once."""

    info = ModelInfo("thumbnail")

    def __init__(self, value: float | None = None) -> None:
        self.value = value
        self.embedded = self.running = self.most = 0
        self.lock = threading.Lock()

    def preprocess(self, picture: Image.Image) -> np.ndarray:
        return Thumbnail().preprocess(picture)

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        with self.lock:
            self.embedded += 1
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(0.002)
        with self.lock:
            self.running -= 1
        return Thumbnail().embed(pixels) if self.value is None else np.full(768, self.value, np.float32)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e30, 1e-30])
def test_an_embedding_that_cannot_be_compared_is_reported(value: float, tmp_path: Path) -> None:
    image((9, 9), 1).save(tmp_path / "a.png")
    documents, errors = embed_all([tmp_path / "a.png"], Counting(value))
    assert documents == []
    assert "no usable embedding" in errors[str(tmp_path / "a.png")]


def test_the_same_content_is_not_embedded_again(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    image((20, 20), 1).save(path)
    indexed = FileMetadata(1, 1, embedded(path).sha256)
    model = Counting()
    (second,), _ = embed_all([path], model, indexed)
    assert isinstance(second, MetadataUpdate)
    assert (second.image.size, second.image.mtime) == (path.stat().st_size, path.stat().st_mtime_ns)
    assert model.embedded == 0


def test_content_that_the_index_has_is_copied(tmp_path: Path) -> None:
    for seed in range(3):
        image((20, 20), seed).save(tmp_path / f"{seed}.png")
    vector = np.arange(768, dtype=np.float32)
    known = {embedded(tmp_path / "1.png").sha256: vector}
    model = Counting()
    documents, errors = embed_all([tmp_path / f"{seed}.png" for seed in range(3)], model, index=Known(known))
    assert errors == {} and model.embedded == 2
    assert [isinstance(document, Document) and document.is_copy for document in documents] == [False, True, False]
    assert isinstance(documents[1], Document) and np.array_equal(documents[1].embedding, vector)


def test_copies_that_are_new_together_are_embedded_once_on_each_cpu_at_most(tmp_path: Path) -> None:
    for number in range(60):
        image((20, 20), number % 3).save(tmp_path / f"{number}.png")
    model, index = Counting(), Known()
    documents, _ = embed_all([tmp_path / f"{number}.png" for number in range(60)], model, index=index)
    assert 3 <= model.embedded <= 3 * available_cpus()  # the same content may be embedded on two CPUs at one moment
    assert sum(isinstance(document, Document) and document.is_copy for document in documents) == 60 - model.embedded
    assert len(index.asked) < 30  # chunks are looked up, not images


def test_an_index_that_fails_to_answer_only_costs_time(tmp_path: Path) -> None:
    image((20, 20), 1).save(tmp_path / "a.png")
    (document,), errors = embed_all([tmp_path / "a.png"], index=Known(fails=True))
    assert errors == {} and isinstance(document, Document) and not document.is_copy


def test_recent_embeddings_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "RECENT_SIZE", 2)
    for number in range(40):
        image((20, 20), number % 10).save(tmp_path / f"{number}.png")
    embedder = Embedder(Counting, Known(), cpus=1)  # type: ignore[arg-type]
    for number in range(40):
        with open_file(str(tmp_path / f"{number}.png"), "") as opened:
            assert [embedder.embed(opened, {})[1] for _ in range(2)] == [False, True]  # made, then copied


def test_one_image_is_embedded_on_each_cpu(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(40)]
    for number, path in enumerate(paths):
        image((20, 20), number).save(path)
    model = Counting()
    documents, _ = embed_all(paths, model)
    assert [document.image.location for document in documents] == [str(path) for path in paths]
    assert model.most == available_cpus()


@pytest.mark.slow
@pytest.mark.parametrize("cpus", [2, 8, 64])
def test_open_files_stay_below_the_limit_on_any_machine(
    cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS allows a process 256."""
    monkeypatch.setattr(embed, "available_cpus", lambda: cpus)
    monkeypatch.setattr(embed, "raise_open_file_limit", lambda: 256)
    paths = [tmp_path / f"{number}.png" for number in range(600)]
    for number, path in enumerate(paths):
        image((9, 9), number).save(path)
    most, before = 0, len(os.listdir("/proc/self/fd"))

    class Watching(Counting):
        def embed(self, pixels: np.ndarray) -> np.ndarray:
            nonlocal most
            most = max(most, len(os.listdir("/proc/self/fd")) - before)
            return super().embed(pixels)

    documents, errors = embed_all(paths, Watching())
    assert len(documents) == 600 and errors == {}
    assert 0 < most <= 200


class UnreachableSource(FolderSource):
    """A source that cannot be reached; it counts the attempts to open a chunk."""

    opened = 0

    def open_images(self, images: Sequence[ImageFile]) -> Any:
        self.opened += 1
        raise ImageSearchError("did not recover")


def test_no_image_is_tried_after_the_source_was_given_up(tmp_path: Path) -> None:
    source = UnreachableSource("/", "/")
    with pytest.raises(ImageSearchError, match="did not recover"):
        embed_all([tmp_path] * 1000, source=source)
    assert source.opened <= 4 * available_cpus()


def test_queries_are_embedded_in_order_with_the_reasons_for_those_that_cannot(tmp_path: Path) -> None:
    image((20, 20), 1).save(tmp_path / "a.png")
    names = [str(tmp_path / name) for name in ("a.png", "missing.png", "a.png")]
    queries = list(embed_queries(names, open_query, Thumbnail, Known()))  # type: ignore[arg-type]
    assert [query.name for query in queries] == names
    assert isinstance(queries[1].embedding, Unreadable)
    assert queries[1].embedding.reason == "No such file or directory"
    assert all(isinstance(queries[n].embedding, np.ndarray) for n in (0, 2))


def test_the_model_is_loaded_once_and_only_if_a_query_needs_it(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(40)]
    for number, path in enumerate(paths):
        image((20, 20), number).save(path)
    index: Any = Known({embedded(path).sha256: np.ones(768, np.float32) for path in paths})
    loaded: list[int] = []

    def load() -> Model:
        loaded.append(1)
        return Thumbnail()

    names = list(map(str, paths))
    assert len(list(embed_queries(names, open_query, load, index))) == 40
    assert loaded == []
    assert len(list(embed_queries(names, open_query, load, Known()))) == 40  # type: ignore[arg-type]
    assert loaded == [1]


def test_a_model_that_cannot_be_loaded_is_tried_once(tmp_path: Path) -> None:
    image((20, 20), 1).save(tmp_path / "a.png")
    tried: list[int] = []

    def load() -> Model:
        tried.append(1)
        raise ImageSearchError("no model")

    with pytest.raises(ImageSearchError, match="no model"):
        list(embed_queries([str(tmp_path / "a.png")] * 100, open_query, load, Known()))  # type: ignore[arg-type]
    assert tried == [1]


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


@pytest.mark.slow
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
    documents, errors = embed_all([path])
    assert len(documents) + len(errors) == 1
    for document in documents:
        assert isinstance(document, Document)
        assert np.isfinite(document.embedding).all()
    for reason in errors.values():
        assert reason and "\n" not in reason
