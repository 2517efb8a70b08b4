"""Running the two scripts as a user does, and what they say."""

import hashlib
import importlib
import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE, CompletedProcess, Popen
from typing import Any

import numpy as np

from imagesearch.index import Index, open_index
from imagesearch.index.connection import Connection
from imagesearch.records import document_id
from tests import forked
from tests.server import ROOT, request

LEFT_OUT = ("ES_", "HF_", "TEST_", "AWS_", "OPENBLAS_", "PYTHON")  # variables that would lead the scripts elsewhere
BROKEN = "Traceback|Error in sitecustomize"  # in stderr: of the scripts, or of what patches them
MANY = 1000  # images of the fixture `many`

# In a script: after some 200 images, no more chunks until there is a file; how many images have begun is in another.
PAUSING = """
import os, time
import imagesearch.parallel as parallel
make_chunks, tests = parallel.make_chunks, os.getppid()
def pausing(*arguments):
    chunks, number = make_chunks(*arguments), 0
    for chunk in chunks:
        yield chunk
        number += len(chunk)
        if number > 200:
            break
    with open({begun!r} + ".new", "w") as file:
        file.write(str(number))
    os.rename({begun!r} + ".new", {begun!r})
    while not os.path.exists({go_on!r}):
        if os.getppid() != tests:
            os._exit(1)
        time.sleep(0.02)
    yield from chunks
parallel.make_chunks = pausing
"""

# In a script: a server is given up after two retries, not after two minutes.
FEWER_RETRIES = """
import imagesearch.index.elasticsearch as e
e.LONG_RETRY = e.LONG_RETRY.new(total=2)
"""


