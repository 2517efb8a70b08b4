"""CLIP embeddings through imgbeddings: its model file, its import, its preprocessing."""

import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from imagesearch.cache import model_sha256
from imagesearch.errors import Misuse
from imagesearch.int8 import exact_int8
from imagesearch.models import DIMENSIONS, ModelRecord

HUB_REPOSITORY, HUB_FILE = "minimaxir/imgbeddings", "patch32_v1.onnx"
HUB_SECONDS = 10

SIDE = 224
STRIP_PIXELS = 1 << 22  # 16 MB as Pillow keeps them


def import_imgbeddings() -> Any:
    """The class `imgbeddings.imgbeddings`, without what its module imports and this project never calls.

    imgbeddings 0.1.0 imports `cached_download`, which huggingface_hub has dropped, so that its
    import fails today; and transformers and scikit-learn, which take seconds. For the length of
    its import empty classes stand in for them.
    """
    stand_ins = {
        "huggingface_hub": ("hf_hub_url", "cached_download"),
        "transformers": ("CLIPProcessor",),
        "sklearn": (),
        "sklearn.decomposition": ("PCA",),
    }
    before = {name: sys.modules.get(name) for name in stand_ins}
    try:
        for name, members in stand_ins.items():
            module = types.ModuleType(name)
            module.__dict__.update({member: type(member, (), {}) for member in members})
            sys.modules[name] = module
        from imgbeddings import imgbeddings
    finally:
        for name, original in before.items():
            if original is None:
                del sys.modules[name]
            else:
                sys.modules[name] = original
    return imgbeddings


# Of each channel: transformers.image_utils.OPENAI_CLIP_MEAN and OPENAI_CLIP_STD.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)[:, None, None]
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)[:, None, None]


class Clip(import_imgbeddings()):  # type: ignore[misc]
    """imgbeddings with its model and its results, and a lighter way to them: a `Model`."""

    record: ModelRecord

    def __post_init__(self) -> None:
        """Makes a session that leaves the number of threads to `load`, not imgbeddings' downloads."""

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """`image`, 8-bit RGB, padded to a square on black and resized: shape (224, 224, 3).

        Equal to imgbeddings' `square_pad` and a bicubic `resize`, but the square is never made.
        Pillow resizes along rows first, then along columns: so the rows are resized a strip at a
        time, padded in width alone, and only the narrow result is padded in height.
        """
        side = max(image.size)
        left, top = (side - image.width) // 2, (side - image.height) // 2
        narrow = Image.new("RGB", (SIDE, side))
        step = max(1, STRIP_PIXELS // side)
        for y in range(0, image.height, step):
            height = min(step, image.height - y)
            strip = Image.new("RGB", (side, height))
            strip.paste(image.crop((0, y, image.width, y + height)), (left, 0))
            narrow.paste(strip.resize((SIDE, height), Image.Resampling.BICUBIC), (0, top + y))
        return np.asarray(narrow.resize((SIDE, SIDE), Image.Resampling.BICUBIC))

    def process_inputs(self, inputs: list[NDArray[np.uint8]]) -> dict[str, NDArray[np.float32]]:
        """Arrays from `pixels` as the model's input `pixel_values`, shape (n, 3, 224, 224).

        For all 256 values the result is transformers' own (`CLIPImageProcessor`), to the last bit.
        """
        values = np.stack(inputs).transpose(0, 3, 1, 2).astype(np.float32, order="C")
        values /= np.float32(255)
        values -= MEAN
        values /= DEVIATION
        return {"pixel_values": values}

    def embed(self, batch: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
        embeddings: NDArray[np.float32] = self.create_embeddings(self.process_inputs(batch))
        return embeddings


def load(name: str, path: Path, threads: int) -> Clip:
    """The ONNX model in `path`, with imgbeddings' input and output, as `name` is to be recorded.

    Raises Misuse for a file that is not such a model.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # its errors are raised; its warnings are for developers of models
    try:
        sha256 = model_sha256(path)
        session = open_session(path, exact_int8(path, sha256), options)
    except Exception as error:  # Onnx Runtime's own exceptions share no other base class
        raise Misuse(f"{path} is not an ONNX model that can be run: {' '.join(str(error).split())}") from None
    inputs = [(node.name, node.type, node.shape[1:]) for node in session.get_inputs()]
    outputs = [(node.name, node.type, node.shape[1:]) for node in session.get_outputs()]
    if inputs != [("pixel_values", "tensor(float)", [3, SIDE, SIDE])]:
        raise Misuse(
            f"{path}: its input must be pixel_values (n, 3, {SIDE}, {SIDE}) float32, as imgbeddings' model has it."
        )
    if ("embeddings", "tensor(float)", [DIMENSIONS]) not in outputs:
        raise Misuse(f"{path}: its output must be embeddings (n, {DIMENSIONS}) float32, as imgbeddings' model has it.")
    if isinstance(session.get_inputs()[0].shape[0], int):
        raise Misuse(f"{path}: its number of images is fixed; it must be free, as imgbeddings' model has it.")
    model = Clip(model_path=str(path))
    model.session = session
    model.record = ModelRecord(name, sha256)
    return model


def open_session(path: Path, rewritten: Path, options: Any) -> Any:
    """A session on the rewritten model, or on `path` itself where that was damaged since it was written."""
    if rewritten != path:
        try:
            return onnxruntime.InferenceSession(str(rewritten), options, providers=["CPUExecutionProvider"])
        except Exception:
            rewritten.unlink(missing_ok=True)  # the next run makes it again
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def hub_file() -> Path:
    """The file of imgbeddings' model, downloaded with progress where it is not in the hub's cache yet.

    Raises Misuse where the hub does not answer within about ten seconds, or the file is damaged.
    """
    path = cached_hub_file() or download()
    # The cache keeps a large file under its SHA-256, and links to it; the hash is remembered (`model_sha256`).
    promised = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    if len(promised) == 64 and model_sha256(path) != promised:
        path.resolve().unlink()
        raise Misuse("The download of CLIP was damaged on its way: run this again.")
    return path


def cached_hub_file() -> Path | None:
    """The model in the hub's cache, found without the import of huggingface_hub (half a second).

    The cache's layout is documented: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()
    repository = cache / ("models--" + HUB_REPOSITORY.replace("/", "--"))
    try:
        revision = (repository / "refs" / "main").read_text().strip()
    except OSError:
        return None
    path = repository / "snapshots" / revision / HUB_FILE
    return path if path.is_file() else None


def download() -> Path:
    """Downloads the model into the hub's cache. Raises Misuse where that fails."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    try:
        # Asked first, since hf_hub_download alone tries for minutes where nothing answers.
        get_hf_file_metadata(hf_hub_url(HUB_REPOSITORY, HUB_FILE), timeout=HUB_SECONDS)
        return Path(hf_hub_download(HUB_REPOSITORY, HUB_FILE))
    except Exception as error:  # of the hub's, of its HTTP client's, of the file system's
        raise Misuse(
            f"CLIP could not be downloaded from {constants.ENDPOINT} ({type(error).__name__}): go online once and run"
            " this again, or use --model FILE (an ONNX file with imgbeddings' input and output) or --model thumbnail."
        ) from None
