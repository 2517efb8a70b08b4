"""A short pass on Elasticsearch 9.2: the same two scripts, the same index."""

from pathlib import Path

import pytest

from tests.pictures import Picture
from tests.running import count, counts, embeddings, scripts_on
from tests.server import Cluster


def test_elasticsearch_9_serves_as_8_does(fragile_server: Cluster, tmp_path: Path, picture: Picture) -> None:
    if not fragile_server.release.startswith("9"):
        pytest.skip("there is no JDK 21 or newer here; that leaves Elasticsearch 9 untested")
    scripts = scripts_on(fragile_server, tmp_path, tmp_path)
    for number in range(50):
        picture(f"images/{number % 5}/{number}.png", seed=number)
    assert counts(scripts.create()) == {"new": 50}
    before = embeddings(scripts, scripts.folder)
    (scripts.folder / "images" / "0" / "0.png").touch()
    picture("images/0/5.png", seed=5).unlink()
    (scripts.folder / "images" / "1").rename(scripts.folder / "images" / "one")
    pruned = counts(scripts.create("--prune"))
    assert pruned == {"new": 10, "known": 10, "unchanged": 39, "deleted": 11}
    after = embeddings(scripts, scripts.folder)
    for path, bits in after.items():  # to the last bit, though 9.2 would leave vectors out of _source
        assert bits == before[path.replace("/one/", "/1/")]
    hits = scripts.search(scripts.folder / "images" / "0" / "0.png", "-k", 10, "--desc", "0")[0]["hits"]["hits"]
    assert len(hits) == 9
    assert hits[0]["fields"] == {"file_path": ["./images/0/0.png"], "desc": ["0"]}
    assert hits[0]["_score"] == pytest.approx(1, abs=1e-5)
    assert count(scripts) == 49
