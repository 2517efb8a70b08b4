"""A marked password and a marked key, through every way to fail: neither is ever shown or kept."""

import re
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagesearch.connection import Connection
from imagesearch.errors import UsageError
from imagesearch.paths import query_name
from tests.pictures import Picture, averaging_model
from tests.running import Scripts

PASSWORD = "hunter2&SECRET/marked"
KEY = "SECRETmarkedKEY=="
MARKED = ("SECRET", quote(PASSWORD, safe=""), "aHVudGVyMi")  # plain, in a URL, and as base64 begins it

WITH_PASSWORD = f"https://admin:{quote(PASSWORD, safe='')}@"


def failing(elastic: Scripts) -> dict[str, dict[str, str]]:
    """Environments that cannot work, each with a secret in it."""
    there = elastic.environment["ES_URL"].split("@")[-1]
    return {
        "wrong password": {"ES_URL": f"{WITH_PASSWORD}{there}"},
        "wrong key": {"ES_URL": f"https://{there}", "ES_API_KEY": KEY},
        "both": {"ES_URL": f"{WITH_PASSWORD}{there}", "ES_API_KEY": KEY},
        "no server": {"ES_URL": f"{WITH_PASSWORD}localhost:9"},
        "no such host": {"ES_URL": f"{WITH_PASSWORD}nowhere.invalid:9200"},
        "wrong CA": {"ES_URL": f"{WITH_PASSWORD}{there}", "ES_CA_CERT": ""},
        "no CA file": {"ES_URL": f"{WITH_PASSWORD}{there}", "ES_CA_CERT": "missing.pem"},
        "plain http": {"ES_URL": f"{WITH_PASSWORD}{there}".replace("https", "http")},
        "no scheme": {"ES_URL": f"{WITH_PASSWORD}{there}".removeprefix("https://")},
        "unknown scheme": {"ES_URL": f"{WITH_PASSWORD}{there}".replace("https", "elastic")},
        "spaces": {"ES_URL": f"https://admin:{PASSWORD} x@{there}"},
        "not encoded": {"ES_URL": f"https://admin:{PASSWORD}@{there}"},
        "a path": {"ES_URL": f"{WITH_PASSWORD}{there}/no/such/path"},
        "a bad port": {"ES_URL": f"{WITH_PASSWORD}localhost:port"},
        "two passwords": {"ES_URL": f"{WITH_PASSWORD}{there},https://admin:other@{there}"},
        "a key of two lines": {"ES_URL": f"https://{there}", "ES_API_KEY": f"{KEY}\n{KEY}"},
    }


def test_no_error_shows_a_secret(elastic: Scripts, picture: Picture) -> None:
    path = picture("images/a.png")
    for name, environment in failing(elastic).items():
        for arguments in (("create.py", "--model", "thumbnail"), ("search.py", str(path))):
            done = elastic.run(*arguments, **environment)
            assert done.returncode == (1 if name in ("no server", "no such host", "plain http") else 2), (
                name,
                done.stderr,
            )
            assert done.stderr.count("\n") == 1, (name, done.stderr)
            for secret in MARKED:
                assert secret not in done.stdout + done.stderr, name


def test_neither_help_nor_the_process_list_shows_a_secret(elastic: Scripts, picture: Picture) -> None:
    picture("images/a.png")
    environment = failing(elastic)["wrong password"]
    for script in ("create.py", "search.py"):
        done = elastic.run(script, "--help", **environment)
        assert done.returncode == 0
        assert "hunter2" not in done.stdout
    process = elastic.start("create.py", "--model", "thumbnail", **environment)
    time.sleep(0.1)
    command = Path(f"/proc/{process.pid}/cmdline")
    if command.exists():
        assert b"SECRET" not in command.read_bytes()
    process.communicate()


def test_the_files_that_stay_hold_no_secret(local: Scripts, picture: Picture) -> None:
    picture("images/a.png")
    model = averaging_model(local.folder / "model.onnx")
    local.create("--model", model, ES_API_KEY=KEY, SECRET=PASSWORD)
    for path in local.folder.rglob("*"):
        assert not path.is_file() or b"SECRET" not in path.read_bytes(), path


def test_insecure_is_warned_about_each_time(local: Scripts, picture: Picture) -> None:
    path = picture("images/a.png")
    environment = {"ES_URL": f"{WITH_PASSWORD}localhost:9"}
    for arguments in (("create.py", "--model", "thumbnail"), ("search.py", str(path))):
        for _ in range(2):
            done = local.run(*arguments, "--insecure", **environment)
            assert done.stderr.startswith("Warning: --insecure does not verify")


def test_verification_is_never_turned_off_but_by_insecure(elastic: Scripts, picture: Picture) -> None:
    path = picture("images/a.png")
    for environment in ({"CURL_CA_BUNDLE": ""}, {"REQUESTS_CA_BUNDLE": ""}, {"PYTHONHTTPSVERIFY": "0"}):
        done = elastic.run("search.py", path, ES_CA_CERT="", **environment)
        assert done.returncode == 2
        assert "cannot be verified" in done.stderr


PIECES = st.text(max_size=8) | st.sampled_from(["1/", "/", "?", "#", "@", ":", ",", "%", "[", "]", "\\", " "])


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(["https", "http"]) | st.text(max_size=5), PIECES, PIECES)
def test_no_address_whatever_it_holds_shows_its_password(scheme: str, before: str, after: str) -> None:
    try:
        shown = repr(Connection.from_env({"ES_URL": f"{scheme}://admin:{before}SECRET{after}@host:9200"}))
    except UsageError as error:
        shown = str(error)
    assert "SECRET" not in shown


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(["https", "http"]), PIECES, PIECES)
def test_no_url_to_search_for_shows_its_password(scheme: str, before: str, after: str) -> None:
    assert "SECRET" not in query_name(f"{scheme}://admin:{before}SECRET{after}@host/a.png?x=1")
    assert "SECRET" not in query_name(f"{scheme}://host/a.png?{before}=SECRET{after}")


def test_git_has_no_secret_files(tmp_path: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.split("\n")
    assert not [name for name in tracked if re.search(r"\.(pem|tfvars|tfstate|db)$", name)]
