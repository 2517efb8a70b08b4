"""The records that pass between embedding and index."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

DIMENSIONS = 768  # of an embedding

# Version of everything between a file and the model's input (images.py, clip.py, embed.py). Increment it
# if a change there changes an embedding: existing indexes are then refused, not mixed.
PREPROCESSING = 2


@dataclass(frozen=True)
class ModelInfo:
    """Which model made an index's embeddings; stored in the index.

    `model` is the value of ``--model``: ``clip``, ``thumbnail`` or the absolute path of a file.
    `sha256` is the hash of the ONNX model in hex, empty for ``thumbnail``.
    """

    model: str
    sha256: str = ""
    preprocessing: int = PREPROCESSING

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
    """The document's ``_id``: the SHA-256 of `file_path` in hex."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", hashlib.sha256(self.file_path.encode()).hexdigest())


@dataclass(frozen=True, slots=True)
class FileMetadata:
    """What an index holds of a file: size in bytes, mtime in nanoseconds, SHA-256 of its content in hex."""

    size: int
    mtime: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Document:
    """A document to write: an image that is new, or whose content changed.

    `embedding` has shape (768,) and dtype float32. `is_update` is True if it replaces a document,
    `is_copy` if its embedding was reused, from the index or from earlier in this run.
    """

    image: ImageFile
    sha256: str
    embedding: NDArray[np.float32]
    is_update: bool = False
    is_copy: bool = False


@dataclass(frozen=True, slots=True)
class MetadataUpdate:
    """An image whose size or mtime changed but whose content is what the index holds: its embedding stays."""

    image: ImageFile
