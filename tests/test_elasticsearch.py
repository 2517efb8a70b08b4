"""What is special to Elasticsearch: how it is reached, what may stand before it, and what the index is."""

import json
import os
import re
import shlex
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from elasticsearch import OrjsonSerializer
from elasticsearch.helpers import expand_action
from pytest_httpserver import HTTPServer
from werkzeug import Response

from imagesearch.index import INDEX_TYPES, open_index
from imagesearch.index.connection import Connection
from imagesearch.index.elasticsearch import _action
from imagesearch.index.elasticsearch_errors import PRIVILEGES_HINT
from imagesearch.models import Thumbnail
from imagesearch.records import PREPROCESSING, Document, ImageFile, Search
from tests.certificates import CA
from tests.pictures import Picture, Pictures, averaging_model
from tests.running import FEWER_RETRIES, Scripts, counts, environment, patched
from tests.server import PASSWORD, ROLES, ROOT, Elasticsearch
from tests.test_documents import blocks
from tools.embeddings import SHAPES, nearest, recall
from tools.neighbors import load_index, numbers

pytestmark = pytest.mark.slow

CREDENTIALS = "admin:[^@]*@"
MODULE = "imagesearch.index.elasticsearch"


def test_the_scripts_work_with_a_ca_like_ibm_clouds(scripts_on_elasticsearch: Scripts, picture: Picture) -> None:
    """Its certificate is one that Python 3.13 and newer refuse by default."""
    from cryptography import x509

    pem = Path(scripts_on_elasticsearch.environment["ES_CA_CERT"]).read_text()
    extensions = x509.load_der_x509_certificate(ssl.PEM_cert_to_DER_cert(pem)).extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).critical
    with pytest.raises(x509.ExtensionNotFound):
        extensions.get_extension_for_class(x509.KeyUsage)
    path = picture("images/a.png")
    assert counts(scripts_on_elasticsearch.create()) == {"new": 1}
    assert scripts_on_elasticsearch.hits(path)[0]["_score"] == pytest.approx(1, abs=1e-6)


def test_mappings_and_settings_are_as_intended(scripts_on_elasticsearch: Scripts, pictures: Pictures) -> None:
    """Beside what an index template has for it: shards, replicas, and other people's _meta."""
    scripts = scripts_on_elasticsearch
    pictures(20)
    settings = {"number_of_shards": 3, "number_of_replicas": 2, "refresh_interval": "7s"}
    theirs = {"owner": "search team", "model": "theirs"}
    with scripts.index_template(settings, _meta=theirs):
        scripts.create()
    assert counts(scripts.create()) == {"unchanged": 20}
    index = scripts.request("GET", scripts.index)[scripts.index]
    kept = index["settings"]["index"]
    assert (kept["number_of_shards"], kept["number_of_replicas"], kept["refresh_interval"]) == ("3", "2", "7s")
    meta = {"name": "thumbnail", "sha256": "", "preprocessing": PREPROCESSING, "folder": str(scripts.folder)}
    assert index["mappings"]["_meta"] == theirs | {"imagesearch": meta}
    assert index["mappings"]["dynamic"] == "strict"
    vector = index["mappings"]["properties"].pop("embeddings")
    assert (vector["type"], vector["dims"], vector["similarity"]) == ("dense_vector", 768, "cosine")
    assert vector["index_options"]["type"] == "int8_hnsw"
    assert (vector["index_options"]["m"], vector["index_options"]["ef_construction"]) == (16, 100)
    assert set(index["mappings"]["properties"]) == {"desc", "file_path", "size", "mtime", "sha256"}
    response = scripts.search("images/7.png", "-k", 3)[0]
    assert response["_shards"] == {"total": 3, "successful": 3, "skipped": 0, "failed": 0}
    assert response["hits"]["hits"][0]["fields"]["file_path"] == ["./images/7.png"]


