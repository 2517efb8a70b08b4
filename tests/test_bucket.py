"""Images in a bucket, on a real S3 server with signatures."""

import hashlib
import json
import re
import signal
import threading
import time
from html import unescape
from urllib.parse import urlsplit

import pytest
import requests
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from tests.pictures import Pictures, png
from tests.running import Scripts, counts, end, patched, read_until, skipped
from tests.server import Bucket
from tools.tcp_proxy import TcpProxy

pytestmark = pytest.mark.slow


@pytest.fixture
def scripts_on_file(scripts_on_file: Scripts, s3: dict[str, str]) -> Scripts:
    """The scripts on the local index file, with the S3 server's credentials."""
    scripts_on_file.environment |= s3
    return scripts_on_file


@pytest.fixture
def scripts_on_elasticsearch(scripts_on_elasticsearch: Scripts, s3: dict[str, str]) -> Scripts:
    """The scripts on the real Elasticsearch, with the S3 server's credentials."""
    scripts_on_elasticsearch.environment |= s3
    return scripts_on_elasticsearch


def test_a_bucket_is_indexed_as_a_folder_is(scripts: Scripts, bucket: Bucket) -> None:
    keys = ["photos/Bald_Eagle/1.png", "photos/Bald_Eagle/2.png", "photos/deep/down/Wren/3.png", "photos/4.png"]
    others = ["photos/.hidden.png", "photos/.hidden/5.png", "photos/notes.txt", "photos/README", "other/6.png"]
    bucket.put({key: png(seed) for seed, key in enumerate(keys)} | dict.fromkeys(others, b"x"))
    stderr = scripts.create("--images", f"{bucket.url}/photos/")
    assert counts(stderr) == {"new": 4}
    assert skipped(stderr) == ["1 .txt", "1 without extension", "2 hidden"]

    (scripts.folder / "query.png").write_bytes(png(2))
    (hit,) = scripts.hits("query.png")
    path = f"{bucket.url}/photos/deep/down/Wren/3.png"
    assert hit["_id"] == hashlib.sha256(path.encode()).hexdigest()
    assert hit["fields"] == {"file_path": [path], "desc": ["Wren"]}
    assert hit["_score"] == pytest.approx(1, abs=1e-6)
    assert scripts.hits("query.png", "--desc", "photos")[0]["fields"]["file_path"] == [f"{bucket.url}/photos/4.png"]
    assert scripts.hits(path)[0]["fields"]["file_path"] == [path]  # a query from the bucket
    lines = scripts.search(f"{bucket.url}/photos", "--exclude-self")  # all of them
    assert [line["image"] for line in lines] == [f"{bucket.url}/{key}" for key in sorted(keys)]
    assert all(line["hits"]["hits"][0]["fields"]["file_path"] != [line["image"]] for line in lines)

    assert counts(scripts.create("--images", f"{bucket.url}/photos")) == {"unchanged": 4}
    time.sleep(1)  # last_modified has seconds
    bucket.put({keys[0]: png(0), keys[1]: png(77), "photos/new.png": png(78)})  # the first is the same content
    assert counts(scripts.create("--images", f"{bucket.url}/photos")) == {"new": 1, "updated": 1, "unchanged": 3}
    assert counts(scripts.create("--images", f"{bucket.url}/other", exits=1)) == {"unreadable": 1}


def test_pruning_a_bucket_deletes_only_what_is_gone_below_the_url(scripts: Scripts, bucket: Bucket) -> None:
    keys = [f"photos/{number % 3}/{number}.png" for number in range(9)]
    bucket.put({key: png(seed) for seed, key in enumerate([*keys, "photos-too/a.png"])})
    for prefix in ("photos", "photos-too"):
        scripts.create("--images", f"{bucket.url}/{prefix}")
    bucket.delete(*keys[:4], "photos-too/a.png")
    assert counts(scripts.create("--images", f"{bucket.url}//photos/", "--prune")) == {"unchanged": 5, "deleted": 4}
    assert scripts.paths() == sorted(f"{bucket.url}/{key}" for key in [*keys[4:], "photos-too/a.png"])
    bucket.delete(*keys[4:])
    assert "There are no images below" in scripts.create("--images", f"{bucket.url}/photos", "--prune", exits=2)
    assert counts(scripts.create("--images", f"{bucket.url}/photos", "--prune-all")) == {"deleted": 5}


