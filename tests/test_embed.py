"""From files to embeddings: every image is embedded, copied or reported; what is under way is bounded."""

import importlib
import io
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from imagesearch import embed, parallel
from imagesearch.embed import Embedder, UnreadableError
from imagesearch.errors import ImageSearchError
from imagesearch.models import Model, Thumbnail
from imagesearch.parallel import available_cpus
from imagesearch.progress import Progress
from imagesearch.records import Document, ImageFile, ModelInfo, OpenedImage
from imagesearch.sources.folder import FolderSource
from tests.pictures import image, png


class CountingModel:
    """The thumbnail model, which counts how many images it embeds, and how many at once."""

    info = ModelInfo("thumbnail")
    chunk_size = 96

    def __init__(self, value: float | None = None) -> None:
        self.value = value
        self.embedded = self.running = self.most = 0
        self.lock = threading.Lock()

    def preprocess(self, picture: Image.Image) -> np.ndarray:
        return Thumbnail().preprocess(picture)

    def create_embedding(self, pixels: np.ndarray) -> np.ndarray:
        with self.lock:
            self.embedded += 1
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(0.002)
        with self.lock:
            self.running -= 1
        return Thumbnail().create_embedding(pixels) if self.value is None else np.full(768, self.value, np.float32)


class KeptDocuments:
    """An index that keeps what is written, and knows no embedding."""

    def __init__(self) -> None:
        self.written: list[Document] = []
        self.writes = 0

    def find_embeddings(self, sha256s: Sequence[str]) -> dict[str, np.ndarray]:
        return {}

    def write(self, documents: Sequence[Document]) -> list[Document]:
        self.written += documents
        self.writes += 1
        return list(documents)


@pytest.fixture(scope="module")
def create() -> ModuleType:
    """create.py, whose import sets what Ctrl-C does."""
    before = signal.getsignal(signal.SIGINT)
    module = importlib.import_module("create")
    signal.signal(signal.SIGINT, before)
    return module


def opened(content: bytes) -> OpenedImage:
    return OpenedImage.from_memory(ImageFile("a", "a", "", 0, 0), content)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e30, 1e-30])
def test_an_embedding_that_cannot_be_compared_is_reported(value: float) -> None:
    with pytest.raises(UnreadableError, match="no usable embedding"):
        Embedder(lambda: CountingModel(value)).embed(opened(png(1)), {})


def test_known_or_recent_is_copied_and_the_model_loaded_once_if_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "RECENT_SIZE", 2)
    loaded = list[Model]()

    def load() -> Model:
        loaded.append(CountingModel())
        return loaded[-1]

    embedder, pictures = Embedder(load), [opened(png(seed)) for seed in range(3)]
    vector = np.arange(768, dtype=np.float32)
    assert embedder.embed(pictures[0], {pictures[0].sha256: vector}) == (vector, True)
    assert loaded == []
    copies = [embedder.embed(pictures[number], {})[1] for number in (0, 0, 1, 2, 2, 0)]  # the last was forgotten
    assert copies == [False, True, False, False, True, False]
    assert len(loaded) == 1


def test_a_model_that_cannot_be_loaded_is_tried_once() -> None:
    failed = list[int]()

    def fail() -> Model:
        failed.append(1)
        raise ImageSearchError("no model")

    embedder = Embedder(fail)
    for _ in range(2):
        with pytest.raises(ImageSearchError, match="no model"):
            embedder.embed(opened(png(1)), {})
    assert failed == [1]


def test_one_image_is_embedded_on_each_cpu(tmp_path: Path, create: Any) -> None:
    images = []
    for number in range(60):
        image((20, 20), number).save(tmp_path / f"{number}.png")
        images.append(ImageFile(str(tmp_path / f"{number}.png"), f"./{number}.png", "", 0, 0))
    model, index, progress = CountingModel(), KeptDocuments(), Progress()
    create.index_images_in_chunks(iter(images), FolderSource("/", "/"), index, model, progress)
    assert {document.image.file_path for document in index.written} == {each.file_path for each in images}
    assert (progress.new, model.most) == (60, available_cpus())


