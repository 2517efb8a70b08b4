"""CLIP embeddings with imgbeddings: its import, its preprocessing, and a session on its model."""

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from imagesearch.cache import model_sha256
from imagesearch.errors import UsageError
from imagesearch.images import STRIP_PIXELS
from imagesearch.parallel import available_cpus
from imagesearch.paths import quote_path
from imagesearch.prepared_model import prepared_model_path, session_options
from imagesearch.records import DIMENSIONS, ModelInfo

IMAGE_SIZE = 224

# From so many images on, ONNX Runtime's prepacking of the weights pays: 12 measured with AMX, 18 without it.
PREPACK_FROM = 12

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


class Clip(import_imgbeddings()):  # type: ignore[misc]
    """imgbeddings with one session of its model and a faster preprocessing; a `Model`."""

    def __init__(self, info: ModelInfo, session: Any) -> None:
        # Not imgbeddings' own __init__, which downloads the model and a tokenizer.
        self.info = info
        self.session = session
        self.pca = None

    def preprocess(self, image: Image.Image) -> NDArray[np.float32]:
        """Returns the model's input for `image`, 8-bit RGB: shape (3, 224, 224), to the last bit imgbeddings' own.

        imgbeddings pads to a square on black, resizes bicubically, and normalizes. Here the square is never
        made: since Pillow resizes along rows first, then along columns, the rows are resized a strip at a
        time, padded in width only, and the narrow result is padded in height.
        """
        side = max(image.size)
        left, top = (side - image.width) // 2, (side - image.height) // 2
        narrow = Image.new("RGB", (IMAGE_SIZE, side))
        rows = max(1, STRIP_PIXELS // side)
        for y in range(0, image.height, rows):
            height = min(rows, image.height - y)
            strip = Image.new("RGB", (side, height))
            strip.paste(image.crop((0, y, image.width, y + height)), (left, 0))
            narrow.paste(strip.resize((IMAGE_SIZE, height), Image.Resampling.BICUBIC), (0, top + y))
        square = narrow.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        values = np.asarray(square).transpose(2, 0, 1).astype(np.float32, order="C")
        values /= np.float32(255)
        values -= MEAN
        values /= STD
        return values

    def embed(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the embedding, shape (768,), of an array from `preprocess`.

        One image at a time: ONNX Runtime derives the scales of the quantized activations from a whole
        batch, so in a batch an embedding would depend on the other images.
        """
        (embedding,) = self.create_embeddings({"pixel_values": pixels[None]})
        return np.asarray(embedding, np.float32)


def load_onnx(name: str, path: Path, image_count: int | None) -> Clip:
    """Returns the ONNX model in `path`, which has imgbeddings' input and output; `name` is recorded in the index.

    `image_count` is how many images will be embedded, None for many: it changes the speed, not a bit of the result.
    Raises UsageError for a file that is not such a model.
    """
    quoted = quote_path(str(path))
    try:
        sha256 = model_sha256(path)
        session = _open_session(path, prepared_model_path(path, sha256), image_count)
    except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
        raise UsageError(f"{quoted} is not an ONNX model that can be run: {' '.join(str(error).split())}") from None
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


def _open_session(path: Path, prepared: Path, image_count: int | None) -> Any:
    """Returns a session on the prepared model, or on `path` itself if the prepared one was damaged."""
    options = session_options(threads=available_cpus() if image_count == 1 else 1)
    if prepared != path:
        options.add_session_config_entry("session.load_model_format", "ORT")
        options.add_session_config_entry("session.use_memory_mapped_ort_model", "1")
        options.add_session_config_entry("session.use_ort_model_bytes_for_initializers", "1")
        if image_count is not None and image_count < PREPACK_FROM:
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            return onnxruntime.InferenceSession(str(prepared), options, providers=["CPUExecutionProvider"])
        except Exception:  # ONNX Runtime verifies the file
            prepared.unlink(missing_ok=True)  # the next run makes it again
            options = session_options(options.intra_op_num_threads)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
