"""One picture, one vector: an embedding depends on the picture alone, to the last bit.

The model is one of CLIP's shape with outlier channels, with which an embedding made in a batch would differ
(tests/test_models.py shows that it does).
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from imagesearch.models.clip import import_imgbeddings
from tests.pictures import image
from tests.running import Scripts, bits, counts, patched

pytestmark = pytest.mark.slow

COUNT = 24


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images/` of many sizes, in formats that lose nothing."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(COUNT):
        path = folder / "images" / str(number % 3) / f"{number}.{'png' if number % 2 else 'webp'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = (int(side) for side in random.integers(150, 420, 2))
        noise = Image.effect_noise((width, height), 60).convert("RGB")
        Image.blend(image((width, height), number), noise, 0.2).save(path, lossless=True)
    return folder


Expected = dict[str, str]


@pytest.fixture(scope="module")
def expected(small_clip: Path, pictures: Path) -> Expected:
    """The embedding of each file, by its name, that imgbeddings itself makes with the unmodified model."""
    from transformers import CLIPImageProcessor

    theirs: Any = object.__new__(import_imgbeddings())
    theirs.pca = None
    theirs.session = onnxruntime.InferenceSession(str(small_clip), providers=["CPUExecutionProvider"])
    theirs.processor = CLIPImageProcessor(do_center_crop=False)
    paths = sorted((pictures / "images").rglob("*.*"))
    return {path.name: bits(theirs.to_embeddings(str(path))[0]) for path in paths}


@pytest.fixture
def scripts_on_pictures(scripts: Scripts, pictures: Path, small_clip: Path) -> Scripts:
    scripts.model = str(small_clip)
    return scripts.move_to(pictures)


def by_name(scripts: Scripts) -> Expected:
    return {Path(path).name: embedding for path, embedding in scripts.embeddings().items()}


def test_every_vector_is_the_models_own(scripts_on_pictures: Scripts, expected: Expected) -> None:
    """A picture scores 1 with itself, asked alone and among others."""
    assert counts(scripts_on_pictures.create()) == {"new": COUNT}
    assert by_name(scripts_on_pictures) == expected
    together = scripts_on_pictures.search("images", "-k", 3)
    for line in together:
        assert line["hits"]["hits"][0]["fields"]["file_path"] == [line["image"]]
        assert line["hits"]["max_score"] == pytest.approx(1, abs=1e-6)
    for line in together[::10]:
        (alone,) = scripts_on_pictures.search(line["image"], "-k", 3)
        assert alone["hits"] == line["hits"]


def test_parts_in_any_order_make_the_same_vectors(scripts_on_pictures: Scripts, expected: Expected) -> None:
    for part in (2, 3, 1):
        scripts_on_pictures.create("--part", f"{part}/3")
    assert by_name(scripts_on_pictures) == expected


# Small bulks, and Ctrl-C when the model has been called 15 times.
INTERRUPTING = """
import os, signal
import imagesearch.models.clip as clip
clip.Clip.chunk_size = 2
embed, calls = clip.Clip.create_embedding, []
def interrupting(self, pixels):
    calls.append(1)
    if len(calls) == 15:
        os.kill(os.getpid(), signal.SIGINT)
    return embed(self, pixels)
clip.Clip.create_embedding = interrupting
"""


def test_a_resumed_run_makes_the_same_vectors(scripts_on_pictures: Scripts, tmp_path: Path, expected: Expected) -> None:
    scripts_on_pictures.create(exits=130, new_python=True, **patched(tmp_path, source=INTERRUPTING))
    stored = scripts_on_pictures.count()
    assert 0 < stored < COUNT
    assert counts(scripts_on_pictures.create()) == {"new": COUNT - stored, "unchanged": stored}
    assert by_name(scripts_on_pictures) == expected