@pytest.mark.parametrize("index_type", INDEX_TYPES)
def test_an_index_has_the_type_given(index_type: str, scripts_on_elasticsearch: Scripts, pictures: Pictures) -> None:
    scripts, paths = scripts_on_elasticsearch, pictures(30)
    scripts.create("--index-type", index_type)
    mappings = scripts.request("GET", f"{scripts.index}/_mapping")[scripts.index]["mappings"]
    assert mappings["properties"]["embeddings"]["index_options"]["type"] == index_type
    for path, response in zip(paths, scripts.search(*paths), strict=True):
        assert response["hits"]["hits"][0]["fields"]["file_path"] == [f"./{path.relative_to(scripts.folder)}"]
        assert response["hits"]["max_score"] == pytest.approx(1, abs=1e-6)  # scored by the exact vector
    assert counts(scripts.create("--index-type", index_type)) == counts(scripts.create()) == {"unchanged": 30}
    other = "hnsw" if index_type != "hnsw" else "bbq_hnsw"
    stderr = scripts.create("--index-type", other, exits=2)
    assert f"is of type {index_type}, not {other}: leave out --index-type, or use another --index" in stderr


@pytest.mark.parametrize("shape", SHAPES)
def test_nearly_all_of_the_nearest_are_found(shape: str, scripts_on_elasticsearch: Scripts) -> None:
    """Whatever the embeddings' shape, in one segment, which is hard. docs/scaling.md has more, by `make neighbors`."""
    scripts, connection = scripts_on_elasticsearch, Connection.from_env(scripts_on_elasticsearch.environment)
    embeddings, queries = SHAPES[shape](5000, 1), SHAPES[shape](5000, 2)[:100]
    with open_index(scripts.index, connection, Path()) as index:
        load_index(index, embeddings)
    scripts.request("POST", f"{scripts.index}/_forcemerge?max_num_segments=1")
    with open_index(scripts.index, connection, Path()) as index:
        parts = [index.search([Search(query, 10) for query in queries[n : n + 25]]) for n in range(0, 100, 25)]
    found = [numbers(response) for part in parts for response in part]
    assert recall(found, nearest(embeddings, queries, 10)) >= 0.995


def test_an_index_that_is_not_ours_is_refused_and_left_alone(scripts_on_elasticsearch: Scripts) -> None:
    scripts = scripts_on_elasticsearch
    scripts.request("PUT", scripts.index, {"mappings": {"properties": {"title": {"type": "text"}}}})
    assert "no record of its model" in scripts.both_fail(2)
    assert scripts.count() == 0
    meta = {"imagesearch": {"name": "thumbnail", "sha256": "", "preprocessing": PREPROCESSING, "folder": "/"}}
    scripts.request("DELETE", scripts.index)
    small = {"_meta": meta, "properties": {"embeddings": {"type": "dense_vector", "dims": 8}}}
    scripts.request("PUT", scripts.index, {"mappings": small})
    assert "not made by this version of create.py" in scripts.both_fail(2)


def run_block(document: str, beginning: str, scripts: Scripts) -> "subprocess.Popen[str]":
    """Starts the block of commands in `document` that begins so, with the test's index in place of `images`."""
    block = next(block for block in blocks((ROOT / document).read_text()) if block.startswith(beginning))
    ours = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'create.py'))}"
    commands = block.replace("images", scripts.index).replace("python3 create.py", ours)
    command = ["bash", "-ec", f"ES_INDEX={scripts.index}; {commands}"]
    return subprocess.Popen(command, cwd=scripts.folder, env=scripts.environment, stdout=subprocess.PIPE, text=True)


