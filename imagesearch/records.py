"""The records: from an image file to a document of the index."""

import hashlib
import io
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol, Self

import numpy as np
from numpy.typing import NDArray

DIMENSIONS = 768  # the length of an embedding
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


def short_id(id_: str) -> int:
    """Returns the first 8 bytes of an ``_id`` as a number."""
    return int(id_[:16], 16)


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

    `base` is the absolute folder that a `file_path` of ``./…`` is relative to, as text (`locations.path_to_text`).
    """

    model: ModelInfo
    base: str


@dataclass(frozen=True)
class Part:
    """The `number`-th of `count` parts of the images; the parts are disjoint and together cover all images."""

    number: int = 1
    count: int = 1

    def contains(self, id_: str) -> bool:
        """Returns True if the document with this ``_id``, a SHA-256 in hex, is in this part."""
        return short_id(id_) % self.count == self.number - 1


@dataclass(frozen=True, slots=True)
class FileMetadata:
    """What an index holds of a file: size in bytes, mtime in nanoseconds, SHA-256 of its content in hex."""

    size: int
    mtime: int
    sha256: str

    def matches(self, image: "ImageFile") -> bool:
        """Returns True if the file's size and mtime are these, so that its content is taken to be unchanged."""
        return (self.size, self.mtime) == (image.size, image.mtime)


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file as its source found it.

    `location` is where it is read: an operating system path, an object's key, or for a query what names it. `file_path`
    is its name in the index, `desc` the name of the folder it is in (its class). `size` is in bytes,
    `mtime` in nanoseconds since 1970. `indexed` is what the index holds of it, None if nothing or not looked up.
    """

    location: str
    file_path: str
    desc: str
    size: int
    mtime: int
    indexed: FileMetadata | None = None
    id: str = field(init=False)
    """The document's ``_id``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", document_id(self.file_path))


class ListingReport(Protocol):
    """Is told of what a listing leaves out; what inherits from it may leave out either method."""

    def count_skipped(self, kind: str) -> None:
        """Counts a file or folder that is not looked at; `kind` is its extension, or ``hidden`` and the like."""
        return

    def count_unreadable(self, name: str, reason: str) -> None:
        """Counts a file or folder that cannot be read, and says why."""
        return


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An image that cannot be read or embedded, and why; `name` is shown in messages."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """The content of an image file, with its size and mtime as it was read, and its SHA-256 in hex."""

    image: ImageFile
    stream: BinaryIO
    sha256: str

    @property
    def is_indexed(self) -> bool:
        """True if the index holds this content of the image."""
        return self.image.indexed is not None and self.image.indexed.sha256 == self.sha256

    @classmethod
    def from_memory(cls, image: ImageFile, content: bytes) -> Self:
        """Returns the image with this content."""
        return cls(image, io.BytesIO(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True, slots=True)
class Document:
    """A document to write.

    `embedding` is None if the index holds this content of the image already: its size and mtime are written alone.
    `is_copy` is True if the embedding was known, of an image with the same content.
    """

    image: ImageFile
    sha256: str
    embedding: Embedding | None
    is_copy: bool = False


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
