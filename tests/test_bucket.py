"""Images in a bucket, on a real S3 server with signatures."""

import hashlib
import http.client
import http.server
import importlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import ClassVar

import pytest
from imagesearch.content import MAX_CONTENT_BYTES

from tests.http_servers import Answering, serving
from tests.pictures import png
from tests.running import Scripts, counts, end, hits, read_until, rows, summary, wait_until
from tests.server import S3, Bucket
from tests.tcp_proxy import TcpProxy

SLOW_SECONDS = 4


def test_a_bucket_is_indexed_as_a_folder_is(on_s3: Scripts, bucket: Bucket) -> None:
    keys = ["photos/Bald_Eagle/1.png", "photos/Bald_Eagle/2.png", "photos/deep/down/Wren/3.png", "photos/4.png"]
    for seed, key in enumerate(keys):
        bucket.put(key, png(seed))
    for key in ("photos/.hidden.png", "photos/.hidden/5.png", "photos/notes.txt", "photos/README", "other/6.png"):
        bucket.put(key, b"x")
    parts = summary(on_s3.create("--images", f"{bucket.url}/photos/"))
    assert parts.pop("new") == "4"
    assert sorted(parts["skipped"].split(", ")) == ["1 .txt", "1 without extension", "2 hidden"]

    (on_s3.folder / "query.png").write_bytes(png(2))
    (hit,) = hits(on_s3, "query.png")
    path = f"{bucket.url}/photos/deep/down/Wren/3.png"
    assert hit["_id"] == hashlib.sha256(path.encode()).hexdigest()
    assert hit["fields"] == {"file_path": [path], "desc": ["Wren"]}
    assert hit["_score"] == pytest.approx(1, abs=1e-6)
    assert hits(on_s3, "query.png", "-k", 9, "--desc", "photos")[0]["fields"]["file_path"] == [
        f"{bucket.url}/photos/4.png"
    ]
    assert hits(on_s3, path)[0]["fields"]["file_path"] == [path]  # a query from the bucket

    assert counts(on_s3.create("--images", f"{bucket.url}/photos")) == {"unchanged": 4}
    time.sleep(1)  # last_modified has seconds
    bucket.put(keys[0], png(0))  # the same content
    bucket.put(keys[1], png(77))
    bucket.put("photos/new.png", png(78))
    assert counts(on_s3.create("--images", f"{bucket.url}/photos")) == {"new": 1, "updated": 1, "unchanged": 3}
    assert counts(on_s3.create("--images", f"{bucket.url}/other", code=1)) == {"unreadable": 1}


def test_pruning_a_bucket_deletes_only_what_is_gone_below_the_url(on_s3: Scripts, bucket: Bucket) -> None:
    keys = [f"photos/{number % 3}/{number}.png" for number in range(9)]
    for seed, key in enumerate([*keys, "photos-too/a.png"]):
        bucket.put(key, png(seed))
    for prefix in ("photos", "photos-too"):
        on_s3.create("--images", f"{bucket.url}/{prefix}")
    bucket.delete(*keys[:4], "photos-too/a.png")
    assert counts(on_s3.create("--images", f"{bucket.url}/photos", "--prune")) == {"unchanged": 5, "deleted": 4}
    (on_s3.folder / "query.png").write_bytes(png(5))
    rest = {hit["fields"]["file_path"][0] for hit in hits(on_s3, "query.png", "-k", 99)}
    assert rest == {f"{bucket.url}/{key}" for key in [*keys[4:], "photos-too/a.png"]}
    bucket.delete(*keys[4:])
    assert "would delete all 5 documents" in on_s3.create("--images", f"{bucket.url}/photos", "--prune", code=2)
    assert counts(on_s3.create("--images", f"{bucket.url}/photos", "--prune-all")) == {"deleted": 5}


def test_content_is_copied_between_a_folder_and_a_bucket(on_s3: Scripts, bucket: Bucket) -> None:
    for seed in range(4):
        path = on_s3.folder / "images" / f"{seed}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(seed))
        bucket.put(f"moved/{seed}.png", png(seed))
    on_s3.create()
    assert counts(on_s3.create("--images", f"{bucket.url}/moved")) == {"new": 4, "known": 4}


