"""search.py as a user runs it, on the local file and on a real Elasticsearch over TLS."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagesearch.models import Thumbnail
from imagesearch.records import PREPROCESSING, IndexMetadata, ModelInfo
from tests.pictures import Picture, Pictures, averaging_model, image
from tests.running import Scripts, counts, patched

pytestmark = pytest.mark.slow


def test_the_nearest_image_is_found_and_the_json_is_elasticsearchs(scripts: Scripts, bird_images: list[Path]) -> None:
    scripts.create()
    Image.open(bird_images[3]).save(scripts.folder / "myimage.jpg", quality=95)
    done = scripts.run("search.py", "myimage.jpg")
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and done.stderr == ""
    response = json.loads(done.stdout)
    path = "./images/Bald_Eagle/3.png"
    assert list(response) == ["image", "took", "timed_out", "_shards", "hits"]
    assert response["image"] == "myimage.jpg"
    assert list(response["_shards"].items()) == [("total", 1), ("successful", 1), ("skipped", 0), ("failed", 0)]
    assert list(response["hits"]) == ["total", "max_score", "hits"]
    assert response["hits"]["total"] == {"value": 1, "relation": "eq"}
    (hit,) = response["hits"]["hits"]
    assert list(hit) == ["_index", "_id", "_score", "fields"]
    assert (hit["_index"], hit["_id"]) == (scripts.index, hashlib.sha256(path.encode()).hexdigest())
    assert 0.99 < hit["_score"] == response["hits"]["max_score"] <= 1
    assert list(hit["fields"].items()) == [("file_path", [path]), ("desc", ["Bald_Eagle"])]


def test_both_kinds_of_index_give_the_same_hits(
    scripts_on_file: Scripts, scripts_on_elasticsearch: Scripts, picture: Picture, pictures: Pictures
) -> None:
    pictures(150, classes=7)
    both = scripts_on_file, scripts_on_elasticsearch
    for scripts in both:
        scripts.index = scripts_on_elasticsearch.index
        scripts.create()
    queries = [picture(f"query-{number}.png", size=(37, 64), seed=1000 + number) for number in range(5)]
    queries += [Path("images/3/3.png"), Path("images/4/4.png")]
    for options in (("-k", 1), ("-k", 10), ("-k", 10, "--desc", "3"), ("-k", 10, "--exclude-self")):
        found = [scripts.search(*queries, *options) for scripts in both]
        for ours, theirs in zip(*found, strict=True):
            assert ours["image"] == theirs["image"]
            assert ours["hits"]["total"] == theirs["hits"]["total"] == {"value": options[1], "relation": "eq"}
            for mine, yours in zip(ours["hits"]["hits"], theirs["hits"]["hits"], strict=True):
                assert mine["_score"] == pytest.approx(yours["_score"], abs=1e-4)
                assert (mine["_id"], mine["fields"]) == (yours["_id"], yours["fields"])


def test_there_is_one_line_for_each_image_in_order_readable_or_not(scripts: Scripts, bird_images: list[Path]) -> None:
    scripts.create()
    (scripts.folder / "bad.png").write_bytes(bird_images[0].read_bytes()[:100])
    done = scripts.run("search.py", bird_images[25], "bad.png", "missing.png", bird_images[2])
    assert done.returncode == 1
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["image"] for line in lines] == [str(bird_images[25]), "bad.png", "missing.png", str(bird_images[2])]
    assert [line.get("status") for line in lines] == [None, 400, 400, None]
    found = [line["hits"]["hits"][0]["fields"]["file_path"][0] for line in lines if "hits" in line]
    assert found == ["./images/deep/down/Wren/5.png", "./images/Bald_Eagle/2.png"]
    assert re.findall(r"^Cannot read (\S+): ", done.stderr, re.MULTILINE) == ["bad.png", "missing.png"]
    reason = "Cannot read missing.png: No such file or directory"
    assert lines[2] == {"image": "missing.png", "error": {"type": "image_error", "reason": reason}, "status": 400}


def test_a_folder_is_a_query_for_each_image_below_it(scripts: Scripts, bird_images: list[Path]) -> None:
    """Found and named as create.py finds and names them; copies elsewhere are not the image itself."""
    scripts.create()
    folder = scripts.folder / "images" / "Osprey"
    (folder / "again.png").write_bytes(bird_images[13].read_bytes())
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(bird_images[0].read_bytes())
    scripts.create(exits=1)
    done = scripts.run("search.py", "images/Osprey", "images/loose.jpg", "-k", 2, "--exclude-self")
    assert done.returncode == 1
    lines = {line["image"]: line for line in map(json.loads, done.stdout.splitlines())}
    names = [f"./images/Osprey/{name}.png" for name in (*range(10), "again", "bad")]
    assert set(lines) == {*names, "images/loose.jpg"} and list(lines)[-1] == "images/loose.jpg"
    assert lines["./images/Osprey/bad.png"]["error"]["reason"].startswith("Cannot read ./images/Osprey/bad.png: ")
    for name, line in lines.items():
        hits = line.get("hits", {}).get("hits", [])
        assert len(hits) == (0 if "bad" in name else 2)
        assert not {f"./{name.removeprefix('./')}"} & {hit["fields"]["file_path"][0] for hit in hits}
    assert lines["./images/Osprey/3.png"]["hits"]["hits"][0]["fields"]["file_path"] == ["./images/Osprey/again.png"]
    assert lines["./images/Osprey/3.png"]["hits"]["max_score"] == pytest.approx(1, abs=1e-6)
    (folder.parent / "empty").mkdir()
    done = scripts.run("search.py", "images/empty", "gone.png", "images/loose.jpg")
    reasons = [json.loads(line).get("error", {}).get("reason") for line in done.stdout.splitlines()]
    assert reasons == [
        "Cannot read images/empty: there are no images below it",
        "Cannot read gone.png: No such file or directory",
        None,
    ]


def test_a_class_and_a_number_of_neighbors_can_be_asked_for(scripts: Scripts, bird_images: list[Path]) -> None:
    scripts.create()
    hits = scripts.hits(bird_images[0], "-k", 5, "--desc", "Wren")
    assert [hit["fields"]["desc"] for hit in hits] == [["Wren"]] * 5
    assert [hit["_score"] for hit in hits] == sorted((hit["_score"] for hit in hits), reverse=True)
    assert len(scripts.hits(bird_images[0], "-k", 10_000)) == 31


@pytest.mark.parametrize(
    ("wanted", "answer"),
    [
        ("Dodo", r"among its 4 classes \(Bald_Eagle, Osprey, .Vo.gel., Wren\)\. An image's class is the innermost"),
        ("bald_eagel", r"did you mean Bald_Eagle\?"),
        ("v\u00f6gel", "did you mean .Vo\u0308gel.\\?"),
    ],
)
def test_a_missing_class_names_the_others(wanted: str, answer: str, scripts: Scripts, picture: Picture) -> None:
    for number, name in enumerate(["Bald_Eagle", "Osprey", "Wren", "Vo\u0308gel"]):
        picture(f"images/{name}/{number}.png", seed=number)
    scripts.create()
    done = scripts.run("search.py", "images/Wren/2.png", "images/Wren/2.png", "--desc", wanted)
    assert done.returncode == 1 and done.stderr.count("has no image of class") == 1
    assert re.search(answer, done.stderr), done.stderr


def test_search_uses_the_model_that_made_the_index(scripts: Scripts, bird_images: list[Path]) -> None:
    model = averaging_model(scripts.folder / "model.onnx")
    assert counts(scripts.create("--model", model)) == {"new": 31}
    image((40, 30), 999).save(scripts.folder / "new.png")
    (_, before) = scripts.search("new.png", bird_images[0], "-k", 3)
    moved = model.rename(scripts.folder / "moved.onnx")
    done = scripts.run("search.py", "new.png")
    assert done.returncode == 2 and "use --model FILE to say where it is now" in done.stderr
    shutil.copy(bird_images[0], scripts.folder / "elsewhere.png")
    assert scripts.search("elsewhere.png", "-k", 3)[0]["hits"] == before["hits"]  # its content is known: no model
    assert scripts.run("search.py", bird_images[0], "--model", "thumbnail").returncode == 2  # still checked
    scripts.search("new.png", "--model", moved)
    other = averaging_model(scripts.folder / "other.onnx", scale=2)
    done = scripts.run("search.py", bird_images[7], "--model", other)
    assert done.returncode == 2 and "is another model" in done.stderr and done.stdout == ""
    other.rename(model)
    done = scripts.run("search.py", "new.png")
    assert done.returncode == 2 and "and it has changed" in done.stderr and done.stdout == ""


def test_a_search_imports_only_what_it_needs(scripts: Scripts, bird_images: list[Path]) -> None:
    model = averaging_model(scripts.folder / "model.onnx")
    scripts.environment |= {"HOME": str(scripts.folder), "XDG_CACHE_HOME": ""}
    scripts.create("--model", model)
    code = """