def test_another_model_takes_over_without_a_gap(scripts_on_elasticsearch: Scripts, pictures: Pictures) -> None:
    """The commands of docs/models.md: the next index is built while this one serves, and takes its name."""
    scripts = scripts_on_elasticsearch
    pictures(10)
    averaging_model(scripts.folder / "other.onnx")
    averaging_model(scripts.folder / "third.onnx", scale=2)
    scripts.create()
    for model, before, after in (("other.onnx", "", "-v2"), ("third.onnx", "-v2", "-v3")):
        assert scripts.hits("images/3.png")[0]["_index"] == scripts.index + before
        switching = run_block("docs/models.md", f"python3 create.py --model {model}", scripts)
        while switching.poll() is None:
            found = scripts.count()
            assert found == 10 or scripts.count() == 10  # under way just when its index was removed: once more
            time.sleep(0.05)
        output, _ = switching.communicate()
        assert switching.returncode == 0 and json.loads(output)["acknowledged"]
        (hit,) = scripts.hits("images/3.png")
        assert (hit["_index"], hit["fields"]["file_path"]) == (scripts.index + after, ["./images/3.png"])
        scripts.model = model
        assert counts(scripts.create()) == {"unchanged": 10}  # an alias is written through as well
    scripts.point(scripts.index, to=f"{scripts.index}-v2")
    assert (
        f"{scripts.index} is an alias of several indices ({scripts.index}-v2, {scripts.index}-v3)"
        in scripts.both_fail(2)
    )
    done = run_block("README.md", "INDEX=", scripts)  # "to start over" works after that, too
    assert done.wait() == 0
    assert scripts.request("GET", f"{scripts.index}*?ignore_unavailable=true") == {}


def test_an_open_index_stays_the_one_its_alias_pointed_to(scripts_on_elasticsearch: Scripts, picture: Picture) -> None:
    """Whose model was checked; for what is searched, written and deleted."""
    scripts, image = scripts_on_elasticsearch, ImageFile("", "./new.png", "", 1, 1)
    picture("images/3.png")
    alias, old, new = scripts.index, f"{scripts.index}-v1", f"{scripts.index}-v2"
    for scripts.index in (old, new):
        scripts.create()
    scripts.point(alias, to=old)
    with open_index(alias, Connection.from_env(scripts.environment), Path()) as index:
        scripts.point(alias, to=new, not_to=old)
        search = Search(np.ones(768, np.float32), 1)
        assert index.search([search])[0]["hits"]["hits"][0]["_index"] == old
        index.write([Document(image, 64 * "a", search.embedding)])
        assert scripts.request("GET", f"{old}/_doc/{image.id}")["found"]
        index.refresh()
        assert sorted(index.list_paths(".")) == ["./images/3.png", "./new.png"]
        assert index.delete([image.id]) == 1
    assert scripts.count() == 1


@pytest.mark.xdist_group("elasticsearch_to_kill")
def test_elasticsearch_9_is_as_8(elasticsearch_to_kill: Elasticsearch, tmp_path: Path, pictures: Pictures) -> None:
    if not elasticsearch_to_kill.release.startswith("9"):
        pytest.skip("there is no JDK 21 or newer here; that leaves Elasticsearch 9 untested")
    scripts = Scripts(tmp_path, environment(tmp_path) | elasticsearch_to_kill.environment)
    paths = pictures(50, classes=5)
    assert counts(scripts.create()) == {"new": 50}
    before = scripts.embeddings()
    paths[0].touch()
    paths[5].unlink()
    paths[1].parent.rename(scripts.folder / "images" / "one")
    assert counts(scripts.create("--prune")) == {"new": 10, "known": 10, "unchanged": 39, "deleted": 11}
    # To the last bit, though 9.2 would leave vectors out of _source.
    assert all(bits == before[path.replace("/one/", "/1/")] for path, bits in scripts.embeddings().items())
    hits = scripts.hits(paths[0], "-k", 10, "--desc", "0")
    assert len(hits) == 9 and hits[0]["fields"] == {"file_path": ["./images/0/0.png"], "desc": ["0"]}


# Who may do what


