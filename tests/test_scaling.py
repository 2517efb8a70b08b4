"""Several machines embed; shards and replicas are the index's own; another model takes over without a gap."""

import json

import numpy as np
import pytest

from imagesearch.connection import Connection
from imagesearch.elasticsearch_index import ElasticsearchIndex
from imagesearch.errors import ImageSearchError
from imagesearch.records import Document, ImageFile
from imagesearch.retry import NO_RETRY
from tests.pictures import Picture, averaging_model
from tests.running import Scripts, counts, start_recipe
from tests.server import Server


def test_parts_are_disjoint_and_together_all(scripts: Scripts, picture: Picture) -> None:
    for number in range(60):
        picture(f"images/{number % 3}/{number}.png", size=(8, 8), seed=number)
    new = [counts(scripts.create("--part", f"{part}/4"))["new"] for part in (3, 1, 4, 2)]
    assert sum(new) == 60  # each image was new to one part only
    assert min(new) >= 5
    assert counts(scripts.create("--part", "2/4")) == {"unchanged": new[3]}
    assert counts(scripts.create()) == {"unchanged": 60}
    assert len(scripts.paths()) == 60


def test_parts_at_once_share_the_work(scripts: Scripts, picture: Picture) -> None:
    for number in range(60):
        picture(f"images/{number % 3}/{number}.png", size=(8, 8), seed=number)
    processes = [scripts.start("create.py", "--model", "thumbnail", "--part", f"{part}/3") for part in (1, 2, 3)]
    ends = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], ends
    assert sum(counts(stderr)["new"] for stderr in ends) == 60
    assert counts(scripts.create()) == {"unchanged": 60}


def test_a_part_prunes_only_what_is_its_own(scripts: Scripts, picture: Picture) -> None:
    paths = [picture(f"images/{number}.png", size=(8, 8), seed=number) for number in range(41)]
    scripts.create()
    for path in paths[:40]:
        path.unlink()
    deleted = [counts(scripts.create("--part", f"{part}/2", "--prune"))["deleted"] for part in (1, 2)]
    assert sum(deleted) == 40
    assert min(deleted) >= 8
    assert len(scripts.paths()) == 1


@pytest.mark.parametrize("part", ["0/4", "5/4", "1", "1/0", "a/b", "-1/2", "1/2/3"])
def test_an_invalid_part_is_refused(part: str, local: Scripts) -> None:
    done = local.run("create.py", f"--part={part}")
    assert done.returncode == 2
    assert done.stderr.startswith("create.py: argument --part: must be I/N with I from 1 to N, for example 2/5.")
    assert done.stderr.count("\n") == 1


def test_shards_and_replicas_come_from_an_index_template(elastic: Scripts, server: Server, picture: Picture) -> None:
    for number in range(20):
        picture(f"images/{number}.png", size=(8, 8), seed=number)
    settings = {"number_of_shards": 3, "number_of_replicas": 2, "refresh_interval": "7s"}
    template = {"index_patterns": [elastic.index], "template": {"settings": settings}}
    server.request("PUT", f"_index_template/{elastic.index}", template)
    try:
        elastic.create()
    finally:
        server.request("DELETE", f"_index_template/{elastic.index}")
    kept = server.request("GET", f"{elastic.index}/_settings")[elastic.index]["settings"]["index"]
    assert (kept["number_of_shards"], kept["number_of_replicas"], kept["refresh_interval"]) == ("3", "2", "7s")
    response = elastic.search("images/7.png", "-k", 3)[0]
    assert response["_shards"] == {"total": 3, "successful": 3, "skipped": 0, "failed": 0}
    assert len(response["hits"]["hits"]) == 3
    assert response["hits"]["hits"][0]["fields"]["file_path"] == ["./images/7.png"]


