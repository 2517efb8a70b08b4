"""Several machines embed; shards and replicas are the index's own; another model takes over without a gap."""

import re

import pytest

from tests.conftest import Picture, Scripts, Server, averaging_model
from tests.test_scripts import counts


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
def test_a_part_that_is_none_is_refused(part: str, local: Scripts) -> None:
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
    """The README's way: an alias is searched; another index is built; the alias is switched in one request."""
    for number in range(10):
        picture(f"images/{number}.png", seed=number)
    alias, first, second = elastic.index, f"{elastic.index}-v1", f"{elastic.index}-v2"
    elastic.index = first
    elastic.create()
    server.request("POST", "_aliases", {"actions": [{"add": {"index": first, "alias": alias}}]})
    elastic.index = alias
    assert elastic.search("images/3.png")[0]["hits"]["hits"][0]["_index"] == first
    assert counts(elastic.create()) == {"unchanged": 10}  # an alias is written through as well

    elastic.index = second
    elastic.create("--model", averaging_model(elastic.folder / "model.onnx"))
    elastic.index = alias
    assert elastic.search("images/3.png")[0]["hits"]["hits"][0]["_index"] == first
    switch = [{"remove": {"index": first, "alias": alias}}, {"add": {"index": second, "alias": alias}}]
    server.request("POST", "_aliases", {"actions": switch})
    hit = elastic.search("images/3.png")[0]["hits"]["hits"][0]
    assert (hit["_index"], hit["fields"]["file_path"]) == (second, ["./images/3.png"])

    server.request("POST", "_aliases", {"actions": [{"add": {"index": first, "alias": alias}}]})
    done = elastic.run("search.py", "images/3.png")
    assert done.returncode == 2
    assert re.search(rf"{alias} is an alias of several indices \({first}, {second}\)", done.stderr)
    server.request("DELETE", f"{first},{second}")
