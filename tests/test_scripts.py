"""create.py and search.py as a user runs them, on the local file and on a real Elasticsearch over TLS."""

import contextlib
import hashlib
import http.server
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
import threading
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from imagesearch.records import PREPROCESSING, Document, ImageFile, IndexMetadata, ModelInfo
from tests.certificates import CA
from tests.http_servers import RecordingServer
from tests.pictures import Picture, averaging_model, image, png
from tests.running import Scripts, counts, hits, open_scripts_index, summary
from tests.server import ROOT, Server


def test_the_nearest_image_is_found_and_the_json_is_elasticsearchs(scripts: Scripts, birds: list[Path]) -> None:
    assert counts(scripts.create()) == {"new": 31}
    query = scripts.folder / "myimage.jpg"
    Image.open(birds[3]).save(query, quality=95)
    done = scripts.run("search.py", query.name)
    assert done.returncode == 0 and done.stdout.count("\n") == 1

    response = json.loads(done.stdout)
    path = "./images/Bald_Eagle/3.png"
    assert list(response) == ["took", "timed_out", "_shards", "hits"]
    assert list(response["_shards"].items()) == [("total", 1), ("successful", 1), ("skipped", 0), ("failed", 0)]
    assert list(response["hits"]) == ["total", "max_score", "hits"]
    assert response["hits"]["total"] == {"value": 1, "relation": "eq"}
    (hit,) = response["hits"]["hits"]
    assert list(hit) == ["_index", "_id", "_score", "fields"]
    assert hit["_index"] == scripts.index
    assert hit["_id"] == hashlib.sha256(path.encode()).hexdigest()
    assert 0.99 < hit["_score"] == response["hits"]["max_score"] <= 1
    assert list(hit["fields"].items()) == [("file_path", [path]), ("desc", ["Bald_Eagle"])]


def test_both_kinds_of_index_give_the_same_hits(local: Scripts, elastic: Scripts, picture: Picture) -> None:
    for number in range(150):
        picture(f"images/{number % 7}/{number}.png", seed=number)
    local.index = elastic.index
    local.create()
    elastic.create()
    queries = [picture(f"query-{number}.png", size=(37, 64), seed=1000 + number) for number in range(5)]
    for k in (1, 10):
        for options in ((), ("--desc", "3")):
            pairs = zip(
                local.search(*queries, "-k", k, *options), elastic.search(*queries, "-k", k, *options), strict=True
            )
            for ours, theirs in pairs:
                assert ours["hits"]["total"] == theirs["hits"]["total"] == {"value": k, "relation": "eq"}
                for mine, yours in zip(ours["hits"]["hits"], theirs["hits"]["hits"], strict=True):
                    assert mine["_score"] == pytest.approx(yours["_score"], abs=1e-4)
                    assert (mine["_id"], mine["fields"]) == (yours["_id"], yours["fields"])


def test_a_class_and_a_number_of_neighbors_can_be_asked_for(scripts: Scripts, birds: list[Path]) -> None:
    scripts.create()
    (response,) = scripts.search(birds[0], "-k", 5, "--desc", "Wren")
    hits = response["hits"]["hits"]
    assert [hit["fields"]["desc"] for hit in hits] == [["Wren"]] * 5
    assert [hit["_score"] for hit in hits] == sorted((hit["_score"] for hit in hits), reverse=True)
    assert len(scripts.search(birds[0], "-k", 100)[0]["hits"]["hits"]) == 31
    done = scripts.run("search.py", birds[0], "--desc", "Dodo")
    assert done.returncode == 1 and done.stderr.count("has no image of class Dodo") == 1


def test_there_is_one_line_for_each_image_in_order_whether_it_can_be_read_or_not(
    scripts: Scripts, birds: list[Path]
) -> None:
    scripts.create()
    (scripts.folder / "bad.png").write_bytes(birds[0].read_bytes()[:100])
    done = scripts.run("search.py", birds[25], "bad.png", "missing.png", birds[2], scripts.folder)
    assert done.returncode == 1
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.get("status") for line in lines] == [None, 400, 400, None, 400]
    found = [line["hits"]["hits"][0]["fields"]["file_path"][0] for line in lines if "hits" in line]
    assert found == ["./images/deep/down/Wren/5.png", "./images/Bald_Eagle/2.png"]
    named = re.findall(r"^Cannot read (\S+): ", done.stderr, re.MULTILINE)
    assert named == ["bad.png", "missing.png", str(scripts.folder)]
    assert lines[2]["error"] == {"type": "image_error", "reason": "Cannot read missing.png: No such file or directory"}


