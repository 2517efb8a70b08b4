"""The contract of both indexes: what is written is found, whatever its name."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagesearch.index import Index
from imagesearch.locations import local_path, path_to_text
from imagesearch.records import Document, FileMetadata, ImageFile, IndexMetadata, ModelInfo, Search
from tests.running import Scripts

pytestmark = pytest.mark.slow

MODEL = ModelInfo("thumbnail")
ONES = np.ones(768, np.float32)
A, B = "a" * 64, "b" * 64  # contents
IMAGE = ImageFile("/a.png", "/a.png", "birds", 1, 1)

# Names of folders: any bytes but / and NUL, and much text.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).map(str.encode)
NAME = (st.binary(min_size=1, max_size=60) | TEXT).map(lambda raw: raw.replace(b"/", b"_").replace(b"\0", b"_"))
NAMES = st.lists(NAME.filter(lambda raw: raw not in (b".", b"..")), min_size=1, max_size=4)


@pytest.fixture
def index(scripts: Scripts) -> Iterator[Index]:
    """A new index of each kind in turn."""
    with scripts.open_index() as index:
        assert index.metadata is None
        for model in (MODEL, ModelInfo("other")):  # one that exists by now is left as it is
            index.create(IndexMetadata(model, index.base))
        assert index.metadata == IndexMetadata(MODEL, index.base)
        yield index


def write(index: Index, *documents: Document) -> list[Document]:
    stored = index.write(documents)
    index.refresh()
    return stored


def search(index: Index, *searches: Search) -> list[list[dict[str, Any]]]:
    """The hits of each search."""
    return [response["hits"]["hits"] for response in index.search(searches)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=NAMES)
def test_any_name_is_kept(names: list[bytes], index: Index, tmp_path: Path) -> None:
    raw = os.path.join(os.fsencode(tmp_path / "images"), *names, b"x.jpg")
    os.makedirs(os.path.dirname(raw), exist_ok=True)
    Path(os.fsdecode(raw)).touch()
    path, folder = os.fsdecode(raw), path_to_text(os.path.basename(os.path.dirname(os.fsdecode(raw))))
    image = ImageFile(path, path_to_text(path), folder, 1, 2)
    embedding = np.random.default_rng(len(raw)).standard_normal(768).astype(np.float32)
    assert write(index, Document(image, A, embedding))
    assert index.get_file_metadata([image.id, "0" * 64]) == {image.id: FileMetadata(1, 2, A)}
    assert np.array_equal(index.find_embeddings([A, B])[A], embedding)
    ((hit,),) = search(index, Search(embedding, 1, image.desc))
    assert hit["_id"] == image.id
    assert hit["fields"] == {"file_path": [image.file_path], "desc": [image.desc]}
    assert os.fsencode(local_path(hit["fields"]["file_path"][0], "/")) == raw
    assert list(index.list_paths(str(tmp_path / "images"))) == [image.file_path]
    assert index.count_below(str(tmp_path / "images")) == 1
    assert index.list_classes() == [image.desc]
    assert search(index, Search(embedding, 1, excluded_id=image.id)) == [[]]
    assert index.delete([image.id]) == 1
    index.refresh()
    os.unlink(raw)


def test_a_document_that_is_written_again_is_replaced(index: Index) -> None:
    for desc in ("before", "after"):  # the project's folder was renamed: ./x.png is in another class
        assert write(index, Document(ImageFile("/x.png", "./x.png", desc, 1, 1), A, ONES))
    ((hit,),) = search(index, Search(ONES, 9))
    assert hit["fields"] == {"file_path": ["./x.png"], "desc": ["after"]}


def test_a_document_without_an_embedding_keeps_the_rest(index: Index) -> None:
    write(index, Document(IMAGE, A, ONES))
    touched = ImageFile("/a.png", "/a.png", "birds", 1, 77)
    assert write(index, Document(touched, A, None)) == [Document(touched, A, None)]
    assert index.get_file_metadata([IMAGE.id]) == {IMAGE.id: FileMetadata(1, 77, A)}
    assert np.array_equal(index.find_embeddings([A])[A], ONES)


def test_a_document_that_another_run_has_deleted_is_not_counted_or_copied_from(index: Index) -> None:
    assert write(index, Document(IMAGE, A, None)) == []
    assert index.delete([IMAGE.id]) == 0
    write(index, Document(IMAGE, A, ONES))
    assert set(index.find_embeddings([A, B])) == {A}
    assert index.delete([IMAGE.id, "0" * 64]) == 1
    index.refresh()
    assert index.find_embeddings([A]) == {}


def test_many_copies_of_one_content_do_not_hide_another(index: Index) -> None:
    documents = [
        Document(ImageFile(f"/{n}", f"/{n}", "", 1, 1), sha256, (1 + (sha256 == B)) * ONES)
        for n, sha256 in enumerate([A] * 300 + [B])
    ]
    assert len(write(index, *documents)) == 301
    found = index.find_embeddings([A, B])
    assert {sha256: found[sha256][0] for sha256 in found} == {A: 1, B: 2}


def test_paths_are_listed_below_a_folder_only(index: Index) -> None:
    paths = ["./images/a.png", "./images/b/c.png", "./images-too/d.png", "./images.png", "/images/e.png"]
    write(index, *(Document(ImageFile(path, path, "", 1, 1), A, ONES) for path in paths))
    for folder, expected in (("./images", paths[:2]), (".", paths[:4]), ("/", paths[4:]), ("s3://birds", [])):
        assert sorted(index.list_paths(folder)) == sorted(expected)
        assert index.count_below(folder) == len(expected)


def test_several_searches_give_what_each_gives_alone(index: Index) -> None:
    embeddings = np.random.default_rng(1).standard_normal((150, 768)).astype(np.float32)
    embeddings[100:130] = embeddings[7]  # copies, whose order is that of their names
    write(
        index,
        *(
            Document(ImageFile("", f"./{n:03}.png", str(n % 3), 1, 1), f"{n:064x}", embedding)
            for n, embedding in enumerate(embeddings)
        ),
    )
    excluded = [ImageFile("", f"./{n:03}.png", "", 1, 1).id for n in range(150)]
    every: list[dict[str, Any]] = [{"k": k} for k in (1, 10, 150)]
    every += [{"k": 10, "desc": "1"}, {"k": 10, "min_score": 0.55}, {"k": 10, "desc": "2", "min_score": 0.9}]
    for options in every:
        searches = [Search(each, **options) for each in embeddings[::7]]
        searches += [Search(embeddings[n], excluded_id=excluded[n], **options) for n in (7, 104, 149)]
        assert search(index, *searches) == [search(index, each)[0] for each in searches]
