"""The same model, faster to open and to run: int8 weights in place of uint8, bit-identical.

imgbeddings' model is dynamically quantized with uint8 weights. ONNX Runtime multiplies uint8 by int8 with the
CPU's dot-product instructions (VNNI, AMX, Arm's), uint8 by uint8 without them. Subtracting 128 from a weight
and its zero point leaves their difference, and so every product, the same integer.

The patch embedding, a `ConvInteger` whose stride equals its kernel, multiplies each patch by the same weights:
as a `MatMulInteger` it uses those kernels too.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from imagesearch.errors import UsageError
from imagesearch.locations import quote_path


def load(path: Path) -> Any:
    """Returns the ONNX model in `path`. Raises UsageError if its weights are in files beside it, onnx's errors."""
    model = onnx.load(path, load_external_data=False)
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise UsageError(
            f"{quote_path(str(path))} keeps weights in files beside it: save it as one file"
            " (onnx.save_model with save_as_external_data=False)."
        )
    return model


def rewrite(model: Any) -> bytes | None:
    """Returns the model with int8 weights, None if it has no weights to rewrite; changes `model`.

    All or nothing: None unless the weights of every `MatMulInteger` are constant, uint8, and used by nothing else.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    uses: dict[str, set[tuple[str, int]]] = {}
    for node in graph.node:
        for position, name in enumerate(node.input):
            uses.setdefault(name, set()).add((node.op_type, position))

    def is_shiftable(name: str, operator: str, position: int) -> bool:
        tensor = constants.get(name)
        return (
            tensor is not None
            and tensor.data_type == TensorProto.UINT8
            and uses[name] == {(operator, position)}
            and name not in {output.name for output in graph.output}
        )

    chosen: set[str] = set()
    for node in graph.node:
        if node.op_type == "MatMulInteger" and len(node.input) == 4:
            weight, zero_point = node.input[1], node.input[3]
            if not (is_shiftable(weight, "MatMulInteger", 1) and is_shiftable(zero_point, "MatMulInteger", 3)):
                return None
            chosen |= {weight, zero_point}
    if not chosen:
        return None
    for name in chosen:
        _replace(constants[name], _shifted(constants[name]))
    for node in [node for node in graph.node if node.op_type == "ConvInteger" and len(node.input) == 4]:
        weight, zero_point = node.input[1], node.input[3]
        if is_shiftable(weight, "ConvInteger", 1) and is_shiftable(zero_point, "ConvInteger", 3):
            _replace_patch_embedding(graph, node, constants[weight], constants[zero_point])
    return bytes(model.SerializeToString())


def _shifted(tensor: Any) -> NDArray[np.int8]:
    """Returns a uint8 tensor minus 128 as int8."""
    return (numpy_helper.to_array(tensor).astype(np.int16) - 128).astype(np.int8)


def _replace(tensor: Any, values: NDArray[np.generic]) -> None:
    """Gives a constant of the graph other values."""
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _replace_patch_embedding(graph: Any, conv: Any, weight: Any, zero_point: Any) -> None:
    """Replaces a `ConvInteger` on the quantized input images by a `MatMulInteger` on their patches.

    A convolution that does not fit is left alone: one with padding, groups or dilation, with a stride other
    than its kernel or a kernel that does not divide the image, with a zero point for each channel, or on
    anything but the model's input.
    """
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in conv.attribute}
    producers = {output: node for node in graph.node for output in node.output}
    quantized = producers.get(conv.input[0])
    images = next((value for value in graph.input if quantized and value.name in quantized.input), None)
    shape = [dim.dim_value for dim in images.type.tensor_type.shape.dim] if images else []
    if not quantized or quantized.op_type != "DynamicQuantizeLinear" or len(shape) != 4:
        return
    channels_out, channels, height, width = numpy_helper.to_array(weight).shape
    rows, columns = shape[2] // height, shape[3] // width
    fits = (
        shape[1:] == [channels, rows * height, columns * width]
        and attributes.get("strides") == [height, width]
        and not any(attributes.get("pads", []))
        and attributes.get("group", 1) == 1
        and set(attributes.get("dilations", [1])) == {1}
        and attributes.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
        and numpy_helper.to_array(zero_point).size == 1
    )
    if not fits:
        return
    _replace(weight, np.ascontiguousarray(_shifted(weight).reshape(channels_out, -1).T))
    _replace(zero_point, _shifted(zero_point).reshape(()))
    name = conv.output[0]
    shapes = {
        "split": [-1, channels, rows, height, columns, width],
        "patches": [-1, rows * columns, channels * height * width],
        "grid": [-1, rows, columns, channels_out],
    }
    graph.initializer.extend(
        numpy_helper.from_array(np.array(sizes, np.int64), f"{name}_{key}_shape") for key, sizes in shapes.items()
    )
    split, ordered, patches, product, grid = (
        f"{name}_{step}" for step in ("split", "ordered", "patches", "product", "grid")
    )
    replacement = [
        helper.make_node("Reshape", [conv.input[0], f"{name}_split_shape"], [split]),
        helper.make_node("Transpose", [split], [ordered], perm=[0, 2, 4, 1, 3, 5]),
        helper.make_node("Reshape", [ordered, f"{name}_patches_shape"], [patches]),
        helper.make_node("MatMulInteger", [patches, weight.name, conv.input[2], zero_point.name], [product]),
        helper.make_node("Reshape", [product, f"{name}_grid_shape"], [grid]),
        helper.make_node("Transpose", [grid], [name], perm=[0, 3, 1, 2]),
    ]
    nodes = [new for node in graph.node for new in (replacement if node.output[0] == name else [node])]
    del graph.node[:]
    graph.node.extend(nodes)


def write_probe(target: Path, right: NDArray[np.int8]) -> None:
    """Writes a model that multiplies its input, uint8 of shape (rows, n), by `right`, of shape (n, m)."""
    node = helper.make_node("MatMulInteger", ["left", "right"], ["product"])
    left = helper.make_tensor_value_info("left", TensorProto.UINT8, ["rows", right.shape[0]])
    product = helper.make_tensor_value_info("product", TensorProto.INT32, ["rows", right.shape[1]])
    graph = helper.make_graph([node], "probe", [left], [product], [numpy_helper.from_array(right, "right")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, target)