def test_a_second_run_embeds_only_what_changed(scripts: Scripts, birds: list[Path], picture: Picture) -> None:
    scripts.create()
    assert counts(scripts.create()) == {"unchanged": 31}

    picture("images/Osprey/4.png", seed=9999)  # other content
    os.utime(birds[0])  # touched, same content
    picture("images/Osprey/new.png")
    assert counts(scripts.create()) == {"new": 1, "updated": 1, "unchanged": 30}
    assert counts(scripts.create()) == {"unchanged": 32}
    (response,) = scripts.search(birds[14], "-k", 1)
    assert response["hits"]["hits"][0]["fields"]["file_path"] == ["./images/Osprey/4.png"]
    assert response["hits"]["max_score"] == pytest.approx(1, abs=1e-5)


def test_prune_forgets_what_is_gone_below_the_folder_only(
    scripts: Scripts, birds: list[Path], picture: Picture
) -> None:
    other = picture("other/a.png")
    picture("images-too/b.png")
    for folder in ("images", "other", "images-too"):
        scripts.create("--images", folder)
    for path in [*birds[:10], other]:
        path.unlink()
    shutil.rmtree(scripts.folder / "images-too")
    assert counts(scripts.create()) == {"unchanged": 21}
    assert len(scripts.paths()) == 33
    assert counts(scripts.create("--prune")) == {"unchanged": 21, "deleted": 10}
    expected = sorted(f"./{path.relative_to(scripts.folder)}" for path in birds[10:])
    assert scripts.paths() == sorted([*expected, "./other/a.png", "./images-too/b.png"])
    # What is left is still found where it was.
    assert [response["hits"]["hits"][0]["fields"]["file_path"] for response in scripts.search(*birds[10:])] == [
        [f"./{path.relative_to(scripts.folder)}"] for path in birds[10:]
    ]


def test_hidden_and_other_files_are_skipped_and_counted_by_kind(scripts: Scripts, picture: Picture) -> None:
    picture("images/a.png")
    picture("images/.b.png")
    for name in ("notes.txt", "more.txt", "vector.svg", "README"):
        (scripts.folder / "images" / name).write_text("no image")
    parts = summary(scripts.create())
    assert parts["new"] == "1"
    assert parts["skipped"].startswith("2 .txt, ")
    assert sorted(parts["skipped"].split(", ")) == ["1 .svg", "1 hidden", "1 without extension", "2 .txt"]


def test_unreadable_images_are_named_and_the_rest_goes_on(scripts: Scripts, birds: list[Path]) -> None:
    birds[0].write_bytes(b"no image")
    birds[1].write_bytes(b"")
    stderr = scripts.create(code=1)
    assert counts(stderr) == {"new": 29, "unreadable": 2}
    assert "Cannot read ./images/Bald_Eagle/0.png: not an image that Pillow can read" in stderr


def test_many_unreadable_images_are_counted_but_not_all_named(local: Scripts) -> None:
    (local.folder / "images").mkdir()
    for number in range(50):
        (local.folder / "images" / f"{number}.png").write_bytes(b"no image")
    stderr = local.create(code=1)
    assert counts(stderr) == {"unreadable": 50}
    assert stderr.count("Cannot read") == 20 and stderr.count("they are only counted") == 1


def test_an_index_of_another_model_is_refused_and_left_alone(scripts: Scripts, birds: list[Path]) -> None:
    scripts.create()
    model = averaging_model(scripts.folder / "model.onnx")
    (scripts.folder / "images" / "new.png").write_bytes(birds[0].read_bytes())
    stderr = scripts.create("--model", model, code=2)
    assert "made with --model thumbnail" in stderr and "--index" in stderr
    assert counts(scripts.create()) == {"new": 1, "known": 1, "unchanged": 31}


