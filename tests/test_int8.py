"""The rewritten model: the same integers, used only where they come out the same."""

import os
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from imagesearch import int8
from imagesearch.cache import cache_folder
from imagesearch.int8 import int8_model_path, multiplies_exactly, rewrite, write_probe
from imagesearch.models import load_model
from tests.clip_model import build
from tests.conftest import averaging_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def random_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's shape and operators, three layers of it, with random weights."""
    path = tmp_path_factory.mktemp("model") / "clip.onnx"
    build(path, layers=3)
    return path


def embeddings(path: Path, batch: int) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).standard_normal((64, 3, 224, 224), np.float32)
    parts = [session.run(["embeddings"], {"pixel_values": pixels[n : n + batch]})[0] for n in range(0, 64, batch)]
    return np.concatenate(parts)


def require_exact_kernel(tmp_path: Path) -> None:
    write_probe(tmp_path / "probe.onnx")
    if not multiplies_exactly(tmp_path / "probe.onnx"):
        pytest.skip("this CPU's kernel for uint8 x int8 saturates, so the rewritten model is not used on it")


@pytest.mark.parametrize("batch", [1, 8])
def test_embeddings_are_bit_identical(batch: int, random_clip: Path, tmp_path: Path) -> None:
    require_exact_kernel(tmp_path)
    rewritten = int8_model_path(random_clip, "hash")
    assert rewritten != random_clip
    assert np.array_equal(embeddings(rewritten, batch), embeddings(random_clip, batch))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_no_bit(threads: int, random_clip: Path) -> None:
    pixels = np.random.default_rng(1).standard_normal((3, 224, 224), np.float32)
    one, several = (load_model(str(random_clip), count).embed(pixels) for count in (1, threads))
    assert np.array_equal(one, several)


def test_a_batch_would_make_an_embedding_depend_on_other_images(random_clip: Path) -> None:
    """What `embed` avoids; so the tests of one embedding for one image would notice a batch."""
    alone, together = embeddings(random_clip, 1), embeddings(random_clip, 2)
    cosines = (alone * together).sum(1) / np.linalg.norm(alone, axis=1) / np.linalg.norm(together, axis=1)
    assert (cosines < 1 - 1e-5).mean() > 0.5


def test_every_weight_is_int8_and_means_the_same(random_clip: Path, tmp_path: Path) -> None:
    rewrite(random_clip, tmp_path / "rewritten.onnx")
    before, after = onnx.load(random_clip).graph, onnx.load(tmp_path / "rewritten.onnx").graph
    old, new = ({t.name: numpy_helper.to_array(t) for t in graph.initializer} for graph in (before, after))
    products = [node for node in after.node if node.op_type == "MatMulInteger"]
    assert len(products) == 19
    for node in products:
        weight, zero_point = node.input[1], node.input[3]
        assert new[weight].dtype == new[zero_point].dtype == np.int8
        original = old[weight] if old[weight].ndim == 2 else old[weight].reshape(len(old[weight]), -1).T
        assert np.array_equal(new[weight].astype(int) - new[zero_point], original.astype(int) - old[zero_point])
    assert not [node for node in after.node if node.op_type == "ConvInteger"]


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
def test_a_convolution_that_does_not_fit_is_kept(change: str, random_clip: Path, tmp_path: Path) -> None:
    model = onnx.load(random_clip)
    change_convolution(model, change)
    onnx.save(model, tmp_path / "changed.onnx")
    rewrite(tmp_path / "changed.onnx", tmp_path / "rewritten.onnx")
    before, after = onnx.load(tmp_path / "changed.onnx").graph, onnx.load(tmp_path / "rewritten.onnx").graph
    convolutions = [[node for node in graph.node if node.op_type == "ConvInteger"] for graph in (before, after)]
    assert convolutions[0] == convolutions[1]
    assert sum(node.op_type == "MatMulInteger" for node in after.node) == 18


def test_it_is_kept_under_the_originals_hash_and_made_once(random_clip: Path, tmp_path: Path) -> None:
    require_exact_kernel(tmp_path)
    rewritten = int8_model_path(random_clip, "hash")
    assert rewritten == cache_folder() / f"hash.int8-{int8.REWRITE_VERSION}.{onnxruntime.__version__}.onnx"
    made = rewritten.stat().st_mtime_ns
    assert int8_model_path(random_clip, "hash").stat().st_mtime_ns == made
    assert int8_model_path(random_clip, "other") != rewritten
    assert {path.suffix for path in cache_folder().iterdir()} == {".onnx"}


def test_a_rewrite_that_breaks_off_leaves_nothing(random_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(original: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(int8, "rewrite", break_off)
    assert int8_model_path(random_clip, "hash") == random_clip
    assert {path.name for path in cache_folder().iterdir()} == {"probe.onnx"}


def test_what_a_killed_run_left_is_removed(random_clip: Path) -> None:
    int8_model_path(random_clip, "hash")
    for name, age in (("other.onnx.1-1.tmp", 7200), ("other.onnx.1-1.optimized.tmp", 7200), ("new.onnx.2-2.tmp", 60)):
        (cache_folder() / name).write_bytes(b"half")
        os.utime(cache_folder() / name, (time.time() - age, time.time() - age))
    int8_model_path(random_clip, "hash")
    assert [path.name for path in cache_folder().glob("*.tmp")] == ["new.onnx.2-2.tmp"]


def test_a_cpu_that_saturates_keeps_the_original(random_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Saturating:
        """Adds pairs of products in 16 bits, as vpmaddubsw does on a CPU without VNNI."""

        def __init__(self, *_: object, **__: object) -> None: ...

        def run(self, _: object, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            products = inputs["left"].astype(np.int32)[:, :, None] * int8.RIGHT.astype(np.int32)[None]
            pairs = products[:, 0::2] + products[:, 1::2]
            return [np.clip(pairs, -32768, 32767).sum(axis=1)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Saturating)
    assert int8_model_path(random_clip, "hash") == random_clip


def test_a_damaged_probe_proves_nothing(random_clip: Path) -> None:
    int8_model_path(random_clip, "hash")
    (cache_folder() / "probe.onnx").write_bytes(b"damaged")
    assert int8_model_path(random_clip, "hash") == random_clip


def test_a_rewritten_model_that_is_damaged_is_made_again(random_clip: Path, tmp_path: Path) -> None:
    require_exact_kernel(tmp_path)
    model = tmp_path / "clip.onnx"
    model.write_bytes(random_clip.read_bytes())
    info = load_model(str(model), threads=1).info
    rewritten = int8_model_path(model, info.sha256)
    rewritten.write_bytes(b"damaged")
    assert load_model(str(model), threads=1).info == info
    assert not rewritten.exists()
    load_model(str(model), threads=1)
    assert rewritten.stat().st_size > 1_000_000


def test_a_model_that_does_not_fit_is_used_as_it_is(tmp_path: Path) -> None:
    path = averaging_model(tmp_path / "averaging.onnx")
    assert int8_model_path(path, "hash") == path
    assert int8_model_path(path, "hash") == path  # and from its mark in the cache


def test_without_a_cache_folder_the_original_is_used(
    random_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert int8_model_path(random_clip, "hash") == random_clip
