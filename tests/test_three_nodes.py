"""A cluster of three nodes: shards and senders spread over it, and one node may be lost."""

import json
from pathlib import Path

from tests.pictures import Picture
from tests.running import MANY, count, counts, end, scripts_on, start_recipe, wait_until
from tests.server import Cluster, Server


def test_three_nodes_share_shards_and_senders(three_nodes: Cluster, picture: Picture, tmp_path: Path) -> None:
    """Three machines embed a part each and write to a node each; the template of docs/scaling.md spreads the index."""
    for number in range(60):
        picture(f"images/{number % 3}/{number}.png", size=(8, 8), seed=number)
    scripts = scripts_on(three_nodes, tmp_path, tmp_path)
    servers = [Server(url, str(three_nodes.ca)) for url in three_nodes.url.split(",")]
    output, _ = start_recipe("docs/scaling.md", "curl", scripts, ES_URL=servers[0].url).communicate()
    assert json.loads(output) == {"acknowledged": True}
    parts = [
        scripts.start("create.py", "--model", "thumbnail", "--part", f"{number}/3", ES_URL=node.url)
        for number, node in enumerate(servers, 1)
    ]
    ends = [part.communicate(timeout=120)[1] for part in parts]
    assert [part.returncode for part in parts] == [0, 0, 0], ends
    assert sum(counts(stderr)["new"] for stderr in ends) == 60
    assert counts(scripts.create()) == {"unchanged": 60}

    servers[1].request(
        "GET", f"_cluster/health/{scripts.index}?wait_for_status=green&wait_for_no_relocating_shards=true&timeout=60s"
    )
    shards = servers[2].request("GET", f"_cat/shards/{scripts.index}?format=json")
    assert sorted(shard["prirep"] for shard in shards) == ["p", "p", "p", "r", "r", "r"]
    assert {shard["state"] for shard in shards} == {"STARTED"}
    assert {shard["node"] for shard in shards} == {"node-0", "node-1", "node-2"}
    response = scripts.search("images/1/7.png", "-k", 60)[0]
    assert response["_shards"] == {"total": 3, "successful": 3, "skipped": 0, "failed": 0}
    assert len(response["hits"]["hits"]) == 60
    assert response["hits"]["hits"][0]["fields"]["file_path"] == ["./images/1/7.png"]


def test_a_cluster_that_loses_a_node_loses_nothing_and_goes_on(
    three_nodes: Cluster, many_images: Path, tmp_path: Path
) -> None:
    """While one script writes and another searches."""
    scripts = scripts_on(three_nodes, many_images, tmp_path)
    survivor = scripts_on(three_nodes, many_images, tmp_path)
    survivor.index = scripts.index
    survivor.environment["ES_URL"] = ",".join(three_nodes.url.split(",")[1:])
    scripts.create("--images", "images/3")
    indexed = count(survivor)
    queries = 3 * sorted((many_images / "images" / "3").iterdir())
    searching = scripts.start("search.py", *queries)
    assert searching.stdout
    lines = [searching.stdout.readline() for _ in range(20)]  # then it waits: the pipe is full
    writing = scripts.start("create.py", "--model", "thumbnail")
    wait_until(lambda: count(survivor) > indexed)
    assert writing.poll() is None and searching.poll() is None
    three_nodes.kill(three_nodes.nodes[0])  # the first address, and where the first request goes
    lines += searching.stdout.readlines()
    code, stderr = end(searching)
    assert code == 0, stderr
    found = [json.loads(line)["hits"]["hits"][0]["_score"] for line in lines]
    assert len(found) == len(queries) and min(found) > 0.99999
    code, stderr = end(writing)
    assert code == 0, stderr
    assert counts(stderr) == {"new": MANY - indexed, "unchanged": indexed}
    assert count(survivor) == MANY

    query = many_images / "images" / "7" / "7.png"
    response = scripts.search(query)[0]  # its first address is the lost node's
    assert response["hits"]["hits"][0]["fields"]["file_path"] == ["./images/7/7.png"]
    assert response["_shards"]["failed"] == 0
    alone = scripts.run("search.py", query, ES_URL=three_nodes.url.split(",")[0])
    assert alone.returncode == 1 and "No answer from https://localhost" in alone.stderr