def test_search_uses_the_model_that_made_the_index(scripts: Scripts, birds: list[Path]) -> None:
    model = averaging_model(scripts.folder / "model.onnx")
    assert counts(scripts.create("--model", model)) == {"new": 31}
    assert scripts.search(birds[7])[0]["hits"]["max_score"] == pytest.approx(1, abs=1e-5)

    moved = model.rename(scripts.folder / "moved.onnx")
    image((40, 30), 999).save(scripts.folder / "new.png")
    done = scripts.run("search.py", "new.png")
    assert done.returncode == 2 and "--model FILE" in done.stderr
    assert scripts.search(birds[7], "--model", moved)[0]["hits"]["max_score"] == pytest.approx(1, abs=1e-5)
    assert counts(scripts.create("--model", moved)) == {"unchanged": 31}  # a file is known by its content

    other = averaging_model(scripts.folder / "other.onnx", scale=2)
    done = scripts.run("search.py", birds[7], "--model", other)
    assert done.returncode == 2 and "is another model" in done.stderr and done.stdout == ""
    other.rename(model)
    done = scripts.run("search.py", "new.png")
    assert done.returncode == 2 and "and it has changed" in done.stderr and done.stdout == ""


def test_a_document_that_is_written_again_is_replaced(scripts: Scripts) -> None:
    embedding = np.ones(768, np.float32)
    with open_scripts_index(scripts, scripts.folder) as index:
        index.create(IndexMetadata(ModelInfo("thumbnail"), "/"))
        assert index.get_metadata()
        for desc in ("before", "after"):  # the project's folder was renamed: ./x.png is in another class
            assert list(index.write([Document(ImageFile("/x.png", "./x.png", desc, 1, 1), "0" * 64, embedding)]))
        index.refresh()
        (hit,) = index.search(embedding, 9)["hits"]["hits"]
    assert hit["fields"] == {"file_path": ["./x.png"], "desc": ["after"]}


def test_no_index_and_an_empty_one_are_reported_in_one_line(scripts: Scripts, birds: list[Path]) -> None:
    done = scripts.run("search.py", birds[0])
    there_is_none = f"There is no index {scripts.index} in " if "ES_URL" in scripts.environment else "There is no file"
    assert done.returncode == 2 and there_is_none in done.stderr and done.stdout == ""
    scripts.create()
    birds[0].rename(scripts.folder / "elsewhere.png")
    for path in birds[1:]:
        path.unlink()
    scripts.create("--prune-all")
    for options in ((), ("--min-score", "0.9")):
        done = scripts.run("search.py", "elsewhere.png", *options)
        assert done.returncode == 2 and "is empty" in done.stderr and done.stdout == ""


def test_clip_that_cannot_be_downloaded_names_both_ways_on(scripts: Scripts, birds: list[Path]) -> None:
    stderr = scripts.create("--model", "clip", code=1)
    assert stderr.splitlines()[-1].startswith("create.py: CLIP could not be downloaded")
    assert "--model FILE" in stderr and "--model thumbnail --index tryout" in stderr


def test_a_line_says_which_index_and_model_are_used(scripts: Scripts, birds: list[Path]) -> None:
    where = r"https://localhost:\d+" if "ES_URL" in scripts.environment else "imagesearch.db"
    line = rf"Index {scripts.index} in {where}, made with the model thumbnail \(a baseline, not CLIP\)\.\n"
    assert re.match(line, scripts.create())
    assert re.match(line, scripts.create())
    assert scripts.run("search.py", birds[0]).stderr == ""  # it is for terminals


def test_db_is_refused_beside_es_url(elastic: Scripts, birds: list[Path]) -> None:
    elastic.leaves_out_db = False
    for arguments in (("create.py", "--model", "thumbnail"), ("search.py", birds[0])):
        done = elastic.run(*arguments, "--db", "x.db")
        assert done.returncode == 2 and "unset ES_URL, or leave out --db" in done.stderr


def test_a_local_index_is_one_file(local: Scripts, birds: list[Path]) -> None:
    local.create("--db", "other.db")
    assert [path.name for path in local.folder.glob("*.db*")] == ["other.db"]


def test_the_indexes_that_there_are_are_named_if_another_is_asked_for(scripts: Scripts, birds: list[Path]) -> None:
    scripts.create()
    made, scripts.index = scripts.index, "other"
    done = scripts.run("search.py", birds[0])
    assert done.returncode == 2
    assert (
        f"There is no index other in {'https' if 'ES_URL' in scripts.environment else 'imagesearch.db'}" in done.stderr
    )
    assert f"{made} (thumbnail)" in done.stderr
    scripts.index = made


