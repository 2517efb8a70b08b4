"""Embeddings are imgbeddings' own; its model comes from the hub or a file, and the one that is run is bit-identical."""

import hashlib
import io
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from PIL import Image
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from imagesearch.errors import UsageError
from imagesearch.files import cache_folder
from imagesearch.models import int8, load_model, prepared_model
from imagesearch.models.clip import Clip, import_imgbeddings
from imagesearch.models.int8 import rewrite
from imagesearch.models.prepared_model import model_sha256
from imagesearch.records import ModelInfo
from tests.pictures import averaging_model, image, read_image
from tests.running import environment
from tests.server import ROOT

PIXELS = np.random.default_rng(1).standard_normal((16, 3, 224, 224)).astype(np.float32)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def unmodified(path: Path, batch: int = 1) -> np.ndarray:
    """What ONNX Runtime makes of PIXELS by a model as it is, as imgbeddings runs it."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    parts = [session.run(["embeddings"], {"pixel_values": PIXELS[n : n + batch]})[0] for n in range(0, 16, batch)]
    return np.concatenate(parts)


def prepared_files() -> list[Path]:
    return sorted(cache_folder().glob("*.ort"))


# Preprocessing


@pytest.fixture(scope="module")
def process_inputs() -> Any:
    """imgbeddings' own `process_inputs`, with transformers' own preprocessing as imgbeddings sets it."""
    from transformers import CLIPImageProcessor

    original = object.__new__(import_imgbeddings())
    original.processor = CLIPImageProcessor(do_center_crop=False)
    return partial(type(original).process_inputs, original)


SIZES = [(224, 224), (500, 375), (375, 500), (100, 37), (37, 100), (1, 1), (1, 700), (700, 1), (223, 225), (3100, 2400)]


@pytest.mark.parametrize("size", SIZES)
def test_the_models_input_equals_imgbeddings_own(size: tuple[int, int], process_inputs: Any) -> None:
    picture = image(size, sum(size))
    ours = Clip(ModelInfo(""), None).preprocess(picture)[None]
    theirs = np.asarray(process_inputs([picture])["pixel_values"])
    assert ours.shape == theirs.shape == (1, 3, 224, 224)
    assert ours.dtype == theirs.dtype == np.float32
    assert np.array_equal(ours, theirs)


@pytest.mark.slow
def test_a_large_jpeg_at_reduced_scale_has_nearly_the_same_embedding(tmp_path: Path, process_inputs: Any) -> None:
    stream = io.BytesIO()
    sharp = Image.fromarray(np.random.default_rng(1).integers(0, 256, (600, 800, 3), np.uint8))
    sharp.resize((4000, 3000), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    model = load_model(str(averaging_model(tmp_path / "model.onnx")))
    ours = model.create_embedding(model.preprocess(read_image(stream)))
    theirs = model.create_embedding(np.asarray(process_inputs([Image.open(stream)])["pixel_values"])[0])
    assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) > 0.999


# Loading


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x08"])
def test_a_file_that_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(UsageError, match="not an ONNX model that can be run"):
        load_model(str(tmp_path / "bad.onnx"))


def test_a_model_with_other_inputs_or_outputs_is_refused(tmp_path: Path) -> None:
    path = averaging_model(tmp_path / "model.onnx")
    for name in (b"pixel_values", b"embeddings"):
        (tmp_path / "other.onnx").write_bytes(path.read_bytes().replace(name, name[::-1]))
        with pytest.raises(UsageError, match=name.decode()):
            load_model(str(tmp_path / "other.onnx"))
    with pytest.raises(UsageError, match="no such file"):
        load_model(str(tmp_path / "missing.onnx"))


def test_a_model_with_weights_beside_it_is_refused(tmp_path: Path) -> None:
    path = averaging_model(tmp_path / "model.onnx")
    model = onnx.load(path)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array(1, np.float32), "scale"))
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=0, convert_attribute=True)
    with pytest.raises(UsageError, match="keeps weights in files beside it: save it as one file"):
        load_model(str(path))


@pytest.mark.parametrize("content", ["", "{", '{"file": [], "sha256": 7}', "0" * 64])
def test_a_damaged_memory_of_a_hash_does_not_matter(content: str, tmp_path: Path) -> None:
    path = averaging_model(tmp_path / "model.onnx")
    sha256 = model_sha256(path)
    (remembered,) = cache_folder().glob("*.sha256")
    remembered.write_text(content)
    assert model_sha256(path) == sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    time.sleep(0.01)
    averaging_model(path, scale=2)
    assert model_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest() != sha256


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
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=hub, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.slow
def test_clip_is_downloaded_once_then_found_offline(hub: dict[str, str], web: HTTPServer, tmp_path: Path) -> None:
    sha256 = hashlib.sha256((tmp_path / "hub.onnx").read_bytes()).hexdigest()
    assert load_in_a_process(hub | {"HF_TOKEN": "hf_secret"}).stdout == f"{sha256}\nhuggingface_hub\n"
    assert web.log and not any("Authorization" in request.headers for request, _ in web.log)
    assert load_in_a_process(hub | {"HF_ENDPOINT": "http://127.0.0.1:9"}).stdout == f"{sha256}\n\n"


@pytest.mark.slow
def test_a_download_that_breaks_off_leaves_nothing_to_use(hub: dict[str, str], web: HTTPServer) -> None:
    response = Response(b"half", headers={"X-Repo-Commit": "a" * 40, "ETag": f'"{"b" * 64}"', "X-Linked-Size": "5000"})
    web.clear()
    web.expect_request(re.compile(".*patch32_v1.onnx")).respond_with_response(response)
    done = load_in_a_process(hub | {"HF_HUB_DOWNLOAD_TIMEOUT": "1"})
    assert "CLIP could not be downloaded" in done.stderr and done.stdout == ""
    assert not (Path(hub["XDG_CACHE_HOME"]) / "imagesearch" / "patch32_v1.onnx").exists()


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_given_up_soon(tmp_path: Path, web: HTTPServer) -> None:
    def hang(_: Request) -> Response:
        time.sleep(5)
        return Response("", 503)

    web.expect_request(re.compile(".*patch32_v1.onnx")).respond_with_handler(hang)
    hub = environment(tmp_path) | {"HF_ENDPOINT": web.url_for("").rstrip("/"), "HF_HUB_ETAG_TIMEOUT": "1"}
    started = time.monotonic()
    done = load_in_a_process(hub)
    assert time.monotonic() - started < 20  # a loaded machine takes its time to start Python
    assert done.stderr.count("\n") == 1 and "--model FILE" in done.stderr


# The prepared model


@pytest.mark.parametrize("single_image", [True, False])
def test_embeddings_are_bit_identical(single_image: bool, small_clip: Path) -> None:
    """With int8 weights where this CPU multiplies them exactly, with the model's own elsewhere."""
    expected = unmodified(small_clip)
    for _ in range(2):  # made, and from the cache
        model = load_model(str(small_clip), single_image)
        assert all(
            np.array_equal(model.create_embedding(pixels), right)
            for pixels, right in zip(PIXELS, expected, strict=True)
        )
        assert len(prepared_files()) == 1


