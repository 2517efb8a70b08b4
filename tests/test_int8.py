"""The rewritten model: the same integers, used only where they come out the same."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from imagesearch.cache import cache_folder
from imagesearch.int8 import rewrite, write_probe
from imagesearch.prepared_model import PROBE_WEIGHTS, multiplies_exactly, prepared_model_path
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from imagesearch import int8, prepared_model
from imagesearch.models import load_model
from tests.pictures import averaging_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def embeddings(path: Path, batch: int) -> np.ndarray:
    """Of 16 random images; without the optimizations of `session_options`, as imgbeddings does."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).standard_normal((16, 3, 224, 224), np.float32)
    parts = [session.run(["embeddings"], {"pixel_values": pixels[n : n + batch]})[0] for n in range(0, 16, batch)]
    return np.concatenate(parts)


def require_exact_kernel(tmp_path: Path) -> None:
    write_probe(tmp_path / "probe.onnx", PROBE_WEIGHTS)
    if not multiplies_exactly(tmp_path / "probe.onnx"):
        pytest.skip(
            "this CPU's kernel for uint8 x int8 saturates; that leaves its int8 model untested, which it never uses"
        )


@pytest.mark.parametrize("batch", [1, 8])
def test_embeddings_are_bit_identical(batch: int, small_clip: Path) -> None:
    """With int8 weights where this CPU multiplies them exactly, with the model's own elsewhere."""
    prepared = prepared_model_path(small_clip, "hash")
    assert prepared != small_clip
    assert np.array_equal(embeddings(prepared, batch), embeddings(small_clip, batch))


@pytest.mark.parametrize("image_count", [1, 2, None])
def test_however_many_images_are_to_come_the_bits_are_the_same(image_count: int | None, small_clip: Path) -> None:
    """One is embedded by all CPUs, few by weights that are not prepacked."""
    pixels = np.random.default_rng(1).standard_normal((3, 224, 224), np.float32)
    session = onnxruntime.InferenceSession(str(small_clip))
    expected = np.asarray(session.run(["embeddings"], {"pixel_values": pixels[None]})[0])[0]
    for _ in range(2):  # made, and from the cache
        assert np.array_equal(load_model(str(small_clip), image_count).embed(pixels), expected)


def quantized_model(path: Path, random: np.random.Generator) -> None:
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
    images = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["n", 3, 224, 224])
    outputs = [
        helper.make_tensor_value_info("patches", TensorProto.INT32, ["n", 5, 2, 2]),
        helper.make_tensor_value_info("embeddings", TensorProto.INT32, ["n", 7]),
    ]
    constants = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = helper.make_graph(nodes, "quantized", [images], outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)


@pytest.mark.parametrize("seed", range(6))
def test_the_rewrite_leaves_every_integer_the_same_on_any_cpu(seed: int, tmp_path: Path) -> None:
    """By onnx's reference implementation, which multiplies exactly, with and without extreme values."""
    random = np.random.default_rng(seed)
    quantized_model(tmp_path / "model.onnx", random)
    rewritten = rewrite(tmp_path / "model.onnx")
    assert rewritten
    images = random.standard_normal((2, 3, 224, 224)).astype(np.float32)
    before, after = (
        list(ReferenceEvaluator(loaded(model)).run(None, {"pixel_values": images}))
        for model in ((tmp_path / "model.onnx").read_bytes(), rewritten)
    )
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    assert len(np.unique(before[0])) > 1


@pytest.mark.slow
def test_a_batch_would_make_an_embedding_depend_on_other_images(small_clip: Path) -> None:
    """What `embed` avoids; so the tests of one embedding for one image would notice a batch."""
    alone, together = embeddings(small_clip, 1), embeddings(small_clip, 2)
    cosines = (alone * together).sum(1) / np.linalg.norm(alone, axis=1) / np.linalg.norm(together, axis=1)
    assert (cosines < 1 - 1e-5).mean() > 0.5


def test_every_weight_is_int8_and_means_the_same(small_clip: Path, tmp_path: Path) -> None:
    before, after = onnx.load(small_clip).graph, loaded(rewrite(small_clip)).graph
    old, new = ({t.name: numpy_helper.to_array(t) for t in graph.initializer} for graph in (before, after))
    products = [node for node in after.node if node.op_type == "MatMulInteger"]
    assert len(products) == 19
    for node in products:
        weight, zero_point = node.input[1], node.input[3]
        assert new[weight].dtype == new[zero_point].dtype == np.int8
        original = old[weight] if old[weight].ndim == 2 else old[weight].reshape(len(old[weight]), -1).T
        assert np.array_equal(new[weight].astype(int) - new[zero_point], original.astype(int) - old[zero_point])
    assert not [node for node in after.node if node.op_type == "ConvInteger"]


def loaded(model: bytes | None) -> onnx.ModelProto:
    assert model
    return onnx.load_model_from_string(model)


def change_convolution(model: onnx.ModelProto, change: str) -> None:
    """Makes the patch embedding one that a product of patches does not equal."""
    (conv,) = [node for node in model.graph.node if node.op_type == "ConvInteger"]
    attributes = {attribute.name: attribute for attribute in conv.attribute}
    if change == "padding":
        conv.attribute.append(helper.make_attribute("pads", [1, 1, 1, 1]))
    elif change == "stride":
        del attributes["strides"].ints[:]
        attributes["strides"].ints.extend([16, 16])
    elif change == "dilation":
        conv.attribute.append(helper.make_attribute("dilations", [2, 2]))
    elif change == "group":
        conv.attribute.append(helper.make_attribute("group", 3))
    elif change == "input":
        model.graph.node.insert(0, helper.make_node("Neg", ["pixel_values"], ["negated"]))
        (quantize,) = [node for node in model.graph.node if conv.input[0] in node.output]
        quantize.input[0] = "negated"


