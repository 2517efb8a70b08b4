"""Running the two scripts as a user does, and what they say."""

import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from imagesearch.connection import Connection
from imagesearch.index import WritableIndex, open_writable_index
from imagesearch.records import document_id
from imagesearch.retry import NO_RETRY
from tests import forked
from tests.server import ROOT, Cluster, Server
from tests.tcp_proxy import TcpProxy

RUN_SECONDS = 120  # which no script takes


@dataclass
class Scripts:
    """Runs create.py and search.py as a user does, in a folder of their own, on an index of their own."""

    folder: Path
    environment: dict[str, str]
    leaves_out_db: bool = True
    index: str = field(default_factory=lambda: f"test-{uuid.uuid4().hex}")

    def start(
        self, script: str, *arguments: object, stdin: Any = subprocess.DEVNULL, **environment: str
    ) -> "subprocess.Popen[str]":
        """Starts a script; its output is text, on pipes."""
        return subprocess.Popen(
            [sys.executable, *self.arguments(script, arguments, environment)],
            cwd=self.folder,
            env=self.environment | environment,
            text=True,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def arguments(self, script: str, arguments: Sequence[object], environment: dict[str, str]) -> list[str]:
        """Python's arguments for a script; ``--db`` is left out where the index is on Elasticsearch."""
        if self.leaves_out_db and "ES_URL" in self.environment | environment and "--db" in arguments:
            place = arguments.index("--db")
            arguments = [*arguments[:place], *arguments[place + 2 :]]
        return [str(ROOT / script), *map(str, arguments), "--index", self.index]

    def run(self, script: str, *arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Runs a script to its end: in a fork, or in a new Python if PYTHON… or LC_… variables differ."""
        settings = self.environment | environment
        if any(name.startswith(("PYTHON", "LC_")) and os.environ.get(name) != settings[name] for name in settings):
            process = self.start(script, *arguments, **environment)
            stdout, stderr = process.communicate(timeout=RUN_SECONDS)
            done = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
        else:
            done = forked.run(self.arguments(script, arguments, environment), self.folder, settings, RUN_SECONDS)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def shell(self, command: str) -> "subprocess.CompletedProcess[str]":
        """Runs a command line with bash."""
        return subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )

    def create(self, *arguments: object, code: int = 0, **environment: Any) -> str:
        """Runs create.py with the thumbnail model, unless told otherwise, to the exit `code`; its stderr."""
        model = () if "--model" in arguments else ("--model", "thumbnail")
        done = self.run("create.py", *model, *arguments, **environment)
        assert done.returncode == code, done.stderr
        return done.stderr

    def search(self, *arguments: object, **environment: str) -> list[dict[str, Any]]:
        """Runs search.py; the JSON that it prints, a line each."""
        done = self.run("search.py", *arguments, **environment)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def paths(self) -> list[str]:
        """The `file_path` of every document, sorted."""
        anything = self.folder / "anything.png"
        Image.new("RGB", (20, 20), "teal").save(anything)
        hits = self.search(anything, "-k", 10_000)[0]["hits"]["hits"]
        return sorted(hit["fields"]["file_path"][0] for hit in hits)


def environment(home: Path) -> dict[str, str]:
    """The environment without what would lead the scripts elsewhere; the caches are in `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ES_", "HF_", "TEST_", "AWS_"))}
    return kept | {"XDG_CACHE_HOME": str(home / "cache"), "HF_ENDPOINT": "http://127.0.0.1:9"}


def scripts_on(nodes: Cluster, folder: Path, cache: Path) -> Scripts:
    """The scripts on a cluster, run in `folder`."""
    return Scripts(folder, environment(cache) | {"ES_URL": nodes.url, "ES_CA_CERT": str(nodes.ca)})


def behind(proxy: TcpProxy, scripts: Scripts) -> str:
    """`ES_URL` for the scripts' server behind a proxy."""
    return re.sub(r":\d+$", f":{proxy.port}", scripts.environment["ES_URL"])


# Python imports it at its start: each call of the model appends a byte to a file.
COUNTING = """
import imagesearch.models as models
embed = models.Thumbnail.embed
def counting(self, pixels):
    with open({path!r}, "ab") as file:
        file.write(b".")
    return embed(self, pixels)
models.Thumbnail.embed = counting
"""

MANY = 2500  # images in `many_images`

KNOWN = r"( \((?P<known>[\d,]+) with a known embedding\))?"
COUNTS = re.compile(
    rf"^(?P<new>[\d,]+) new{KNOWN}(, (?P<updated>[\d,]+) updated{KNOWN.replace('known>', 'also_known>')})?"
    r"(, (?P<unchanged>[\d,]+) unchanged)?(, (?P<deleted>[\d,]+) deleted)?(, (?P<unreadable>[\d,]+) unreadable)?"
    r" in [\d.]+ s( \([\d.]+ images/s embedded\))?(; index [^;\n]+)?(; skipped: (?P<skipped>.+))?$",
    re.MULTILINE,
)


def summary(stderr: str) -> dict[str, str]:
    """The summary's parts that are not 0."""
    found = COUNTS.search(stderr)
    assert found, stderr
    parts = {name: value for name, value in found.groupdict().items() if value not in ("0", None)}
    if "also_known" in parts:
        parts["known"] = parts.pop("also_known")
    return parts


def counts(stderr: str) -> dict[str, int]:
    """The summary's counts that are not 0."""
    return {name: int(value.replace(",", "")) for name, value in summary(stderr).items() if name != "skipped"}


def count(scripts: Scripts, refresh: bool = True) -> int:
    """How many documents the index has; 0 before there is one."""
    server = Server(scripts.environment["ES_URL"], scripts.environment["ES_CA_CERT"])
    try:
        if refresh:
            server.request("POST", f"{scripts.index}/_refresh")
        return int(server.request("GET", f"{scripts.index}/_count")["count"])
    except AssertionError:
        return 0


def rows(path: Path) -> int:
    """How many documents the local file has; 0 before there is one."""
    if not path.exists():
        return 0
    database = sqlite3.connect(path)
    try:
        return int(database.execute("SELECT count(*) FROM images").fetchone()[0])
    except sqlite3.OperationalError:
        return 0
    finally:
        database.close()


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end(process: "subprocess.Popen[str]", seconds: float = 180) -> tuple[int, str]:
    """Waits for a script; its exit code and stderr."""
    _, stderr = process.communicate(timeout=seconds)
    assert "Traceback" not in stderr, stderr
    return process.returncode, stderr


def read_until(process: "subprocess.Popen[str]", text: str) -> None:
    """Reads a script's stderr up to a line with this text."""
    assert process.stderr
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"the script ended without {text!r}")


def wait_for_start(process: "subprocess.Popen[str]") -> None:
    """Waits until a script's first import has removed Python's SIGINT handler; what comes before is Python's own.

    Python ignores SIGPIPE a moment before it installs that handler. So it must have been there; or, if it was missed,
    a module must be loaded that the scripts import after their first one.
    """
    was_there = False
    while process.poll() is None:
        if signal.SIGINT in signals(process.pid, "SigCgt"):
            was_there = True
        elif signal.SIGPIPE in signals(process.pid, "SigIgn") and (was_there or "_hashlib" in maps(process.pid)):
            return
        time.sleep(0.001)


def maps(pid: int) -> str:
    """The files that a process has mapped into its memory."""
    return Path(f"/proc/{pid}/maps").read_text()


def signals(pid: int, mask: str) -> set[int]:
    """The signals in a process's mask: SigIgn, those it ignores, or SigCgt, those it handles."""
    bits = int(re.findall(rf"{mask}:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[0], 16)
    return {number for number in range(1, 65) if bits & 1 << (number - 1)}


def calls(scripts: Scripts) -> int:
    """How often the model was called since the last time."""
    path = scripts.folder / "calls"
    number = path.stat().st_size if path.exists() else 0
    path.unlink(missing_ok=True)
    return number


def open_scripts_index(scripts: Scripts, folder: Path) -> WritableIndex:
    """The index that the scripts use; in `folder`, if it is a local file."""
    connection = Connection.from_env(scripts.environment)
    return open_writable_index(scripts.index, connection, folder / "imagesearch.db", NO_RETRY)


def embeddings(scripts: Scripts, folder: Path) -> dict[str, bytes]:
    """The bits of every embedding in the index, by path."""
    with open_scripts_index(scripts, folder) as index:
        assert index.get_metadata()
        ids = {document_id(path): path for path in index.list_paths(".")}
        found = index.get_file_metadata(list(ids))
        vectors = index.find_embeddings([metadata.sha256 for metadata in found.values()])
        return {ids[id_]: vectors[metadata.sha256].tobytes() for id_, metadata in found.items()}


def hits(scripts: Scripts, query: object, *arguments: object) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = scripts.search(query, *arguments)[0]["hits"]["hits"]
    return found


def start_recipe(document: str, beginning: str, scripts: Scripts, **environment: str) -> "subprocess.Popen[str]":
    """Starts the block of commands in `document` that begins so, with the test's index in place of `images`."""
    text = (ROOT / document).read_text()
    found = re.search(rf"^```sh\n({re.escape(beginning)}.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert found
    commands = found[1].replace("images", scripts.index)
    ours = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'create.py'))}"
    return subprocess.Popen(
        ["bash", "-ec", commands.replace("python3 create.py", ours)],
        cwd=scripts.folder,
        env=scripts.environment | environment,
        stdout=subprocess.PIPE,
        text=True,
    )
