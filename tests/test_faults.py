"""Whatever happens to the server, the process or the disk: nothing is lost, and what is reported is true."""

import contextlib
import http.server
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from imagesearch.connection import Connection
from imagesearch.elasticsearch_index import BULK_REQUESTS, BULK_SIZE, ElasticsearchIndex
from imagesearch.interrupt import Interrupt
from imagesearch.retry import Retry

from imagesearch import elasticsearch_index, retry, sqlite_index
from imagesearch.records import Document, ImageFile, IndexMetadata, MetadataUpdate, ModelInfo
from tests.http_servers import NotElasticsearch
from tests.pictures import Picture, averaging_model
from tests.running import (
    MANY,
    Scripts,
    behind,
    count,
    counts,
    end,
    open_scripts_index,
    read_until,
    rows,
    scripts_on,
    wait_for_start,
    wait_until,
)
from tests.server import ROOT, Cluster, Server
from tests.tcp_proxy import TcpProxy

METADATA = IndexMetadata(ModelInfo("thumbnail"), "/")


# The server


def test_a_server_that_is_killed_and_comes_back_is_retried(
    fragile_server: Cluster, many_images: Path, tmp_path: Path
) -> None:
    scripts = scripts_on(fragile_server, many_images, tmp_path)
    process = scripts.start("create.py", "--model", "thumbnail")
    wait_until(lambda: count(scripts) > 200)
    fragile_server.kill(fragile_server.nodes[0])
    read_until(process, "Retrying in 2 s: no answer from https://localhost")
    fragile_server.start(fragile_server.nodes[0])
    code, stderr = end(process)
    assert code == 0, stderr
    assert counts(stderr) == {"new": MANY}
    assert count(scripts) == MANY
    fragile_server.wait()


def test_a_server_that_stays_away_ends_the_run_and_the_next_one_goes_on(
    elastic: Scripts, many_images: Path, proxy: TcpProxy
) -> None:
    elastic.folder = many_images
    process = elastic.start("create.py", "--model", "thumbnail", "--retry-timeout", "2", ES_URL=behind(proxy, elastic))
    wait_until(lambda: count(elastic) > 200)
    proxy.stop()
    stopped = time.monotonic()
    code, stderr = end(process)
    assert time.monotonic() - stopped > 0.9  # the request that was under way counts, too
    assert code == 1
    assert "Retrying in 1 s" in stderr and "Retrying in 2 s" not in stderr  # the last delay is cut to fit
    assert re.search(r"Elasticsearch did not recover within [23] s: .*Run the command again", stderr)
    written, before = counts(stderr)["new"], count(elastic)
    assert written <= before < MANY  # the last bulk may have arrived without its answer
    assert counts(elastic.create()) == {"new": MANY - before, "unchanged": before}
    assert count(elastic) == MANY