def test_more_objects_than_a_page_of_the_listing_in_parts(local_s3: Scripts, bucket: Bucket) -> None:
    contents = [png(seed) for seed in range(50)]
    bucket.put_many({f"many/{number}.png": contents[number % 50] for number in range(1100)})
    new = [counts(local_s3.create("--images", bucket.url, "--part", f"{part}/2"))["new"] for part in (1, 2)]
    assert sum(new) == 1100 and min(new) > 400
    bucket.delete(*(f"many/{number}.png" for number in range(0, 1100, 100)))
    assert counts(local_s3.create("--images", bucket.url, "--prune")) == {"unchanged": 1089, "deleted": 11}


ODD_KEYS = [
    "odd/Bald Eagle/ä 1.png",
    "odd/100%/%2F.png",
    "odd/a%2Fb.png",
    "odd/ü🦅.png",
    "odd/plus+and&more?.png",
    "odd/it's #1.png",
    "odd/back\\slash.png",
]


def test_unusual_keys_are_preserved(local: Scripts, memory_bucket: Bucket) -> None:
    local.environment |= memory_bucket.server.environment
    for seed, key in enumerate(ODD_KEYS):
        memory_bucket.put_any(key, png(seed))
    memory_bucket.put_any("odd", b"an object named like the prefix")
    memory_bucket.put_any("odd/folder/", b"")
    memory_bucket.put_any("odd/folder.png/", b"")
    stderr = local.create("--images", f"{memory_bucket.url}/odd")
    assert counts(stderr) == {"new": len(ODD_KEYS)}
    assert summary(stderr)["skipped"] == "1 empty object, 1 without extension"
    urls = [f"{memory_bucket.url}/{key}" for key in ODD_KEYS]
    for seed in range(len(ODD_KEYS)):
        (local.folder / f"{seed}.png").write_bytes(png(seed))
    found = [
        response["hits"]["hits"][0]
        for response in local.search(*(f"{seed}.png" for seed in range(len(ODD_KEYS))), *urls)
    ]
    assert [hit["fields"]["file_path"] for hit in found] == [[url] for url in (*urls, *urls)]
    assert min(hit["_score"] for hit in found) == pytest.approx(1, abs=1e-6)
    assert counts(local.create("--images", f"{memory_bucket.url}/odd", "--prune")) == {"unchanged": len(ODD_KEYS)}


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("in/b/Icon\r", "control characters"),
        ("in/b//5.png", "a part that is empty"),
        ("in/b/./6.png", "a part that is"),
    ],
)
def test_a_key_that_obstore_cannot_read_costs_one_line(
    key: str, problem: str, local: Scripts, memory_bucket: Bucket
) -> None:
    good = ["in/a/1.png", "in/a/2.png", "in/b/z.png", "in/c/3.png", "in/c/d/4.png", "in/5.png"]
    local.environment |= memory_bucket.server.environment
    for seed, name in enumerate([*good, key]):
        memory_bucket.put_any(name, png(seed))
    stderr = local.create("--images", f"{memory_bucket.url}/in", code=1)
    assert counts(stderr) == {"new": len(good), "unreadable": 1}
    (line,) = [line for line in stderr.splitlines() if line.startswith("Cannot read")]
    assert f"obstore cannot read keys with {problem}" in line and "\r" not in line
    assert local.paths() == sorted(f"{memory_bucket.url}/{name}" for name in good)
    assert counts(local.create("--images", f"{memory_bucket.url}/in", "--prune", code=1))["unchanged"] == len(good)


def test_several_keys_that_obstore_cannot_read_are_each_named_once(local: Scripts, memory_bucket: Bucket) -> None:
    local.environment |= memory_bucket.server.environment
    for seed, name in enumerate(["in/Icon\r", "in/a.png", "in/b//c.png", "in/d.png", "in/e\x7f.png", "in/z.png"]):
        memory_bucket.put_any(name, png(seed))
    stderr = local.create("--images", f"{memory_bucket.url}/in", code=1)
    assert stderr.count("obstore cannot read keys") == 3
    assert (
        {f"{memory_bucket.url}/in/z.png"}
        <= set(local.paths())
        <= {f"{memory_bucket.url}/in/{name}.png" for name in "adz"}
    )


