"""No picture is embedded twice: moved, renamed and copied files keep the embedding of their content."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from imagesearch.parallel import available_cpus
from imagesearch.records import Document, ImageFile, IndexMetadata, ModelInfo
from tests.pictures import Picture, averaging_model
from tests.running import Scripts, calls, counts, embeddings, open_scripts_index


def test_a_renamed_folder_is_not_embedded_again(counting: Scripts, picture: Picture) -> None:
    for number in range(40):
        picture(f"images/unsorted/{number}.png", size=(8, 8), seed=number)
    assert counts(counting.create()) == {"new": 40}
    assert calls(counting) == 40
    (counting.folder / "images" / "unsorted").rename(counting.folder / "images" / "Osprey")
    assert counts(counting.create("--prune")) == {"new": 40, "known": 40, "deleted": 40}
    assert calls(counting) == 0
    (hit,) = counting.search("images/Osprey/7.png")[0]["hits"]["hits"]
    assert hit["fields"] == {"file_path": ["./images/Osprey/7.png"], "desc": ["Osprey"]}
    assert hit["_score"] == pytest.approx(1, abs=1e-6)
    assert len(counting.paths()) == 40


def test_copies_that_are_new_together_and_replaced_contents_are_embedded_once(
    counting: Scripts, picture: Picture
) -> None:
    for number in range(30):
        picture(f"images/{number}.png", size=(8, 8), seed=number % 3)
    found = counts(counting.create())
    embedded = calls(counting)
    assert 3 <= embedded <= 3 * available_cpus()  # the same content may be embedded on two CPUs at one moment
    assert found == {"new": 30, "known": 30 - embedded}
    picture("images/0.png", size=(8, 8), seed=1)  # the content of 1.png
    picture("images/new.png", size=(8, 8), seed=99)
    assert counts(counting.create()) == {"new": 1, "updated": 1, "known": 1, "unchanged": 29}
    assert calls(counting) == 1


def test_the_index_is_the_same_as_if_all_had_been_embedded(scripts: Scripts, picture: Picture) -> None:
    for number in range(20):
        picture(f"images/a/{number}.png", seed=number)
    model = averaging_model(scripts.folder / "model.onnx", scale=0.37)
    scripts.create("--model", model)
    shutil.move(scripts.folder / "images" / "a", scripts.folder / "images" / "b")
    assert counts(scripts.create("--model", model, "--prune")) == {"new": 20, "known": 20, "deleted": 20}
    copied = embeddings(scripts, scripts.folder)
    scripts.index = "fresh-" + scripts.index
    assert counts(scripts.create("--model", model)) == {"new": 20}
    assert embeddings(scripts, scripts.folder) == copied
    assert len(copied) == 20


def test_another_index_is_never_a_source(counting: Scripts, picture: Picture) -> None:
    picture("images/a.png")
    counting.create()
    counting.index += "-other"
    assert counts(counting.create()) == {"new": 1}
    assert calls(counting) == 2


def test_a_deleted_document_is_not_copied_from(scripts: Scripts, tmp_path: Path) -> None:
    """Another run's prune deletes it before it is looked up: then nothing is found, and the image is embedded."""
    with open_scripts_index(scripts, tmp_path) as index:
        index.create(IndexMetadata(ModelInfo("thumbnail"), "/"))
        index.get_metadata()
        image = ImageFile("/a.png", "/a.png", "", 1, 1)
        assert list(index.write([Document(image, "a" * 64, np.ones(768, np.float32))]))
        index.refresh()
        assert set(index.find_embeddings(["a" * 64, "b" * 64])) == {"a" * 64}
        assert index.delete([image.id]) == 1
        index.refresh()
        assert index.find_embeddings(["a" * 64]) == {}


def test_many_copies_of_one_content_do_not_hide_another(scripts: Scripts, tmp_path: Path) -> None:
    with open_scripts_index(scripts, tmp_path) as index:
        index.create(IndexMetadata(ModelInfo("thumbnail"), "/"))
        index.get_metadata()
        vectors = {sha256: np.full(768, value, np.float32) for value, sha256 in enumerate(("a" * 64, "b" * 64), 1)}
        documents = [
            Document(ImageFile(f"/{n}", f"/{n}", "", 1, 1), sha256, vectors[sha256])
            for n, sha256 in enumerate(["a" * 64] * 300 + ["b" * 64])
        ]
        assert len(list(index.write(documents))) == 301
        index.refresh()
        found = index.find_embeddings(["a" * 64, "b" * 64])
        assert {sha256: found[sha256][0] for sha256 in found} == {"a" * 64: 1, "b" * 64: 2}