def test_documents_that_are_rejected_for_now_are_sent_again(
    fragile_server: Cluster, many_images: Path, tmp_path: Path
) -> None:
    scripts = scripts_on(fragile_server, many_images, tmp_path)
    server = Server(fragile_server.url, str(fragile_server.ca))
    template = {"index_patterns": [scripts.index], "template": {"settings": {"number_of_shards": 3}}}
    server.request("PUT", "_index_template/many-shards", template)
    stderr = scripts.create("--images", "images/1")
    server.request("DELETE", "_index_template/many-shards")
    assert "Elasticsearch temporarily rejected" in stderr and "es_rejected_execution_exception" in stderr
    assert counts(stderr) == {"new": MANY // 10}
    assert count(scripts) == MANY // 10


def test_a_server_that_does_not_answer_is_retried(
    fragile_server: Cluster, tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that runs into its time limit is sent again, as one that finds no server is."""
    monkeypatch.setattr(elasticsearch_index, "REQUEST_TIMEOUT_SECONDS", 1)
    monkeypatch.setattr(retry, "SLOW_SECONDS", 0.5)
    process = fragile_server.nodes[0].process
    connection = Connection.from_env({"ES_URL": fragile_server.url, "ES_CA_CERT": str(fragile_server.ca)})
    assert process
    assert connection
    pid = process.pid
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if text.startswith("Retrying"):
            os.killpg(pid, signal.SIGCONT)

    with ElasticsearchIndex(connection, "test-silent", Retry(30, Interrupt(), say)) as index:
        index.create(METADATA)
        index.get_metadata()
        index.refresh()
        path = str(picture("a.png"))
        document = Document(ImageFile(path, path, "a", 1, 1), "0" * 64, np.ones(768, np.float32))
        os.killpg(process.pid, signal.SIGSTOP)
        assert list(index.write([document])) == [document]
        assert said[0] == "Waiting for an answer of Elasticsearch, which takes more than 0.5 seconds."
        assert re.match(r"Retrying in 1 s: no answer from https://localhost", said[1])


def test_a_document_that_another_run_has_deleted_is_not_counted(scripts: Scripts, picture: Picture) -> None:
    path = str(picture("a.png"))
    image = ImageFile(path, path, "a", 1, 1)
    with open_scripts_index(scripts, scripts.folder) as index:
        index.create(METADATA)
        index.get_metadata()
        assert list(index.write([MetadataUpdate(image)])) == []
        assert index.delete([image.id]) == 0


def test_an_index_that_another_run_has_just_made_with_another_model_is_refused(
    scripts: Scripts, picture: Picture
) -> None:
    """Two runs begin on no index; the other model's run is the first to create it."""
    picture("images/a.png")
    scripts.create()
    (scripts.folder / "sitecustomize.py").write_text(
        "import imagesearch.elasticsearch_search as e, imagesearch.sqlite_index as s\n"
        "for kind in (e.ElasticsearchSearch, s.SqliteIndex):\n"
        "    def get_metadata(self, original=kind.get_metadata, asked=[]):\n"
        "        asked.append(1)\n"
        "        return original(self) if len(asked) > 1 else None\n"
        "    kind.get_metadata = get_metadata\n"
    )
    model = averaging_model(scripts.folder / "model.onnx")
    path = os.pathsep.join([str(scripts.folder), str(ROOT)])
    assert "made with --model thumbnail" in scripts.create("--model", model, code=2, PYTHONPATH=path)


@pytest.mark.parametrize("block", ["read_only_allow_delete", "write"])
def test_a_blocked_index_ends_the_run_at_once(block: str, elastic: Scripts, server: Server, picture: Picture) -> None:
    picture("images/a.png")
    elastic.create()
    server.request("PUT", f"{elastic.index}/_settings", {f"index.blocks.{block}": True})
    picture("images/b.png")
    stderr = elastic.create(code=1)
    assert "Retrying" not in stderr
    assert counts(stderr) == {"unchanged": 1}
    assert stderr.count("create.py:") == 1
    assert "cluster_block_exception" in stderr and "remove the index's block" in stderr
    server.request("PUT", f"{elastic.index}/_settings", {f"index.blocks.{block}": None})
    assert counts(elastic.create()) == {"new": 1, "unchanged": 1}


@pytest.mark.parametrize("kind", sorted(NotElasticsearch.answers))
def test_what_is_not_elasticsearch_is_reported_in_one_line(kind: str, local: Scripts, picture: Picture) -> None:
    path = picture("images/a.png")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotElasticsearch) as stranger:
        threading.Thread(target=stranger.serve_forever, daemon=True).start()
        url = f"http://admin:hunter2@127.0.0.1:{stranger.server_port}/{kind}"
        for arguments in (("create.py", "--model", "thumbnail"), ("search.py", path)):
            done = local.run(*arguments, ES_URL=url)
            if kind == "gateway":
                assert done.returncode == 1
                message = (
                    r"\w+\.py: No answer from Elasticsearch \(\S+ answered HTTP 502 with text/html\)\. Check ES_URL.*\n"
                )
            else:
                assert done.returncode == 2
                message = r"\w+\.py: \S+ is not Elasticsearch, .* Check ES_URL\.\n"
            assert re.fullmatch(message, done.stderr), done.stderr
            assert "hunter2" not in done.stderr
        stranger.shutdown()


def test_deletions_that_are_refused_are_not_counted(elastic: Scripts, server: Server, picture: Picture) -> None:
    picture("images/a.png")
    gone = picture("images/b.png")
    elastic.create()
    gone.unlink()
    server.request("PUT", f"{elastic.index}/_settings", {"index.blocks.write": True})
    stderr = elastic.create("--prune", code=1)
    assert counts(stderr) == {"unchanged": 1}
    assert "cluster_block_exception" in stderr


def test_an_index_that_is_deleted_during_a_run_does_not_come_back_with_a_guessed_mapping(
    elastic: Scripts, server: Server, many_images: Path
) -> None:
    elastic.folder = many_images
    process = elastic.start("create.py", "--model", "thumbnail")
    wait_until(lambda: count(elastic) > 200)
    server.request("DELETE", elastic.index)
    code, stderr = end(process)
    assert code == 1, stderr
    assert re.search(rf"create.py: The index {elastic.index} was deleted during the run, with all that was", stderr)
    assert server.request("GET", f"{elastic.index}?ignore_unavailable=true") == {}
    assert counts(elastic.create())["new"] == MANY


def test_an_index_that_is_replaced_during_a_run_ends_it(elastic: Scripts, server: Server, many_images: Path) -> None:
    elastic.folder = many_images
    process = elastic.start("create.py", "--model", "thumbnail")
    wait_until(lambda: count(elastic) > 200)
    (mappings,) = (index["mappings"] for index in server.request("GET", f"{elastic.index}/_mapping").values())
    server.request("DELETE", elastic.index)
    with contextlib.suppress(AssertionError):  # the run may have been faster: then it deletes what it made
        server.request("PUT", elastic.index, {"mappings": mappings})
    code, stderr = end(process)
    assert code == 1, stderr
    assert "was deleted during the run" in stderr or "no longer points to the index" in stderr


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_of_two_runs_with_different_models_one_is_refused(delay: float, scripts: Scripts, picture: Picture) -> None:
    for number in range(20):
        picture(f"images/{number}.png", seed=number)
    model = averaging_model(scripts.folder / "model.onnx")
    first = scripts.start("create.py", "--model", "thumbnail")
    time.sleep(delay)
    second = scripts.start("create.py", "--model", str(model))
    ends = [end(process) for process in (first, second)]
    assert sorted(code for code, _ in ends) == [0, 2], ends
    (refused,) = [stderr for code, stderr in ends if code == 2]
    assert "is another model: use the same model, or another index with --index" in refused
    winner = "thumbnail" if ends[0][0] == 0 else str(model)
    assert counts(scripts.create("--model", winner)) == {"unchanged": 20}


# The process


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(),
    reason="needs /proc to see when the script has begun; that leaves Ctrl-C at random moments untested",
)
@pytest.mark.parametrize("script", ["create.py", "search.py"])
def test_ctrl_c_at_any_moment_ends_without_a_traceback(script: str, local: Scripts, picture: Picture) -> None:
    for number in range(300):
        picture(f"images/{number}.png", size=(8, 8), seed=number)
    path = local.folder / "images" / "1.png"
    local.create()
    chance = random.Random(7)
    arguments = ["--model", "thumbnail", "--db", "new.db"] if script == "create.py" else [str(path)]
    codes = []
    for _ in range(15):
        for stale in local.folder.glob("new.db*"):
            stale.unlink()
        process = local.start(script, *arguments)
        wait_for_start(process)
        time.sleep(0.6 * chance.random())
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
        assert "Traceback" not in stderr and "KeyboardInterrupt" not in stderr, stderr
        codes.append(process.returncode)
    assert set(codes) <= {0, 130, -signal.SIGINT}, codes  # the last one, during the imports, is 130 in a shell too
    assert {130, -signal.SIGINT} & set(codes)


