"""Embeddings are imgbeddings' own; its model comes from the hub, checked, or from a file."""

import hashlib
import io
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from imagesearch.cache import cache_folder, model_sha256
from onnx import numpy_helper
from PIL import Image

from imagesearch import clip
from imagesearch.errors import ImageSearchError
from imagesearch.models import load_model
from imagesearch.records import DIMENSIONS
from tests.http_servers import Hub
from tests.pictures import averaging_model, image, read_image
from tests.running import environment
from tests.server import ROOT


@pytest.fixture(scope="module")
def averaging(tmp_path_factory: pytest.TempPathFactory) -> clip.Clip:
    path = averaging_model(tmp_path_factory.mktemp("model") / "averaging.onnx")
    return clip.load_onnx(str(path), path, None)


@pytest.fixture(scope="module")
def process_inputs() -> Any:
    """imgbeddings' own `process_inputs`, with transformers' own preprocessing as imgbeddings sets it."""
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(do_center_crop=False)
    theirs = clip.import_imgbeddings()
    original = object.__new__(theirs)
    original.processor = processor
    return partial(theirs.process_inputs, original)


SIZES = [(224, 224), (500, 375), (375, 500), (100, 37), (37, 100), (1, 1), (1, 700), (700, 1), (223, 225), (1500, 1100)]


@pytest.mark.parametrize("size", SIZES)
def test_the_models_input_equals_imgbeddings_own(
    size: tuple[int, int], averaging: clip.Clip, process_inputs: Any
) -> None:
    picture = image(size, sum(size))
    ours = averaging.preprocess(picture)[None]
    theirs = np.asarray(process_inputs([picture])["pixel_values"])
    assert ours.shape == theirs.shape == (1, 3, 224, 224)
    assert ours.dtype == theirs.dtype == np.float32
    assert np.abs(ours - theirs).max() == 0


