"""A short pass on Elasticsearch 9.2: the same two scripts, the same index."""

from collections.abc import Iterator

import pytest

from tests.conftest import Picture, Scripts, Server, environment, unavailable
from tests.server import Cluster, UnavailableError
from tests.test_copies import embeddings
from tests.test_scripts import counts


@pytest.fixture
def newest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripts]:
    """The scripts on Elasticsearch 9.2, where a JDK 21 or newer is found."""
    try:
        cluster = Cluster("9.2.0")
    except UnavailableError as reason:
        if "JDK" in str(reason):
            pytest.skip(str(reason))
        unavailable(str(reason))
    with cluster:
        folder = tmp_path_factory.mktemp("newest")
        yield Scripts(folder, environment(folder) | {"ES_URL": cluster.url, "ES_CA_CERT": str(cluster.ca)})


def test_elasticsearch_9_serves_as_8_does(newest: Scripts, picture: Picture) -> None:
    for number in range(50):
        picture(f"images/{number % 5}/{number}.png", seed=number)
    newest.folder = picture("images/0/0.png", seed=0).parents[2]
    assert counts(newest.create()) == {"new": 50}
    before = embeddings(newest, newest.folder)
    (newest.folder / "images" / "0" / "0.png").touch()
    picture("images/0/5.png", seed=5).unlink()
    (newest.folder / "images" / "1").rename(newest.folder / "images" / "one")
    pruned = counts(newest.create("--prune"))
    assert pruned == {"new": 10, "copied": 10, "unchanged": 39, "deleted": 11}
    after = embeddings(newest, newest.folder)
    for path, bits in after.items():  # to the last bit, though 9.2 would leave vectors out of _source
        assert bits == before[path.replace("/one/", "/1/")]
    hits = newest.search(newest.folder / "images" / "0" / "0.png", "-k", 10, "--desc", "0")[0]["hits"]["hits"]
    assert len(hits) == 9
    assert hits[0]["fields"] == {"file_path": ["./images/0/0.png"], "desc": ["0"]}
    assert hits[0]["_score"] == pytest.approx(1, abs=1e-5)
    assert (
        Server(newest.environment["ES_URL"], newest.environment["ES_CA_CERT"]).request("GET", f"{newest.index}/_count")[
            "count"
        ]
        == 49
    )
