"""The same model, twice as fast: int8 weights in place of uint8, to the last bit.

imgbeddings' model is dynamically quantised with uint8 weights. Onnx Runtime multiplies uint8 by int8
with the CPU's dot-product instructions (VNNI, AMX, Arm's), uint8 by uint8 without. (w - zero point)
stays the same integer when 128 is taken from both, so the rewritten model's products are the same.
"""

import contextlib
import os
from pathlib import Path

import numpy as np
import onnxruntime

from imagesearch.cache import cache_folder, replacing

PROBE = "probe.onnx"


def exact_int8(path: Path, sha256: str) -> Path:
    """The rewritten model where this CPU multiplies it exactly and the rewrite fits; else `path` itself.

    The rewritten model is kept in the cache folder under `sha256`, the hash of the file `path`, and
    the version of Onnx Runtime; an empty file there says that the rewrite does not fit.
    """
    rewritten = cache_folder() / f"{sha256}.int8.{onnxruntime.__version__}.onnx"
    probe = cache_folder() / PROBE
    try:
        if not probe.exists():
            with replacing(probe) as temporary:
                write_probe(temporary)
        if not rewritten.exists():
            with replacing(rewritten) as temporary:
                rewrite(path, temporary)
                if temporary.stat().st_size:
                    optimise(temporary)
        fits = rewritten.stat().st_size > 0
    except Exception:  # no cache folder to write to or no room in it, which Onnx Runtime words in its own way
        return path
    return rewritten if fits and multiplies_exactly(probe) else path


def rewrite(original: Path, target: Path) -> None:
    """Writes the model in `original` with int8 weights to `target`; nothing where it has no weights to rewrite.

    Only weights are touched that are constant, uint8, and go into `MatMulInteger` and nothing else.
    """
    import onnx  # takes a quarter of a second to import, and is needed once for each model
    from onnx import numpy_helper

    try:
        model = onnx.load(original)
    except Exception:  # not a model: whoever loads it says so
        return
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    uses: dict[str, set[tuple[str, int]]] = {}
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            uses.setdefault(name, set()).add((node.op_type, position))

    def shiftable(name: str, position: int) -> bool:
        tensor = constants.get(name)
        return (
            tensor is not None
            and tensor.data_type == onnx.TensorProto.UINT8
            and uses[name] == {("MatMulInteger", position)}
        )

    chosen: set[str] = set()
    for node in model.graph.node:
        if node.op_type == "MatMulInteger" and len(node.input) == 4:
            weight, zero_point = node.input[1], node.input[3]
            if not (shiftable(weight, 1) and shiftable(zero_point, 3)):
                return
            chosen |= {weight, zero_point}
    if not chosen:
        return
    for name in chosen:
        shifted = numpy_helper.to_array(constants[name]).astype(np.int16) - 128
        constants[name].CopyFrom(numpy_helper.from_array(shifted.astype(np.int8), name))
    onnx.save(model, target)


def optimise(path: Path) -> None:
    """Lets Onnx Runtime fuse the graph's operators once and for all: it then loads in a third of the time.

    Extended is its highest level whose result does not depend on this CPU.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path.with_suffix(".optimised"))
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        os.replace(options.optimized_model_filepath, path)
    finally:
        path.with_suffix(".optimised").unlink(missing_ok=True)


# The greatest uint8 against the least and greatest int8, in rows long enough that a kernel that
# adds pairs of products in 16 bits (a CPU without VNNI) saturates.
LEFT = np.full((8, 768), 255, np.uint8)
RIGHT = np.tile(np.array([-128, 127], np.int8), (768, 32))


def write_probe(target: Path) -> None:
    """Writes the smallest model that shows whether this CPU multiplies uint8 by int8 exactly."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node("MatMulInteger", ["left", "right"], ["product"])
    left = helper.make_tensor_value_info("left", TensorProto.UINT8, ["rows", LEFT.shape[1]])
    product = helper.make_tensor_value_info("product", TensorProto.INT32, ["rows", RIGHT.shape[1]])
    graph = helper.make_graph([node], "probe", [left], [product], [numpy_helper.from_array(RIGHT, "right")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, target)


def multiplies_exactly(probe: Path) -> bool:
    """Whether Onnx Runtime's kernel for uint8 × int8 is exact on this CPU, for one row and for several."""
    exact = LEFT.astype(np.int32) @ RIGHT.astype(np.int32)
    with contextlib.suppress(Exception):  # a damaged probe proves nothing
        session = onnxruntime.InferenceSession(str(probe), providers=["CPUExecutionProvider"])
        return all(np.array_equal(session.run(None, {"left": LEFT[:n]})[0], exact[:n]) for n in (1, len(LEFT)))
    return False
