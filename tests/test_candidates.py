"""Many searches at once on the local file find what each finds alone, to the last bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagesearch.index import candidates, open_index, sqlite
from imagesearch.index.candidates import Candidates
from imagesearch.records import Document, ImageFile, IndexMetadata, ModelInfo, Search
from tools.embeddings import clustered

SIZE = 4000


@pytest.fixture(scope="module")
def embeddings() -> np.ndarray:
    """Clustered ones; hundreds of copies of one, near-copies of another, and some far longer or shorter."""
    random = np.random.default_rng(3)
    rows = clustered(SIZE, 1)
    rows[1000:1400] = rows[5]
    rows[2000:2100] = rows[7] + random.standard_normal((100, 768), np.float32) * np.float32(1e-5)
    rows[3000:3500] *= np.float32(1e6)
    rows[3500:] *= np.float32(1e-6)
    return rows[random.permutation(SIZE)]


@pytest.fixture(scope="module")
def path(embeddings: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local index of them, in three classes."""
    path = tmp_path_factory.mktemp("index") / "many.db"
    with open_index("many", None, path) as index:
        index.create(IndexMetadata(ModelInfo("thumbnail"), index.base))
        images = [ImageFile("", f"./{number % 37}/{number}.png", str(number % 3), 1, 1) for number in range(SIZE)]
        documents = zip(images, embeddings, strict=True)
        index.write([Document(each, f"{number:064x}", vector) for number, (each, vector) in enumerate(documents)])
    return path


def differences(path: Path, searches: list[Search]) -> int:
    """How many of the searches find something else together than alone."""
    with open_index("many", None, path) as index:
        together = index.search(searches)
        alone = [response for search in searches for response in index.search([search])]
    return sum(one["hits"] != other["hits"] for one, other in zip(together, alone, strict=True))


@pytest.mark.parametrize("ranges", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [
        *({"k": k} for k in (1, 20, 10_000)),
        {"k": 20, "desc": "1"},
        {"k": 20, "min_score": 0.7},
        {"k": 50, "desc": "2", "min_score": 0.9},
        {"k": 5, "desc": "none"},
    ],
)
def test_many_searches_find_what_each_finds_alone(
    options: dict[str, Any], ranges: int, path: Path, embeddings: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "available_cpus", lambda: ranges)
    monkeypatch.setattr(sqlite, "ROWS_PER_CPU", 1000)
    monkeypatch.setattr(sqlite, "ROWS_PER_BLOCK", 300)
    step = SIZE // (3 if options["k"] == 10_000 else 60)
    queries = [*embeddings[::step], *clustered(SIZE, 2)[::step]]
    ids = [ImageFile("", f"./{number % 37}/{number}.png", "", 1, 1).id for number in range(0, SIZE, step)]
    searches = [Search(query, **options) for query in queries]
    searches += [Search(query, excluded_id=id_, **options) for query, id_ in zip(queries, ids, strict=False)]
    assert differences(path, searches) == 0


def test_without_the_margin_some_are_lost(path: Path, embeddings: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "MARGIN", 0.0)
    assert differences(path, [Search(query, 20) for query in embeddings[::20]]) > 0


def test_too_many_candidates_search_alone(path: Path, embeddings: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """As among thousands of copies of one picture; memory stays bounded."""
    monkeypatch.setattr(candidates, "MAX_CANDIDATES", 1000)
    whole = Candidates(embeddings[:50], 1, -1.0)
    whole.add(np.arange(SIZE), embeddings)
    found = Candidates.merge([whole])
    assert None in found and any(found)
    assert sum(len(rowids) for rowids in found if rowids) <= 1000
    assert differences(path, [Search(query, 1) for query in embeddings[:50]]) == 0
