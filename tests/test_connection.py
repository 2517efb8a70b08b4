"""What ES_URL, ES_API_KEY and ES_CA_CERT may be; no secret is shown."""

from pathlib import Path

import pytest

from imagesearch.connection import Connection
from imagesearch.errors import UsageError


def connect(url: str, **more: str) -> Connection:
    connection = Connection.from_env({"ES_URL": url} | more)
    assert connection
    return connection


def test_no_url_means_no_elasticsearch() -> None:
    assert Connection.from_env({}) is None
    assert Connection.from_env({"ES_URL": " "}) is None


def test_user_and_password_are_percent_decoded_and_taken_out_of_the_address() -> None:
    ours = connect("https://ad%40min:p%2Fw%3A%20%25@db.example.com:31000/")
    assert (ours.hosts, ours.username, ours.password) == (("https://db.example.com:31000",), "ad@min", "p/w: %")


def test_several_nodes_share_their_credentials() -> None:
    ours = connect("https://u:p@one:9200, https://two:9201/es,https://[::1]")
    assert ours.hosts == ("https://one:9200", "https://two:9201/es", "https://[::1]:443")
    assert (ours.username, ours.password) == ("u", "p")


@pytest.mark.parametrize(
    "url",
    [
        "host:9200",
        "ftp://u:hunter2@host:9200",
        "https://",
        "https://u:hunter2@host:port",
        "https://u:hunter2@host:99999",
        "https://u:hunter2@ho st:9200",
        "https://u:hunter2@[host:9200",
        "https://u:hunter2@host:9200?x=1",
        "https://hunter2@host:9200",
        "https://:hunter2@host:9200",
        "https://u:hunter2@one:1,https://u:other@two:2",
        "https://u:hunter2@one:1,",
        "https://u:hunter2@one:1,http://u:hunter2@two:2",
    ],
)
def test_what_cannot_be_an_address_is_reported_in_one_line_without_the_password(url: str) -> None:
    with pytest.raises(UsageError) as error:
        connect(url)
    assert "ES_URL" in str(error.value)
    assert "hunter2" not in str(error.value) and "\n" not in str(error.value)


def test_a_key_or_a_password_but_not_both() -> None:
    assert connect("https://host:9200", ES_API_KEY="a2V5").api_key == "a2V5"
    for url, key in (("https://u:p@host:9200", "hunter2"), ("https://host:9200", "hunter2\nX-Evil: 1")):
        with pytest.raises(UsageError, match="ES_API_KEY") as error:
            connect(url, ES_API_KEY=key)
        assert "hunter2" not in str(error.value)


def test_the_certificate_file_must_be_one(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    for path, why in (
        (tmp_path / "ca.pem", "PEM"),
        (tmp_path / "missing.pem", "No such file"),
        (tmp_path, "PEM|directory"),
    ):
        with pytest.raises(UsageError, match=why):
            connect("https://host:9200", ES_CA_CERT=str(path))


def test_secrets_are_not_in_the_repr() -> None:
    assert "hunter2" not in repr(connect("https://u:hunter2@host:9200"))
    assert "hunter2" not in repr(connect("https://host:9200", ES_API_KEY="hunter2"))
