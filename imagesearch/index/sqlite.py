"""The index in a local SQLite file: one row per image, searched with sqlite-vec."""

import json
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import apsw
import numpy as np
import sqlite_vec

from imagesearch.errors import ImageSearchError, UsageError
from imagesearch.parallel import available_cpus, batch_until_error, map_buffered
from imagesearch.paths import quote_path
from imagesearch.records import (
    BATCH_SIZE,
    SCORE_TOLERANCE,
    Document,
    Embedding,
    FileMetadata,
    IndexMetadata,
    MetadataUpdate,
    ModelInfo,
    Search,
)

# SQLite counts the memory it uses under one lock, which every thread's sqlite-vec would take twice a row.
apsw.shutdown()
apsw.config(apsw.SQLITE_CONFIG_MEMSTATUS, False)
apsw.initialize()

APPLICATION_ID = 0x494D5345  # "IMSE": marks the file as this project's
SCHEMA_VERSION = 3
TRANSACTION_SIZE = 128  # documents in one transaction
BUSY_TIMEOUT_SECONDS = 60
PAGE_BYTES = 16_384  # four rows

SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
CREATE TABLE IF NOT EXISTS metadata (record TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS images (
    id TEXT NOT NULL, file_path TEXT NOT NULL, "desc" TEXT NOT NULL, size INTEGER NOT NULL, mtime INTEGER NOT NULL,
    sha256 TEXT NOT NULL, embedding BLOB NOT NULL -- 768 little-endian float32
);
CREATE UNIQUE INDEX IF NOT EXISTS images_id ON images (id);
CREATE INDEX IF NOT EXISTS images_file_path ON images (file_path);
CREATE INDEX IF NOT EXISTS images_desc ON images ("desc");
CREATE INDEX IF NOT EXISTS images_sha256 ON images (sha256);
"""

SEARCH = """
SELECT id, file_path, "desc", vec_distance_cosine(embedding, :embedding) AS distance FROM images
WHERE {} ORDER BY distance, file_path LIMIT :k
"""
BELOW = "file_path > :after AND file_path < :end"  # a range of the index on file_path


class SqliteIndex:
    """A `WritableIndex` in the SQLite file `path`, which is created with the index; its name is the file's.

    A file that is not writable, or on a read-only disk, can be searched.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._name = path.stem
        self._database: apsw.Connection | None = None
        self._lock = threading.Lock()  # of _database
        self._searcher = threading.local()  # SQLite searches on as many CPUs as there are connections

    def __enter__(self) -> Self:
        if self._path.exists():
            self._database = self._open()
        return self

    def __exit__(self, *_: object) -> None:
        if self._database:
            self._database.close()

    @property
    def max_searches(self) -> int:
        return available_cpus()

    @property
    def location(self) -> str:
        return quote_path(str(self._path))

    def _open(self) -> apsw.Connection:
        """Opens the file, or creates an empty one. Raises UsageError if it is not an index of this project."""
        with self._explain_errors():
            database = apsw.Connection(str(self._path))
            database.set_busy_timeout(1000 * BUSY_TIMEOUT_SECONDS)
            database.enable_load_extension(True)
            database.load_extension(sqlite_vec.loadable_path())
            application_id, version, empty = database.execute(
                "SELECT application_id, user_version, NOT EXISTS (SELECT * FROM sqlite_schema)"
                " FROM pragma_application_id, pragma_user_version"
            ).get
        if empty:
            return database
        if application_id != APPLICATION_ID:
            raise UsageError(
                f"{quote_path(str(self._path))} is a database, but not an index made by create.py: use another --db."
            )
        if version != SCHEMA_VERSION:
            raise UsageError(
                f"{quote_path(str(self._path))} was made by another version of create.py: delete it or move it away,"
                " then run create.py again."
            )
        return database

    def get_metadata(self) -> IndexMetadata | None:
        if self._database is None or not self._select("SELECT * FROM sqlite_schema WHERE name = 'metadata'"):
            return None
        record = json.loads(self._select("SELECT record FROM metadata")[0][0])
        return IndexMetadata(ModelInfo(**record["model"]), record["folder"])

    def list_indexes(self) -> dict[str, str]:
        models = {}
        for path in sorted(self._path.parent.glob("*.db")):
            with suppress(ImageSearchError), SqliteIndex(path) as index:  # other databases
                if metadata := index.get_metadata():
                    models[path.stem] = metadata.model.name
        return models

    def create(self, metadata: IndexMetadata) -> None:
        self._database = database = self._database or self._open()
        with self._explain_errors():
            database.execute(f"PRAGMA page_size = {PAGE_BYTES}")  # of a new file
        with self._transaction():
            database.execute(SCHEMA)
            record = "INSERT INTO metadata SELECT ? WHERE NOT EXISTS (SELECT * FROM metadata)"
            database.execute(record, (json.dumps(asdict(metadata)),))

    def get_file_metadata(self, ids: Sequence[str]) -> dict[str, FileMetadata]:
        query = "SELECT id, size, mtime, sha256 FROM images WHERE id IN (SELECT value FROM json_each(?))"
        return {id_: FileMetadata(*row) for id_, *row in self._select(query, (json.dumps(ids),))}

    def find_embeddings(self, sha256s: Sequence[str]) -> dict[str, Embedding]:
        query = """SELECT sha256, embedding FROM images WHERE sha256 IN (SELECT value FROM json_each(?))
                   GROUP BY sha256"""
        rows = self._select(query, (json.dumps(sha256s),))
        return {sha256: np.frombuffer(embedding, np.float32) for sha256, embedding in rows}

    def write(self, items: Iterable[Document | MetadataUpdate]) -> Iterator[Document | MetadataUpdate]:
        batches = batch_until_error(items, TRANSACTION_SIZE)
        with ThreadPoolExecutor(1) as pool:  # while SQLite waits for the disk, images are embedded
            for written in map_buffered(pool, self._write_batch, batches, 2):
                yield from written

    def _write_batch(self, batch: Sequence[Document | MetadataUpdate]) -> list[Document | MetadataUpdate]:
        """Writes documents in one transaction; returns those that are stored: all but updates of what is not there."""
        insert = """INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE
                    SET "desc" = excluded."desc", size = excluded.size, mtime = excluded.mtime,
                        sha256 = excluded.sha256, embedding = excluded.embedding"""
        update = "UPDATE images SET size = ?, mtime = ? WHERE id = ?"
        rows = [_row(item) for item in batch if isinstance(item, Document)]
        missing: set[str] = set()
        with self._transaction() as database:
            database.executemany(insert, rows)
            for image in (item.image for item in batch if isinstance(item, MetadataUpdate)):
                database.execute(update, (image.size, image.mtime, image.id))
                if not database.changes():
                    missing.add(image.id)
        return [item for item in batch if item.image.id not in missing]

    def count_below(self, folder: str) -> int:
        return int(self._select(f"SELECT count(*) FROM images WHERE {BELOW}", self._below(folder))[0][0])

    def list_paths(self, folder: str) -> Iterator[str]:
        values = self._below(folder)
        query = f"SELECT file_path FROM images WHERE {BELOW} ORDER BY file_path LIMIT {BATCH_SIZE}"
        while batch := self._select(query, values):
            yield from (file_path for (file_path,) in batch)
            values["after"] = batch[-1][0]

    def _below(self, folder: str) -> dict[str, str]:
        prefix = folder.rstrip("/")
        return {"after": f"{prefix}/", "end": f"{prefix}0"}  # 0 is the character after /

    def delete(self, ids: Sequence[str]) -> int:
        query = "DELETE FROM images WHERE id IN (SELECT value FROM json_each(?))"
        with self._transaction() as database:
            database.execute(query, (json.dumps(ids),))
            return database.changes()

    def refresh(self) -> None:
        """Does nothing: what is committed is visible."""

    def list_classes(self) -> list[str]:
        return [desc for (desc,) in self._select('SELECT DISTINCT "desc" FROM images')]

    def search(self, search: Search) -> dict[str, Any]:
        started = time.perf_counter()
        if not hasattr(self._searcher, "database"):
            self._searcher.database = self._open()
        # + keeps SQLite from looking up each row through an index: without a class, every row is read.
        conditions = ["TRUE"] if search.desc is None else ['"desc" = :desc']
        conditions += [] if search.excluded_id is None else ["+id <> :excluded_id"]
        values = asdict(search) | {"embedding": search.embedding.tobytes()}
        with self._explain_errors():
            rows = self._searcher.database.execute(SEARCH.format(" AND ".join(conditions)), values).fetchall()
        hits = [
            {
                "_index": self._name,
                "_id": id_,
                "_score": _score(distance),
                "fields": {"file_path": [file_path], "desc": [desc]},
            }
            for id_, file_path, desc, distance in rows
            if search.min_score is None or _score(distance) >= search.min_score - SCORE_TOLERANCE
        ]
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

    def _select(self, query: str, parameters: Any = ()) -> list[Any]:
        """Returns all rows of a query."""
        assert self._database
        with self._lock, self._explain_errors():
            return self._database.execute(query, parameters).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[apsw.Connection]:
        """Runs a transaction: all of it is in the file afterwards, or nothing, whatever happens."""
        assert self._database
        with self._lock, self._explain_errors():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            finally:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Translates SQLite's errors into messages that say what to do."""
        path = quote_path(str(self._path))
        try:
            yield
        except apsw.BusyError:
            raise ImageSearchError(f"{path} is in use by another process: run the command again later.") from None
        except (apsw.NotADBError, apsw.CorruptError) as error:
            raise UsageError(
                f"{path} is not an SQLite file, or is damaged ({error}): move it away or use another --db."
            ) from None
        except apsw.Error as error:
            raise ImageSearchError(f"{path} cannot be read or written: {error}.") from None


def _row(item: Document) -> tuple[Any, ...]:
    image, vector = item.image, item.embedded.embedding.tobytes()
    return (image.id, image.file_path, image.desc, image.size, image.mtime, item.sha256, vector)


def _score(distance: float) -> float:
    """Returns Elasticsearch's score, (1 + cosine) / 2, with the digits of a float32."""
    return min(1.0, float(str(np.float32(1 - distance / 2))))
