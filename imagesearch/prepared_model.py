"""The model as this CPU runs it best, in the cache folder: with int8 weights, if the CPU multiplies them exactly."""

from pathlib import Path

import numpy as np
import onnxruntime

from imagesearch.cache import cache_folder
from imagesearch.files import atomic_write, remove_stale

PROBE_NAME = "probe.onnx"
REWRITE_VERSION = 3  # increment it if the rewrite changes


def prepared_model_path(path: Path, sha256: str) -> Path:
    """Returns the model in `path` as this CPU and this version of ONNX Runtime run it best, kept in the cache folder.

    It has int8 weights if the CPU multiplies them exactly, its operators are fused, and it is in ONNX Runtime's own
    format, which opens in a tenth of the time. It is kept under `sha256`, the hash of the model. Returns `path`
    itself if the cache folder cannot be used.
    """
    try:
        remove_stale(cache_folder())
        probe = cache_folder() / PROBE_NAME
        if not probe.exists():
            _write_probe(probe)
        weights = "int8" if multiplies_exactly(probe) else "uint8"
        prepared = cache_folder() / f"{sha256}.{weights}-{REWRITE_VERSION}.{onnxruntime.__version__}.ort"
        if not prepared.exists():
            _prepare(path, weights, prepared)
    except Exception:  # no model, no such folder, a full disk, for which ONNX Runtime has its own errors
        return path
    return prepared


def _write_probe(path: Path) -> None:
    from imagesearch.int8 import write_probe  # late: onnx takes a quarter of a second to import, and is needed once

    with atomic_write(path) as temporary:
        write_probe(temporary, PROBE_WEIGHTS)


def _prepare(path: Path, weights: str, target: Path) -> None:
    from imagesearch.int8 import rewrite  # late, too

    rewritten = rewrite(path) if weights == "int8" else None
    with atomic_write(target) as temporary:
        _optimize(rewritten or str(path), temporary)


def session_options(threads: int = 1) -> onnxruntime.SessionOptions:
    """Returns the options with which a model is optimized and run.

    "Extended" is the highest optimization level whose result does not depend on this CPU.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised; warnings are for authors of models
    return options


def _optimize(model: bytes | str, target: Path) -> None:
    """Writes a model, given as it is or by its path, to `target` with fused operators in ONNX Runtime's own format."""
    options = session_options()
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.add_session_config_entry("session.disable_prepacking", "1")  # it is not run
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


# The largest uint8 by the smallest and largest int8, in rows long enough to saturate a kernel that
# adds pairs of products in 16 bits (on a CPU without VNNI).
PROBE_INPUT = np.full((8, 768), 255, np.uint8)
PROBE_WEIGHTS = np.tile(np.array([-128, 127], np.int8), (768, 32))


def multiplies_exactly(probe: Path) -> bool:
    """Returns True if ONNX Runtime's kernel for uint8 × int8 is exact on this CPU, for one row and for several."""
    exact = PROBE_INPUT.astype(np.int32) @ PROBE_WEIGHTS.astype(np.int32)
    try:
        session = onnxruntime.InferenceSession(str(probe), providers=["CPUExecutionProvider"])
        return all(
            np.array_equal(session.run(None, {"left": PROBE_INPUT[:n]})[0], exact[:n]) for n in (1, len(PROBE_INPUT))
        )
    except Exception:  # a damaged probe proves nothing
        probe.unlink(missing_ok=True)  # the next run makes it again
        return False