class Scripts:
    """Runs create.py and search.py as a user does, in `folder`, on an index of their own.

    What the tests write, and the local index file, is in `home`.
    """

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        self.home = self.folder = home
        self.environment = environment
        self.index = f"test-{uuid.uuid4().hex}"
        self.model = "thumbnail"

    @property
    def on_elasticsearch(self) -> bool:
        return "ES_URL" in self.environment

    @property
    def database(self) -> Path:
        return self.home / f"{self.index}.db"

    def move_to(self, folder: Path) -> "Scripts":
        """Lets the scripts run in another folder; what they write stays in this one. Returns itself."""
        self.folder = folder
        return self

    def behind(self, port: int) -> dict[str, str]:
        """The environment in which Elasticsearch is reached by another port, a proxy's."""
        return {"ES_URL": re.sub(r":\d+$", f":{port}", self.environment["ES_URL"])}

    def arguments(self, script: str, *arguments: object) -> list[str]:
        """Python's arguments for a script."""
        model = ["--model", self.model] if script == "create.py" and "--model" not in arguments else []
        elsewhere = self.folder != self.home and not self.on_elasticsearch
        index = ["--db", str(self.database)] if elsewhere else ["--index", self.index]
        named = {"--index", "--db"} & set(arguments)
        return [str(ROOT / script), *model, *([] if named else index), *map(str, arguments)]

    def start(self, script: str, *arguments: object, stderr: Any = PIPE, **environment: str) -> Popen[str]:
        """Starts a script; its output is text, on pipes unless another file is given."""
        command = [sys.executable, *self.arguments(script, *arguments)]
        options: dict[str, Any] = {"stdin": DEVNULL, "stdout": PIPE, "stderr": stderr}
        return Popen(command, cwd=self.folder, env=self.environment | environment, text=True, **options)

    def run(
        self, script: str, *arguments: object, new_python: Any = False, **environment: str
    ) -> CompletedProcess[str]:
        """Runs a script to its end: in a fork, or in a new Python, which reads PYTHON… and LC_… variables."""
        variables = self.environment | environment
        assert new_python or not [name for name in variables if name.startswith("PYTHON")], "use new_python"
        command = self.arguments(script, *arguments)
        if new_python:
            done = run([sys.executable, *command], self.folder, variables)
        else:
            done = forked.run(command, self.folder, variables)
        assert not re.search(BROKEN, done.stderr), done.stderr
        return done

    def start_paused(self, *arguments: object, constants: Any = None, source: Any = "", **options: Any) -> Popen[str]:
        """Starts create.py, patched, and waits until it has stored some 200 images, with nothing more under way.

        It begins no more chunks until `go_on` is called.
        """
        begun, before = self.home / "begun", self.count()
        source += PAUSING.format(go_on=str(self.home / "go-on"), begun=str(begun))
        process = self.start("create.py", *arguments, **patched(self.home, constants, source), **options)

        def is_paused() -> bool:
            return begun.exists() and self.count() - before >= int(begun.read_text())

        wait_until(lambda: process.poll() is not None or is_paused())
        assert process.poll() is None, process.communicate()
        return process

    def go_on(self) -> None:
        """Lets a script that `start_paused` has started embed the rest."""
        (self.home / "go-on").touch()

    def shell(self, command: str, **environment: str) -> CompletedProcess[str]:
        """Runs a command line with bash; `CREATE` and `SEARCH` are the scripts on this index."""
        for name, script in (("CREATE", "create.py"), ("SEARCH", "search.py")):
            command = command.replace(name, shlex.join([sys.executable, *self.arguments(script)]))
        return run(["bash", "-c", command], self.folder, self.environment | environment)

    def create(self, *arguments: object, exits: Any = 0, new_python: Any = False, **environment: str) -> str:
        """Runs create.py, which must exit with this code; returns its stderr."""
        done = self.run("create.py", *arguments, new_python=new_python, **environment)
        assert done.returncode == exits, done.stderr
        return done.stderr

    def search(self, *arguments: object, new_python: Any = False, **environment: str) -> list[dict[str, Any]]:
        """Runs search.py; returns the JSON that it prints, a line each."""
        done = self.run("search.py", *arguments, new_python=new_python, **environment)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def hits(self, query: object, *arguments: object) -> list[dict[str, Any]]:
        """The hits of one query."""
        found: list[dict[str, Any]] = self.search(query, *arguments)[0]["hits"]["hits"]
        return found

    def both_fail(self, exits: int, **environment: str) -> str:
        """Runs both scripts, which both fail with this code and the same line; that line."""
        (self.folder / "images").mkdir(exist_ok=True)
        done = [self.run(*command, **environment) for command in (("create.py",), ("search.py", "images/a.png"))]
        assert [(each.returncode, each.stdout) for each in done] == [(exits, "")] * 2, done
        lines = {each.stderr.split(": ", 1)[1] for each in done}
        assert len(lines) == 1 and all(each.stderr.count("\n") == 1 for each in done), lines
        return lines.pop()

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """Sends a request to Elasticsearch; its JSON."""
        return request(self.environment, method, path, body)

    def point(self, alias: str, to: str, not_to: str | None = None) -> None:
        """Lets an alias point to an index, and no longer to another, at one moment."""
        actions = [{"remove": {"index": not_to, "alias": alias}}] if not_to else []
        self.request("POST", "_aliases", {"actions": [*actions, {"add": {"index": to, "alias": alias}}]})

    @contextmanager
    def index_template(self, settings: dict[str, Any], **mappings: Any) -> Iterator[None]:
        """Gives the index settings and mappings of an index template, if it is created now."""
        template = {"index_patterns": [self.index], "template": {"settings": settings, "mappings": mappings}}
        self.request("PUT", f"_index_template/{self.index}", template)
        try:
            yield
        finally:
            self.request("DELETE", f"_index_template/{self.index}")

    def count(self) -> int:
        """How many documents the index has; 0 before there is one."""
        if self.on_elasticsearch:
            self.request("POST", f"{self.index}/_refresh?ignore_unavailable=true")
            stats = self.request("GET", f"{self.index}/_stats/docs?ignore_unavailable=true")["_all"]["primaries"]
            return int(stats["docs"]["count"]) if stats else 0
        if self.database.exists():
            with closing(sqlite3.connect(self.database)) as database, suppress(sqlite3.OperationalError):
                return int(database.execute("SELECT count(*) FROM images").fetchone()[0])
        return 0

    def change(self, statements: str) -> None:
        """Changes the local index file by SQL, behind the scripts' back."""
        with closing(sqlite3.connect(self.database)) as database:
            database.executescript(statements)

    def open_index(self) -> Index:
        """The index that the scripts use."""
        return open_index(self.index, Connection.from_env(self.environment), self.database)

    def paths(self) -> list[str]:
        """The `file_path` of every document, sorted."""
        with self.open_index() as index:
            return sorted(path for below in (".", "/", "s3:/") for path in index.list_paths(below))

    def embeddings(self) -> dict[str, str]:
        """A hash of the bits of every embedding in the index, by path."""
        with self.open_index() as index:
            ids = {document_id(path): path for path in self.paths()}
            found = index.get_file_metadata(list(ids))
            vectors = index.find_embeddings([metadata.sha256 for metadata in found.values()])
            return {ids[id_]: bits(vectors[metadata.sha256]) for id_, metadata in found.items()}