def test_the_smallest_privileges_are_enough(scripts_on_elasticsearch: Scripts, picture: Picture) -> None:
    """And without one of them, the message names them."""
    scripts = scripts_on_elasticsearch
    if "TEST_ES_URL" in os.environ:
        pytest.skip("the server of TEST_ES_URL has no users of the tests' roles; that leaves privileges untested")
    creator, searcher = (
        {"ES_URL": scripts.environment["ES_URL"].replace("//admin:", f"//{role}:")} for role in ("creator", "searcher")
    )
    first, second = picture("images/a.png"), picture("images/b.png")
    assert counts(scripts.create(**creator)) == {"new": 2}
    second.rename(second.with_name("c.png"))
    first.touch()
    assert counts(scripts.create("--prune", **creator)) == {"new": 1, "known": 1, "unchanged": 1, "deleted": 1}
    (response,) = scripts.search(first, "-k", 2, "--html", "page.html", **searcher)
    assert response["hits"]["total"]["value"] == 2
    assert "no image of class Owl" in scripts.run("search.py", first, "--desc", "Owl", **searcher).stderr
    picture("images/new.png")
    assert PRIVILEGES_HINT in scripts.create(exits=2, **searcher)


def test_the_message_and_the_docs_name_the_smallest_privileges() -> None:
    key = re.search(r'"privileges": \[([^]]*)\]', (ROOT / "docs" / "elasticsearch.md").read_text())
    assert key and re.findall(r'"(\w+)"', key[1]) == ROLES["creator"]
    for role, wording in (("creator", "create.py needs the privileges"), ("searcher", "search.py needs")):
        *most, last = ROLES[role]
        assert f"{wording} {', '.join(most)} and {last}" in PRIVILEGES_HINT


def test_an_api_key_stands_for_the_password(scripts_on_elasticsearch: Scripts, bird_images: list[Path]) -> None:
    scripts = scripts_on_elasticsearch
    privileges = {"images": {"indices": [{"names": [scripts.index], "privileges": ["all"]}]}}
    try:
        key = scripts.request("POST", "_security/api_key", {"name": scripts.index, "role_descriptors": privileges})
    except AssertionError as refused:
        assert "pattern_capture" in str(refused)
        pytest.skip("this Elasticsearch keeps no API keys: set TEST_ES_URL; that leaves a real key untested")
    keyed = {"ES_URL": re.sub(CREDENTIALS, "", scripts.environment["ES_URL"]), "ES_API_KEY": key["encoded"]}
    assert counts(scripts.create(**keyed)) == {"new": 31}
    assert scripts.search(bird_images[1], **keyed)[0]["hits"]["max_score"] == pytest.approx(1, abs=1e-5)


def test_the_api_key_is_sent_by_both_scripts(scripts_on_file: Scripts, web: HTTPServer, picture: Picture) -> None:
    path = picture("images/a.png")
    headers = {"X-Elastic-Product": "Elasticsearch"}
    web.expect_request(re.compile(".*"), method="GET").respond_with_json({"error": "none"}, 404, headers)
    web.expect_request(re.compile(".*"), method="PUT").respond_with_json({"error": "no"}, 401, headers)
    keyed = {"ES_URL": web.url_for("").rstrip("/"), "ES_API_KEY": "a2V5OmtleQ=="}
    assert "rejected the API key in ES_API_KEY (HTTP 401)" in scripts_on_file.create(exits=2, **keyed)
    created = len(web.log)
    scripts_on_file.run("search.py", path, **keyed)
    sent = [(request.method, request.headers.get("Authorization")) for request, _ in web.log]
    assert sent[:2] == [("GET", "ApiKey a2V5OmtleQ=="), ("PUT", "ApiKey a2V5OmtleQ==")]
    assert created < len(sent) and {key for _, key in sent} == {"ApiKey a2V5OmtleQ=="}


def test_a_bulk_request_is_below_1_mb() -> None:
    """The default limit of nginx; with long paths, and values as long as those of CLIP."""
    embedding = np.random.default_rng(1).standard_normal(768).astype(np.float32) * np.float32(0.3)
    image = ImageFile("", "./images/" + 300 * "x", "x" * 100, 12_345_678, time.time_ns())
    lines = expand_action(_action(Document(image, 64 * "a", embedding)) | {"_index": 50 * "x"})
    assert Thumbnail.chunk_size * sum(len(OrjsonSerializer().dumps(line)) + 1 for line in lines) < 1_000_000


