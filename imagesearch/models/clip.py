"""CLIP embeddings with imgbeddings: its import, its preprocessing, and a session on its model."""

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imagesearch.errors import UsageError
from imagesearch.locations import quote_path
from imagesearch.models.prepared_model import model_sha256, open_session
from imagesearch.records import DIMENSIONS, ModelInfo

IMAGE_SIZE = 224
STRIP_PIXELS = 1 << 22

# Of each channel: transformers.image_utils.OPENAI_CLIP_MEAN and OPENAI_CLIP_STD.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)[:, None, None]
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)[:, None, None]


def import_imgbeddings() -> Any:
    """Returns the class `imgbeddings.imgbeddings`, without the imports that this project never uses.

    imgbeddings 0.1.0 imports `cached_download`, which huggingface_hub has dropped, so that its
    import fails; and transformers and scikit-learn, which take seconds. Stub classes replace them
    during the import.
    """
    stubs = {
        "huggingface_hub": ("hf_hub_url", "cached_download"),
        "transformers": ("CLIPProcessor",),
        "sklearn": (),
        "sklearn.decomposition": ("PCA",),
    }
    originals = {name: sys.modules.get(name) for name in stubs}
    try:
        for name, members in stubs.items():
            module = types.ModuleType(name)
            module.__dict__.update({member: type(member, (), {}) for member in members})
            sys.modules[name] = module
        from imgbeddings import imgbeddings
    finally:
        for name, original in originals.items():
            if original is None:
                del sys.modules[name]
            else:
                sys.modules[name] = original
    return imgbeddings


class Clip:
    """imgbeddings on one session of its model, with its preprocessing in numpy; a `Model`."""

    chunk_size = 16

    def __init__(self, info: ModelInfo, session: Any) -> None:
        self.info = info
        imgbeddings = import_imgbeddings()
        self._imgbeddings = object.__new__(imgbeddings)  # its __init__ downloads the model and a tokenizer
        self._imgbeddings.session = session

    def preprocess(self, image: Image.Image) -> NDArray[np.float32]:
        """Returns the model's input for `image`, 8-bit RGB: shape (3, 224, 224), to the last bit imgbeddings' own.

        It is padded to a square on black, resized bicubically, and normalized. Since Pillow resizes along rows first,
        they are resized some at a time, padded in width only, so that no square of a long picture is made.
        """
        side = max(image.size)
        left, top = (side - image.width) // 2, (side - image.height) // 2
        narrow = Image.new("RGB", (IMAGE_SIZE, side))
        rows = max(1, STRIP_PIXELS // side)
        for y in range(0, image.height, rows):
            strip = Image.new("RGB", (side, min(rows, image.height - y)))
            strip.paste(image.crop((0, y, image.width, y + strip.height)), (left, 0))
            narrow.paste(strip.resize((IMAGE_SIZE, strip.height), Image.Resampling.BICUBIC), (0, top + y))
        square = narrow.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        values = np.asarray(square).transpose(2, 0, 1).astype(np.float32, order="C")
        values /= np.float32(255)
        values -= MEAN
        values /= STD
        return values

    def create_embedding(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the embedding, shape (768,), of an array from `preprocess`.

        One image at a time: ONNX Runtime derives the scales of the quantized activations from a whole
        batch, so in a batch an embedding would depend on the other images.
        """
        (embedding,) = self._imgbeddings.create_embeddings({"pixel_values": pixels[None]})
        return np.asarray(embedding, np.float32)


def load_onnx(name: str, path: Path, single_image: bool) -> Clip:
    """Returns the ONNX model in `path`, which has imgbeddings' input and output; `name` is recorded in the index.

    Raises UsageError for a file that is not such a model.
    """
    quoted = quote_path(str(path))
    try:
        sha256 = model_sha256(path)
        session = open_session(path, sha256, single_image)
    except UsageError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
        again = " If it was downloaded, delete it and run the command again." if name == "clip" else ""
        reason = " ".join(str(error).split())
        raise UsageError(f"{quoted} is not an ONNX model that can be run: {reason.rstrip('.')}.{again}") from None
    inputs = [(node.name, node.type, node.shape[1:]) for node in session.get_inputs()]
    outputs = [(node.name, node.type, node.shape[1:]) for node in session.get_outputs()]
    if inputs != [("pixel_values", "tensor(float)", [3, IMAGE_SIZE, IMAGE_SIZE])]:
        raise UsageError(
            f"{quoted}: its input must be pixel_values (n, 3, {IMAGE_SIZE}, {IMAGE_SIZE}) float32,"
            " like that of imgbeddings' model."
        )
    if ("embeddings", "tensor(float)", [DIMENSIONS]) not in outputs:
        raise UsageError(
            f"{quoted}: its output must be embeddings (n, {DIMENSIONS}) float32, like that of imgbeddings' model."
        )
    batch_size = session.get_inputs()[0].shape[0]
    if isinstance(batch_size, int) and batch_size != 1:
        raise UsageError(f"{quoted}: it takes {batch_size} images at a time, not one.")
    return Clip(ModelInfo(name, sha256), session)
