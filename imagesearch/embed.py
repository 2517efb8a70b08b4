"""From the content of an image to its embedding, made once for each content."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import BinaryIO

import numpy as np

from imagesearch.errors import ImageSearchError, describe_error
from imagesearch.images import open_rgb
from imagesearch.models import Model
from imagesearch.parallel import available_cpus
from imagesearch.records import Embedding, OpenedImage

RECENT_SIZE = 4096  # embeddings kept for copies of images that a look-up in the index may not find yet


class UnreadableError(Exception):
    """An image cannot be read or embedded; the message says why in a few words."""


class Embedder:
    """Embeds images, or copies the embedding of the same content. Safe to use from several threads.

    `get_model` is called when the first image has to be embedded.
    """

    def __init__(self, get_model: Callable[[], Model]) -> None:
        self._get_model = get_model
        self._model: Future[Model] | None = None
        self._recent = OrderedDict[str, Embedding]()
        self._lock = threading.Lock()  # guards the model and the recent embeddings
        self.cpu_slots = threading.Semaphore(available_cpus())
        """A thread holds one while it embeds, so that no more do than there are CPUs."""

    def embed(self, opened: OpenedImage, known: Mapping[str, Embedding]) -> tuple[Embedding, bool]:
        """Returns the embedding of an image, shape (768,) float32, and whether it is a copy.

        It is copied if it is among the `known` ones, by their SHA-256, or was made lately. Raises UnreadableError, and
        ImageSearchError if the model cannot be loaded.
        """
        with self._lock:
            embedding = known.get(opened.sha256, self._recent.get(opened.sha256))
        if embedding is not None:
            return embedding, True
        model = self._load_model()
        try:
            embedding = embed_image(opened.stream, model)
        except Exception as error:  # Pillow raises nearly anything for a damaged file
            raise UnreadableError(describe_error(error)) from None
        with self._lock:
            self._recent[opened.sha256] = embedding
            if len(self._recent) > RECENT_SIZE:
                self._recent.popitem(last=False)
        return embedding, False

    def _load_model(self) -> Model:
        """Returns the model, loaded once; raises the same error each time if it cannot be."""
        with self._lock:
            if self._model is None:
                self._model = Future()
                try:
                    self._model.set_result(self._get_model())
                except ImageSearchError as error:
                    self._model.set_exception(error)
        return self._model.result()


def embed_image(stream: BinaryIO, model: Model) -> Embedding:
    """Returns the embedding of the image in `stream`, shape (768,) float32.

    Raises ValueError if the model gives no usable embedding, and whatever Pillow raises for a damaged file.
    """
    with open_rgb(stream) as rgb:
        pixels = model.preprocess(rgb)
    embedding = model.create_embedding(pixels)
    with np.errstate(over="ignore"):
        length = np.sqrt(np.dot(embedding, embedding))
    if not (np.isfinite(length) and length > 0):
        raise ValueError("the model gives it no usable embedding (zero, or not finite)")
    return embedding
