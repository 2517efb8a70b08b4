"""A short pass on Elasticsearch 9.2: the same two scripts, the same index."""

import pytest

from tests.pictures import Picture
from tests.running import Scripts, counts, embeddings
from tests.server import Server


def test_elasticsearch_9_serves_as_8_does(elasticsearch_9: Scripts, picture: Picture) -> None:
    for number in range(50):
        picture(f"images/{number % 5}/{number}.png", seed=number)
    elasticsearch_9.folder = picture("images/0/0.png", seed=0).parents[2]
    assert counts(elasticsearch_9.create()) == {"new": 50}
    before = embeddings(elasticsearch_9, elasticsearch_9.folder)
    (elasticsearch_9.folder / "images" / "0" / "0.png").touch()
    picture("images/0/5.png", seed=5).unlink()
    (elasticsearch_9.folder / "images" / "1").rename(elasticsearch_9.folder / "images" / "one")
    pruned = counts(elasticsearch_9.create("--prune"))
    assert pruned == {"new": 10, "known": 10, "unchanged": 39, "deleted": 11}
    after = embeddings(elasticsearch_9, elasticsearch_9.folder)
    for path, bits in after.items():  # to the last bit, though 9.2 would leave vectors out of _source
        assert bits == before[path.replace("/one/", "/1/")]
    hits = elasticsearch_9.search(elasticsearch_9.folder / "images" / "0" / "0.png", "-k", 10, "--desc", "0")[0][
        "hits"
    ]["hits"]
    assert len(hits) == 9
    assert hits[0]["fields"] == {"file_path": ["./images/0/0.png"], "desc": ["0"]}
    assert hits[0]["_score"] == pytest.approx(1, abs=1e-5)
    assert (
        Server(elasticsearch_9.environment["ES_URL"], elasticsearch_9.environment["ES_CA_CERT"]).request(
            "GET", f"{elasticsearch_9.index}/_count"
        )["count"]
        == 49
    )