def test_no_images_is_reported_in_one_line(local: Scripts) -> None:
    assert "./images: No such file or directory. Put your images there" in local.create(code=2)
    (local.folder / "images").mkdir()
    (local.folder / "images" / "notes.txt").write_text("no image")
    assert local.create(code=2).startswith("create.py: There are no images below ./images.")
    assert not (local.folder / "imagesearch.db").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("search.py", "a.png", "-k", "0"),
        ("search.py", "a.png", "-k", "20000"),
        ("search.py", "a.png", "-k", "ten"),
        ("search.py",),
        ("create.py", "--retry-timeout", "nan"),
        ("create.py", "--retry-timeout", "soon"),
        ("create.py", "--imag", "x"),
        ("create.py", "--model", "missing.onnx"),
        ("create.py", "--images", ""),
        ("create.py", "--images", "images", "--images", "other"),
        ("create.py", "--db", ":memory:"),
        ("create.py", "--db", ""),
        ("search.py", "a.png", "--min-score", "2"),
        ("search.py", "a.png", "--min-score", "nan"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: tuple[str, ...], local: Scripts, picture: Picture) -> None:
    picture("images/a.png")
    done = local.run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(rf"(Index .*\n)?{arguments[0]}: .+\n", done.stderr), done.stderr


@pytest.mark.parametrize("name", ["Images", "a b", "-a", "_a", ".a", "..", "a/b", "a*", "a,b", "a#", "", "x" * 256])
def test_index_names_that_elasticsearch_refuses_are_refused_by_both(
    name: str, local: Scripts, picture: Picture
) -> None:
    picture("images/a.png")
    local.index = name
    for script in ("create.py", "search.py"):
        done = local.run(script, *(["images/a.png"] if script == "search.py" else []))
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1


def test_the_greatest_k_is_taken(scripts: Scripts, birds: list[Path]) -> None:
    scripts.create()
    assert len(scripts.search(birds[0], "-k", 10_000)[0]["hits"]["hits"]) == 31


def test_a_folder_whose_name_is_no_utf8_can_be_indexed_pruned_and_searched(scripts: Scripts) -> None:
    folder = os.fsdecode(b"caf\xe9")
    (scripts.folder / folder).mkdir()
    for seed in range(3):
        image((30, 30), seed).save(scripts.folder / folder / f"{seed}.png")
    assert counts(scripts.create("--images", folder)) == {"new": 3}
    (scripts.folder / folder / "0.png").unlink()
    assert counts(scripts.create("--images", folder, "--prune")) == {"unchanged": 2, "deleted": 1}
    assert len(scripts.search(f"{folder}/1.png", "-k", 9, "--desc", folder)[0]["hits"]["hits"]) == 2


def test_results_that_cannot_be_written_are_said_in_a_line(local: Scripts, birds: list[Path]) -> None:
    local.create()
    command = [sys.executable, str(ROOT / "search.py"), str(birds[0]), "--index", local.index]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command,
            cwd=local.folder,
            env=local.environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["search.py: the results cannot be written: No space left on device."]


def test_a_terminal_shows_a_bar(local: Scripts, birds: list[Path]) -> None:
    birds[0].write_bytes(b"no image")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command = [sys.executable, str(ROOT / "create.py"), "--model", "thumbnail", "--index", local.index]
    with subprocess.Popen(
        command, cwd=local.folder, env=local.environment | {"TERM": "xterm"}, stderr=theirs
    ) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the other end has been closed
            while part := os.read(ours, 4096):
                shown += part
    os.close(ours)
    assert process.returncode == 1
    assert b"100%|" in shown and b"| 31/31, 1 unreadable" in shown


# Elasticsearch alone


def one_line(scripts: Scripts, birds: list[Path], code: int = 2, **environment: str) -> str:
    """Runs both scripts in an environment that cannot work; the line that both end with."""
    lines = []
    for arguments in (("create.py", "--model", "thumbnail"), ("search.py", birds[0])):
        done = scripts.run(*arguments, **environment)
        assert done.returncode == code and done.stdout == "", done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        for secret in ("p@ss/w:rd", quote("p@ss/w:rd", safe=""), "hunter2"):
            assert secret not in done.stderr
        lines.append(done.stderr.split(": ", 1)[1])
    assert lines[0] == lines[1]
    return lines[0]


def test_a_wrong_password_is_one_line(elastic: Scripts, birds: list[Path]) -> None:
    url = re.sub("admin:[^@]*@", "admin:hunter2@", elastic.environment["ES_URL"])
    assert "rejected the user or password in ES_URL" in one_line(elastic, birds, ES_URL=url)
    url = re.sub("admin:[^@]*@", "", elastic.environment["ES_URL"])
    assert "none was given" in one_line(elastic, birds, ES_URL=url)
    assert "rejected the API key in ES_API_KEY" in one_line(elastic, birds, ES_URL=url, ES_API_KEY="hunter2")


