"""The records: from an image file to a document of the index."""

import hashlib
import io
from dataclasses import dataclass, field
from typing import BinaryIO, Literal, Self

import numpy as np
from numpy.typing import NDArray

DIMENSIONS = 768  # of an embedding
BATCH_SIZE = 1000  # documents that are looked up, listed or deleted together
MAX_K = 10_000  # Elasticsearch's limit on num_candidates and on the size of a result
SCORE_TOLERANCE = 1e-6  # the score of the same vector comes out up to 8e-7 from 1, since float32 is rounded
Embedding = NDArray[np.float32]  # shape (768,)

# Version of everything between a file and its embedding: images.py, models/, embed.py. Increment it if a change there
# changes an embedding: existing indexes are then refused, not mixed.
PREPROCESSING = 3


def document_id(file_path: str) -> str:
    """Returns the ``_id`` of the document for `file_path`: its SHA-256 in hex."""
    return hashlib.sha256(file_path.encode()).hexdigest()


@dataclass(frozen=True)
class ModelInfo:
    """Which model made an index's embeddings; stored in the index.

    `name` is the value of ``--model``: ``clip``, ``thumbnail`` or the absolute path of a file.
    `sha256` is the hash of the ONNX model in hex, empty for ``thumbnail``.
    """

    name: str
    sha256: str = ""
    preprocessing: int = PREPROCESSING

    @property
    def description(self) -> str:
        """The model as messages name it."""
        return "the model thumbnail (a baseline, not CLIP)" if self.name == "thumbnail" else f"the model {self.name}"

    def is_compatible(self, other: "ModelInfo") -> bool:
        """Returns True if both make the same embeddings; an ONNX model is identified by its hash alone."""
        if self.sha256 or other.sha256:
            return (self.sha256, self.preprocessing) == (other.sha256, other.preprocessing)
        return self == other


@dataclass(frozen=True)
class IndexMetadata:
    """What an index records about itself.

    `folder` is the absolute folder that a `file_path` of ``./…`` is relative to, as text (`paths.path_to_text`).
    """

    model: ModelInfo
    folder: str


@dataclass(frozen=True)
class Part:
    """The `number`-th of `count` parts of the images; the parts are disjoint and together cover all images."""

    number: int = 1
    count: int = 1

    def contains(self, id_: str) -> bool:
        """Returns True if the document with this ``_id``, a SHA-256 in hex, is in this part."""
        return int(id_[:16], 16) % self.count == self.number - 1


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file as its source found it.

    `location` is where the source reads it: an operating system path or an object's key. `file_path`
    is its name in the index, `desc` the name of the folder it is in (its class). `size` is in bytes,
    `mtime` in nanoseconds since 1970.
    """

    location: str
    file_path: str
    desc: str
    size: int
    mtime: int
    id: str = field(init=False)
    """The document's ``_id``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", document_id(self.file_path))


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file or folder that is not looked at; `kind` is its extension, or ``hidden`` and the like."""

    kind: str


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An image, a folder or a query that cannot be read or embedded, and why; `name` is that in messages."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class FileMetadata:
    """What an index holds of a file: size in bytes, mtime in nanoseconds, SHA-256 of its content in hex."""

    size: int
    mtime: int
    sha256: str

    def matches(self, image: ImageFile) -> bool:
        """Returns True if the file's size and mtime are these, so that its content is taken to be unchanged."""
        return (self.size, self.mtime) == (image.size, image.mtime)


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image that may have to be embedded, with what the index holds of it, None for a new one."""

    image: ImageFile
    indexed: FileMetadata | None


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """The content of a file, an object or a query, with its metadata as it was read.

    `name` is that in messages, `size` is in bytes, `mtime` in nanoseconds since 1970, 0 if there is none,
    `sha256` in hex.
    """

    name: str
    stream: BinaryIO
    size: int
    mtime: int
    sha256: str

    @classmethod
    def from_memory(cls, name: str, content: bytes, mtime: int = 0) -> Self:
        """Returns the image with this content."""
        return cls(name, io.BytesIO(content), len(content), mtime, hashlib.sha256(content).hexdigest())


@dataclass(frozen=True, slots=True)
class Embedded:
    """An image's embedding. `copied_from` says where it was known already: ``index``, this ``run``, or empty."""

    embedding: Embedding
    copied_from: Literal["", "index", "run"] = ""


@dataclass(frozen=True, slots=True)
class Document:
    """A document to write: an image that is new, or whose content changed.

    `is_update` is True if it replaces a document.
    """

    image: ImageFile
    sha256: str
    embedded: Embedded
    is_update: bool = False


@dataclass(frozen=True, slots=True)
class Search:
    """What to search for: the `k` documents nearest to `embedding`.

    With `desc` only documents of this class, with `min_score` only those that score at least this, without the one
    whose ``_id`` is `excluded_id`.
    """

    embedding: Embedding
    k: int
    desc: str | None = None
    min_score: float | None = None
    excluded_id: str | None = None


@dataclass(frozen=True, slots=True)
class MetadataUpdate:
    """An image whose size or mtime changed but whose content is what the index holds: its embedding stays."""

    image: ImageFile
