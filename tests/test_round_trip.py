"""Path → id → document → JSON → hit and back, for any name that a file may have."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagesearch.connection import connection
from imagesearch.elastic import Elastic
from imagesearch.embed import Document, Stored
from imagesearch.files import File, local_path
from imagesearch.index import Index
from imagesearch.local import Local
from imagesearch.models import ModelRecord
from tests.conftest import Scripts

# Names of folders: any bytes but / and NUL, and much text.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).map(str.encode)
NAME = (st.binary(min_size=1, max_size=60) | TEXT).map(lambda raw: raw.replace(b"/", b"_").replace(b"\0", b"_"))
NAMES = st.lists(NAME.filter(lambda raw: raw not in (b".", b"..")), min_size=1, max_size=4)


def check(index: Index, names: list[bytes], folder: Path) -> None:
    """Writes a document for a file in these folders, and looks it up, searches it, lists it and deletes it."""
    raw = os.path.join(os.fsencode(folder), *names, b"x.jpg")
    os.makedirs(os.path.dirname(raw), exist_ok=True)
    with open(raw, "wb"):
        pass
    file = File(os.fsdecode(raw), 1, 2)
    embedding = np.random.default_rng(len(raw)).standard_normal(768).astype(np.float32)
    assert list(index.write([Document(file, None, "ab" * 32, embedding)]))
    index.refresh()
    assert index.stored([file.id]) == {file.id: Stored(1, 2, "ab" * 32)}
    hit = json.loads(json.dumps(index.search(embedding, 1, file.desc)))["hits"]["hits"][0]
    assert hit["_id"] == file.id
    assert hit["fields"] == {"file_path": [file.file_path], "desc": [file.desc]}
    assert os.fsencode(local_path(hit["fields"]["file_path"][0])) == raw
    assert list(index.paths(str(folder))) == [(file.id, file.file_path)]
    assert index.delete([file.id]) == 1
    index.refresh()
    os.unlink(raw)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=NAMES)
def test_the_local_file_keeps_any_name(names: list[bytes], tmp_path: Path) -> None:
    with Local(tmp_path / "index.db", "images") as index:
        index.create(ModelRecord("thumbnail"))
        check(index, names, tmp_path / "images")


@pytest.fixture
def index(elastic: Scripts) -> Index:
    place = connection(elastic.environment, insecure=False)
    assert place
    found = Elastic(place, elastic.index, lambda seconds, why: False, patience=0)
    found.create(ModelRecord("thumbnail"))
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=NAMES)
def test_elasticsearch_keeps_any_name(names: list[bytes], index: Index, tmp_path: Path) -> None:
    check(index, names, tmp_path / "images")
