"""Files that are made once for each model and kept: hashes and rewritten models."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from imagesearch.files import atomic_write, file_sha256


def cache_folder() -> Path:
    """Returns `imagesearch` in the user's cache folder; it may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imagesearch"


def model_sha256(path: Path) -> str:
    """Returns the hash, in hex, of the ONNX model in `path` with the files of its external data.

    For a model without external data it is the SHA-256 of the file. It is remembered as long as
    every file's size and mtime stay the same.
    """
    key = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()
    remembered = cache_folder() / f"{key}.sha256"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # not there, or damaged: it is hashed again
        record = json.loads(remembered.read_text())
        files = [Path(name) for name, *_ in record["files"]]
        if files[0] == path and record["files"] == [_identity(file) for file in files]:
            return str(record["sha256"])
    files = [path.parent / name for name in (path.name, *_external_data(path))]
    identities = [_identity(file) for file in files]  # before hashing, so that a later change is always noticed
    hashes = [file_sha256(file) for file in files]
    sha256 = hashes[0] if len(files) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    record = {"files": identities, "sha256": sha256}
    with contextlib.suppress(OSError), atomic_write(remembered) as temporary:  # without a cache, it is hashed each time
        temporary.write_text(json.dumps(record))
    return sha256


def _identity(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def _external_data(path: Path) -> list[str]:
    """Returns the names, sorted, of the files beside `path` that hold weights of its ONNX model.

    https://onnx.ai/onnx/repo-docs/ExternalData.html
    """
    import onnx  # takes a quarter of a second to import, and is needed once for each model

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # not an ONNX model; loading it says so
        return []
    names = set()
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        attributes = [attribute for node in graph.node for attribute in node.attribute]
        graphs += [sub for attribute in attributes for sub in (attribute.g, *attribute.graphs) if sub.node]
        tensors = [
            *graph.initializer,
            *(tensor for attribute in attributes for tensor in (attribute.t, *attribute.tensors)),
        ]
        names |= {
            entry.value
            for tensor in tensors
            if tensor.data_location == onnx.TensorProto.EXTERNAL
            for entry in tensor.external_data
            if entry.key == "location"
        }
    return sorted(name for name in names if (path.parent / name).is_file())