def test_a_host_that_cannot_be_is_one_line(elastic: Scripts, birds: list[Path]) -> None:
    assert "No answer from" in one_line(elastic, birds, ES_URL="https://admin:hunter2@a..b:9200", code=1)


def test_a_wrong_ca_is_one_line(elastic: Scripts, birds: list[Path]) -> None:
    line = one_line(elastic, birds, ES_CA_CERT=str(CA().write(elastic.folder / "other.pem")))
    assert "cannot be verified" in line and "other.pem, which is not the CA that signed it" in line
    assert "set ES_CA_CERT to the file of the CA that signed it" in one_line(elastic, birds, ES_CA_CERT="")


def test_no_server_and_a_wrong_url_are_one_line(elastic: Scripts, birds: list[Path]) -> None:
    url = elastic.environment["ES_URL"]
    assert "No answer from" in one_line(elastic, birds, ES_URL="https://admin:hunter2@localhost:9", code=1)
    assert "No answer from" in one_line(elastic, birds, ES_URL="https://admin:hunter2@nowhere.invalid:9200", code=1)
    line = one_line(elastic, birds, ES_URL=url.replace("https", "http"), code=1)
    assert "No answer from" in line and "ES_URL must begin with https://" in line
    assert "ES_URL" in one_line(elastic, birds, ES_URL=url.replace("https", "ftp"))


def test_insecure_goes_on_without_the_ca_and_says_so(elastic: Scripts, birds: list[Path]) -> None:
    assert "--insecure" in elastic.create("--insecure", ES_CA_CERT="")
    done = elastic.run("search.py", birds[0], "--insecure", ES_CA_CERT="")
    assert done.returncode == 0 and "--insecure" in done.stderr and done.stderr.count("\n") == 1


def test_an_api_key_stands_for_the_password(elastic: Scripts, birds: list[Path], server: Server) -> None:
    privileges = {"images": {"indices": [{"names": [elastic.index], "privileges": ["all"]}]}}
    try:
        answer = server.request("POST", "_security/api_key", {"name": elastic.index, "role_descriptors": privileges})
    except AssertionError as refused:
        if "pattern_capture" not in str(refused):
            raise
        pytest.skip(
            "this Elasticsearch lacks the module analysis-common, without which it keeps no keys: set TEST_ES_URL;"
            " that leaves a real API key untested"
        )
    keyed = {"ES_URL": re.sub("admin:[^@]*@", "", server.url), "ES_API_KEY": answer["encoded"]}
    assert counts(elastic.create(**keyed)) == {"new": 31}
    assert elastic.search(birds[1], **keyed)[0]["hits"]["max_score"] == pytest.approx(1, abs=1e-5)


