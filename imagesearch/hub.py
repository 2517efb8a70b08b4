"""The download of imgbeddings' model from the Hugging Face hub, and where the hub's cache has it."""

import os
from pathlib import Path

from imagesearch.cache import model_sha256
from imagesearch.errors import ImageSearchError
from imagesearch.files import file_sha256

REPOSITORY, FILE_NAME = "minimaxir/imgbeddings", "patch32_v1.onnx"


def clip_path() -> Path:
    """Returns the path of imgbeddings' CLIP model; downloads it, with progress, if it is not in the hub's cache.

    Raises ImageSearchError if the hub does not answer within HF_HUB_ETAG_TIMEOUT, 10 seconds, or the file is damaged.
    """
    path = _cached_path() or _download()
    # The cache keeps a large file under its SHA-256, with a link to it. The hash that is remembered is looked at first.
    expected = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    if len(expected) == 64 and model_sha256(path) != expected and file_sha256(path) != expected:
        path.resolve().unlink()
        raise ImageSearchError("The downloaded CLIP model is damaged, and was deleted: run the command again.")
    return path


def _cached_path() -> Path | None:
    """Returns the model's path in the hub's cache, found without importing huggingface_hub (half a second).

    The cache's layout is documented: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()
    repository = cache / ("models--" + REPOSITORY.replace("/", "--"))
    try:
        revision = (repository / "refs" / "main").read_text().strip()
    except OSError:
        return None
    path = repository / "snapshots" / revision / FILE_NAME
    return path if path.is_file() else None


def _download() -> Path:
    """Downloads the model into the hub's cache. Raises ImageSearchError if that fails."""
    # Late: it takes half a second to import, and is needed once.
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    try:
        # hf_hub_download alone would retry for minutes if nothing answers.
        get_hf_file_metadata(hf_hub_url(REPOSITORY, FILE_NAME), timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return Path(hf_hub_download(REPOSITORY, FILE_NAME))
    except Exception as error:  # of the hub, of its HTTP client, of the file system
        raise ImageSearchError(
            f"CLIP could not be downloaded from {constants.ENDPOINT} ({type(error).__name__}): connect to the internet"
            f" and run the command again, or use --model FILE with a copy of imgbeddings' {FILE_NAME}. To try the"
            " scripts with a baseline in place of CLIP: create.py --model thumbnail --index tryout, then search.py"
            " --index tryout."
        ) from None