# What cannot work is one line


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"ES_URL": (CREDENTIALS, "admin:%26SECRET@")}, 2, "rejected the user or password in ES_URL (HTTP 401)"),
        ({"ES_URL": (CREDENTIALS, "admin:a/SECRET@")}, 2, "percent-encoded"),
        ({"ES_URL": (CREDENTIALS, "")}, 2, "requires authentication (HTTP 401), and none was given"),
        ({"ES_URL": (CREDENTIALS, ""), "ES_API_KEY": "SECRET=="}, 2, "rejected the API key in ES_API_KEY (HTTP 401)"),
        ({"ES_API_KEY": "SECRET=="}, 2, "use one of the two"),
        ({"ES_URL": (CREDENTIALS, ""), "ES_API_KEY": "SECRET\nSECRET"}, 2, "ES_API_KEY"),
        ({"ES_URL": ("@localhost:.*", "@localhost:9")}, 1, "No answer from https://localhost:9 ("),
        ({"ES_URL": ("@localhost:", "@nowhere.invalid:")}, 1, "No answer from https://nowhere.invalid:"),
        ({"ES_URL": ("@localhost:", "@a..b:")}, 1, "No answer from https://a..b:"),
        ({"ES_URL": ("https", "http")}, 1, "If that port uses TLS, ES_URL must begin with https://"),
        ({"ES_URL": ("$", "/images")}, 1, "If ES_URL ends with the name of an index, leave that out"),
        ({"ES_CA_CERT": ""}, 2, "set ES_CA_CERT to the file of the CA that signed it"),
        ({"ES_CA_CERT": "other.pem"}, 2, "ES_CA_CERT is other.pem, which is not the CA that signed it"),
        ({"ES_CA_CERT": "missing.pem"}, 2, "No such file"),
    ],
)
def test_what_cannot_be_reached_is_one_line_without_the_secret(
    change: dict[str, str | tuple[str, str]], code: int, message: str, scripts_on_elasticsearch: Scripts
) -> None:
    """A value that is new, or a part of the one that works and what takes its place."""
    scripts = scripts_on_elasticsearch
    CA().write(scripts.folder / "other.pem")
    changed = {
        name: new if isinstance(new, str) else re.sub(*new, scripts.environment[name], count=1)
        for name, new in change.items()
    }
    line = scripts.both_fail(code, **changed)
    assert message in line
    header = "YWRtaW46"  # as base64 begins that of `admin:` and a password
    assert not [text for text in ("SECRET", PASSWORD, quote(PASSWORD, safe=""), header) if text in line]


@pytest.mark.parametrize(
    ("host", "expired", "trusted", "message"),
    [
        ("other.example.com", False, True, r"[Hh]ostname mismatch.*: check the host name in ES_URL, and"),
        ("127.0.0.2", False, True, r"[Hh]ostname mismatch.*: check the host name in ES_URL, and"),
        ("localhost", True, True, r"certificate has expired\): check the host name in ES_URL, and the server's cert"),
        ("localhost", False, False, r"ES_CA_CERT is \S+, which is not the CA that signed it"),
    ],
)
def test_a_certificate_that_is_refused_is_reported_with_its_reason(
    host: str, expired: bool, trusted: bool, message: str, scripts_on_file: Scripts
) -> None:
    authority, folder = CA(), scripts_on_file.folder
    ca = (authority if trusted else CA()).write(folder / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue(folder, host, expired=expired))
    with HTTPServer(ssl_context=context) as server:
        line = scripts_on_file.both_fail(2, ES_URL=f"https://localhost:{server.port}", ES_CA_CERT=str(ca))
    assert f"The certificate of https://localhost:{server.port} cannot be verified (" in line
    assert re.search(message, line), line
    assert line.count("(") == line.count(")")


REDIRECT = Response("", 302, {"Location": "https://admin:hunter2@db.example.com:9243/?token=hunter2"})


