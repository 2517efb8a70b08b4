"""One picture, one vector: an embedding depends on the picture alone, to the last bit.

The model is one of CLIP's shape with outlier channels, with which an embedding made in a batch
would differ (tests/test_int8.py shows that it does).
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from imagesearch.clip import import_imgbeddings
from imagesearch.connection import Connection
from PIL import Image

from imagesearch.index import open_index
from tests.running import Scripts, counts
from tests.server import ROOT

COUNT = 24


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images/`: crops of scikit-learn's two photographs, in formats that lose nothing."""
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    originals = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    for number in range(COUNT):
        size = random.integers(150, 420, 2)
        left, top = (int(random.integers(0, limit - length)) for limit, length in zip((640, 427), size, strict=True))
        path = folder / "images" / str(number % 3) / f"{number}.{'png' if number % 2 else 'webp'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        crop = originals[number % 2].crop((left, top, left + int(size[0]), top + int(size[1])))
        crop.save(path, lossless=True)
    return folder


Expected = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def expected(small_clip: Path, photographs: Path) -> Expected:
    """The embedding of each file, by SHA-256, that imgbeddings itself makes with the unmodified model."""
    from transformers import CLIPImageProcessor

    theirs: Any = object.__new__(import_imgbeddings())
    theirs.pca = None
    theirs.session = onnxruntime.InferenceSession(str(small_clip), providers=["CPUExecutionProvider"])
    theirs.processor = CLIPImageProcessor(do_center_crop=False)
    paths = sorted((photographs / "images").rglob("*.*"))
    return {hashlib.sha256(path.read_bytes()).hexdigest(): theirs.to_embeddings(str(path))[0] for path in paths}


@pytest.fixture
def run(scripts: Scripts, photographs: Path, small_clip: Path) -> Callable[..., str]:
    """Runs create.py on the photographs; scripts run in their folder, with the local index elsewhere."""
    database = scripts.folder / "index.db"
    scripts.folder = photographs
    scripts.environment["DB"] = str(database)
    return lambda *arguments, **options: scripts.create("--model", small_clip, "--db", database, *arguments, **options)


def stored(scripts: Scripts, expected: Expected) -> Expected:
    """The embeddings in the index, by the SHA-256 of their images."""
    connection = Connection.from_env(scripts.environment)
    with open_index(scripts.index, connection, Path(scripts.environment["DB"])) as index:
        assert index.get_metadata()
        return index.find_embeddings(list(expected))


def assert_equal(found: Expected, expected: Expected) -> None:
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[sha256], expected[sha256]) for sha256 in expected)


def test_every_vector_is_the_models_own(scripts: Scripts, run: Callable[..., str], expected: Expected) -> None:
    assert counts(run()) == {"new": COUNT}
    assert_equal(stored(scripts, expected), expected)


def test_parts_in_any_order_make_the_same_vectors(
    scripts: Scripts, run: Callable[..., str], expected: Expected
) -> None:
    for part in (2, 3, 1):
        run("--part", f"{part}/3")
    assert_equal(stored(scripts, expected), expected)


# Small bulks, and Ctrl-C when the model has been called ten times.
INTERRUPTING = """
import os, signal
import imagesearch.clip as clip, imagesearch.elasticsearch_index as e, imagesearch.embed as m
import imagesearch.sqlite_index as s
e.BULK_SIZE = s.TRANSACTION_SIZE = 4
m.CHUNK_SIZE = 1
embed, calls = clip.Clip.embed, []
def interrupting(self, pixels):
    calls.append(1)
    if len(calls) == 10:
        os.kill(os.getpid(), signal.SIGINT)
    return embed(self, pixels)
clip.Clip.embed = interrupting
"""


def test_an_interrupted_and_resumed_run_makes_the_same_vectors(
    scripts: Scripts, run: Callable[..., str], tmp_path: Path, expected: Expected
) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTING)
    written = counts(run(code=130, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)])))["new"]
    assert 0 < written < COUNT
    assert counts(run()) == {"new": COUNT - written, "unchanged": written}
    assert_equal(stored(scripts, expected), expected)


def test_a_picture_scores_1_with_itself_alone_and_among_others(
    scripts: Scripts, run: Callable[..., str], photographs: Path
) -> None:
    run()
    queries = sorted((photographs / "images").rglob("*.*"))
    options = ("--db", scripts.environment["DB"], "-k", 3)
    together = scripts.search(*queries, *options)
    for number in (0, 7, 23):
        (alone,) = scripts.search(queries[number], *options)
        assert alone["hits"] == together[number]["hits"]
    for query, response in zip(queries, together, strict=True):
        assert response["hits"]["hits"][0]["fields"]["file_path"] == [f"./{query.relative_to(photographs)}"]
        assert response["hits"]["max_score"] == pytest.approx(1, abs=1e-6)
