"""Whatever happens to the server, the process or the disk: nothing is lost, and what is reported is true."""

import contextlib
import json
import random
import re
import signal
import sqlite3
import sys
import threading
import time
from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from imagesearch.errors import ImageSearchError
from imagesearch.index import sqlite
from tests.pictures import Picture, Pictures, averaging_model
from tests.running import FEWER_RETRIES, MANY, Scripts, counts, end, environment, patched, read_until, wait_until
from tests.server import ROOT, Elasticsearch, send
from tools.tcp_proxy import TcpProxy

pytestmark = pytest.mark.slow


@pytest.fixture
def scripts_to_kill(elasticsearch_to_kill: Elasticsearch, many_images: Path, tmp_path: Path) -> Scripts:
    """The scripts on many images and on an Elasticsearch of their own."""
    return Scripts(tmp_path, environment(tmp_path) | elasticsearch_to_kill.environment).move_to(many_images)


# The server


@pytest.mark.xdist_group("elasticsearch_to_kill")
@pytest.mark.parametrize("is_killed", [True, False])
def test_a_server_that_is_killed_or_frozen_and_comes_back_loses_nothing(
    is_killed: bool, scripts_to_kill: Scripts, elasticsearch_to_kill: Elasticsearch
) -> None:
    """A frozen one is waited for 30 seconds at a time, here for three; each retry is said, here without a pause."""
    constants = {"imagesearch.console.SAY_SECONDS": 0}
    if not is_killed:
        constants["imagesearch.index.elasticsearch.READ_TIMEOUT_SECONDS"] = 3
    process = scripts_to_kill.start_paused(constants=constants)
    if is_killed:
        elasticsearch_to_kill.kill()
    else:
        elasticsearch_to_kill.signal(signal.SIGSTOP)
    try:
        scripts_to_kill.go_on()
        read_until(process, "Retrying a request to Elasticsearch: no answer (")
    finally:
        if is_killed:
            elasticsearch_to_kill.start()
        else:
            elasticsearch_to_kill.signal(signal.SIGCONT)
    code, stderr = end(process)
    assert code == 0, stderr
    assert counts(stderr) == {"new": MANY}
    assert scripts_to_kill.count() == MANY