def test_content_is_copied_between_a_folder_and_a_bucket(scripts: Scripts, bucket: Bucket, pictures: Pictures) -> None:
    pictures(4)
    bucket.put({f"moved/{seed}.png": png(seed) for seed in range(4)})
    scripts.create()
    assert counts(scripts.create("--images", f"{bucket.url}/moved")) == {"new": 4, "known": 4}


def test_more_objects_than_a_page_of_the_listing_in_parts(scripts_on_file: Scripts, bucket: Bucket) -> None:
    contents = [png(seed) for seed in range(50)]
    bucket.put({f"many/{number}.png": contents[number % 50] for number in range(1100)})
    new = [counts(scripts_on_file.create("--images", bucket.url, "--part", f"{part}/2"))["new"] for part in (1, 2)]
    assert sum(new) == 1100 and min(new) > 400
    bucket.delete(*(f"many/{number}.png" for number in range(0, 1100, 100)))
    stderr = scripts_on_file.create("--images", bucket.url, "--prune")
    assert counts(stderr) == {"unchanged": 1089, "deleted": 11}


def test_unusual_keys_are_preserved(scripts_on_file: Scripts, bucket: Bucket) -> None:
    keys = ["odd/Bald Eagle/ä 1.png", "odd/100%/%2F.png", "odd/a%2Fb.png", "odd/ü🦅.png", "odd/it's #1.png"]
    keys += ["odd/plus+and&more?.png", "odd/back\\slash.png"]
    bucket.put({key: png(seed) for seed, key in enumerate(keys)})
    assert counts(scripts_on_file.create("--images", f"{bucket.url}/odd")) == {"new": len(keys)}
    urls = [f"{bucket.url}/{key}" for key in keys]
    for url, line in zip(urls, scripts_on_file.search(*urls), strict=True):
        (hit,) = line["hits"]["hits"]
        assert hit["fields"]["file_path"] == [url] and hit["_score"] == pytest.approx(1, abs=1e-6)
    stderr = scripts_on_file.create("--images", f"{bucket.url}/odd", "--prune")
    assert counts(stderr) == {"unchanged": len(keys)}


@pytest.mark.parametrize(
    ("environment", "url", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "SECRET-2"}, "{}", r"denied access \(HTTP 403 SignatureDoesNotMatch\): check"),
        ({"AWS_ACCESS_KEY_ID": "SECRET-id"}, "{}", r"denied access \(HTTP 403 InvalidAccessKeyId\): check AWS_ACCESS"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "{}", r"No answer from s3://\S+ \(error sending request\)\."),
        ({}, "s3://no-such-bucket-here", r"There is no bucket s3://no-such-bucket-here, .* \(HTTP 404 NoSuchBucket\)"),
        ({}, "{}/no/such/prefix", r"[Tt]here are no images below (s3://\S+/no/such/prefix|it)"),
        ({}, "{}/gone.png", r"here are no images below s3|Cannot read s3://\S+/gone.png: no such object"),
        ({}, "s3://user:local-SECRET@birds", r"The URL of a bucket must look like s3://bucket/folder, without a user"),
        *(({}, url, r"The URL of a bucket must look like") for url in ("s3://", "s3://birds?x=1", "s3://birds:80/a")),
    ],
)
def test_a_wrong_bucket_url_or_key_is_one_line(
    environment: dict[str, str], url: str, message: str, scripts_on_file: Scripts, bucket: Bucket
) -> None:
    bucket.put({"a.png": png(1)})
    started = time.monotonic()
    code = 1 if "AWS_ENDPOINT_URL" in environment else 2
    (line,) = scripts_on_file.create("--images", url.format(bucket.url), exits=code, **environment).splitlines()
    assert time.monotonic() - started < 30  # a few retries, not two minutes
    assert re.search(message, line), line
    assert "<" not in line and "Debug" not in line and "SECRET-" not in line and "-SECRET" not in line
    assert scripts_on_file.count() == 0
    scripts_on_file.create("--images", bucket.url)
    done = scripts_on_file.run("search.py", url.format(bucket.url), f"{bucket.url}/a.png", **environment)  # queries
    first, *others = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 1 and len(others) == 1
    assert re.search(message.removesuffix(r"\."), first["error"]["reason"]), first
    assert "SECRET-" not in done.stdout + done.stderr and "-SECRET" not in done.stdout + done.stderr


