"""The index in a local SQLite file: one row per image, searched with sqlite-vec."""

import itertools
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import apsw
import numpy as np
import sqlite_vec

from imagesearch.errors import ImageSearchError, UsageError, describe_error
from imagesearch.index.candidates import Candidates
from imagesearch.locations import local_path, path_to_text, quote_path
from imagesearch.parallel import available_cpus, exit_lock
from imagesearch.records import (
    BATCH_SIZE,
    DIMENSIONS,
    SCORE_TOLERANCE,
    Document,
    Embedding,
    FileMetadata,
    IndexMetadata,
    ModelInfo,
    Search,
)

# SQLite would count the memory it uses, under a lock that all threads would wait for, at every row.
apsw.shutdown()
apsw.config(apsw.SQLITE_CONFIG_MEMSTATUS, False)
apsw.initialize()

APPLICATION_ID = 0x494D5345  # "IMSE": marks the file as this project's
SCHEMA_VERSION = 4
RECORDED_BASE_VERSION = 3  # whose relative names are relative to a recorded folder, not to that of the file
BUSY_TIMEOUT_SECONDS = 60
PAGE_BYTES = 16_384  # four rows
ROWS_PER_CPU = 10_000  # at least, of a search on several CPUs
SEARCHES_AT_ONCE = 512
ROWS_PER_BLOCK = 2048  # rows that are compared with all searches at once

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
SELECT CAST(id AS TEXT), CAST(file_path AS TEXT), CAST("desc" AS TEXT),
       vec_distance_cosine(embedding, :embedding) AS distance