def test_what_takes_long_is_written_now_and_then(tmp_path: Path, create: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After two seconds; here after each image."""
    monkeypatch.setattr(create, "WRITE_SECONDS", 0)
    image((20, 20), 1).save(tmp_path / "a.png")
    index = KeptDocuments()
    images = (ImageFile(str(tmp_path / "a.png"), f"./{number}.png", "", 0, 0) for number in range(30))
    create.index_images_in_chunks(images, FolderSource("/", "/"), index, CountingModel(), Progress())
    assert len(index.written) == 30 and index.writes > 30


@pytest.mark.slow
@pytest.mark.parametrize("cpus", [2, 64])
def test_open_files_are_limited(cpus: int, create: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS allows a process 256."""
    monkeypatch.setattr(create, "available_cpus", lambda: cpus)
    monkeypatch.setattr(embed, "available_cpus", lambda: cpus)
    monkeypatch.setattr(create, "raise_open_file_limit", lambda: 256)
    monkeypatch.setattr(embed, "RECENT_SIZE", 0)
    image((400, 400), 1).save(tmp_path / "large.bmp")  # larger than what is read at once
    most, before = 0, len(os.listdir("/proc/self/fd"))

    class Watching(CountingModel):
        def create_embedding(self, pixels: np.ndarray) -> np.ndarray:
            nonlocal most
            most = max(most, len(os.listdir("/proc/self/fd")) - before)
            return super().create_embedding(pixels)

    images = (ImageFile(str(tmp_path / "large.bmp"), f"./{number}.bmp", "", 0, 0) for number in range(400))
    progress = Progress()
    create.index_images_in_chunks(images, FolderSource("/", "/"), KeptDocuments(), Watching(), progress)
    assert progress.new == 400 and 0 < most <= 200


def test_no_image_is_tried_after_the_source_was_given_up(create: Any) -> None:
    class UnreachableSource(FolderSource):
        opened = 0

        def open_images(self, images: Sequence[ImageFile]) -> Any:
            self.opened += 1
            raise ImageSearchError("no answer")

    source, images = UnreachableSource("/", "/"), (ImageFile("a", f"./{n}", "", 0, 0) for n in range(10_000))
    with pytest.raises(ImageSearchError, match="no answer"):
        create.index_images_in_chunks(images, source, KeptDocuments(), CountingModel(), Progress())
    assert source.opened <= 2 * available_cpus() + create.EXTRA_WORKERS


def test_memory_is_bounded_on_a_machine_of_many_cpus(create: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """96 small files of 256 kB on each of 68 workers would be 1.7 GB."""
    monkeypatch.setattr(create, "available_cpus", lambda: 64)
    monkeypatch.setattr(parallel, "available_cpus", lambda: 64)
    most = 0

    def index_chunk(images: Sequence[ImageFile], **_: Any) -> Any:
        nonlocal most
        most = max(most, sum(each.size for each in images))
        return []

    monkeypatch.setattr(create, "index_chunk", index_chunk)
    images = (ImageFile("a", f"./{number}", "", 256_000, 0) for number in range(20_000))
    create.index_images_in_chunks(images, FolderSource("/", "/"), KeptDocuments(), CountingModel(), Progress())
    assert 1_000_000 < most <= create.MAX_BUFFERED_BYTES // 68


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
def test_damaged_images_are_embedded_or_reported(content: bytes, flips: list[tuple[float, int]], cut: float) -> None:
    damaged = bytearray(content)
    for place, mask in flips:
        damaged[int(place * len(damaged))] ^= mask
    try:
        embedding, _ = Embedder(Thumbnail).embed(opened(bytes(damaged[: int(cut * len(damaged))])), {})
        assert embedding.shape == (768,)
    except UnreadableError as error:
        assert str(error) and "\n" not in str(error)