def test_the_page_shows_hits_in_a_bucket_without_linking_them(scripts_on_file: Scripts, bucket: Bucket) -> None:
    bucket.put({f"photos/{seed}.png": png(seed, (60, 40)) for seed in range(5)})
    scripts_on_file.create("--images", bucket.url)
    bucket.delete("photos/4.png")
    (scripts_on_file.folder / "new.png").write_bytes(png(3))
    shown = {}
    for options in ((), ("--images", bucket.url)):  # an index of somebody else's does not choose what is read
        scripts_on_file.search("new.png", "-k", 5, "--html", "page.html", *options)
        shown[options] = (scripts_on_file.folder / "page.html").read_text().count('role="img"')
    assert list(shown.values()) == [1, 5]
    scripts_on_file.search(f"{bucket.url}/photos/3.png", "-k", 5, "--html", "page.html")
    html = (scripts_on_file.folder / "page.html").read_text()
    assert html.count('role="img"') == 1 + 4 and html.count("4.png is gone") == 1
    assert "<a " not in html and f"{bucket.url}/photos/2.png" in html.replace("<wbr>", "")
    assert "SECRET" not in html and "Signature" not in html


# What stores and networks do


@pytest.mark.parametrize("returns", [True, False])
def test_an_outage_loses_nothing(returns: bool, scripts_on_file: Scripts, s3: dict[str, str], bucket: Bucket) -> None:
    """It is waited for, for two minutes, here for two seconds; objects that wait are then not tried any more."""
    constants = {"imagesearch.sources.bucket." + ("SILENT_SECONDS" if returns else "RETRY_SECONDS_OF_A_RUN"): 2}
    bucket.put({f"many/{number}.png": png(number) for number in range(600)})
    with TcpProxy(urlsplit(s3["AWS_ENDPOINT_URL"]).port or 0) as proxy:
        url = f"http://127.0.0.1:{proxy.port}"
        process = scripts_on_file.start_paused("--images", bucket.url, constants=constants, AWS_ENDPOINT_URL=url)
        proxy.stop()
        scripts_on_file.go_on()
        stopped = time.monotonic()
        if returns:
            read_until(process, f"Retrying requests to {bucket.url}: no answer yet.")
            proxy.start()
        code, stderr = end(process)
    stored = scripts_on_file.count()
    assert counts(stderr) == {"new": stored}
    if returns:
        assert (code, stored) == (0, 600), stderr
    else:
        assert time.monotonic() - stopped < 60
        assert code == 1 and stored < 600 and f"create.py: No answer from {bucket.url} (" in stderr, stderr
        assert counts(scripts_on_file.create("--images", bucket.url)) == {"new": 600 - stored, "unchanged": stored}


def behind_other_store(web: HTTPServer, scripts: Scripts, busy_seconds: float = 0, listed_as: str = "") -> list[str]:
    """Makes `web` a proxy in front of S3 that does what other stores do; the objects that are read.

    From the first one on, it is overloaded for some seconds. It lists odd.png under another key.
    """
    endpoint, read = scripts.environment["AWS_ENDPOINT_URL"], list[str]()
    first_read_at: list[float] = []

    def handle(request: Request) -> Response:
        headers = {name: value for name, value in request.headers.items() if name not in ("Content-Length",)}
        url = endpoint + request.environ["RAW_URI"]
        answer = requests.request(request.method, url, headers=headers, data=request.get_data(), timeout=60)
        # As IBM Cloud Object Storage, MinIO and Google list it; the response to GET has whole seconds.
        content = re.sub(rb"(<LastModified>[^<.]*)(\.\d+)?Z", rb"\1.006Z", answer.content)
        if listed_as and "list-type" in request.args:
            content = content.replace(b"odd.png", listed_as.encode())
        if request.method == "GET" and request.path.endswith(".png"):
            first_read_at.append(time.monotonic())
            if time.monotonic() - first_read_at[0] < busy_seconds:
                return Response("<Error><Code>SlowDown</Code></Error>", 503)
            read.append(request.path)
        if request.path.endswith("/encrypted.png"):  # with a key of the customer's
            return Response("<Error><Code>InvalidRequest</Code></Error>", 400)
        if request.path.endswith("/broken.png"):
            return Response("<Error><Code>InternalError</Code></Error>", 500)
        kept = {name: answer.headers[name] for name in ("ETag", "Last-Modified") if name in answer.headers}
        response = Response(content, answer.status_code, kept, content_type=answer.headers.get("Content-Type"))
        if request.method == "HEAD":
            response.headers["Content-Length"] = answer.headers["Content-Length"]
        return response

    web.expect_request(re.compile(".*")).respond_with_handler(handle)
    scripts.environment["AWS_ENDPOINT_URL"] = web.url_for("").rstrip("/")
    return read


