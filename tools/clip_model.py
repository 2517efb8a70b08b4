"""A random-weight model like imgbeddings': its exact shape, operators and size, with random weights.

CLIP's ViT-B/32 vision tower as imgbeddings exports it (its models.py): 12 layers of width 768 with
12 heads and an MLP of 3072, patches of 32 pixels; the last three hidden states are summed and
weighted over the tokens by the last three layers' mean attention without the class token; then
dynamically quantized to uint8. As in trained transformers, a few channels of each LayerNorm have gains far
larger than the rest, so that an embedding made in a batch would depend on the other images of the batch.
It costs what CLIP costs; its embeddings mean nothing.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

WIDTH, HEADS, MLP, PATCH, IMAGE_SIZE, OPSET = 768, 12, 3072, 32, 224, 17
OUTLIERS = 6
TOKENS = (IMAGE_SIZE // PATCH) ** 2 + 1


class Graph:
    """Collects the nodes and weights of an ONNX graph."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, values: np.ndarray) -> str:
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def weight(self, *shape: int, scale: float = 0.02) -> str:
        return self.constant((self.random.standard_normal(shape) * scale).astype(np.float32))

    def number(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def shape(self, *sizes: int) -> str:
        return self.constant(np.array(sizes, np.int64))

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def linear(self, x: str, rows: int, columns: int) -> str:
        product = self.add("MatMul", x, self.weight(rows, columns))
        return self.add("Add", product, self.weight(columns))

    def norm(self, x: str) -> str:
        gains = np.ones(WIDTH, np.float32)
        gains[self.random.choice(WIDTH, OUTLIERS, replace=False)] = self.random.uniform(5, 20, OUTLIERS)
        scale = self.constant(gains)
        return self.add("LayerNormalization", x, scale, self.weight(WIDTH), axis=-1, epsilon=1e-5)

    def heads(self, x: str) -> str:
        split = self.add("Reshape", x, self.shape(-1, TOKENS, HEADS, WIDTH // HEADS))
        return self.add("Transpose", split, perm=[0, 2, 1, 3])


def attention(graph: Graph, x: str) -> tuple[str, str]:
    """Self-attention's output (n, tokens, width) and its weights (n, heads, tokens, tokens)."""
    scaled = graph.add("Mul", graph.linear(x, WIDTH, WIDTH), graph.number((WIDTH // HEADS) ** -0.5))
    query, key, value = (graph.heads(y) for y in (scaled, graph.linear(x, WIDTH, WIDTH), graph.linear(x, WIDTH, WIDTH)))
    scores = graph.add("MatMul", query, graph.add("Transpose", key, perm=[0, 1, 3, 2]))
    weights = graph.add("Softmax", scores, axis=-1)
    mixed = graph.add("Transpose", graph.add("MatMul", weights, value), perm=[0, 2, 1, 3])
    merged = graph.add("Reshape", mixed, graph.shape(-1, TOKENS, WIDTH))
    return graph.linear(merged, WIDTH, WIDTH), weights


def mlp(graph: Graph, x: str) -> str:
    hidden = graph.linear(x, WIDTH, MLP)
    gate = graph.add("Sigmoid", graph.add("Mul", hidden, graph.number(1.702)))  # CLIP's quick GELU
    return graph.linear(graph.add("Mul", hidden, gate), MLP, WIDTH)


def build(path: Path, layers: int = 12, seed: int = 0) -> None:
    """Writes the model, quantized, to `path`: 88 MB with all 12 layers. At least 3 layers."""
    graph = Graph(seed)
    conv = graph.add(
        "Conv", "pixel_values", graph.weight(WIDTH, 3, PATCH, PATCH), kernel_shape=[PATCH] * 2, strides=[PATCH] * 2
    )
    patches = graph.add("Transpose", graph.add("Reshape", conv, graph.shape(-1, WIDTH, TOKENS - 1)), perm=[0, 2, 1])
    batch = graph.add("Gather", graph.add("Shape", "pixel_values"), graph.constant(np.array([0], np.int64)))
    class_shape = graph.add("Concat", batch, graph.shape(1, WIDTH), axis=0)
    class_token = graph.add("Expand", graph.weight(1, 1, WIDTH), class_shape)
    tokens = graph.add("Concat", class_token, patches, axis=1)
    x = graph.norm(graph.add("Add", tokens, graph.weight(TOKENS, WIDTH)))

    states, attentions = [], []
    for _ in range(layers):
        mixed, weights = attention(graph, graph.norm(x))
        x = graph.add("Add", x, mixed)
        x = graph.add("Add", x, mlp(graph, graph.norm(x)))
        states.append(x)
        attentions.append(weights)

    summed = graph.add("Sum", *states[-3:])
    # Mean over the three layers, the heads and the queries: one weight a token.
    means = [graph.add("ReduceMean", weights, axes=[1, 2], keepdims=0) for weights in attentions[-3:]]
    no_class = graph.constant(np.array([0] + [1] * (TOKENS - 1), np.float32))
    masked = graph.add("Mul", graph.add("Mean", *means), no_class)
    shares = graph.add("Div", masked, graph.add("ReduceSum", masked, graph.shape(1), keepdims=1))
    weighted = graph.add("Mul", summed, graph.add("Unsqueeze", shares, graph.shape(2)))
    graph.nodes.append(helper.make_node("ReduceSum", [weighted, graph.shape(1)], ["embeddings"], keepdims=0))

    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, IMAGE_SIZE, IMAGE_SIZE])
    embeddings = helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", WIDTH])
    proto = helper.make_graph(graph.nodes, "clip_vision", [pixels], [embeddings], graph.weights)
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    quantize_dynamic(model, str(path), weight_type=QuantType.QUInt8)