@pytest.mark.xdist_group("elasticsearch_to_kill")
def test_documents_that_are_rejected_for_now_are_sent_again(scripts_to_kill: Scripts) -> None:
    """With HTTP 429: the server takes one bulk request at a time for a shard, and the index has three.

    After some seconds each time, here sooner.
    """
    sooner = patched(scripts_to_kill.home, {"imagesearch.index.elasticsearch.REJECTED_WAITS": 300 * (0.2,)})
    with scripts_to_kill.index_template({"number_of_shards": 3}):
        stderr = scripts_to_kill.create("--images", "images/1", new_python=True, **sooner)
    assert counts(stderr) == {"new": MANY // 4}
    pools = scripts_to_kill.request("GET", "_nodes/stats/thread_pool")["nodes"].values()
    assert next(iter(pools))["thread_pool"]["write"]["rejected"] > 0
    assert re.search(r"Retrying .* \(HTTP 429\)", stderr)
    assert scripts_to_kill.count() == MANY // 4


@pytest.mark.parametrize("ctrl_c", [False, True])
def test_a_server_that_stays_away_ends_a_run(ctrl_c: bool, many_on_elasticsearch: Scripts, tcp_proxy: TcpProxy) -> None:
    """After two minutes, here after the first retries; at once by Ctrl-C."""
    scripts = many_on_elasticsearch
    source = "" if ctrl_c else FEWER_RETRIES
    process = scripts.start_paused(source=source, **scripts.behind(tcp_proxy.port))
    tcp_proxy.stop()
    scripts.go_on()
    if ctrl_c:
        read_until(process, "Retrying")
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
    code, stderr = end(process)
    if ctrl_c:
        assert code == 130 and time.monotonic() - started < 5
    else:
        assert code == 1 and stderr.count("create.py:") == 1
        assert re.search(r"create.py: No answer from https://localhost:\d+ \(.+\)\.", stderr), stderr
    written, before = counts(stderr)["new"], scripts.count()
    assert 0 < written <= before < MANY  # the last bulk may have arrived without its answer
    assert counts(scripts.create()) == {"new": MANY - before, "unchanged": before}


def test_a_server_is_given_up_once(scripts_on_elasticsearch: Scripts, tcp_proxy: TcpProxy) -> None:
    """Not by one request after the other, two minutes each; here with three retries, which take 6 seconds."""
    scripts = scripts_on_elasticsearch
    scripts.environment |= scripts.behind(tcp_proxy.port)
    with scripts.open_index() as index:
        tcp_proxy.stop()
        seconds = []
        for _ in range(3):
            started = time.monotonic()
            with pytest.raises(ImageSearchError, match="No answer"):
                index.list_classes()
            seconds.append(time.monotonic() - started)
    assert seconds[0] > 4 and max(seconds[1:]) < 2


def failing_proxy(web: HTTPServer, scripts: Scripts, *failing: str, times: int = 2, status: int = 502) -> list[str]:
    """Makes `web` a proxy in front of Elasticsearch, which fails some times for each kind of request that is named.

    With status 200, its response breaks off. Returns the list of the requests that have failed so far.
    """
    server, failed, lock = scripts.environment.copy(), list[str](), threading.Lock()

    def handle(request: Request) -> Response:
        kind = request.path.rpartition("/")[2]
        with lock:
            if kind in failing and failed.count(kind) < times:
                failed.append(kind)
                headers = {"Content-Length": "1000"} if status == 200 else {}
                return Response(iter(["<html>Not now</html>"]), status, headers, content_type="text/html")
        headers = {name: request.headers[name] for name in ("Content-Type", "Accept") if name in request.headers}
        answer = send(server, request.method, request.full_path[1:], request.get_data(), **headers)
        kept = {name: answer.headers[name] for name in ("X-Elastic-Product", "Content-Type")}
        return Response(answer.data, answer.status, kept)

    web.expect_request(re.compile(".*")).respond_with_handler(handle)
    scripts.environment["ES_URL"] = web.url_for("").rstrip("/")
    return failed


@pytest.mark.parametrize(("status", "times"), [(502, 2), (200, 1)])
def test_a_502_or_half_a_response_now_and_then_ends_neither_script(
    status: int, times: int, scripts_on_elasticsearch: Scripts, web: HTTPServer, bird_images: list[Path]
) -> None:
    scripts = scripts_on_elasticsearch
    failed = failing_proxy(web, scripts, "_bulk", "_search", "_refresh", times=times, status=status)
    assert counts(scripts.create()) == {"new": 31}
    assert sorted(failed) == times * ["_bulk"] + times * ["_refresh"] + times * ["_search"]
    failed.clear()
    lines = scripts.search(*bird_images, "--html", "page.html")
    assert len(lines) == 31 and min(line["hits"]["max_score"] for line in lines) > 0.9999
    assert failed == times * ["_search"] and (scripts.folder / "page.html").exists()


def test_429_has_one_round_of_retries(scripts_on_elasticsearch: Scripts, web: HTTPServer, picture: Picture) -> None:
    """Whole bulk requests that are rejected, which the client's helper would repeat once more for each retry."""
    scripts = scripts_on_elasticsearch
    picture("images/a.png")
    failing_proxy(web, scripts, "_bulk", times=100, status=429)
    stderr = scripts.create(exits=1, new_python=True, **patched(scripts.folder, source=FEWER_RETRIES))
    assert "Retrying a request to Elasticsearch: HTTP 429" in stderr and "answered HTTP 429)" in stderr
    assert sum(request.path.endswith("_bulk") for request, _ in web.log) == 3


def test_a_blocked_index_is_reported(scripts_on_elasticsearch: Scripts, pictures: Pictures, picture: Picture) -> None:
    """As Elasticsearch blocks it when the disk is full; or as its owner does, whose block forbids deletions too."""
    scripts, (gone, _) = scripts_on_elasticsearch, pictures(2)
    scripts.create()
    new = picture("images/new.png")
    for block, arguments, unchanged in (("read_only_allow_delete", [], 2), ("write", [], 2), ("write", ["--prune"], 1)):
        if arguments:  # all that is left to do is a deletion
            new.unlink()
            gone.unlink()
        scripts.request("PUT", f"{scripts.index}/_settings", {f"index.blocks.{block}": True})
        started = time.monotonic()
        stderr = scripts.create(*arguments, exits=1)
        assert time.monotonic() - started < 20  # not two minutes, in which there may be room again
        assert counts(stderr) == {"unchanged": unchanged} and stderr.count("create.py:") == 1
        assert "cluster_block_exception" in stderr and "remove the index's block" in stderr
        scripts.request("PUT", f"{scripts.index}/_settings", {f"index.blocks.{block}": None})
    assert counts(scripts.create("--prune")) == {"unchanged": 1, "deleted": 1}


@pytest.mark.parametrize("is_replaced", [False, True])
def test_an_index_that_is_deleted_or_replaced_ends_a_run(is_replaced: bool, many_on_elasticsearch: Scripts) -> None:
    """What was written before is gone, though every request may be answered."""
    scripts = many_on_elasticsearch
    process = scripts.start_paused()
    mappings = scripts.request("GET", scripts.index)[scripts.index]["mappings"]
    scripts.request("DELETE", scripts.index)
    if is_replaced:
        scripts.request("PUT", scripts.index, {"mappings": mappings})
    scripts.go_on()
    code, stderr = end(process)
    assert code == 1, stderr
    assert re.search(rf"create.py: The index {scripts.index} was deleted during the run\. .* delete that one", stderr)
    if not is_replaced:
        if scripts.request("GET", f"{scripts.index}?ignore_unavailable=true"):
            assert "no record of its model" in scripts.create(exits=2)  # the guessed one is never used
            scripts.request("DELETE", scripts.index)
        assert counts(scripts.create()) == {"new": MANY}


def test_a_run_keeps_to_the_index_that_its_alias_pointed_to(many_on_elasticsearch: Scripts, picture: Picture) -> None:
    scripts = many_on_elasticsearch
    picture("images/a.png")
    alias, old, new = scripts.index, f"{scripts.index}-1", f"{scripts.index}-2"
    many, scripts.folder = scripts.folder, scripts.home
    for scripts.index in (old, new):
        scripts.create()
    scripts.point(alias, to=old)
    scripts.folder, scripts.index = many, alias
    process = scripts.start_paused()
    scripts.point(alias, to=new, not_to=old)
    scripts.go_on()
    code, stderr = end(process)
    assert code == 0, stderr
    for scripts.index, number in ((old, 1 + MANY), (new, 1)):
        assert scripts.count() == number


def test_connections_that_end_do_not_end_a_search(many_on_elasticsearch: Scripts, tcp_proxy: TcpProxy) -> None:
    """As load balancers do with those that were idle; or all at once, as here."""
    scripts = many_on_elasticsearch
    scripts.create()
    process = scripts.start("search.py", "images", **scripts.behind(tcp_proxy.port))  # far more than are asked at once
    assert process.stdout
    lines = [process.stdout.readline() for _ in range(100)]
    tcp_proxy.stop()
    tcp_proxy.start()
    lines += process.stdout.readlines()  # not communicate, which does not see what was read ahead
    code, stderr = end(process)
    assert code == 0, stderr
    assert len(lines) == MANY


def test_of_two_runs_at_once_with_different_models_one_is_refused(scripts: Scripts, pictures: Pictures) -> None:
    pictures(20)
    model = averaging_model(scripts.folder / "model.onnx")
    first, second = scripts.start("create.py"), scripts.start("create.py", "--model", str(model))
    ends = [end(process) for process in (first, second)]
    assert sorted(code for code, _ in ends) == [0, 2], ends
    (refused,) = [stderr for code, stderr in ends if code == 2]
    assert "is another model: use the same model, or another index with --index" in refused
    winner = "thumbnail" if ends[0][0] == 0 else str(model)
    assert counts(scripts.create("--model", winner)) == {"unchanged": 20}


def test_two_runs_at_once_end_well(many: Scripts) -> None:
    processes = [many.start("create.py") for _ in range(2)]
    for code, stderr in map(end, processes):
        assert code == 0, stderr
        found = counts(stderr)
        assert found.get("new", 0) + found.get("unchanged", 0) == MANY
    assert counts(many.create()) == {"unchanged": MANY}


# The process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_counts_what_is_stored(number: signal.Signals, code: int, many: Scripts) -> None:
    process = many.start_paused()
    process.send_signal(number)
    started = time.monotonic()
    ended, stderr = end(process)
    assert ended == code, stderr
    assert time.monotonic() - started < 5
    assert re.search(
        r"^Interrupted: at least [\d,]+ new .*\. Run the command again to continue: what is stored is kept\.$",
        stderr,
        re.MULTILINE,
    )
    again = counts(many.create())
    assert 0 < counts(stderr)["new"] <= again["unchanged"] < MANY  # what was on its way may have been stored
    assert again["new"] + again["unchanged"] == many.count() == MANY


@pytest.mark.parametrize("arguments", [("create.py",), ("search.py", "images/1")])
def test_ctrl_c_at_any_moment_ends_without_a_traceback(arguments: tuple[str, ...], many_on_file: Scripts) -> None:
    """From the first import on; what comes before is Python's own."""
    many_on_file.create("--images", "images/1")
    started = many_on_file.home / "started"
    environment = patched(many_on_file.home, source=f"import imagesearch.start\nopen({str(started)!r}, 'w').close()")
    chance, codes = random.Random(7), set[int]()
    for _ in range(10):
        started.unlink(missing_ok=True)
        process = many_on_file.start(*arguments, **environment)
        wait_until(started.exists)
        time.sleep(0.6 * chance.random())
        process.send_signal(signal.SIGINT)
        code, stderr = end(process)
        assert "KeyboardInterrupt" not in stderr, stderr
        codes.add(code)
    assert codes <= {0, 130, -signal.SIGINT}, codes  # the last one, during the imports, is 130 in a shell too
    assert codes != {0}


def test_ctrl_c_is_no_error_if_stderr_is_closed(many_on_file: Scripts) -> None:
    """As with `2>&1 | tee log`, which the same Ctrl-C ends first."""
    process = many_on_file.start_paused()
    assert process.stderr
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_whenever_a_run_is_ended_the_local_file_is_whole(number: signal.Signals, many_on_file: Scripts) -> None:
    """After SIGTERM without a journal, which SQLite would roll into another file that takes the place of this one."""
    for attempt in range(8):
        many_on_file.database.unlink(missing_ok=True)
        process = many_on_file.start("create.py")
        wait_until(lambda: process.poll() is not None or many_on_file.count() > 100)  # noqa: B023
        time.sleep(0.003 * attempt)
        process.send_signal(number)
        assert process.wait() in (0, 143, -signal.SIGKILL)
        assert number == signal.SIGKILL or not list(many_on_file.home.glob("*-journal"))
        with contextlib.closing(sqlite3.connect(many_on_file.database)) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    many_on_file.create()
    assert counts(many_on_file.create()) == {"unchanged": MANY}


# The disk


DAMAGED = "is not an SQLite file, or is damaged"
OLD_VERSION = f"CREATE TABLE indexes (name); PRAGMA application_id = {sqlite.APPLICATION_ID}; PRAGMA user_version = 2"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"no database at all, but long enough to have a header" * 100, DAMAGED),
        (b"SQLite format 3\0" * 300, DAMAGED),
        ("CREATE TABLE notes (text)", "is a database, but not an index made by create.py"),
        (OLD_VERSION, "was made by another version of create.py: delete it or move it away, then run create.py again"),
    ],
)
def test_what_is_no_index_is_refused_and_left_alone(content: bytes | str, line: str, scripts_on_file: Scripts) -> None:
    if isinstance(content, bytes):
        scripts_on_file.database.write_bytes(content)
    else:
        scripts_on_file.change(content)
    before = scripts_on_file.database.read_bytes()
    assert line in scripts_on_file.both_fail(2)
    assert scripts_on_file.database.read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE images SET embedding = zeroblob(12)",
        "UPDATE images SET file_path = CAST(x'2e2fff' AS TEXT)",
        "UPDATE metadata SET record = '{'",
        "ALTER TABLE images RENAME TO real_images; CREATE VIEW images AS SELECT rowid, * FROM real_images",
        *(pytest.param(part, id=f"1/{part} of it") for part in (2, 3, 10)),
    ],
)
def test_a_bad_or_hostile_index_is_one_line(damage: str | int, scripts_on_file: Scripts, pictures: Pictures) -> None:
    pictures(100)
    scripts_on_file.create()
    if isinstance(damage, str):
        scripts_on_file.change(damage)
    else:
        content = scripts_on_file.database.read_bytes()
        scripts_on_file.database.write_bytes(content[: len(content) // damage])
    for query in ("images/1.png", "images"):
        done = scripts_on_file.run("search.py", query)
        assert done.returncode in (1, 2) and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
        assert scripts_on_file.database.name in done.stderr
        assert isinstance(damage, str) or (done.returncode == 2 and DAMAGED in done.stderr)


def test_a_full_disk_is_reported_in_one_line_and_the_next_run_goes_on(many_on_file: Scripts) -> None:
    done = many_on_file.shell("ulimit -f 1500; CREATE")  # KiB
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"create.py: \S+ cannot be read or written: .*(full|I/O error)", done.stderr)
    written = counts(done.stderr).get("new", 0)
    assert 0 < written < MANY
    assert counts(many_on_file.create()) == {"new": MANY - written, "unchanged": written}


def test_a_read_only_index_can_be_searched(scripts_on_file: Scripts, picture: Picture) -> None:
    """As on a DVD: nothing can be written beside the file either."""
    path = picture("images/a.png")
    disk = scripts_on_file.folder / "disk"
    disk.mkdir()
    scripts_on_file.create("--db", disk / "images.db")
    search = f"{sys.executable} {ROOT}/search.py {path} --db {disk}/images.db"
    mount = f"mount --bind {disk} {disk} && mount -o remount,bind,ro {disk} && ! touch {disk}/new 2>/dev/null"
    done = scripts_on_file.shell(f"unshare --mount --map-root-user sh -c '{mount} || exit 99; {search}'")
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"no read-only mount ({done.stderr.strip()}); that leaves a read-only disk untested")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["hits"]["max_score"] == pytest.approx(1, abs=1e-6)
