"""The model as this CPU runs it best, in the cache folder: with int8 weights, if the CPU multiplies them exactly."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from imagesearch.console import say
from imagesearch.errors import UsageError
from imagesearch.files import atomic_write, cache_folder, stream_sha256
from imagesearch.locations import path_to_text
from imagesearch.parallel import available_cpus

PROBE_NAME = "probe.onnx"
REWRITE_VERSION = 3  # increment it if the rewrite changes
PREPARATION_BYTES = 10_000_000  # preparing a larger model takes seconds


def model_sha256(path: Path) -> str:
    """Returns the SHA-256, in hex, of a file; it is remembered as long as the file's size and mtime stay the same."""
    status, real_path = path.stat(), os.path.realpath(path)
    identity = [path_to_text(real_path), status.st_size, status.st_mtime_ns]
    remembered = cache_folder() / f"{hashlib.sha256(os.fsencode(real_path)).hexdigest()}.sha256"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # not there, or damaged: it is hashed again
        record = json.loads(remembered.read_text())
        if record["file"] == identity:
            return str(record["sha256"])
    with path.open("rb") as file:
        sha256 = stream_sha256(file)
    with contextlib.suppress(OSError), atomic_write(remembered) as temporary:  # without a cache, it is hashed each time
        temporary.write_text(json.dumps({"file": identity, "sha256": sha256}))
    return sha256


def open_session(path: Path, sha256: str, single_image: bool) -> onnxruntime.InferenceSession:
    """Returns a session on the model in `path`, whose hash is `sha256`, as this CPU runs it best.

    For one image, it uses all CPUs for it, and leaves out ONNX Runtime's prepacking of the weights, which pays from
    some 12 images on; otherwise images are embedded on one CPU each. Raises what ONNX Runtime raises.
    """
    threads = available_cpus() if single_image else 1
    if prepared := _prepared_model_path(path, sha256):
        options = _session_options(threads)
        options.add_session_config_entry("session.load_model_format", "ORT")
        options.add_session_config_entry("session.use_memory_mapped_ort_model", "1")
        options.add_session_config_entry("session.use_ort_model_bytes_for_initializers", "1")
        if single_image:
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            return onnxruntime.InferenceSession(str(prepared), options, providers=["CPUExecutionProvider"])
        except Exception:  # damaged: ONNX Runtime verifies the file; the next run makes it again
            with contextlib.suppress(OSError):
                prepared.unlink()
    return onnxruntime.InferenceSession(str(path), _session_options(threads), providers=["CPUExecutionProvider"])


def _prepared_model_path(path: Path, sha256: str) -> Path | None:
    """Returns the model in `path` as this CPU and this version of ONNX Runtime run it best, kept in the cache folder.

    It has int8 weights if the CPU multiplies them exactly, its operators are fused, and it is in ONNX Runtime's own
    format, which opens in a tenth of the time. None if the cache folder cannot be used, or the model not be prepared.
    """
    try:
        probe = cache_folder() / PROBE_NAME
        if not probe.exists():
            _write_probe(probe)
        weights = "int8" if _multiplies_exactly(probe) else "uint8"
        prepared = cache_folder() / f"{sha256}.{weights}-{REWRITE_VERSION}.{onnxruntime.__version__}.ort"
        if not prepared.exists():
            _prepare(path, weights, prepared)
    except UsageError:
        raise
    except Exception:  # no model, no such folder, a full disk, for which ONNX Runtime has its own errors
        return None
    return prepared


def _write_probe(path: Path) -> None:
    # Late: onnx takes a quarter of a second to import, and is needed once.
    from imagesearch.models.int8 import write_probe

    with atomic_write(path) as temporary:
        write_probe(temporary, PROBE_WEIGHTS)


def _prepare(path: Path, weights: str, target: Path) -> None:
    from imagesearch.models.int8 import load, rewrite  # imported here, for the same reason

    if path.stat().st_size > PREPARATION_BYTES:
        say("Preparing the model for this CPU, which takes some seconds, once.")
    model = load(path)
    rewritten = rewrite(model) if weights == "int8" else None
    del model  # as large as the file
    with atomic_write(target) as temporary:
        options = _session_options(1)
        options.optimized_model_filepath = str(temporary)
        options.add_session_config_entry("session.save_model_format", "ORT")
        options.add_session_config_entry("session.disable_prepacking", "1")  # it is not run
        onnxruntime.InferenceSession(rewritten or str(path), options, providers=["CPUExecutionProvider"])


def _session_options(threads: int) -> Any:
    """Returns the options with which a model is optimized and run.

    "Extended" is the highest optimization level whose result does not depend on this CPU.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised; warnings are for authors of models
    return options


# The largest uint8 by the smallest and largest int8, in rows long enough to saturate a kernel that
# adds pairs of products in 16 bits (on a CPU without VNNI).
PROBE_INPUT = np.full((8, 768), 255, np.uint8)
PROBE_WEIGHTS = np.tile(np.array([-128, 127], np.int8), (768, 32))


def _multiplies_exactly(probe: Path) -> bool:
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
