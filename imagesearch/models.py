"""The models that make embeddings, by the name or file that `--model` gives."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imagesearch.errors import Misuse
from imagesearch.files import shown

DIMENSIONS = 768

# The version of what happens between a file and the model's input, in files.py and clip.py.
# Raise it when that changes an embedding: indexes made before are then refused, not mixed.
PREPROCESSING = 1


@dataclass(frozen=True)
class ModelRecord:
    """Which model made an index's embeddings, as the index's `_meta` keeps it.

    `model` is what `--model` said: `clip`, `thumbnail` or a file's absolute path; `sha256` is the
    ONNX file's hash in hex (empty for `thumbnail`).
    """

    model: str
    sha256: str = ""
    preprocessing: int = PREPROCESSING

    def same_as(self, other: "ModelRecord") -> bool:
        """Whether both make the same embeddings: a file is known by its hash, wherever it lies."""
        if self.sha256 or other.sha256:
            return (self.sha256, self.preprocessing) == (other.sha256, other.preprocessing)
        return self == other


class Model(Protocol):
    """What turns images into embeddings."""

    record: ModelRecord

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """An 8-bit RGB image as the array that `embed` takes, shape (height, width, 3)."""

    def embed(self, batch: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """The embeddings of n arrays from `pixels`, shape (n, 768)."""


class Thumbnail:
    """The image averaged to 16×16 RGB: no download, no knowledge, for trying things out.

    The "tiny images" baseline: Torralba, Fergus and Freeman, "80 Million Tiny Images", 2008.
    """

    record = ModelRecord("thumbnail")

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        return np.asarray(image.resize((16, 16), Image.Resampling.BOX))

    def embed(self, batch: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
        # Around mid-grey, so that the cosine tells dark from light; no 8-bit value comes out as 0.
        averages = np.stack(batch).reshape(len(batch), DIMENSIONS).astype(np.float32)
        return averages / np.float32(127.5) - np.float32(1)


def load_model(name: str, threads: int) -> Model:
    """The model that `--model` names: `clip` (downloaded once), `thumbnail`, or an ONNX file.

    `threads` is how many threads work on one batch. Raises Misuse where the model cannot be had.
    """
    if name == "thumbnail":
        return Thumbnail()
    from imagesearch import clip  # Onnx Runtime takes a tenth of a second to import

    if name == "clip":
        return clip.load(name, clip.hub_file(), threads)
    path = Path(name).absolute()
    if not os.path.isfile(path):
        raise Misuse(f"--model {shown(name)}: no such file. Give an ONNX file, clip or thumbnail.")
    return clip.load(str(path), path, threads)