def test_the_api_key_is_sent_by_both_clients(local: Scripts, birds: list[Path]) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), RecordingServer) as door:
        threading.Thread(target=door.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{door.server_port}"
        stderr = local.create(ES_URL=url, ES_API_KEY="a2V5OmtleQ==", code=2)
        door.shutdown()
    assert RecordingServer.seen == [("GET", "ApiKey a2V5OmtleQ=="), ("PUT", "ApiKey a2V5OmtleQ==")]
    assert "HTTP 401" in stderr


def test_the_index_is_as_pinned(elastic: Scripts, birds: list[Path], server: Server) -> None:
    elastic.create()
    mappings = server.request("GET", f"{elastic.index}/_mapping")[elastic.index]["mappings"]
    assert mappings["dynamic"] == "strict"
    folder = str(elastic.folder)
    meta = {"name": "thumbnail", "sha256": "", "preprocessing": PREPROCESSING, "folder": folder}
    assert mappings["_meta"] == {"imagesearch": meta}
    embeddings = mappings["properties"]["embeddings"]
    assert (embeddings["type"], embeddings["dims"], embeddings["similarity"]) == ("dense_vector", 768, "cosine")
    assert embeddings["index_options"]["type"] == "int8_hnsw"
    assert set(mappings["properties"]) == {"embeddings", "desc", "file_path", "size", "mtime", "sha256"}


def test_an_index_that_is_not_ours_is_refused_and_left_alone(
    elastic: Scripts, birds: list[Path], server: Server
) -> None:
    server.request("PUT", elastic.index, {"mappings": {"properties": {"title": {"type": "text"}}}})
    assert "no record of its model" in one_line(elastic, birds)
    assert server.request("GET", f"{elastic.index}/_count")["count"] == 0
    meta = {"imagesearch": {"name": "thumbnail", "sha256": "", "preprocessing": PREPROCESSING, "folder": "/"}}
    server.request("DELETE", elastic.index)
    small = {"_meta": meta, "properties": {"embeddings": {"type": "dense_vector", "dims": 8}}}
    server.request("PUT", elastic.index, {"mappings": small})
    assert "not made by this version of create.py" in one_line(elastic, birds)


def test_vectors_of_another_preprocessing_are_refused(scripts: Scripts, birds: list[Path]) -> None:
    other = ModelInfo("thumbnail", preprocessing=PREPROCESSING + 1)
    with open_scripts_index(scripts, scripts.folder) as index:
        index.create(IndexMetadata(other, str(scripts.folder)))
    refused = "another version of create.py, whose embeddings differ"
    assert refused in scripts.create(code=2) and refused in scripts.run("search.py", birds[0]).stderr


def test_a_search_imports_only_what_it_needs(scripts: Scripts, birds: list[Path]) -> None:
    model = averaging_model(scripts.folder / "model.onnx")
    scripts.create("--model", model)
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules, sep='\\n', file=open('modules', 'w')))"
    (scripts.folder / "sitecustomize.py").write_text(code)
    image((40, 30), 999).save(scripts.folder / "new.png")
    modules = []
    for query in ("new.png", birds[0]):
        scripts.search(query, PYTHONPATH=str(scripts.folder))
        modules.append(set((scripts.folder / "modules").read_text().split()))
    for_new, for_indexed = modules
    never = {"transformers", "sklearn", "huggingface_hub", "elasticsearch", "onnx", "pi_heif"}
    assert {"imgbeddings", "onnxruntime", "numpy"} <= for_new and not never & for_new
    assert not {"imgbeddings", "onnxruntime"} & for_indexed


def test_names_and_classes_are_whole_whatever_they_hold(scripts: Scripts) -> None:
    names = [
        "plain",
        "two words",
        "quo\"te's",
        "new\nline",
        "🦅 émoji",
        "<script>alert(1)",
        "tab\tand\\back",
        os.fsdecode(b"caf\xe9"),
    ]
    for seed, name in enumerate(names):
        folder = scripts.folder / "images" / name
        folder.mkdir(parents=True)
        image((40, 30), seed).save(folder / "x.png")
    assert counts(scripts.create()) == {"new": len(names)}
    assert counts(scripts.create("--prune")) == {"unchanged": len(names)}
    for name in names:
        path = scripts.folder / "images" / name / "x.png"
        text = os.fsencode(name).decode("utf-8", "backslashreplace")
        hit = scripts.search(path, "--desc", text)[0]["hits"]["hits"][0]
        assert hit["fields"] == {"file_path": [f"./images/{text}/x.png"], "desc": [text]}
        assert hit["_score"] == pytest.approx(1, abs=1e-5)


def test_min_score_is_a_cutoff(scripts: Scripts) -> None:
    for seed in range(40):
        path = scripts.folder / "images" / str(seed % 2) / f"{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(seed, (40, 30)))
    scripts.create()
    Path(scripts.folder / "query.png").write_bytes(png(1000, (40, 30)))
    scores = [hit["_score"] for hit in hits(scripts, "query.png", "-k", 40)]
    middle = scores[10]
    for options in ((), ("--desc", "1")):
        everything = hits(scripts, "query.png", "-k", 40, *options)
        limited = hits(scripts, "query.png", "-k", 40, "--min-score", middle, *options)
        assert limited == [hit for hit in everything if hit["_score"] >= middle - 1e-6]
        assert hits(scripts, "query.png", "-k", 3, "--min-score", middle, *options) == limited[:3]
    done = scripts.run("search.py", "query.png", "-k", 5, "--min-score", 0.99999)
    assert done.returncode == 0 and json.loads(done.stdout)["hits"]["hits"] == []


