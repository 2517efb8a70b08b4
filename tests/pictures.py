"""Images and models that the tests make."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from onnx import TensorProto, helper
from PIL import Image

from imagesearch.images import open_rgb

Picture = Callable[..., Path]
Pictures = Callable[..., list[Path]]


def image(size: tuple[int, int], seed: int) -> Image.Image:
    """A picture with large colored patches, as different from another seed's as two photographs."""
    patches = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC)


def read_image(stream: BinaryIO) -> Image.Image:
    """Decodes an image as the scripts do."""
    with open_rgb(stream) as picture:
        return picture


def averaging_model(path: Path, scale: float = 1.0) -> Path:
    """An ONNX model with imgbeddings' input and output: the pixels averaged to 16×16, times `scale`."""
    pool = helper.make_node("AveragePool", ["pixel_values"], ["pooled"], kernel_shape=[14, 14], strides=[14, 14])
    flat = helper.make_node("Flatten", ["pooled"], ["flat"])
    constant = helper.make_tensor("scale", TensorProto.FLOAT, [], [scale])
    scaled = helper.make_node("Mul", ["flat", "scale"], ["embeddings"])
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 224, 224])
    embeddings = helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", 768])
    graph = helper.make_graph([pool, flat, scaled], "averaging", [pixels], [embeddings], [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    path.write_bytes(model.SerializeToString())
    return path


def png(seed: int, size: tuple[int, int] = (8, 8)) -> bytes:
    stream = io.BytesIO()
    image(size, seed).save(stream, "PNG")
    return stream.getvalue()
