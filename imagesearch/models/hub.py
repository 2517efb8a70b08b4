"""The download of imgbeddings' model from the Hugging Face hub into this project's cache folder."""

from pathlib import Path

from imagesearch.errors import ImageSearchError
from imagesearch.files import cache_folder

REPOSITORY, FILE_NAME = "minimaxir/imgbeddings", "patch32_v1.onnx"


def clip_path() -> Path:
    """Returns the path of imgbeddings' CLIP model in the cache folder; downloads it, with progress, if it is not there.

    Raises ImageSearchError if the hub does not answer within HF_HUB_ETAG_TIMEOUT, 10 seconds.
    """
    path = cache_folder() / FILE_NAME
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)  # an error of its own, if it cannot be written to
    # Late: it takes half a second to import, and is needed once.
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    try:
        # hf_hub_download alone would retry for minutes if nothing answers.
        # Without the user's token, which a public file does not need.
        url, timeout = hf_hub_url(REPOSITORY, FILE_NAME), constants.HF_HUB_ETAG_TIMEOUT
        get_hf_file_metadata(url, token=False, timeout=timeout)
        return Path(hf_hub_download(REPOSITORY, FILE_NAME, token=False, local_dir=cache_folder()))
    except Exception as error:  # from the hub, its HTTP client or the file system
        raise ImageSearchError(
            f"CLIP could not be downloaded from {constants.ENDPOINT} ({type(error).__name__}): connect to the internet"
            f" and run the command again, or use --model FILE with a copy of imgbeddings' {FILE_NAME}. A baseline needs"
            " no download: --model thumbnail, with an --index of its own."
        ) from None