def test_min_score_keeps_what_the_printed_score_says(scripts: Scripts, picture: Picture) -> None:
    """The same picture at 1, and any hit at its own score: float32 rounds some below."""
    paths = [picture(f"images/{seed}.png", seed=seed) for seed in range(60)]
    model = averaging_model(scripts.folder / "model.onnx", scale=0.37)
    scripts.create("--model", model)
    for path, response in zip(paths, scripts.search(*paths, "--min-score", 1), strict=True):
        (hit,) = response["hits"]["hits"]
        assert hit["fields"]["file_path"] == [f"./{path.relative_to(scripts.folder)}"]
        assert 1 - 1e-6 <= hit["_score"] <= 1
    for path, response in zip(paths[:3], scripts.search(*paths[:3], "-k", 9), strict=True):
        score = response["hits"]["hits"][5]["_score"]
        assert len(scripts.search(path, "-k", 9, "--min-score", score)[0]["hits"]["hits"]) >= 6


def test_an_indexed_picture_is_searched_without_the_model(scripts: Scripts, birds: list[Path]) -> None:
    """Its content is looked up, wherever it is; only other pictures need the model."""
    model = averaging_model(scripts.folder / "model.onnx", scale=0.37)
    scripts.create("--model", model)
    before = scripts.search(*birds[:5], "-k", 3)
    (scripts.folder / "elsewhere.png").write_bytes(birds[0].read_bytes())
    model.rename(scripts.folder / "moved.onnx")
    names = scripts.folder / "names.txt"
    names.write_text("\n".join(["elsewhere.png", *map(str, birds[1:5])]))
    after = scripts.search(f"@{names}", "-k", 3)
    assert [response["hits"] for response in after] == [response["hits"] for response in before]
    Image.new("RGB", (9, 9), "red").save(scripts.folder / "new.png")
    done = scripts.run("search.py", "new.png")
    assert done.returncode == 2 and "use --model FILE to say where it is now" in done.stderr
    assert scripts.run("search.py", birds[0], "--model", "thumbnail").returncode == 2  # still checked


def test_names_are_taken_as_users_write_them(local: Scripts, birds: list[Path]) -> None:
    local.create("--images", f"file://{local.folder}/images")
    assert "" not in local.paths() and len(local.paths()) == 31
    local.environment["HOME"] = str(local.folder)
    assert counts(local.create("--images", "~/images")) == {"unchanged": 31}
    for query in (f"file://{birds[0]}", "~/images/Bald_Eagle/0.png"):
        done = local.run("search.py", query)
        assert json.loads(done.stdout)["hits"]["max_score"] == pytest.approx(1, abs=1e-6)
    done = local.run("search.py", birds[0], "-k", 2, birds[1], "--desc", "Osprey")  # options between images
    assert done.returncode == 0 and done.stdout.count("\n") == 2
    done = local.run("search.py", "images")
    assert done.returncode == 1 and "Cannot read images: is a folder" in done.stderr


def test_a_folder_without_its_option_is_proposed(local: Scripts) -> None:
    done = local.run("create.py", "my", "photos")
    assert done.returncode == 2
    assert "unrecognized arguments: 'my photos'; to index a folder or bucket, use --images 'my photos'" in done.stderr
    (local.folder / "a.jpg").touch()
    assert "./a.jpg is a file; --images takes a folder or a bucket" in local.create("--images", "a.jpg", code=2)


def test_files_that_are_gone_are_mentioned(scripts: Scripts, birds: list[Path]) -> None:
    scripts.create()
    for path in birds[:3]:
        path.unlink()
    gone = "Documents without an image: 3; --prune deletes those of deleted files."
    assert gone in scripts.create()
    assert gone not in scripts.create("--part", "1/2")
    damaged = scripts.folder / "images" / "damaged.png"
    damaged.write_bytes(b"x")
    assert "Documents without an image: at least 2; --prune" in scripts.create(code=1)
    damaged.unlink()
    assert gone not in scripts.create("--prune") and "Documents without" not in scripts.create()


@pytest.mark.parametrize("closing", ["2>&-", "2>/dev/full", "2>/dev/full <&-"])
def test_messages_that_cannot_be_written_are_dropped(closing: str, local: Scripts, birds: list[Path]) -> None:
    script = f"{sys.executable} {ROOT}/create.py --model thumbnail {closing}"
    search = f"{sys.executable} {ROOT}/search.py missing.png {birds[0]} {closing}"
    for command, code, lines in ((script, 0, 0), (search, 1, 2)):
        done = local.shell(command)
        assert done.returncode == code
        assert len([json.loads(line) for line in done.stdout.splitlines()]) == lines