def test_keys_that_differ_in_outer_slashes_are_reported(local: Scripts, memory_bucket: Bucket) -> None:
    local.environment |= memory_bucket.server.environment
    for seed, name in enumerate(["/photos/1.png", "photos/1.png", "photos/2.png", "/only/3.png"]):
        memory_bucket.put_any(name, png(seed))
    stderr = local.create("--images", memory_bucket.url, code=1)
    assert counts(stderr) == {"new": 2, "unreadable": 2}
    assert (
        f"Cannot read {memory_bucket.url}/photos/1.png: there are several such keys, with and without slashes" in stderr
    )
    assert (
        f"Cannot read {memory_bucket.url}/only/3.png: no such object: it was deleted, or its key begins or ends"
        in stderr
    )


@pytest.mark.parametrize(
    ("environment", "url", "message"),
    [
        (
            {"AWS_SECRET_ACCESS_KEY": "wrong-SECRET"},
            "{}",
            r"denied access \(HTTP 403 SignatureDoesNotMatch\): check",
        ),
        ({"AWS_ACCESS_KEY_ID": "SECRET-id"}, "{}", r"denied access \(HTTP 403 InvalidAccessKeyId\): check AWS_ACCESS"),
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            "{}",
            r"No answer from s3://\S+ \(error sending request\)\. Check AWS_ACCESS_KEY_ID",
        ),
        (
            {"AWS_ALLOW_HTTP": "false"},
            "{}",
            r"cannot be reached over http://: set AWS_ALLOW_HTTP=true",
        ),
        ({}, "s3://no-such-bucket-here", r"There is no bucket s3://no-such-bucket-here \(HTTP 404 NoSuchBucket\)"),
        ({}, "{}/no/such/prefix", r"There are no images below s3://\S+/no/such/prefix"),
        ({}, "s3://", r"The URL of a bucket must look like s3://bucket/folder"),
        ({}, "s3://user:local-SECRET@birds", r"The URL of a bucket must look like s3://bucket/folder, without a user"),
        ({}, "s3://birds?x=1", r"The URL of a bucket must look like"),
        ({}, "s3://birds:80/a", r"The URL of a bucket must look like"),
        ({}, "S3://no-such-bucket-here", r"There is no bucket s3://no-such-bucket-here"),
    ],
)
def test_what_is_wrong_is_reported_in_one_line(
    environment: dict[str, str], url: str, message: str, local_s3: Scripts, bucket: Bucket
) -> None:
    bucket.put("a.png", png(1))
    started = time.monotonic()
    code = 1 if "AWS_ENDPOINT_URL" in environment else 2
    stderr = local_s3.create("--images", url.format(bucket.url), code=code, **environment)
    assert time.monotonic() - started < 60  # not the minutes of obstore's own retries
    (line,) = stderr.splitlines()
    assert re.search(message, line), line
    assert "<" not in line and "Debug" not in line
    assert not re.search("wrong-SECRET|local-SECRET|SECRET-id", line)
    assert not (local_s3.folder / "imagesearch.db").exists()


def test_no_credentials_are_reported_in_one_line(local: Scripts, s3: S3, bucket: Bucket) -> None:
    """Without a key, the cloud's metadata server is asked, which is not there."""
    local.environment |= {name: value for name, value in s3.environment.items() if "KEY" not in name}
    stderr = local.create("--images", bucket.url, code=2)
    assert re.search(r"create.py: (No credentials for|s3://\S+ denied|.*no answer).*AWS_ACCESS_KEY_ID", stderr), stderr


def test_one_bad_object_is_one_line(local_s3: Scripts, bucket: Bucket) -> None:
    bucket.put("a.png", png(1))
    bucket.put("bad.png", b"no image")
    stderr = local_s3.create("--images", bucket.url, code=1)
    assert counts(stderr) == {"new": 1, "unreadable": 1}
    assert f"Cannot read {bucket.url}/bad.png: not an image that Pillow can read" in stderr
    done = local_s3.run("search.py", f"{bucket.url}/gone.png", f"{bucket.url}/a.png")
    assert done.returncode == 1
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["error"]["reason"] == f"Cannot read {bucket.url}/gone.png: No such object"
    assert second["hits"]["max_score"] == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
def test_an_object_over_200_mb_is_reported_and_not_read(local_s3: Scripts, bucket: Bucket) -> None:
    bucket.put("a.png", png(1))
    bucket.put("huge.png", bytes(MAX_CONTENT_BYTES + 1))
    assert f"Cannot read {bucket.url}/huge.png: more than 200 MB" in local_s3.create("--images", bucket.url, code=1)
    done = local_s3.run("search.py", f"{bucket.url}/huge.png")
    assert done.returncode == 1 and "more than 200 MB" in done.stdout