import os, sys
end = os._exit
def list_modules_and_end(code):
    with open("modules", "w") as file:
        file.write("\\n".join(sys.modules))
    end(code)
os._exit = list_modules_and_end
"""
    image((40, 30), 999).save(scripts.folder / "new.png")
    modules = []
    for query in ("new.png", bird_images[0]):
        scripts.search(query, new_python=True, **patched(scripts.folder, source=code))
        modules.append(set((scripts.folder / "modules").read_text().split()))
    for_new, for_indexed = modules
    never = {"transformers", "sklearn", "huggingface_hub", "elasticsearch", "onnx", "pi_heif", "jinja2"}
    assert {"imgbeddings", "onnxruntime", "numpy"} <= for_new and not never & for_new
    assert not {"imgbeddings", "onnxruntime"} & for_indexed
    assert os.listdir(scripts.folder / ".cache") == ["imagesearch"]  # and no telemetry of ONNX Runtime


def test_no_index_and_an_empty_one_are_reported_in_one_line(scripts: Scripts, bird_images: list[Path]) -> None:
    done = scripts.run("search.py", bird_images[0])
    assert done.returncode == 2 and f"There is no index {scripts.index} in " in done.stderr and done.stdout == ""
    scripts.create()
    made, scripts.index = scripts.index, f"{scripts.index}-other"
    done = scripts.run("search.py", bird_images[0])
    assert done.returncode == 2 and re.search(rf"but there are: .*{made} \(thumbnail\)", done.stderr)
    scripts.index = made
    (scripts.folder / "elsewhere.png").write_bytes(bird_images[0].read_bytes())
    for path in bird_images:
        path.unlink()
    scripts.create("--prune-all")
    for options in ((), ("--min-score", "0.9")):
        done = scripts.run("search.py", "elsewhere.png", *options)
        assert done.returncode == 2 and "is empty" in done.stderr and done.stdout == ""


def test_vectors_of_another_preprocessing_are_refused(scripts: Scripts, bird_images: list[Path]) -> None:
    other = ModelInfo("thumbnail", preprocessing=PREPROCESSING + 1)
    with scripts.open_index() as index:
        index.create(IndexMetadata(other, str(scripts.folder)))
    refused = "another version of create.py, whose embeddings differ"
    assert refused in scripts.create(exits=2) and refused in scripts.run("search.py", bird_images[0]).stderr


def test_min_score_is_a_cutoff_by_the_printed_score(scripts: Scripts, pictures: Pictures) -> None:
    """Of the same picture it is 1, and any hit is there at its own score: float32 rounds some below."""
    paths = pictures(60, classes=2)
    model = averaging_model(scripts.folder / "model.onnx", scale=0.37)
    scripts.create("--model", model)
    for path, response in zip(paths, scripts.search(*paths, "--min-score", 1), strict=True):
        (hit,) = response["hits"]["hits"]
        assert hit["fields"]["file_path"] == [f"./{path.relative_to(scripts.folder)}"]
        assert 1 - 1e-6 <= hit["_score"] <= 1
    for options in ((), ("--desc", "1")):
        everything = scripts.hits(paths[0], "-k", 60, *options)
        middle = everything[10]["_score"]
        limited = scripts.hits(paths[0], "-k", 60, "--min-score", middle, *options)
        assert limited == [hit for hit in everything if hit["_score"] >= middle - 1e-6] and len(limited) >= 11
        assert scripts.hits(paths[0], "-k", 3, "--min-score", middle, *options) == limited[:3]
    assert scripts.hits(paths[0], "--min-score", 1, "--exclude-self") == []


def test_a_search_that_is_cut_off_ends(scripts_on_file: Scripts, bird_images: list[Path]) -> None:
    """Its threads end before the index is closed: there is no error and no wait, whenever the reader goes."""
    scripts_on_file.create()
    names = " ".join(100 * [str(path.relative_to(scripts_on_file.folder)) for path in bird_images])
    for number in (1, 40, 700):
        done = scripts_on_file.shell(f"timeout 60 SEARCH {names} | head -n {number}; exit ${{PIPESTATUS[0]}}")
        assert done.returncode == 141 and done.stderr == "", done.stderr
        assert len(done.stdout.splitlines()) == number
    done = scripts_on_file.shell(f"timeout 60 SEARCH {names} --desc Nope")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr


def test_memory_does_not_grow_with_the_number_of_queries(many_on_file: Scripts, tmp_path: Path) -> None:
    scripts = many_on_file
    scripts.create("--images", "images/3")
    peaks = []
    for folders in (["images/3"], 8 * ["images/3"]):
        command = [sys.executable, *scripts.arguments("search.py", *folders)]
        with (tmp_path / "lines").open("w") as lines:
            process = subprocess.Popen(command, cwd=scripts.folder, env=scripts.environment, stdout=lines)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        assert len((tmp_path / "lines").read_text().splitlines()) == 250 * len(folders)
        peaks.append(usage.ru_maxrss)
    assert peaks[1] < peaks[0] + 20_000  # KiB


def test_no_name_controls_a_terminal(scripts: Scripts, picture: Picture) -> None:
    """Not DEL, a C1 control or a character that turns text around; the JSON is the same."""
    name = "Vögel\x9b31m\u202eb\x7f\u2066.png"
    path = picture(f"images/{name}")
    scripts.create()
    done = scripts.run("search.py", path, "missing\u202e.png")
    assert not re.search("[\x7f-\x9f\u202a-\u202e\u2066-\u2069]", done.stdout + done.stderr)
    found = json.loads(done.stdout.splitlines()[0])
    assert found["hits"]["hits"][0]["fields"]["file_path"] == [f"./images/{name}"]
    assert "./images/Vögel" in done.stdout


def test_a_listed_image_that_is_unchanged_is_not_opened(scripts: Scripts, bird_images: list[Path]) -> None:
    """Its stored embedding is used; one whose time has changed is opened."""
    scripts.create()
    before = scripts.search("images", "-k", 3)
    for path in bird_images:
        status = path.stat()
        path.write_bytes(bytes(status.st_size))  # which nobody could embed
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert [line["hits"] for line in scripts.search("images", "-k", 3)] == [line["hits"] for line in before]
    os.utime(bird_images[3])
    done = scripts.run("search.py", "images/Bald_Eagle")
    assert done.returncode == 1
    assert re.findall("Cannot read (.*): not an image", done.stderr) == ["./images/Bald_Eagle/3.png"]


def test_a_folder_is_searched_in_the_order_of_names(scripts_on_file: Scripts, picture: Picture) -> None:
    names = ["a.png", "b/1.png", "b/10.png", "b/2.png", "c/d/1.png", "z.png"]
    for name in reversed(names):
        picture(f"images/{name}")
    scripts_on_file.create()
    expected = ["a.png", "z.png", *names[1:5]]  # a folder's own images first
    assert [line["image"] for line in scripts_on_file.search("images")] == [f"./images/{name}" for name in expected]


def test_a_query_scores_by_the_cosine(scripts: Scripts, pictures: Pictures) -> None:
    paths = pictures(12)
    scripts.create()
    vectors = []
    for path in paths:
        with Image.open(path) as opened:
            vectors.append(Thumbnail().create_embedding(Thumbnail().preprocess(opened.convert("RGB"))))
    cosines = np.array(vectors) @ vectors[0] / np.linalg.norm(vectors, axis=1) / np.linalg.norm(vectors[0])
    scores = {
        os.path.basename(hit["fields"]["file_path"][0]): hit["_score"] for hit in scripts.hits(paths[0], "-k", 12)
    }
    for path, cosine in zip(paths, cosines, strict=True):
        assert scores[path.name] == pytest.approx((1 + cosine) / 2, abs=1e-6)