def test_standard_streams_that_are_closed_are_errors_where_they_matter(local: Scripts, birds: list[Path]) -> None:
    local.create()
    search = f"{sys.executable} {ROOT}/search.py --index {local.index}"
    for command, message in (
        (f"{search} - <&-", "Cannot read 'standard input': it is empty"),
        (f"{search} {birds[0]} >&-", "the results cannot be written: Bad file descriptor"),
    ):
        done = local.shell(command)
        assert done.returncode == 1 and message in done.stderr, done.stderr


def test_a_terminal_shows_each_hit_in_a_line(local: Scripts, birds: list[Path]) -> None:
    local.create()
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "search.py"), str(birds[0]), "missing.png", "--index", local.index]
    shown = b""
    with subprocess.Popen(command, cwd=local.folder, env=local.environment, stdout=theirs, stderr=theirs):
        os.close(theirs)
        with contextlib.suppress(OSError):  # the other end has been closed
            while part := os.read(ours, 4096):
                shown += part
    os.close(ours)
    lines = shown.decode().splitlines()
    assert lines[0].startswith(f"Index {local.index} in imagesearch.db, made with the model thumbnail")
    assert lines[2] == "1.0000000  Bald_Eagle  ./images/Bald_Eagle/0.png"
    assert shown.count(b"Cannot read missing.png") == 1


def test_names_in_the_json_are_as_they_are(local: Scripts, picture: Picture) -> None:
    picture("images/Vögel/Kohlmeise.png")
    local.create()
    assert "./images/Vögel/Kohlmeise.png" in local.run("search.py", "images/Vögel/Kohlmeise.png").stdout


def test_a_class_that_differs_in_case_or_normal_form_is_proposed_alone(scripts: Scripts, picture: Picture) -> None:
    for number, name in enumerate(["Vo\u0308gel", "Voegel", "Vogel"]):
        picture(f"images/{name}/{number}.png", seed=number)
    scripts.create()
    done = scripts.run("search.py", "images/Vogel/2.png", "images/Vogel/2.png", "--desc", "v\u00f6gel")
    assert done.returncode == 1
    assert done.stderr.count("did you mean") == 1 and " or " not in done.stderr
    assert "innermost folder" in done.stderr


def test_folders_that_link_to_each_other_are_searched_once(local: Scripts, picture: Picture) -> None:
    for name in "abcdefg":
        picture(f"images/{name}/{name}.png")
    for name in "abcdefg":
        for other in set("abcdefg") - {name}:
            (local.folder / "images" / name / other).symlink_to(f"../{other}")
    assert counts(local.create()) == {"new": 7}
    assert local.paths() == [f"./images/{name}/{name}.png" for name in "abcdefg"]


def test_a_skipped_name_writes_nothing_to_the_terminal(local: Scripts, picture: Picture) -> None:
    picture("images/a.png")
    for name in ("x.a \x1b]0;title\x07", "y.b\nz"):
        (local.folder / "images" / name).touch()
    stderr = local.create()
    assert "\x1b" not in stderr and stderr.count("\n") == 2


def test_a_search_that_is_cut_off_ends(local: Scripts, birds: list[Path]) -> None:
    """Its threads end before the index is closed: there is no error and no wait, whenever the reader goes."""
    local.create()
    (local.folder / "names.txt").write_text("\n".join(100 * [str(path) for path in birds]))
    search = f"{sys.executable} {ROOT}/search.py --index {local.index} @names.txt"
    for number in (1, 1, 40, 700):
        done = local.shell(f"timeout 60 {search} | head -n {number}; exit ${{PIPESTATUS[0]}}")
        assert done.returncode == 141 and done.stderr == "", done.stderr
        assert len(done.stdout.splitlines()) == number
    done = local.shell(f"timeout 60 {search} --desc Nope")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr


def test_names_in_a_file_may_look_like_options(local: Scripts, birds: list[Path]) -> None:
    local.create()
    (local.folder / "-k.png").write_bytes(birds[0].read_bytes())
    (local.folder / "names.txt").write_text("-k.png\n\n")
    assert local.search("@names.txt")[0]["hits"]["max_score"] == pytest.approx(1, abs=1e-6)
    (local.folder / "names.txt").write_bytes(b"caf\xe9.png\n")
    done = local.run("search.py", "@names.txt")
    assert done.returncode in (1, 2) and done.stderr.count("\n") == 1


def test_a_buckets_url_with_a_password_is_not_shown(local: Scripts, birds: list[Path]) -> None:
    local.create()
    done = local.run("search.py", "s3://user:s3cret@birds/a.jpg")
    assert done.returncode == 1 and "s3cret" not in done.stdout + done.stderr
