"""The same index in one SQLite file, searched by an exact scan."""

import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from imagesearch.embed import Document, Stored, batched
from imagesearch.errors import Failure, Misuse
from imagesearch.files import shown
from imagesearch.models import DIMENSIONS, ModelRecord

APPLICATION = 0x494D5345  # "IMSE": how SQLite marks a file as this project's
BULK = 128  # documents in one transaction
SECONDS = 60  # to wait for another process's transaction

# Embeddings lie in blocks, so that a scan reads long runs: one document a row takes three times as long.
# The documents of an index fill slots 0, 1, 2, … without gaps; slot s is row s % ROWS of block s // ROWS.
ROWS = 1024
ROW_BYTES = DIMENSIONS * 4
PAGE_BYTES = 16384

SCHEMA = f"""
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = 1;
CREATE TABLE indices (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, meta TEXT NOT NULL);
CREATE TABLE documents (
    indices INTEGER NOT NULL REFERENCES indices, id TEXT NOT NULL, slot INTEGER NOT NULL,
    file_path TEXT NOT NULL, desc TEXT NOT NULL, size INTEGER NOT NULL, mtime INTEGER NOT NULL, sha256 TEXT NOT NULL,
    PRIMARY KEY (indices, id)
) WITHOUT ROWID;
CREATE UNIQUE INDEX slots ON documents (indices, slot);
CREATE TABLE blocks (number INTEGER PRIMARY KEY, embeddings BLOB NOT NULL);
"""


