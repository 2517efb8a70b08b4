"""Path → id → document → JSON → hit and back, for any name that a file may have."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagesearch.connection import Connection
from imagesearch.elasticsearch_index import ElasticsearchIndex
from imagesearch.index import WritableIndex
from imagesearch.paths import file_path_to_local, path_to_text
from imagesearch.records import Document, FileMetadata, ImageFile, IndexMetadata, ModelInfo
from imagesearch.retry import NO_RETRY
from imagesearch.sqlite_index import SqliteIndex
from tests.running import Scripts

# Names of folders: any bytes but / and NUL, and much text.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).map(str.encode)
NAME = (st.binary(min_size=1, max_size=60) | TEXT).map(lambda raw: raw.replace(b"/", b"_").replace(b"\0", b"_"))
NAMES = st.lists(NAME.filter(lambda raw: raw not in (b".", b"..")), min_size=1, max_size=4)


def check(index: WritableIndex, names: list[bytes], folder: Path) -> None:
    """Writes a document for a file in these folders, and looks it up, searches it, lists it and deletes it."""
    raw = os.path.join(os.fsencode(folder), *names, b"x.jpg")
    os.makedirs(os.path.dirname(raw), exist_ok=True)
    with open(raw, "wb"):
        pass
    path = os.fsdecode(raw)
    image = ImageFile(path, path_to_text(path), path_to_text(os.path.basename(os.path.dirname(path))), 1, 2)
    embedding = np.random.default_rng(len(raw)).standard_normal(768).astype(np.float32)
    assert list(index.write([Document(image, "ab" * 32, embedding)]))
    index.refresh()
    assert index.get_file_metadata([image.id]) == {image.id: FileMetadata(1, 2, "ab" * 32)}
    assert np.array_equal(index.find_embeddings(["ab" * 32, "cd" * 32])["ab" * 32], embedding)
    hit = json.loads(json.dumps(index.search(embedding, 1, image.desc)))["hits"]["hits"][0]
    assert hit["_id"] == image.id
    assert hit["fields"] == {"file_path": [image.file_path], "desc": [image.desc]}
    assert os.fsencode(file_path_to_local(hit["fields"]["file_path"][0], "/")) == raw
    assert list(index.list_paths(str(folder))) == [image.file_path]
    assert index.count_below(str(folder)) == 1
    assert index.list_classes() == [image.desc]
    assert index.delete([image.id]) == 1
    index.refresh()
    os.unlink(raw)


METADATA = IndexMetadata(ModelInfo("thumbnail"), "/")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=NAMES)
def test_the_local_file_keeps_any_name(names: list[bytes], tmp_path: Path) -> None:
    with SqliteIndex(tmp_path / "index.db", "images") as index:
        index.create(METADATA)
        check(index, names, tmp_path / "images")


@pytest.fixture
def index(elastic: Scripts) -> WritableIndex:
    connection = Connection.from_env(elastic.environment)
    assert connection
    index = ElasticsearchIndex(connection, elastic.index, NO_RETRY)
    index.create(METADATA)
    assert index.get_metadata() == METADATA
    return index


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=NAMES)
def test_elasticsearch_keeps_any_name(names: list[bytes], index: WritableIndex, tmp_path: Path) -> None:
    check(index, names, tmp_path / "images")