def test_a_folder_named_like_a_url_stays_a_folder(local: Scripts) -> None:
    folder = local.folder / "s3:" / "birds"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(png(1))
    assert counts(local.create("--images", "./s3://birds")) == {"new": 1}
    assert local.paths() == ["./s3:/birds/a.png"]


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_store_that_goes_away_is_retried(comes_back: bool, local_s3: Scripts, s3: S3, bucket: Bucket) -> None:
    bucket.put_many({f"many/{number}.png": png(number, (60, 40)) for number in range(1000)})
    with TcpProxy(s3.port) as proxy:
        retry = ("--retry-timeout", "60" if comes_back else "3")
        url = f"http://127.0.0.1:{proxy.port}"
        process = local_s3.start(
            "create.py", "--model", "thumbnail", "--images", bucket.url, *retry, AWS_ENDPOINT_URL=url
        )
        wait_until(lambda: process.poll() is not None or rows(local_s3.folder / "imagesearch.db") > 0)
        proxy.stop()
        read_until(process, "Retrying")
        if comes_back:
            proxy.start()
        code, stderr = end(process)
    found = counts(stderr)
    if comes_back:
        assert code == 0, stderr
        assert found["new"] == 1000
    else:
        assert code == 1, stderr
        assert re.search(rf"create.py: The bucket {bucket.url} did not recover within \d+ s: no answer", stderr)
        assert stderr.count("Retrying") < 10  # not once for each thread
        assert counts(local_s3.create("--images", bucket.url))["unchanged"] == found["new"]


def test_an_interrupted_run_goes_on(local_s3: Scripts, bucket: Bucket) -> None:
    bucket.put_many({f"many/{number}.png": png(number, (60, 40)) for number in range(1500)})
    process = local_s3.start("create.py", "--model", "thumbnail", "--images", bucket.url)
    wait_until(lambda: process.poll() is not None or rows(local_s3.folder / "imagesearch.db") > 0)
    process.send_signal(signal.SIGINT)
    code, stderr = end(process)
    if code == 0:
        pytest.skip("this machine was done before it could be interrupted; that leaves the interruption untested")
    assert code == 130
    written = counts(stderr).get("new", 0)
    assert counts(local_s3.create("--images", bucket.url)).get("unchanged", 0) == written


def test_the_page_shows_hits_in_a_bucket_without_linking_them(local_s3: Scripts, bucket: Bucket) -> None:
    for seed in range(5):
        bucket.put(f"photos/{seed}.png", png(seed, (60, 40)))
    local_s3.create("--images", bucket.url)
    bucket.delete("photos/4.png")
    local_s3.search(f"{bucket.url}/photos/3.png", "-k", 5, "--html", "page.html")
    html = (local_s3.folder / "page.html").read_text()
    assert html.count("<img") == 1 + 4 and html.count("4.png is gone") == 1
    assert "<a " not in html
    assert f"{bucket.url}/photos/2.png" in html.replace("<wbr>", "")
    assert "SECRET" not in html and "Signature" not in html


# A cutoff


class OtherStore(Answering):
    """A proxy in front of S3Proxy that does what other object stores do, or what networks do, by the object's name."""

    protocol_version = "HTTP/1.1"
    port: ClassVar[int]  # of S3Proxy
    read: ClassVar[list[str]]  # the paths of the objects that were read

    def answer(self) -> None:
        upstream = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        upstream.request(self.command, self.path, headers=dict(self.headers))
        response = upstream.getresponse()
        status, content = response.status, response.read()
        upstream.close()
        # As IBM Cloud Object Storage, MinIO and Google list it; the response to GET has whole seconds.
        content = re.sub(rb"(<LastModified>[^<.]*)(\.\d+)?Z", rb"\1.006Z", content)
        is_object = self.command == "GET" and self.path.endswith(".png")
        if is_object:
            self.read.append(self.path)
        if self.path.endswith("/encrypted.png"):  # with a key of the customer's
            status, content = 400, b"<Error><Code>InvalidRequest</Code></Error>"
        self.send_response_only(status)
        for name in ("Content-Type", "Content-Range", "ETag", "Last-Modified"):
            if name in response.headers:
                self.send_header(name, response.headers[name])
        is_head = self.command == "HEAD"
        self.send_header("Content-Length", response.headers["Content-Length"] if is_head else str(len(content)))
        self.end_headers()
        if is_object and self.path.endswith("/cut.png") and self.read.count(self.path) <= 3:
            self.wfile.write(content[:100])
            self.close_connection = True
        elif is_object and self.path.endswith("/slow.png"):
            for start in range(SLOW_SECONDS):
                self.wfile.write(content[start : start + 1 if start < SLOW_SECONDS - 1 else None])
                time.sleep(1)
        else:
            self.wfile.write(content)


