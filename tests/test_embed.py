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
from PIL import Image

from imagesearch import embed
from imagesearch.embed import Embedder, embed_images, embed_queries
from imagesearch.errors import ImageSearchError
from imagesearch.models import Model, Thumbnail
from imagesearch.parallel import available_cpus
from imagesearch.progress import Progress
from imagesearch.records import Candidate, Document, Embedded, FileMetadata, ImageFile, MetadataUpdate, ModelInfo
from imagesearch.records import Unreadable as UnreadableImage
from imagesearch.sources import find_queries
from imagesearch.sources.folder import FolderSource, open_file
from tests.pictures import image


class KnownEmbeddings:
    """An index that has some embeddings."""

    def __init__(self, embeddings: dict[str, np.ndarray] | None = None) -> None:
        self.embeddings = embeddings or {}
        self.lookups: list[int] = []

    def find_embeddings(self, sha256s: Sequence[str]) -> dict[str, np.ndarray]:
        self.lookups.append(len(sha256s))
        return {sha256: self.embeddings[sha256] for sha256 in sha256s if sha256 in self.embeddings}


class Errors(Progress):
    """Keeps the reasons for what cannot be read, by path."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: dict[str, str] = {}

    def count_unreadable(self, unreadable: UnreadableImage) -> None:
        self.reasons[unreadable.name] = unreadable.reason


class CountingModel:
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


def embed_all(
    paths: list[Path],
    model: Model | None = None,
    indexed: FileMetadata | None = None,
    index: Any = None,
    source: Any = None,
) -> tuple[list[Document | MetadataUpdate], dict[str, str]]:
    """The documents of these files, and the reasons for those that cannot be read, by path."""
    errors = Errors()
    candidates = (Candidate(ImageFile(str(path), str(path), "", 0, 0), indexed) for path in paths)
    source, index = source or FolderSource("/", "/"), index or KnownEmbeddings()
    return list(embed_images(candidates, source, model or Thumbnail(), index, errors)), errors.reasons


def embed_file(path: Path) -> Document:
    (document,), errors = embed_all([path])
    assert errors == {} and isinstance(document, Document)
    return document


@pytest.fixture
def sixty_images(tmp_path: Path) -> list[Path]:
    """Of three contents."""
    paths = [tmp_path / f"{number}.png" for number in range(60)]
    for number, path in enumerate(paths):
        image((20, 20), number % 3).save(path)
    return paths


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e30, 1e-30])
def test_an_embedding_that_cannot_be_compared_is_reported(value: float, sixty_images: list[Path]) -> None:
    documents, errors = embed_all(sixty_images[:1], CountingModel(value))
    assert documents == []
    assert "no usable embedding" in errors[str(sixty_images[0])]


def test_the_same_content_is_not_embedded_again(sixty_images: list[Path]) -> None:
    path, model = sixty_images[0], CountingModel()
    (second,), _ = embed_all([path], model, FileMetadata(1, 1, embed_file(path).sha256))
    assert isinstance(second, MetadataUpdate)
    assert (second.image.size, second.image.mtime) == (path.stat().st_size, path.stat().st_mtime_ns)
    assert model.embedded == 0


def test_content_that_the_index_has_is_copied(sixty_images: list[Path]) -> None:
    vector = np.arange(768, dtype=np.float32)
    model, index = CountingModel(), KnownEmbeddings({embed_file(sixty_images[1]).sha256: vector})
    documents, errors = embed_all(sixty_images[:3], model, index=index)
    assert errors == {} and model.embedded == 2
    found = [document.embedded for document in documents if isinstance(document, Document)]
    assert [each.copied_from for each in found] == ["", "index", ""]
    assert np.array_equal(found[1].embedding, vector)


def test_copies_that_are_new_together_are_embedded_once_on_each_cpu_at_most(sixty_images: list[Path]) -> None:
    model, index = CountingModel(), KnownEmbeddings()
    documents, _ = embed_all(sixty_images, model, index=index)
    assert 3 <= model.embedded <= 3 * available_cpus()  # the same content may be embedded on two CPUs at one moment
    copies = [document for document in documents if isinstance(document, Document) and document.embedded.copied_from]
    assert len(copies) == 60 - model.embedded
    assert len(index.lookups) < 30  # chunks are looked up, not images


def test_recent_embeddings_are_bounded(sixty_images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "RECENT_SIZE", 2)
    index: Any = KnownEmbeddings()
    embedder = Embedder(index, CountingModel)
    for path in sixty_images:
        with open_file(str(path), "") as opened:
            found = [each for _ in range(2) for each in embedder.embed([opened])]
        assert [each.copied_from for each in found if isinstance(each, Embedded)] == ["", "run"]


def test_one_image_is_embedded_on_each_cpu_and_the_order_is_kept(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(40)]
    for number, path in enumerate(paths):
        image((20, 20), number).save(path)
    model = CountingModel()
    documents, _ = embed_all(paths, model)
    assert [document.image.location for document in documents] == [str(path) for path in paths]
    assert model.most == available_cpus()


@pytest.mark.slow
@pytest.mark.parametrize("cpus", [2, 64])
def test_open_files_stay_below_the_limit_on_any_machine(
    cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS allows a process 256."""
    monkeypatch.setattr(embed, "available_cpus", lambda: cpus)
    monkeypatch.setattr(embed, "raise_open_file_limit", lambda: 256)
    path = tmp_path / "large.bmp"  # larger than what is read at once
    image((400, 400), 1).save(path)
    most, before = 0, len(os.listdir("/proc/self/fd"))

    class Watching(CountingModel):
        def embed(self, pixels: np.ndarray) -> np.ndarray:
            nonlocal most
            most = max(most, len(os.listdir("/proc/self/fd")) - before)
            return super().embed(pixels)

    for number in range(400):
        (tmp_path / f"{number}.bmp").symlink_to(path)
    monkeypatch.setattr(embed, "RECENT_SIZE", 0)
    documents, errors = embed_all([tmp_path / f"{number}.bmp" for number in range(400)], Watching())
    assert len(documents) == 400 and errors == {}
    assert 0 < most <= 200