@pytest.mark.slow
def test_a_batch_would_make_an_embedding_depend_on_other_images(small_clip: Path) -> None:
    """What `embed` avoids; so the tests of one embedding for one image would notice a batch."""
    alone, together = unmodified(small_clip), unmodified(small_clip, 2)
    cosines = (alone * together).sum(1) / np.linalg.norm(alone, axis=1) / np.linalg.norm(together, axis=1)
    assert (cosines < 1 - 1e-5).mean() > 0.5


def quantized_model(random: np.random.Generator) -> onnx.ModelProto:
    """A small model with what the rewrite changes, of the same forms as CLIP's: patches, then a product."""
    low, high = (0, 256) if random.integers(2) else (255, 256)
    weights: dict[str, Any] = {
        "conv": random.integers(low, high, (5, 3, 112, 112)).astype(np.uint8),
        "conv_zero": random.integers(0, 256, ()).astype(np.uint8),
        "product": random.integers(low, high, (20, 7)).astype(np.uint8),
        "product_zero": random.integers(0, 256, ()).astype(np.uint8),
        "shape": np.array([-1, 20], np.int64),
    }
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["pixel_values"], ["pixels", "scale", "zero"]),
        helper.make_node("ConvInteger", ["pixels", "conv", "zero", "conv_zero"], ["patches"], strides=[112, 112]),
        helper.make_node("Cast", ["patches"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["floats", "shape"], ["rows"]),
        helper.make_node("DynamicQuantizeLinear", ["rows"], ["quantized", "scale_2", "zero_2"]),
        helper.make_node("MatMulInteger", ["quantized", "product", "zero_2", "product_zero"], ["embeddings"]),
    ]
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["n", 3, 224, 224])
    outputs = [
        helper.make_tensor_value_info("patches", TensorProto.INT32, ["n", 5, 2, 2]),
        helper.make_tensor_value_info("embeddings", TensorProto.INT32, ["n", 7]),
    ]
    constants = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = helper.make_graph(nodes, "quantized", [pixels], outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def rewritten(model: onnx.ModelProto) -> onnx.ModelProto:
    content = rewrite(model)
    assert content
    return onnx.load_model_from_string(content)


@pytest.mark.parametrize("seed", range(6))
def test_the_rewrite_leaves_every_integer_the_same_on_any_cpu(seed: int) -> None:
    """By onnx's reference implementation, which multiplies exactly, with and without extreme values."""
    model = quantized_model(np.random.default_rng(seed))
    before = list(ReferenceEvaluator(model).run(None, {"pixel_values": PIXELS[:2]}))  # the rewrite changes the model
    after = list(ReferenceEvaluator(rewritten(model)).run(None, {"pixel_values": PIXELS[:2]}))
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    assert len(np.unique(before[0])) > 1


def test_every_weight_of_clip_becomes_int8_and_means_the_same(small_clip: Path) -> None:
    before, after = onnx.load(small_clip).graph, rewritten(onnx.load(small_clip)).graph
    old, new = ({t.name: numpy_helper.to_array(t) for t in graph.initializer} for graph in (before, after))
    products = [node for node in after.node if node.op_type == "MatMulInteger"]
    assert len(products) == 19
    for node in products:
        weight, zero_point = node.input[1], node.input[3]
        assert new[weight].dtype == new[zero_point].dtype == np.int8
        original = old[weight] if old[weight].ndim == 2 else old[weight].reshape(len(old[weight]), -1).T
        assert np.array_equal(new[weight].astype(int) - new[zero_point], original.astype(int) - old[zero_point])
    assert not [node for node in after.node if node.op_type == "ConvInteger"]


@pytest.mark.parametrize("change", ["padding", "stride", "dilation", "group", "input"])
def test_a_convolution_that_a_product_of_patches_does_not_equal_is_kept(change: str, small_clip: Path) -> None:
    model = onnx.load(small_clip)
    (conv,) = [node for node in model.graph.node if node.op_type == "ConvInteger"]
    if change == "input":
        model.graph.node.insert(0, helper.make_node("Neg", ["pixel_values"], ["negated"]))
        (quantize,) = [node for node in model.graph.node if conv.input[0] in node.output]
        quantize.input[0] = "negated"
    else:
        name, value = {
            "padding": ("pads", [1, 1, 1, 1]),
            "stride": ("strides", [16, 16]),
            "dilation": ("dilations", [2, 2]),
            "group": ("group", 3),
        }[change]
        kept = [attribute for attribute in conv.attribute if attribute.name != name]
        del conv.attribute[:]
        conv.attribute.extend([*kept, helper.make_attribute(name, value)])
    convolutions = [node for node in model.graph.node if node.op_type == "ConvInteger"]
    after = rewritten(model).graph
    assert [node for node in after.node if node.op_type == "ConvInteger"] == convolutions
    assert sum(node.op_type == "MatMulInteger" for node in after.node) == 18


@pytest.mark.slow
def test_a_cpu_that_saturates_keeps_the_weights(small_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Saturating:
        """Adds pairs of products in 16 bits, as vpmaddubsw does on a CPU without VNNI."""

        def __init__(self, *_: object, **__: object) -> None: ...

        def run(self, _: object, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            weights = prepared_model.PROBE_WEIGHTS.astype(np.int32)
            products = inputs["left"].astype(np.int32)[:, :, None] * weights[None]
            return [np.clip(products[:, 0::2] + products[:, 1::2], -32768, 32767).sum(axis=1)]

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", Saturating)
        assert not prepared_model._multiplies_exactly(Path())
    monkeypatch.setattr(prepared_model, "_multiplies_exactly", lambda probe: False)
    monkeypatch.setattr(int8, "rewrite", None)  # an error, if it is called
    assert np.array_equal(load_model(str(small_clip)).create_embedding(PIXELS[0]), unmodified(small_clip)[0])
    assert ".uint8-" in prepared_files()[0].name


@pytest.mark.parametrize("damage", ["empty", "half", "hole", "onnx"])
def test_a_prepared_model_that_is_damaged_is_made_again(damage: str, small_clip: Path) -> None:
    expected = load_model(str(small_clip)).create_embedding(PIXELS[0])
    (prepared,) = prepared_files()
    content = prepared.read_bytes()
    half = len(content) // 2
    contents = {"empty": b"", "half": content[:half], "hole": content[:half] + bytes(half), "onnx": b"\x08\x08"}
    prepared.write_bytes(contents[damage])
    (cache_folder() / "probe.onnx").write_bytes(b"damaged")  # which proves nothing, and is made again
    for single_image in (True, False):
        assert np.array_equal(load_model(str(small_clip), single_image).create_embedding(PIXELS[0]), expected)
    assert (cache_folder() / "probe.onnx").stat().st_size > 1000


def test_what_breaks_off_leaves_nothing(small_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what a killed run has left is removed after an hour."""
    session = onnxruntime.InferenceSession

    def break_off(model: Any, options: Any = None, **more: Any) -> Any:
        if options and options.optimized_model_filepath:
            Path(options.optimized_model_filepath).write_bytes(b"half")
            raise OSError("no space left on device")
        return session(model, options, **more)

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", break_off)
        load_model(str(small_clip))
    assert {path.suffix for path in cache_folder().iterdir()} == {".sha256", ".onnx"}
    load_model(str(small_clip))
    (prepared,) = prepared_files()
    for name, age in ((f"{prepared.name}.imagesearch-1-1.tmp", 7200), (f"{prepared.name}.imagesearch-2-2.tmp", 60)):
        (cache_folder() / name).write_bytes(b"half")
        os.utime(cache_folder() / name, (time.time() - age, time.time() - age))
    prepared.unlink()
    load_model(str(small_clip))
    assert [path.name for path in cache_folder().glob("*.tmp")] == [f"{prepared.name}.imagesearch-2-2.tmp"]


def test_without_cache_the_original_is_used(small_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert np.array_equal(load_model(str(small_clip)).create_embedding(PIXELS[0]), unmodified(small_clip)[0])


def test_a_model_without_such_weights_is_prepared_too(tmp_path: Path) -> None:
    path = averaging_model(tmp_path / "averaging.onnx")
    assert rewrite(onnx.load(path)) is None
    assert np.array_equal(load_model(str(path)).create_embedding(PIXELS[0]), unmodified(path)[0])
    assert len(prepared_files()) == 1