def test_another_model_takes_over_without_a_gap(elastic: Scripts, server: Server, picture: Picture) -> None:
    """The recipes of docs/models.md: the next index is built while this one serves, and takes its name."""
    for number in range(10):
        picture(f"images/{number}.png", seed=number)
    averaging_model(elastic.folder / "other.onnx")
    averaging_model(elastic.folder / "third.onnx", scale=2)
    elastic.create()
    for model, before, after in (("other.onnx", "", "-v2"), ("third.onnx", "-v2", "-v3")):
        assert elastic.search("images/3.png")[0]["hits"]["hits"][0]["_index"] == elastic.index + before
        switching = start_recipe("docs/models.md", f"python3 create.py --model {model}", elastic)
        while switching.poll() is None:
            count = f"{elastic.index}/_count"
            try:
                answer = server.request("GET", count)
            except AssertionError:  # under way just when its index was removed
                answer = server.request("GET", count)
            assert answer["count"] == 10
        output, _ = switching.communicate()
        assert switching.returncode == 0
        assert json.loads(output)["acknowledged"] and not json.loads(output)["errors"]
        hit = elastic.search("images/3.png")[0]["hits"]["hits"][0]
        assert (hit["_index"], hit["fields"]["file_path"]) == (elastic.index + after, ["./images/3.png"])
        assert counts(elastic.create("--model", model)) == {"unchanged": 10}  # an alias is written through as well

    both = [{"add": {"index": f"{elastic.index}-v2", "alias": elastic.index}}]
    server.request("POST", "_aliases", {"actions": both})
    done = elastic.run("search.py", "images/3.png")
    assert done.returncode == 2
    assert f"{elastic.index} is an alias of several indices ({elastic.index}-v2, {elastic.index}-v3)" in done.stderr
    server.request("DELETE", f"{elastic.index}-v2,{elastic.index}-v3")


def test_a_run_keeps_to_the_index_whose_model_it_has(elastic: Scripts, server: Server, picture: Picture) -> None:
    """An alias is switched, then an index replaced by an alias, after a run has asked for the model."""
    picture("images/3.png")
    name, first, second = elastic.index, f"{elastic.index}-v1", f"{elastic.index}-v2"
    for elastic.index in (first, second):
        elastic.create()
    connection = Connection.from_env(elastic.environment)
    assert connection
    embedding = np.ones(768, np.float32)
    moved = "no longer points to the index"
    image = ImageFile("/p/images/4.png", "./images/4.png", "images", 1, 1)

    server.request("POST", "_aliases", {"actions": [{"add": {"index": first, "alias": name}}]})
    with ElasticsearchIndex(connection, name, NO_RETRY) as index:
        assert index.get_metadata()
        switch = [{"remove": {"index": first, "alias": name}}, {"add": {"index": second, "alias": name}}]
        server.request("POST", "_aliases", {"actions": switch})
        with pytest.raises(ImageSearchError, match=moved):
            list(index.write([Document(image, "0" * 64, embedding)]))
        with pytest.raises(ImageSearchError, match=f"{moved}.*Run the command again"):
            index.search(embedding, 1)
    foreign = f"{elastic.index}-foreign"
    server.request("PUT", foreign, {"mappings": {"properties": {"title": {"type": "text"}}}})
    with ElasticsearchIndex(connection, name, NO_RETRY) as index:
        assert index.get_metadata()
        switch = [{"remove": {"index": second, "alias": name}}, {"add": {"index": foreign, "alias": name}}]
        server.request("POST", "_aliases", {"actions": switch})
        written: list[object] = []
        with pytest.raises(ImageSearchError, match=moved):
            written.extend(index.write([Document(image, "0" * 64, embedding)]))
        assert written == []  # it is stored in no index of ours
        assert list(server.request("GET", foreign)) == [foreign]  # and that one is left alone
    server.request("DELETE", foreign)
    with ElasticsearchIndex(connection, first, NO_RETRY) as index:
        assert index.get_metadata()
        switch = [{"remove_index": {"index": first}}, {"add": {"index": second, "alias": first}}]
        server.request("POST", "_aliases", {"actions": switch})
        with pytest.raises(ImageSearchError, match=moved):
            index.search(embedding, 1)
    server.request("DELETE", second)