def bits(embedding: np.ndarray) -> str:
    """A hash of the bits of an embedding, which pytest compares faster than the bits."""
    return hashlib.sha256(embedding.tobytes()).hexdigest()


def run(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> CompletedProcess[str]:
    """Runs a command in a folder; stdin is empty."""
    options: dict[str, Any] = {"stdin": DEVNULL, "capture_output": True, "text": True, "check": False}
    return subprocess.run(command, cwd=folder, env=environment, **options)


def environment(home: Path) -> dict[str, str]:
    """The environment without what would lead the scripts elsewhere; the caches are in `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LEFT_OUT)}
    return kept | {"XDG_CACHE_HOME": str(home / "cache"), "HF_ENDPOINT": "http://127.0.0.1:9"}


def patched(folder: Path, constants: Mapping[str, object] | None = None, source: str = "") -> dict[str, str]:
    """The environment in which a script's Python first runs `source`, then sets constants, by their full names."""
    for name, value in (constants or {}).items():
        module, _, constant = name.rpartition(".")
        assert hasattr(importlib.import_module(module), constant), name
        source += f"\nimport {module}\n{name} = {value!r}"
    (folder / "sitecustomize.py").write_text(source)
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def summary(stderr: str) -> str:
    """The last line that counts what a run did."""
    lines = [line for line in stderr.splitlines() if re.search(r"\d new.* in [\d.]+ s", line)]
    assert lines, f"no summary: {stderr}"
    return lines[-1]


def counts(stderr: str) -> dict[str, int]:
    """The summary's counts that are not 0; `known` are those with a known embedding."""
    kinds = "new|updated|unchanged|deleted|unreadable|with a known embedding"
    found = re.findall(rf"([\d,]+) ({kinds})", summary(stderr).partition(" in ")[0])
    numbers = {kind.replace("with a known embedding", "known"): int(text.replace(",", "")) for text, kind in found}
    return {kind: number for kind, number in numbers.items() if number}


def skipped(stderr: str) -> list[str]:
    """What the summary says was skipped, sorted."""
    return sorted(summary(stderr).partition("; skipped: ")[2].split(", "))


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits, at most as long as a test may take."""
    while not condition():
        time.sleep(0.02)


def end(process: Popen[str]) -> tuple[int, str]:
    """Waits for a script; its exit code and stderr."""
    _, stderr = process.communicate()
    assert not re.search(BROKEN, stderr), stderr
    return process.returncode, stderr


def read_until(process: Popen[str], text: str) -> None:
    """Reads a script's stderr up to a line with this text."""
    assert process.stderr
    lines = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return
    raise AssertionError(f"the script ended without {text!r}: {lines}")