@pytest.mark.parametrize(("signal_", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_counts_what_is_stored_and_the_next_goes_on(
    signal_: signal.Signals, code: int, scripts: Scripts, many_images: Path
) -> None:
    scripts.folder, home = many_images, scripts.folder
    arguments = ("--model", "thumbnail", "--db", home / "index.db")
    process = scripts.start("create.py", *arguments)
    wait_until(lambda: (count(scripts) if "ES_URL" in scripts.environment else rows(home / "index.db")) > 0)
    process.send_signal(signal_)
    ended, stderr = end(process, seconds=20)
    written = counts(stderr).get("new", 0)
    if written == MANY:
        pytest.skip("this machine was done before it could be interrupted; that leaves the interruption untested")
    assert ended == code, stderr
    assert counts(scripts.create(*arguments)) == {"new": MANY - written} | ({"unchanged": written} if written else {})


def test_a_second_ctrl_c_ends_at_once(fragile_server: Cluster, many_images: Path, tmp_path: Path) -> None:
    scripts = scripts_on(fragile_server, many_images, tmp_path)
    process = scripts.start("create.py", "--model", "thumbnail")
    wait_until(lambda: count(scripts) > 0)
    assert fragile_server.nodes[0].process
    os.killpg(fragile_server.nodes[0].process.pid, signal.SIGSTOP)  # it takes connections and says nothing
    try:
        process.send_signal(signal.SIGINT)
        read_until(process, "Interrupted")
        assert process.poll() is None  # the answer to what it has sent is waited for
        time.sleep(0.6)  # sooner, it would be the same signal
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=3) == -signal.SIGINT  # which a shell shows as 130
    finally:
        os.killpg(fragile_server.nodes[0].process.pid, signal.SIGCONT)


def test_a_doubled_signal_is_one(local: Scripts, many_images: Path) -> None:
    """GNU `timeout`, and wrappers that forward Ctrl-C, signal a process and its group at once."""
    local.folder, home = many_images, local.folder
    process = local.start("create.py", "--model", "thumbnail", "--db", home / "index.db")
    wait_until(lambda: process.poll() is not None or rows(home / "index.db") > 0)
    for _ in range(3):
        process.send_signal(signal.SIGINT)
    code, stderr = end(process)
    if code == 0:
        pytest.skip("this machine was done before it could be interrupted; that leaves the interruption untested")
    assert code == 130, stderr
    assert stderr.count("Interrupted") == 1
    assert counts(stderr)["new"] == rows(home / "index.db")
    assert "Run the command again to continue" in stderr


def test_ctrl_c_writes_what_is_embedded_even_if_stderr_is_closed(local: Scripts, many_images: Path) -> None:
    """As with `2>&1 | tee log`, which the same Ctrl-C ends first."""
    local.folder, home = many_images, local.folder
    process = local.start("create.py", "--model", "thumbnail", "--db", home / "index.db")
    assert process.stderr
    wait_until(lambda: process.poll() is not None or rows(home / "index.db") > 0)
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    written = rows(home / "index.db")
    assert 0 < written < MANY
    assert counts(local.create("--db", home / "index.db")) == {"new": MANY - written, "unchanged": written}


def test_an_interruption_ends_the_retries(elastic: Scripts, many_images: Path, proxy: TcpProxy) -> None:
    elastic.folder = many_images
    process = elastic.start("create.py", "--model", "thumbnail", ES_URL=behind(proxy, elastic))
    wait_until(lambda: count(elastic) > BULK_REQUESTS * BULK_SIZE)  # so the first are confirmed
    proxy.stop()
    read_until(process, "Retrying in 4 s")
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, stderr = end(process)
    assert code == 130, stderr
    assert time.monotonic() - started < 3  # the 4 s are cut short
    assert "Retrying" not in stderr  # after the one that was read
    assert 0 < counts(stderr)["new"] < MANY


def test_killed_at_any_moment_the_local_file_opens_and_the_next_run_goes_on(local: Scripts, many_images: Path) -> None:
    local.folder, home = many_images, local.folder
    arguments = ("--model", "thumbnail", "--db", home / "index.db")
    chance = random.Random(5)
    for _ in range(5):
        before = rows(home / "index.db")
        process = local.start("create.py", *arguments)
        wait_until(lambda: process.poll() is not None or rows(home / "index.db") > before)  # noqa: B023
        time.sleep(0.1 * chance.random())
        process.kill()
        process.wait()
        database = sqlite3.connect(home / "index.db")
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        database.close()
    local.create(*arguments)
    assert counts(local.create(*arguments)) == {"unchanged": MANY}
    for number in (0, 1234, MANY - 1):
        path = f"./images/{number % 10}/{number}.png"
        hits = local.search(path, "--db", home / "index.db")[0]["hits"]
        assert hits["hits"][0]["fields"]["file_path"] == [path]


def test_two_runs_at_once_end_well(scripts: Scripts, many_images: Path) -> None:
    scripts.folder, home = many_images, scripts.folder
    arguments = ("--model", "thumbnail", "--db", home / "index.db")
    processes = [scripts.start("create.py", *arguments) for _ in range(2)]
    for code, stderr in map(end, processes):
        assert code == 0, stderr
        found = counts(stderr)
        assert found["new"] + found.get("unchanged", 0) == MANY
    assert counts(scripts.create(*arguments)) == {"unchanged": MANY}


# The disk


@pytest.mark.parametrize(
    "content", [b"no database at all, but long enough to have a header" * 100, b"SQLite format 3\0" * 300]
)
def test_a_file_that_is_not_an_index_is_refused_and_left_alone(
    content: bytes, local: Scripts, picture: Picture
) -> None:
    picture("images/a.png")
    path = local.folder / "imagesearch.db"
    path.write_bytes(content)
    done = local.run("search.py", "images/a.png")
    for stderr in (local.create(code=2), done.stderr):
        assert "is not an SQLite file, or is damaged" in stderr and stderr.count("\n") == 1
    assert done.returncode == 2
    assert path.read_bytes() == content


def test_the_database_of_another_program_is_refused_and_left_alone(local: Scripts, picture: Picture) -> None:
    picture("images/a.png")
    path = local.folder / "imagesearch.db"
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE notes (text)")
    database.close()
    content = path.read_bytes()
    assert "not an index made by create.py" in local.create(code=2)
    assert path.read_bytes() == content
    assert "cannot be read or written" in local.create("--db", local.folder, code=1)


def test_a_truncated_index_is_reported_in_one_line(local: Scripts, picture: Picture) -> None:
    for number in range(300):
        picture(f"images/{number}.png", size=(8, 8), seed=number)
    local.create()
    path = local.folder / "imagesearch.db"
    content = path.read_bytes()
    for part in (2, 3, 10):
        path.write_bytes(content[: len(content) // part])
        done = local.run("search.py", "images/1.png")
        assert done.returncode == 2, done.stderr
        assert "is not an SQLite file, or is damaged" in done.stderr
        assert path.read_bytes() == content[: len(content) // part]


def test_an_empty_file_becomes_an_index(local: Scripts, picture: Picture) -> None:
    picture("images/a.png")
    (local.folder / "imagesearch.db").touch()
    assert local.run("search.py", "images/a.png").returncode == 2
    assert counts(local.create()) == {"new": 1}


def test_a_full_disk_is_reported_in_one_line_and_the_next_run_goes_on(local: Scripts, many_images: Path) -> None:
    local.folder, home = many_images, local.folder
    arguments = ("--model", "thumbnail", "--db", home / "index.db", "--index", local.index)
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20));"
    limited += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", limited, str(ROOT / "create.py"), *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=many_images,
        env=local.environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"create.py: \S+ cannot be read or written: .*(full|I/O error)", done.stderr)
    written = counts(done.stderr).get("new", 0)
    assert 0 < written < MANY
    assert counts(local.create(*arguments)) == {"new": MANY - written, "unchanged": written}


def test_a_folder_that_cannot_be_written_to_is_reported_in_one_line(local: Scripts, picture: Picture) -> None:
    picture("images/a.png")
    assert "cannot be read or written" in local.create("--db", "/nowhere/index.db", code=1)


def test_a_read_only_index_can_be_searched(local: Scripts, picture: Picture) -> None:
    """As on a DVD: nothing can be written beside the file either."""
    path = picture("images/a.png")
    local.create()
    disk = local.folder / "disk"
    disk.mkdir()
    (local.folder / "imagesearch.db").rename(disk / "imagesearch.db")
    search = f"{sys.executable} {ROOT}/search.py {path} --index {local.index} --db {disk}/imagesearch.db"
    mount = f"mount --bind {disk} {disk} && mount -o remount,bind,ro {disk} && ! touch {disk}/new 2>/dev/null"
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", f"{mount} || exit 99; {search}"]
    done = subprocess.run(command, env=local.environment, capture_output=True, text=True, check=False)
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(
            f"no read-only mount can be made here ({done.stderr.strip()}); that leaves a read-only disk untested"
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["hits"]["max_score"] == pytest.approx(1, abs=1e-6)


def test_an_index_file_of_the_former_version_is_refused(local: Scripts, picture: Picture) -> None:
    path = picture("images/a.png")
    with contextlib.closing(sqlite3.connect(local.folder / "imagesearch.db")) as database:
        database.execute("CREATE TABLE documents (id)")
        database.execute(f"PRAGMA application_id = {sqlite_index.APPLICATION_ID}")
        database.execute("PRAGMA user_version = 1")
    line = "was made by another version of create.py: delete it and run create.py again"
    assert line in local.create(code=2)
    assert line in local.run("search.py", path).stderr
