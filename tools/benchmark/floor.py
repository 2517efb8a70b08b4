"""The least that a query can take: start Python, import what it needs, load the model, embed one image."""

import sys

import numpy as np
import onnxruntime
import requests  # noqa: F401
from PIL import Image

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[3])
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
with Image.open(sys.argv[2]) as image:
    pixels = np.asarray(image.convert("RGB").resize((224, 224)), np.float32).transpose(2, 0, 1)[None] / 255
session.run(None, {"pixel_values": pixels})
