"""Embeddings are imgbeddings' own; its model comes from the hub, checked, or from a file."""

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
import pytest
from PIL import Image

from imagesearch import clip
from imagesearch.errors import Misuse
from imagesearch.files import read
from imagesearch.models import DIMENSIONS, load_model
from tests.conftest import Hub, averaging_model, environment, image
from tests.server import ROOT


@pytest.fixture(scope="module")
def averaging(tmp_path_factory: pytest.TempPathFactory) -> clip.Clip:
    path = averaging_model(tmp_path_factory.mktemp("model") / "averaging.onnx")
    return clip.load(str(path), path, threads=1)


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
    ours = averaging.process_inputs([averaging.pixels(picture)])["pixel_values"]
    theirs = np.asarray(process_inputs([picture])["pixel_values"])
    assert ours.shape == theirs.shape == (1, 3, 224, 224)
    assert ours.dtype == theirs.dtype == np.float32
    assert np.abs(ours - theirs).max() == 0


def test_strips_do_not_show(averaging: clip.Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {size: averaging.pixels(image(size, 1)) for size in SIZES}
    monkeypatch.setattr(clip, "STRIP_PIXELS", 7000)
    for size, pixels in whole.items():
        assert np.array_equal(averaging.pixels(image(size, 1)), pixels)


def test_a_long_thin_picture_needs_no_square_of_its_length(averaging: clip.Clip) -> None:
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from PIL import Image
from imagesearch import clip
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
clip.Clip.pixels(None, Image.new("RGB", (1, 20000), "white"))
clip.Clip.pixels(None, Image.new("RGB", (20000, 1), "white"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = int(subprocess.check_output([sys.executable, "-c", code]))
    assert grown < 200_000  # KiB; the square is 1.6 GB


def test_a_large_jpeg_at_reduced_scale_has_nearly_the_same_embedding(averaging: clip.Clip, process_inputs: Any) -> None:
    stream = io.BytesIO()
    sharp = Image.fromarray(np.random.default_rng(1).integers(0, 256, (600, 800, 3), np.uint8))
    sharp.resize((4000, 3000), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    ours = averaging.embed([averaging.pixels(read(stream))])[0]
    theirs = averaging.create_embeddings(process_inputs([Image.open(stream)]))[0]
    assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) > 0.999


def test_embeddings_are_768_float32_a_row_each(averaging: clip.Clip) -> None:
    pixels = [averaging.pixels(image((50, 50), seed)) for seed in range(3)]
    together = averaging.embed(pixels)
    assert together.shape == (3, DIMENSIONS)
    assert together.dtype == np.float32
    assert np.array_equal(together[1], averaging.embed(pixels[1:2])[0])


def test_the_import_leaves_no_stand_ins_behind() -> None:
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
    with pytest.raises(Misuse, match="not an ONNX model"):
        load_model(str(path), threads=1)


def test_a_model_with_other_inputs_or_outputs_is_refused(tmp_path: Path) -> None:
    path = averaging_model(tmp_path / "model.onnx")
    for name in (b"pixel_values", b"embeddings"):
        other = tmp_path / "other.onnx"
        other.write_bytes(path.read_bytes().replace(name, name[::-1]))
        with pytest.raises(Misuse, match=name.decode()):
            load_model(str(other), threads=1)
    with pytest.raises(Misuse, match="no such file"):
        load_model(str(tmp_path / "missing.onnx"), threads=1)


def load_in_a_process(hub: dict[str, str], threads: str = "") -> "subprocess.CompletedProcess[str]":
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from imagesearch.errors import Misuse
from imagesearch.models import load_model
try:
    print(load_model("clip", threads=1).record.sha256)
except Misuse as misuse:
    sys.exit(str(misuse))
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


def test_a_hub_that_says_nothing_is_given_up_in_about_ten_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        done = load_in_a_process(environment(tmp_path) | {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"})
    assert time.monotonic() - started < 15
    assert done.stderr.count("\n") == 1
    assert "--model FILE" in done.stderr and "--model thumbnail" in done.stderr
    assert os.linesep not in done.stdout