def test_no_image_is_tried_after_the_source_was_given_up(tmp_path: Path) -> None:
    class UnreachableSource(FolderSource):
        opened = 0

        def open_images(self, images: Sequence[ImageFile]) -> Any:
            self.opened += 1
            raise ImageSearchError("no answer")

    source = UnreachableSource("/", "/")
    with pytest.raises(ImageSearchError, match="no answer"):
        embed_all([tmp_path] * 1000, source=source)
    assert source.opened <= 4 * available_cpus()


def test_the_model_is_loaded_once_and_only_if_a_query_needs_it(sixty_images: list[Path]) -> None:
    known: Any = KnownEmbeddings({embed_file(path).sha256: np.ones(768, np.float32) for path in sixty_images[:3]})
    unknown: Any = KnownEmbeddings()
    loaded, failed = list[int](), list[int]()

    def load() -> Model:
        loaded.append(1)
        return Thumbnail()

    def fail() -> Model:
        failed.append(1)
        raise ImageSearchError("no model")

    names = [str(path) for path in sixty_images]
    assert len(list(embed_queries(find_queries(names, "/"), known, load))) == 60
    assert loaded == []
    assert len(list(embed_queries(find_queries(names, "/"), unknown, load))) == 60
    assert loaded == [1]
    with pytest.raises(ImageSearchError, match="no model"):
        list(embed_queries(find_queries(names * 4, "/"), unknown, fail))
    assert failed == [1]


def mutable_files() -> list[bytes]:
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
@settings(max_examples=300, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.sampled_from(mutable_files()),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=8),
    cut=st.floats(0.1, 1),
)
def test_damaged_images_are_embedded_or_reported(
    content: bytes, flips: list[tuple[float, int]], cut: float, tmp_path: Path
) -> None:
    damaged = bytearray(content)
    for place, mask in flips:
        damaged[int(place * len(damaged))] ^= mask
    path = tmp_path / "damaged"
    path.write_bytes(damaged[: int(cut * len(damaged))])
    documents, errors = embed_all([path])
    assert len(documents) + len(errors) == 1
    assert all(reason and "\n" not in reason for reason in errors.values())