class Local:
    """The index `name` in the SQLite file `path`, which is made when the index is created."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self.number = 0
        self.database: sqlite3.Connection | None = None

    def __enter__(self) -> Self:
        if os.path.exists(self.path):
            self.open()
        return self

    def __exit__(self, *_: object) -> None:
        if self.database:
            self.database.close()

    def open(self) -> sqlite3.Connection:
        """Opens the file, or makes it. Raises Misuse, leaving it untouched, if it is no index of this project."""
        with self.explaining():
            database = sqlite3.connect(self.path, timeout=SECONDS, isolation_level=None)
            self.database = database
            (application,), (version,) = (
                database.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
            )
            empty = database.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
            if not empty and (application, version) != (APPLICATION, 1):
                raise Misuse(
                    f"{shown(str(self.path))} is a database, but not an index made by create.py: give another --db."
                )
            row = None if empty else self.row("SELECT number FROM indices WHERE name = ?", self.name)
            self.number = row[0] if row else 0
        return database

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Turns SQLite's errors into a line for the user."""
        place = shown(str(self.path))
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            if "locked" in str(error):
                raise Failure(f"{place} is in use by another process: run this again when that has ended.") from None
            if "not a database" in str(error) or "malformed" in str(error):
                raise Misuse(
                    f"{place} is not an SQLite file, or damaged ({error}): move it away or give another --db."
                ) from None
            raise Failure(f"{place} cannot be read or written: {error}. Run this again when that is mended.") from None

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is in the file afterwards, or nothing, whatever happens meanwhile."""
        assert self.database
        with self.explaining():
            self.database.execute("BEGIN IMMEDIATE")
            try:
                yield self.database
                self.database.execute("COMMIT")
            finally:
                if self.database.in_transaction:
                    self.database.execute("ROLLBACK")

    def row(self, query: str, *values: object) -> Any:
        """The first row of a query's result, or None."""
        assert self.database
        return self.database.execute(query, values).fetchone()

    def model(self) -> ModelRecord | None:
        if not self.number:
            return None
        with self.explaining():
            return ModelRecord(**json.loads(self.row("SELECT meta FROM indices WHERE number = ?", self.number)[0]))

    def create(self, record: ModelRecord) -> None:
        database = self.database or self.open()
        with self.explaining():
            database.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            database.execute("PRAGMA journal_mode = WAL")  # searches go on while a run writes
        with self.transaction():
            if self.row("SELECT count(*) FROM sqlite_master") == (0,):
                for statement in SCHEMA.split(";"):
                    database.execute(statement)
            meta = json.dumps(vars(record))
            database.execute("INSERT OR IGNORE INTO indices (name, meta) VALUES (?, ?)", (self.name, meta))
            (self.number,) = self.row("SELECT number FROM indices WHERE name = ?", self.name)

    def stored(self, ids: Sequence[str]) -> dict[str, Stored]:
        assert self.database
        query = """SELECT id, size, mtime, sha256 FROM documents
                   WHERE indices = ? AND id IN (SELECT value FROM json_each(?))"""
        with self.explaining():
            rows = self.database.execute(query, (self.number, json.dumps(ids)))
            return {name: Stored(size, mtime, sha256) for name, size, mtime, sha256 in rows}

    def write(self, documents: Iterable[Document]) -> Iterator[Document]:
        for bulk in batched(documents, BULK):
            with self.transaction():
                written = [document for document in bulk if self.put(document)]
            yield from written

    def put(self, document: Document) -> bool:
        """Writes one document, a new one into the first free slot; False where there is none to bring up to date."""
        assert self.database
        file = document.file
        row = self.row("SELECT slot FROM documents WHERE indices = ? AND id = ?", self.number, file.id)
        if document.embedding is not None:
            slot = row[0] if row else self.count()
            self.database.execute(
                "INSERT OR REPLACE INTO documents VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (self.number, file.id, slot, file.file_path, file.desc, file.size, file.mtime, document.sha256),
            )
            with self.embedding(slot) as blob:
                blob.write(unit(document.embedding).tobytes())
        elif row:
            query = "UPDATE documents SET size = ?, mtime = ? WHERE indices = ? AND id = ?"
            self.database.execute(query, (file.size, file.mtime, self.number, file.id))
        else:  # deleted by another run since this one looked: the next one embeds it
            return False
        return True

    @contextmanager
    def embedding(self, slot: int) -> Iterator[sqlite3.Blob]:
        """The embedding in slot `slot`, to read or write from its start on."""
        assert self.database
        number = self.block(slot)
        empty = f"INSERT OR IGNORE INTO blocks VALUES (?, zeroblob({ROWS * ROW_BYTES}))"
        self.database.execute(empty, (number,))
        with self.database.blobopen("blocks", "embeddings", number) as blob:
            blob.seek(slot % ROWS * ROW_BYTES)
            yield blob

    def block(self, slot: int) -> int:
        """The number, in the table of blocks, of the one that slot `slot` of this index is in."""
        return (self.number << 32) + slot // ROWS

    def count(self) -> int:
        """How many documents the index has: the first slot that is free."""
        (count,) = self.row("SELECT coalesce(max(slot) + 1, 0) FROM documents WHERE indices = ?", self.number)
        return int(count)

    def paths(self, folder: str) -> Iterator[tuple[str, str]]:
        assert self.database
        prefix, after = folder.rstrip("/") + "/", ""
        query = """SELECT id, file_path FROM documents
                   WHERE indices = ? AND substr(file_path, 1, ?) = ? AND id > ? ORDER BY id LIMIT 1000"""
        while True:
            with self.explaining():
                page = self.database.execute(query, (self.number, len(prefix), prefix, after)).fetchall()
            if not page:
                return
            yield from page
            after = page[-1][0]

    def delete(self, ids: Sequence[str]) -> int:
        with self.transaction() as database:
            count = before = self.count()
            for name in ids:
                if row := self.row("SELECT slot FROM documents WHERE indices = ? AND id = ?", self.number, name):
                    database.execute("DELETE FROM documents WHERE indices = ? AND id = ?", (self.number, name))
                    count -= 1
                    self.move(count, row[0])
            rest = self.block(count + ROWS - 1), self.block(0) + (1 << 32) - 1
            database.execute("DELETE FROM blocks WHERE number BETWEEN ? AND ?", rest)
        return before - count

    def move(self, source: int, target: int) -> None:
        """Moves the document in the last slot, `source`, into the slot `target` that has become free."""
        assert self.database
        if source == target:
            return
        with self.embedding(source) as blob:
            moved = blob.read(ROW_BYTES)
        with self.embedding(target) as blob:
            blob.write(moved)
        query = "UPDATE documents SET slot = ? WHERE indices = ? AND slot = ?"
        self.database.execute(query, (target, self.number, source))

    def refresh(self) -> None:
        """What is committed is visible."""

    def search(self, embedding: NDArray[np.float32], k: int, desc: str | None) -> dict[str, Any]:
        assert self.database
        started = time.perf_counter()
        with self.explaining():
            self.database.execute("PRAGMA mmap_size = 0x7fff0000")
            self.database.execute("BEGIN")  # one state of the file for all that follows
            scores = self.scores(unit(embedding))
            slots = np.arange(len(scores))
            if desc is not None:
                query = "SELECT slot FROM documents WHERE indices = ? AND desc = ?"
                slots = np.array(self.database.execute(query, (self.number, desc)).fetchall(), np.intp).reshape(-1)
            if len(slots) > k:
                slots = slots[np.argpartition(-scores[slots], k)[:k]]
            slots = slots[np.argsort(-scores[slots], kind="stable")]
            hits = [self.hit(int(slot), float(str(scores[slot]))) for slot in slots]
            self.database.execute("COMMIT")
        return {
            "took": int((time.perf_counter() - started) * 1000),
            "timed_out": False,
            "_shards": {"total": 1, "successful": 1, "skipped": 0, "failed": 0},
            "hits": {
                "total": {"value": len(hits), "relation": "eq"},
                "max_score": hits[0]["_score"] if hits else None,
                "hits": hits,
            },
        }

    def scores(self, query: NDArray[np.float32]) -> NDArray[np.float32]:
        """Elasticsearch's score, (1 + cosine) / 2, of every document, by slot."""
        assert self.database
        count = self.count()
        cosines = np.empty((count + ROWS - 1) // ROWS * ROWS, np.float32)
        for start in range(0, count, ROWS):
            # Read as a blob, which SQLite copies once; a SELECT copies it twice and takes far longer.
            with self.database.blobopen("blocks", "embeddings", self.block(start), readonly=True) as blob:
                block = np.frombuffer(blob.read(), np.float32).reshape(ROWS, DIMENSIONS)
            np.matmul(block, query, out=cosines[start : start + ROWS])
        return (cosines[:count] + np.float32(1)) / np.float32(2)

    def hit(self, slot: int, score: float) -> dict[str, Any]:
        """The document in a slot as Elasticsearch shows a hit."""
        query = "SELECT id, file_path, desc FROM documents WHERE indices = ? AND slot = ?"
        name, file_path, desc = self.row(query, self.number, slot)
        return {
            "_index": self.name,
            "_id": name,
            "_score": score,
            "fields": {"file_path": [file_path], "desc": [desc]},
        }


def unit(embedding: NDArray[np.float32]) -> NDArray[np.float32]:
    """`embedding` at length 1, float32."""
    return (embedding / np.linalg.norm(embedding)).astype(np.float32)