FROM images
WHERE {} ORDER BY distance, images.file_path LIMIT :k
"""
IN_ROWIDS = "rowid IN (SELECT value FROM json_each(:rowids))"
BELOW = "file_path > :after AND file_path < :end"  # a range of the index on file_path

Row = tuple[str, str, str, float | None]  # id, file_path, desc, distance


class SqliteIndex:
    """An `Index` in the SQLite file `path`, which is created with the index; its name is the file's.

    Relative names are relative to the folder of the file. A file that is not writable, or on a read-only disk, can be
    searched.
    """

    searches_at_once = SEARCHES_AT_ONCE

    def __init__(self, path: Path) -> None:
        self._path = path
        self._name = path.stem
        self._lock = threading.Lock()  # guards the connection
        self._search_lock = threading.Lock()  # a search uses all CPUs
        self._searchers: list[apsw.Connection] = []  # SQLite searches on as many CPUs as there are connections
        self.location = quote_path(str(path))
        self.base = os.path.realpath(path.parent)
        self._database = self._open() if path.exists() else None
        self.metadata = self._read_metadata()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for database in [self._database, *self._searchers]:
            if database:
                database.close()

    def _open(self) -> apsw.Connection:
        """Opens the file, or creates an empty one. Raises UsageError if it is not an index of this project."""
        with self._explain_errors():
            database = apsw.Connection(str(self._path))
            database.set_busy_timeout(1000 * BUSY_TIMEOUT_SECONDS)
            database.enable_load_extension(True)
            database.load_extension(sqlite_vec.loadable_path())
            database.enable_load_extension(False)
            # The file may be somebody else's.
            for option in (apsw.SQLITE_DBCONFIG_ENABLE_TRIGGER, apsw.SQLITE_DBCONFIG_ENABLE_VIEW):
                database.config(option, 0)
            database.config(apsw.SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0)
            application_id, version, empty = database.execute(
                "SELECT application_id, user_version, NOT EXISTS (SELECT * FROM sqlite_schema)"
                " FROM pragma_application_id, pragma_user_version"
            ).get
        if empty:
            return database
        if application_id != APPLICATION_ID:
            raise UsageError(f"{self.location} is a database, but not an index made by create.py: use another --db.")
        if version not in (SCHEMA_VERSION, RECORDED_BASE_VERSION):
            raise UsageError(
                f"{self.location} was made by another version of create.py: delete it or move it away, then run"
                " create.py again."
            )
        return database

    def _read_metadata(self) -> IndexMetadata | None:
        if self._database is None or not self._select("SELECT * FROM sqlite_schema WHERE name = 'metadata'"):
            return None
        with self._explain_errors():
            try:
                record = json.loads(self._select("SELECT record FROM metadata")[0][0])
                model, recorded = ModelInfo(**record["model"]), record.get("folder")
            except (LookupError, TypeError):
                raise ValueError("it has no record of its model") from None
        if recorded:
            self._check_recorded_base(str(recorded))
        return IndexMetadata(model, path_to_text(self.base))

    def _check_recorded_base(self, recorded: str) -> None:
        """Raises UsageError if the file's relative names are those of another folder, as an older version made them."""
        for (file_path,) in self._select("SELECT file_path FROM images WHERE file_path GLOB './*' LIMIT 1"):
            if os.path.exists(local_path(file_path, recorded)) and not os.path.exists(local_path(file_path, self.base)):
                raise UsageError(
                    f"{self.location} was made by an older version of create.py, and its names are relative to"
                    f" {quote_path(recorded)}: move it there, or delete it, then run create.py again."
                )

    def list_indexes(self) -> dict[str, str]:
        models = {}
        for path in sorted(self._path.parent.glob("*.db")):
            with suppress(ImageSearchError), SqliteIndex(path) as index:  # other databases
                if index.metadata:
                    models[path.stem] = index.metadata.model.name
        return models

    def create(self, metadata: IndexMetadata) -> None:
        self._database = database = self._database or self._open()
        with self._explain_errors():
            database.execute(f"PRAGMA page_size = {PAGE_BYTES}")  # only a new file takes it
        with self._transaction():
            database.execute(SCHEMA)
            record = "INSERT INTO metadata SELECT ? WHERE NOT EXISTS (SELECT * FROM metadata)"
            database.execute(record, (json.dumps({"model": asdict(metadata.model)}),))
        self.metadata = self._read_metadata()

    def record_model(self, model: ModelInfo) -> None:
        with self._transaction() as database:
            update = "UPDATE metadata SET record = json_set(record, '$.model', json(?))"
            database.execute(update, (json.dumps(asdict(model)),))

    def get_file_metadata(self, ids: Sequence[str]) -> dict[str, FileMetadata]:
        query = "SELECT id, size, mtime, CAST(sha256 AS TEXT) FROM images WHERE id IN (SELECT value FROM json_each(?))"
        return {id_: FileMetadata(*row) for id_, *row in self._select(query, (json.dumps(ids),))}

    def find_embeddings(self, sha256s: Sequence[str]) -> dict[str, Embedding]:
        query = """SELECT CAST(sha256 AS TEXT), embedding FROM images WHERE sha256 IN (SELECT value FROM json_each(?))
                   GROUP BY sha256"""
        rows = self._select(query, (json.dumps(sha256s),))
        with self._explain_errors():  # a blob may be of another size
            return {sha256: np.frombuffer(embedding, np.float32, DIMENSIONS) for sha256, embedding in rows}

    def write(self, documents: Sequence[Document]) -> list[Document]:
        insert = """INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE
                    SET "desc" = excluded."desc", size = excluded.size, mtime = excluded.mtime,
                        sha256 = excluded.sha256, embedding = excluded.embedding"""
        update = "UPDATE images SET size = ?, mtime = ? WHERE id = ?"
        stored = []
        with self._transaction() as database:
            for document in documents:
                image = document.image
                if document.embedding is None:
                    database.execute(update, (image.size, image.mtime, image.id))
                else:
                    file = (image.id, image.file_path, image.desc, image.size, image.mtime)
                    database.execute(insert, (*file, document.sha256, document.embedding.tobytes()))
                if database.changes():
                    stored.append(document)
        return stored

    def count_below(self, folder: str) -> int:
        return int(self._select(f"SELECT count(*) FROM images WHERE {BELOW}", self._below(folder))[0][0])

    def list_paths(self, folder: str) -> Iterator[str]:
        values = self._below(folder)
        query = f"SELECT CAST(file_path AS TEXT) FROM images WHERE {BELOW} ORDER BY file_path LIMIT {BATCH_SIZE}"
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

    def search(self, searches: Sequence[Search]) -> list[dict[str, Any]]:
        with self._search_lock, self._explain_errors():
            started = time.perf_counter()
            ranges = self._ranges()
            while len(self._searchers) < len(ranges):
                self._searchers.append(self._open())
            with ThreadPoolExecutor(len(ranges)) as pool:
                candidates = self._find_candidates(pool, ranges, searches) if len(searches) > 1 else [None]
                found = [
                    self._search_all_rows(pool, ranges, search)
                    if rowids is None
                    else _search(self._searchers[0], search, IN_ROWIDS, rowids=json.dumps(rowids))
                    for search, rowids in zip(searches, candidates, strict=True)
                ]
            milliseconds = (time.perf_counter() - started) * 1000 / len(searches)
            return [self._response(rows, search, milliseconds) for rows, search in zip(found, searches, strict=True)]

    def _ranges(self) -> list[tuple[int, int]]:
        """Returns ranges of rowids, both ends included, one for each CPU that is worth using."""
        ((first, last),) = self._select("SELECT ifnull(min(rowid), 0), ifnull(max(rowid), 0) FROM images")
        count = max(1, min(available_cpus(), (last - first) // ROWS_PER_CPU))
        ends = [first + (last + 1 - first) * part // count for part in range(count + 1)]
        return [(start, end - 1) for start, end in itertools.pairwise(ends)]

    def _find_candidates(
        self, pool: ThreadPoolExecutor, ranges: Sequence[tuple[int, int]], searches: Sequence[Search]
    ) -> list[list[int] | None]:
        """Returns the rowids that may be the nearest for each search, None where they are too many to keep."""
        first = searches[0]
        least = -1.0 if first.min_score is None else _cosine(first.min_score - SCORE_TOLERANCE)
        k = first.k + any(search.excluded_id is not None for search in searches)
        embeddings = np.array([search.embedding for search in searches])
        query = "SELECT rowid, embedding FROM images WHERE rowid BETWEEN :first AND :last"
        query += "" if first.desc is None else ' AND "desc" = :desc'

        def find(database: apsw.Connection, rowids: tuple[int, int]) -> Candidates:
            candidates = Candidates(embeddings, k, least)
            rows = database.execute(query, {"first": rowids[0], "last": rowids[1], "desc": first.desc})
            while block := list(itertools.islice(rows, ROWS_PER_BLOCK)):
                vectors = np.frombuffer(b"".join(embedding for _, embedding in block), np.float32)
                candidates.add(np.array([rowid for rowid, _ in block]), vectors.reshape(len(block), DIMENSIONS))
            return candidates

        each = list(pool.map(find, self._searchers, ranges))
        return Candidates.merge(each)

    def _search_all_rows(
        self, pool: ThreadPoolExecutor, ranges: Sequence[tuple[int, int]], search: Search
    ) -> list[Row]:
        """Returns the nearest rows, from the nearest of each range."""
        parts = pool.map(
            lambda database, ends: _search(
                database, search, "rowid BETWEEN :first AND :last", first=ends[0], last=ends[1]
            ),
            self._searchers,
            ranges,
        )
        return sorted(itertools.chain.from_iterable(parts), key=lambda row: (row[3] or 0, row[1]))[: search.k]

    def _response(self, rows: Sequence[Row], search: Search, milliseconds: float) -> dict[str, Any]:
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
            "took": int(milliseconds),
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
        with self._lock, exit_lock, self._explain_errors():
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
        try:
            yield
        except apsw.BusyError:
            raise ImageSearchError(
                f"{self.location} is in use by another process: run the command again later."
            ) from None
        except (apsw.NotADBError, apsw.CorruptError, ValueError) as error:  # ValueError: text, or an embedding's size
            raise UsageError(
                f"{self.location} is not an SQLite file, or is damaged ({describe_error(error)}): move it away or use"
                " another --db."
            ) from None
        except apsw.Error as error:
            raise ImageSearchError(f"{self.location} cannot be read or written: {error}.") from None


def _search(database: apsw.Connection, search: Search, condition: str, **values: Any) -> list[Row]:
    """Returns the nearest of the rows that meet the condition."""
    conditions = [condition] if search.desc is None else [condition, '"desc" = :desc']
    # + keeps SQLite from looking up each row through an index.
    conditions += [] if search.excluded_id is None else ["+id <> :excluded_id"]
    parameters = asdict(search) | values | {"embedding": search.embedding.tobytes()}
    rows: list[Row] = database.execute(SEARCH.format(" AND ".join(conditions)), parameters).fetchall()  # type: ignore[assignment]
    return rows


def _score(distance: float | None) -> float:
    """Returns Elasticsearch's score, (1 + cosine) / 2, with the digits of a float32."""
    if distance is None:
        raise ValueError("an embedding is zero")
    return min(1.0, float(str(np.float32(1 - distance / 2))))


def _cosine(score: float) -> float:
    return 2 * score - 1