def test_strips_do_not_show(averaging: clip.Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {size: averaging.preprocess(image(size, 1)) for size in SIZES}
    monkeypatch.setattr(clip, "STRIP_PIXELS", 7000)
    for size, pixels in whole.items():
        assert np.array_equal(averaging.preprocess(image(size, 1)), pixels)


@pytest.mark.slow
def test_a_long_thin_picture_needs_no_square_of_its_length(averaging: clip.Clip) -> None:
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from PIL import Image
from imagesearch import clip
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
clip.Clip.preprocess(None, Image.new("RGB", (1, 20000), "white"))
clip.Clip.preprocess(None, Image.new("RGB", (20000, 1), "white"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = int(subprocess.check_output([sys.executable, "-c", code]))
    assert grown < 200_000  # KiB; the square is 1.6 GB


@pytest.mark.slow
def test_a_large_jpeg_at_reduced_scale_has_nearly_the_same_embedding(averaging: clip.Clip, process_inputs: Any) -> None:
    stream = io.BytesIO()
    sharp = Image.fromarray(np.random.default_rng(1).integers(0, 256, (600, 800, 3), np.uint8))
    sharp.resize((4000, 3000), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    ours = averaging.embed(averaging.preprocess(read_image(stream)))
    theirs = averaging.create_embeddings(process_inputs([Image.open(stream)]))[0]
    assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) > 0.999


def test_an_embedding_has_768_float32(averaging: clip.Clip) -> None:
    embedding = averaging.embed(averaging.preprocess(image((50, 50), 1)))
    assert embedding.shape == (DIMENSIONS,)
    assert embedding.dtype == np.float32


@pytest.mark.slow
def test_the_import_leaves_no_stubs_behind() -> None:
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import imagesearch.clip
assert not {{"transformers", "sklearn", "huggingface_hub"}} & set(sys.modules), sys.modules.keys()
import huggingface_hub, sklearn.decomposition
assert sklearn.decomposition.PCA().fit and huggingface_hub.hf_hub_download
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x08"])
def test_a_file_that_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(ImageSearchError, match="not an ONNX model"):
        load_model(str(path))


def test_a_model_with_other_inputs_or_outputs_is_refused(tmp_path: Path) -> None:
    path = averaging_model(tmp_path / "model.onnx")
    for name in (b"pixel_values", b"embeddings"):
        other = tmp_path / "other.onnx"
        other.write_bytes(path.read_bytes().replace(name, name[::-1]))
        with pytest.raises(ImageSearchError, match=name.decode()):
            load_model(str(other))
    with pytest.raises(ImageSearchError, match="no such file"):
        load_model(str(tmp_path / "missing.onnx"))


def load_in_a_process(hub: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from imagesearch.errors import ImageSearchError
from imagesearch.models import load_model
try:
    print(load_model("clip").info.sha256)
except ImageSearchError as error:
    sys.exit(str(error))
print(*({{"huggingface_hub", "transformers", "sklearn"}} & set(sys.modules)))
"""
    return subprocess.run(
        [sys.executable, "-c", code], env=hub, capture_output=True, text=True, check=False, timeout=60
    )


def test_clip_is_downloaded_once_and_then_found_without_the_hub(hub: dict[str, str]) -> None:
    first = load_in_a_process(hub)
    assert first.stdout == f"{Hub.promised}\nhuggingface_hub\n", first.stderr
    second = load_in_a_process(hub | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert second.stdout == f"{Hub.promised}\n\n", second.stderr


def test_a_damaged_download_is_never_used(hub: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Hub.content
    monkeypatch.setattr(Hub, "content", whole[:-1] + b"?")
    assert "damaged" in load_in_a_process(hub).stderr
    monkeypatch.setattr(Hub, "content", whole)
    assert load_in_a_process(hub).stdout.startswith(Hub.promised)


def test_a_download_that_breaks_off_leaves_nothing_to_use(hub: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "cut", 100)
    done = load_in_a_process(hub | {"HF_HUB_DOWNLOAD_TIMEOUT": "1"})
    assert "CLIP could not be downloaded" in done.stderr and done.stdout == ""
    monkeypatch.setattr(Hub, "cut", 0)
    assert load_in_a_process(hub).stdout.startswith(Hub.promised)


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_given_up_soon(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HUB_ETAG_TIMEOUT": "1"}
        done = load_in_a_process(environment(tmp_path) | hub)
    assert time.monotonic() - started < 20  # a loaded machine takes its time to start Python
    assert done.stderr.count("\n") == 1
    assert "--model FILE" in done.stderr and "--model thumbnail" in done.stderr
    assert os.linesep not in done.stdout


def external_model(folder: Path, scale: float) -> Path:
    """A model whose only weight is in a file beside it."""
    folder.mkdir()
    path = averaging_model(folder / "model.onnx", scale)
    model = onnx.load(path)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array(scale, np.float32), "scale"))
    onnx.save(
        model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0, convert_attribute=True
    )
    return path


def test_external_data_is_part_of_the_model(tmp_path: Path) -> None:
    """Two models whose .onnx files are equal and whose external data differs are two models."""
    first, second = external_model(tmp_path / "a", 1.0), external_model(tmp_path / "b", 2.0)
    assert first.read_bytes() == second.read_bytes()
    models = [load_model(str(path)) for path in (first, second)]
    assert models[0].info.sha256 != models[1].info.sha256
    pixels = models[0].preprocess(image((50, 50), 1))
    assert np.allclose(2 * models[0].embed(pixels), models[1].embed(pixels))
    (first.parent / "model.onnx.data").write_bytes((second.parent / "model.onnx.data").read_bytes())
    assert load_model(str(first)).info.sha256 == models[1].info.sha256


@pytest.mark.parametrize("content", ["", "{", '{"files": [], "sha256": 7}', "0" * 64])
def test_a_damaged_cache_does_not_reject_a_good_model(content: str, tmp_path: Path) -> None:
    path = averaging_model(tmp_path / "model.onnx")
    sha256 = model_sha256(path)
    for remembered in cache_folder().glob("*.sha256"):
        remembered.write_text(content)
    assert model_sha256(path) == sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert model_sha256(path) == sha256
