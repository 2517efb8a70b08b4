"""The models that make embeddings, and loading the one that ``--model`` names."""

import os
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imagesearch.errors import UsageError
from imagesearch.locations import path_from_text, path_to_text, quote_path
from imagesearch.records import DIMENSIONS, PREPROCESSING, ModelInfo

MODEL_NAMES = ("clip", "thumbnail")


class Model(Protocol):
    """Turns one image into its embedding. Safe to use from several threads."""

    @property
    def info(self) -> ModelInfo:
        """What an index records about the model."""

    @property
    def chunk_size(self) -> int:
        """How many images to embed before they are written: a second or two of work for one CPU at most."""

    def preprocess(self, image: Image.Image) -> NDArray[np.float32]:
        """Returns an 8-bit RGB image as the array that `create_embedding` takes; its shape is the model's own."""

    def create_embedding(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the embedding, shape (768,), of an array from `preprocess`."""


class Thumbnail:
    """The image averaged to 16x16 RGB: a baseline that needs no download.

    The "tiny images" of Torralba, Fergus and Freeman, "80 Million Tiny Images", 2008.
    """

    info = ModelInfo("thumbnail")
    chunk_size = 96  # below 1 MB in one bulk request: nginx's default limit

    def preprocess(self, image: Image.Image) -> NDArray[np.float32]:
        return np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float32)

    def create_embedding(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        # Centered on mid-gray, so that the cosine tells dark from light; no 8-bit value becomes 0.
        return pixels.reshape(DIMENSIONS) / np.float32(127.5) - np.float32(1)


def load_model(name: str, single_image: bool = False) -> Model:
    """Returns the model that ``--model`` names: ``clip`` (downloaded once), ``thumbnail``, or an ONNX file.

    If `single_image`, it is loaded for one image rather than for many, which changes the speed, not a bit of the
    result. Raises ImageSearchError if the model cannot be loaded.
    """
    if name == "thumbnail":
        return Thumbnail()
    from imagesearch.models.clip import load_onnx  # ONNX Runtime takes a tenth of a second to import

    if name == "clip":
        from imagesearch.models.hub import clip_path

        return load_onnx(name, clip_path(), single_image)
    path = Path(name).absolute()
    if not os.path.isfile(path):
        raise UsageError(f"--model {quote_path(name)}: no such file. Use an ONNX file, clip or thumbnail.")
    return load_onnx(path_to_text(str(path)), path, single_image)


def load_index_model(info: ModelInfo, name: str | None, single_image: bool = False) -> Model:
    """Returns the model that made an index: the one recorded in it, or `name`, which must be the same one.

    Raises UsageError if it cannot be loaded, or `name` is another model.
    """
    check_version(info)
    if name in MODEL_NAMES and info.name in MODEL_NAMES and name != info.name:
        check_compatible(info, ModelInfo(name))  # raises, before anything is downloaded
    recorded = path_from_text(info.name)
    if not name and info.name not in MODEL_NAMES and not os.path.isfile(recorded):
        raise UsageError(
            f"The index was made with the model {quote_path(info.name)}, which is not there any more: use --model FILE"
            " to say where it is now."
        )
    model = load_model(name or recorded, single_image)
    check_compatible(info, model.info)
    return model


def check_version(recorded: ModelInfo) -> None:
    """Raises UsageError unless this version of the scripts preprocesses images as the one that made an index."""
    if recorded.preprocessing != PREPROCESSING:
        raise UsageError(
            "The index was made by another version of create.py, whose embeddings differ: use another --index,"
            " or delete it and run create.py again."
        )


def check_compatible(recorded: ModelInfo, model: ModelInfo) -> None:
    """Raises UsageError unless embeddings of the model recorded in an index and of `model` can be compared."""
    check_version(recorded)
    if not recorded.is_compatible(model):
        difference = "it has changed" if model.name == recorded.name else f"{quote_path(model.name)} is another model"
        raise UsageError(
            f"The index was made with --model {quote_path(recorded.name)}, and {difference}: use the same model, or"
            " another index with --index."
        )