@pytest.fixture
def other_store(local_s3: Scripts, s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[OtherStore]]:
    """The proxy, which `local_s3` uses."""
    monkeypatch.setattr(OtherStore, "port", s3.port, raising=False)
    monkeypatch.setattr(OtherStore, "read", [], raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OtherStore) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        local_s3.environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.server_port}"
        yield OtherStore
        server.shutdown()


def test_objects_are_unchanged_although_the_store_lists_milliseconds(
    local_s3: Scripts, bucket: Bucket, other_store: type[OtherStore]
) -> None:
    for number in range(3):
        bucket.put(f"{number}.png", png(number))
    assert counts(local_s3.create("--images", bucket.url)) == {"new": 3}
    assert len(other_store.read) == 3
    assert counts(local_s3.create("--images", bucket.url)) == {"unchanged": 3}
    assert len(other_store.read) == 3


def test_an_object_that_the_store_refuses_is_one_unreadable_image(
    local_s3: Scripts, bucket: Bucket, other_store: type[OtherStore]
) -> None:
    for seed, name in enumerate(("a.png", "encrypted.png", "z.png")):
        bucket.put(name, png(seed))
    stderr = local_s3.create("--images", bucket.url, code=1)
    assert counts(stderr) == {"new": 2, "unreadable": 1}
    assert f"Cannot read {bucket.url}/encrypted.png: the store refuses to send it (HTTP 400 InvalidRequest)" in stderr


def test_an_object_that_breaks_off_is_read_again(
    local_s3: Scripts, bucket: Bucket, other_store: type[OtherStore]
) -> None:
    bucket.put("cut.png", png(1, (80, 80)))
    stderr = local_s3.create("--images", bucket.url)
    assert counts(stderr) == {"new": 1}
    assert "Retrying in 1 s: no answer from" in stderr


def test_an_object_may_take_long_as_long_as_it_comes(
    local_s3: Scripts, bucket: Bucket, other_store: type[OtherStore]
) -> None:
    """obstore's own limit of 30 s for a request is set to ten minutes, unless the user sets it."""
    importlib.import_module("imagesearch.bucket")
    assert os.environ["AWS_TIMEOUT"] == "10m"
    bucket.put("slow.png", png(1, (80, 80)))
    assert counts(local_s3.create("--images", bucket.url)) == {"new": 1}
    assert len(other_store.read) == 1
    other = local_s3.folder / "other.db"
    assert "No answer from" in local_s3.create(
        "--images", bucket.url, "--db", other, "--retry-timeout", "0", code=1, AWS_TIMEOUT="1s"
    )


def test_slashes_around_a_prefix_change_nothing(local_s3: Scripts, bucket: Bucket) -> None:
    bucket.put("photos/a.png", png(1))
    bucket.put("photos/b.png", png(2))
    assert counts(local_s3.create("--images", f"{bucket.url}/photos")) == {"new": 2}
    bucket.delete("photos/b.png")
    assert counts(local_s3.create("--images", f"{bucket.url}//photos/", "--prune")) == {"unchanged": 1, "deleted": 1}


class Hanging(Answering):
    """A store that takes requests and says nothing."""

    asked = threading.Event()

    def answer(self) -> None:
        self.asked.set()
        time.sleep(60)


def test_ctrl_c_ends_a_listing_that_hangs_at_the_start(local_s3: Scripts, bucket: Bucket) -> None:
    """obstore waits in Rust, where Python's signal handlers do not run. During a run: tests/test_retry.py."""
    with serving(Hanging) as port:
        local_s3.environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
        process = local_s3.start("create.py", "--model", "thumbnail", "--images", bucket.url)
        assert Hanging.asked.wait(60)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == -signal.SIGINT
