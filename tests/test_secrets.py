"""No password and no key is ever shown or kept; what an address may be."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagesearch.errors import UsageError
from imagesearch.index.connection import Connection, get_connection
from imagesearch.sources.queries import without_credentials
from tests.pictures import Picture, averaging_model
from tests.running import Scripts

pytestmark = pytest.mark.slow


def test_the_files_that_stay_hold_no_secret(scripts_on_elasticsearch: Scripts, picture: Picture) -> None:
    scripts = scripts_on_elasticsearch
    query = picture("images/a.png")
    scripts.create("--model", averaging_model(scripts.folder / "model.onnx"))
    scripts.search(query, "--html", "page.html")
    found = re.search(r"//admin:([^@]+)@", scripts.environment["ES_URL"])
    assert found and len(found[1]) > 8
    files = [path for path in scripts.folder.rglob("*") if path.is_file()]
    assert {".html", ".onnx", ".ort"} <= {path.suffix for path in files}  # the prepared model, in the cache
    for path in files:
        assert found[1].encode() not in path.read_bytes() and unquote(found[1]).encode() not in path.read_bytes(), path


PIECES = st.text(max_size=8) | st.sampled_from(["1/", "/", "?", "#", "@", ":", ",", "%", "[", "]", "\\", " "])


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(["https", "http"]) | st.text(max_size=5), PIECES, PIECES)
def test_no_address_whatever_it_holds_shows_its_password(scheme: str, before: str, after: str) -> None:
    try:
        shown = repr(Connection.from_env({"ES_URL": f"{scheme}://admin:{before}SECRET{after}@host:9200"}))
    except UsageError as error:
        shown = str(error)
    assert "SECRET" not in shown


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(["https", "http"]), PIECES, PIECES)
def test_no_url_to_search_for_shows_its_password(scheme: str, before: str, after: str) -> None:
    assert "SECRET" not in without_credentials(f"{scheme}://admin:{before}SECRET{after}@host/a.png?x=1")
    assert "SECRET" not in without_credentials(f"{scheme}://host/a.png?{before}=SECRET{after}")
    assert "SECRET" not in without_credentials(f"ftp://admin:{before}SECRET{after}@host/a.png")


# Addresses


def connect(url: str, **more: str) -> Connection:
    connection = Connection.from_env({"ES_URL": url} | more)
    assert connection
    return connection


def test_what_an_address_may_be() -> None:
    assert Connection.from_env({}) is Connection.from_env({"ES_URL": " "}) is None
    ours = connect("https://ad%40min:p%2Fw%3A%20%25@db.example.com:31000/")
    assert (ours.url, ours.username, ours.password) == ("https://db.example.com:31000", "ad@min", "p/w: %")
    assert connect("http://[::1]/es/").url == "http://[::1]:80/es"
    assert connect("https://host:9200", ES_API_KEY="a2V5").api_key == "a2V5"
    assert "hunter2" not in repr(connect("https://u:hunter2@host:9200"))
    assert "hunter2" not in repr(connect("https://host:9200", ES_API_KEY="hunter2"))


@pytest.mark.parametrize(
    "url",
    [
        *("host:9200", "ftp://u:hunter2@host:9200", "https://", "https://u:hunter2@host:port"),
        *("https://u:hunter2@host:99999", "https://u:hunter2@ho st:9200", "https://u:hunter2@[host:9200"),
        *("https://u:hunter2@host:9200?x=1", "https://hunter2@host:9200", "https://:hunter2@host:9200"),
        *("https://u:hunter2@one:1,https://two:2", "elastic://u:hunter2@host", "https://u:hunter2 x@host"),
    ],
)
def test_what_cannot_be_an_address_is_reported_in_one_line_without_the_password(url: str) -> None:
    with pytest.raises(UsageError, match="ES_URL") as error:
        connect(url)
    assert "hunter2" not in str(error.value) and "\n" not in str(error.value)


def test_a_password_on_a_network_in_the_clear_is_warned_of(capfd: pytest.CaptureFixture[str]) -> None:
    for url, warned in (
        ("http://u:p@db:1", 1),
        ("http://u:p@127.0.0.1:1", 0),
        ("https://u:p@db:1", 0),
        ("http://db", 0),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ES_URL", url)
            get_connection(insecure=False)
        assert capfd.readouterr().err.count("anyone on the network can read the password") == warned


def test_the_certificate_file_must_be_one(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    for path, why in ((tmp_path / "ca.pem", "PEM"), (tmp_path / "missing.pem", "No such file"), (tmp_path, "PEM|dir")):
        with pytest.raises(UsageError, match=why):
            connect("https://host:9200", ES_CA_CERT=str(path))