@pytest.mark.parametrize("change", ["padding", "stride", "dilation", "group", "input"])
def test_a_convolution_that_does_not_fit_is_kept(change: str, small_clip: Path, tmp_path: Path) -> None:
    model = onnx.load(small_clip)
    change_convolution(model, change)
    onnx.save(model, tmp_path / "changed.onnx")
    rewritten = rewrite(tmp_path / "changed.onnx")
    before, after = onnx.load(tmp_path / "changed.onnx").graph, loaded(rewritten).graph
    convolutions = [[node for node in graph.node if node.op_type == "ConvInteger"] for graph in (before, after)]
    assert convolutions[0] == convolutions[1]
    assert sum(node.op_type == "MatMulInteger" for node in after.node) == 18


def test_it_is_kept_under_the_originals_hash_and_made_once(small_clip: Path, tmp_path: Path) -> None:
    require_exact_kernel(tmp_path)
    prepared = prepared_model_path(small_clip, "hash")
    assert prepared == cache_folder() / f"hash.int8-{prepared_model.REWRITE_VERSION}.{onnxruntime.__version__}.ort"
    made = prepared.stat().st_mtime_ns
    assert prepared_model_path(small_clip, "hash").stat().st_mtime_ns == made
    assert prepared_model_path(small_clip, "other") != prepared
    assert {path.suffix for path in cache_folder().iterdir()} == {".ort", ".onnx"}  # two models and the probe


def test_a_rewrite_that_breaks_off_leaves_nothing(small_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(model: bytes | str, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(prepared_model, "_optimize", break_off)
    assert prepared_model_path(small_clip, "hash") == small_clip
    assert {path.name for path in cache_folder().iterdir()} == {"probe.onnx"}


def test_what_a_killed_run_left_is_removed(small_clip: Path) -> None:
    prepared_model_path(small_clip, "hash")
    for name, age in (("other.ort.imagesearch-1-1.tmp", 7200), ("new.ort.imagesearch-2-2.tmp", 60), ("user.tmp", 7200)):
        (cache_folder() / name).write_bytes(b"half")
        os.utime(cache_folder() / name, (time.time() - age, time.time() - age))
    prepared_model_path(small_clip, "hash")
    assert {path.name for path in cache_folder().glob("*.tmp")} == {"new.ort.imagesearch-2-2.tmp", "user.tmp"}


@pytest.mark.slow
def test_a_cpu_that_saturates_keeps_the_weights_and_rewrites_nothing(
    small_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Saturating:
        """Adds pairs of products in 16 bits, as vpmaddubsw does on a CPU without VNNI."""

        def __init__(self, *_: object, **__: object) -> None: ...

        def run(self, _: object, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            products = inputs["left"].astype(np.int32)[:, :, None] * PROBE_WEIGHTS.astype(np.int32)[None]
            pairs = products[:, 0::2] + products[:, 1::2]
            return [np.clip(pairs, -32768, 32767).sum(axis=1)]

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", Saturating)
        write_probe(tmp_path / "probe.onnx", PROBE_WEIGHTS)
        assert not multiplies_exactly(tmp_path / "probe.onnx")
    monkeypatch.setattr(prepared_model, "multiplies_exactly", lambda probe: False)
    monkeypatch.setattr(int8, "rewrite", None)  # an error, if it is called
    prepared = prepared_model_path(small_clip, "hash")
    assert ".uint8-" in prepared.name
    assert np.array_equal(embeddings(prepared, 1), embeddings(small_clip, 1))


def test_a_damaged_probe_proves_nothing(small_clip: Path) -> None:
    prepared_model_path(small_clip, "hash")
    (cache_folder() / "probe.onnx").write_bytes(b"damaged")
    assert ".uint8-" in prepared_model_path(small_clip, "hash").name


@pytest.mark.parametrize("damage", ["empty", "other", "half", "hole", "onnx"])
def test_a_prepared_model_that_is_damaged_is_made_again(damage: str, small_clip: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).standard_normal((3, 224, 224), np.float32)
    info, expected = load_model(str(small_clip)).info, load_model(str(small_clip)).embed(pixels)
    prepared = prepared_model_path(small_clip, info.sha256)
    content = prepared.read_bytes()
    half = len(content) // 2
    prepared.write_bytes(
        {
            "empty": b"",
            "other": b"damaged",
            "half": content[:half],
            "hole": content[:half] + bytes(half),
            "onnx": small_clip.read_bytes(),
        }[damage]
    )
    for image_count in (1, None):
        assert np.array_equal(load_model(str(small_clip), image_count).embed(pixels), expected)
    session = onnxruntime.InferenceSession(str(prepared), providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(["embeddings"], {"pixel_values": pixels[None]})[0][0], expected)


def test_a_model_without_such_weights_is_prepared_too(tmp_path: Path) -> None:
    path = averaging_model(tmp_path / "averaging.onnx")
    assert rewrite(path) is None
    prepared = prepared_model_path(path, "hash")
    assert prepared != path and np.array_equal(embeddings(prepared, 1), embeddings(path, 1))


def test_without_a_cache_folder_the_original_is_used(
    small_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert prepared_model_path(small_clip, "hash") == small_clip