def test_listed_milliseconds_do_not_change_objects(scripts_on_file: Scripts, bucket: Bucket, web: HTTPServer) -> None:
    bucket.put({f"{number}.png": png(number) for number in range(3)})
    read = behind_other_store(web, scripts_on_file)
    assert counts(scripts_on_file.create("--images", bucket.url)) == {"new": 3}
    assert len(read) == 3
    assert counts(scripts_on_file.create("--images", bucket.url)) == {"unchanged": 3}
    lines = scripts_on_file.search(bucket.url, "--exclude-self")  # nor are they opened to search for them
    assert len(lines) == len(read) == 3


@pytest.mark.parametrize("key", ["Icon&#13;", "in//5.png", "in/./6.png"])
def test_an_unlistable_key_is_named(key: str, scripts_on_file: Scripts, bucket: Bucket, web: HTTPServer) -> None:
    bucket.put({"a.png": png(1), "odd.png": png(2)})
    behind_other_store(web, scripts_on_file, listed_as=key)
    (*_, line) = scripts_on_file.create("--images", bucket.url, exits=2).splitlines()
    assert f"{bucket.url} has the key {unescape(key)!r}, which obstore cannot list" in line and "rename it" in line


def test_a_folder_that_a_console_has_made_is_skipped(scripts_on_file: Scripts, bucket: Bucket, web: HTTPServer) -> None:
    """An object without content, whose key ends in a slash."""
    bucket.put({"a.png": png(1), "odd.png": b""})
    behind_other_store(web, scripts_on_file, listed_as="folder.png/")
    stderr = scripts_on_file.create("--images", bucket.url)
    assert counts(stderr) == {"new": 1} and skipped(stderr) == ["1 empty object"]


def test_an_object_that_cannot_be_read_is_one_line(scripts_on_file: Scripts, bucket: Bucket, web: HTTPServer) -> None:
    """Whatever the store says of it, after all retries, which are fewer here; or beyond 200 MB, here 300 bytes."""
    reasons = {"bad": "not an image that Pillow can read", "broken": "HTTP 500", "large": "more than "}
    reasons |= {"encrypted": "HTTP 400 InvalidRequest"}
    good = {f"{name}.png": png(seed, (4, 4)) for seed, name in enumerate(["a", "broken", "encrypted", "z"])}
    bucket.put(good | {"bad.png": b"no image", "large.png": png(9, (60, 40))})
    behind_other_store(web, scripts_on_file)
    fewer = {
        "imagesearch.sources.bucket.RETRY_SECONDS_OF_A_RUN": 2,
        "imagesearch.sources.memory.MAX_CONTENT_BYTES": 300,
    }
    settings = patched(scripts_on_file.home, fewer)
    stderr = scripts_on_file.create("--images", bucket.url, exits=1, new_python=True, **settings)
    assert counts(stderr) == {"new": 2, "unreadable": 4}
    for name, reason in reasons.items():
        assert f"Cannot read {bucket.url}/{name}.png: {reason}" in stderr


def test_an_overload_of_20_seconds_loses_nothing(scripts_on_file: Scripts, bucket: Bucket, web: HTTPServer) -> None:
    """With HTTP 503, as S3 has it for who is too fast."""
    bucket.put({f"{number}.png": png(number) for number in range(100)})
    behind_other_store(web, scripts_on_file, busy_seconds=20)
    stderr = scripts_on_file.create("--images", bucket.url)
    assert counts(stderr) == {"new": 100}
    assert f"Retrying requests to {bucket.url}: no answer yet." in stderr


def test_ctrl_c_ends_a_run_whose_store_is_silent(scripts_on_file: Scripts, web: HTTPServer) -> None:
    """obstore waits in Rust, where Python's signal handlers do not run."""
    asked, ended = threading.Event(), threading.Event()

    def hang(_: Request) -> Response:
        asked.set()
        ended.wait(120)
        return Response("", 503)

    web.expect_request(re.compile(".*")).respond_with_handler(hang)
    scripts_on_file.environment["AWS_ENDPOINT_URL"] = web.url_for("").rstrip("/")
    process = scripts_on_file.start("create.py", "--images", "s3://birds")
    asked.wait()
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert process.wait() == 130 and time.monotonic() - started < 5
    ended.set()