@pytest.mark.parametrize(
    ("answer", "code", "message"),
    [
        (Response("<html>It works!</html>", 200), 2, r"is not Elasticsearch, .* with text/\S+.* Check ES_URL\."),
        (Response("", 200, content_type="application/json"), 2, "is not Elasticsearch, .* Check ES_URL"),
        (Response('{"hello": "world"}', 200, content_type="application/json"), 2, "is not Elasticsearch, "),
        (Response("[]", 200, content_type="application/json"), 2, "is not Elasticsearch, "),
        (Response("Bad gateway", 502), 1, r"No answer from Elasticsearch \(\S+ answered HTTP 502\)\."),
        (Response("Too large", 413), 2, r"\(HTTP 413\): raise the limit of the proxy"),
        (REDIRECT, 2, "redirects to another address: set ES_URL to that address"),
    ],
)
def test_what_is_not_elasticsearch_is_reported_in_one_line(
    answer: Response, code: int, message: str, scripts_on_file: Scripts, web: HTTPServer
) -> None:
    web.expect_request(re.compile(".*")).respond_with_response(answer)
    line = scripts_on_file.both_fail(code, ES_URL=f"http://admin:hunter2@127.0.0.1:{web.port}")
    assert re.search(message, line), line
    assert "hunter2" not in line
    line = scripts_on_file.both_fail(1, ES_URL=f"https://127.0.0.1:{web.port}")
    assert "If that port does not use TLS, ES_URL must begin with http://" in line


def test_a_missing_shard_is_reported(scripts_on_elasticsearch: Scripts, web: HTTPServer, picture: Picture) -> None:
    scripts, path = scripts_on_elasticsearch, picture("images/a.png")
    scripts.create()
    headers = {"X-Elastic-Product": "Elasticsearch"}
    index = scripts.request("GET", scripts.index)
    shards = {"total": 2, "successful": 1, "skipped": 0, "failed": 1}
    empty: dict[str, Any] = {"total": {"value": 0, "relation": "eq"}, "max_score": None, "hits": []}
    web.expect_request(f"/{scripts.index}").respond_with_json(index, headers=headers)
    answer = {"took": 1, "timed_out": False, "_shards": shards, "hits": empty}
    web.expect_request(f"/{scripts.index}/_search").respond_with_json(answer, headers=headers)
    done = scripts.run("search.py", path, ES_URL=web.url_for("").rstrip("/"))
    assert done.returncode == 1 and done.stdout.count("\n") == 1
    assert "some shards failed or timed out" in done.stderr and "is empty" not in done.stderr


def test_a_shard_that_no_node_may_hold_is_named(scripts_on_elasticsearch: Scripts, picture: Picture) -> None:
    """As when the disks are nearly full."""
    scripts, path = scripts_on_elasticsearch, picture("images/a.png")
    fewer = patched(
        scripts.folder, {f"{MODULE}.ACTIVE_SHARD_TIMEOUT": "1s", f"{MODULE}.READ_TIMEOUT_SECONDS": 3}, FEWER_RETRIES
    )
    with scripts.index_template({"index.routing.allocation.require._name": "nope"}):
        for _ in range(2):  # a new index, then one that is there
            stderr = scripts.create(exits=1, new_python=True, **fewer)
            assert f"The index {scripts.index} has no active shard 0: " in stderr and "ES_URL" not in stderr
    done = scripts.run("search.py", path, new_python=True, **fewer)
    assert done.returncode == 1 and "has no active shard 0" in done.stderr


def test_insecure_works_without_the_ca_and_says_so(scripts_on_elasticsearch: Scripts, bird_images: list[Path]) -> None:
    scripts = scripts_on_elasticsearch
    assert "Warning: --insecure does not verify" in scripts.create("--insecure", ES_CA_CERT="")
    done = scripts.run("search.py", bird_images[0], "--insecure", ES_CA_CERT="")
    assert done.returncode == 0 and "--insecure" in done.stderr and done.stderr.count("\n") == 1
    for variable in ("CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "PYTHONHTTPSVERIFY"):  # nothing else turns it off
        done = scripts.run("search.py", bird_images[0], new_python=True, ES_CA_CERT="", **{variable: ""})
        assert done.returncode == 2 and "cannot be verified" in done.stderr
