"""Runs of the scripts in processes forked from one that has made their imports: a tenth of the CPU time.

`start` looks at the environment and the arguments when it is imported, so each fork imports it itself. What needs a new
Python is run by `Scripts.start`.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import PIL

LIBRARIES = ["apsw", "argparse", "concurrent.futures.thread", "elasticsearch", "json", "numpy", "obstore.store"]
LIBRARIES += ["onnx", "onnxruntime", "orjson", "pi_heif", "PIL.Image", "PIL.ImageCms", "requests", "sqlite_vec"]
LIBRARIES += ["jinja2", "tqdm", *(f"PIL.{plugin}" for plugin in PIL._plugins)]
MODULES = ["arguments", "gone", "progress", "sources.queries", "results_page", "sources.bucket", "sources.folder"]
MODULES += ["sources.web", "index.elasticsearch", "index.sqlite", "models.clip", "models.int8"]

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as imagesearch/start.py does, before numpy is imported

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([*LIBRARIES, *(f"imagesearch.{name}" for name in MODULES)])


def run(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], timeout: float
) -> "subprocess.CompletedProcess[str]":
    """Runs Python with these arguments, the first one a script, as `subprocess.run` does; stdin is empty."""
    with tempfile.TemporaryDirectory() as outputs:
        paths = [Path(outputs, name) for name in ("stdout", "stderr")]
        process = _context.Process(target=_run_script, args=(list(arguments), folder, dict(environment), paths))
        process.start()
        process.join(timeout)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        texts = [path.read_text() if path.exists() else "" for path in paths]
        if code is None:
            raise subprocess.TimeoutExpired(list(arguments), timeout, *texts)
        return subprocess.CompletedProcess(list(arguments), code, *texts)


def _run_script(arguments: list[str], folder: Path, environment: dict[str, str], outputs: list[Path]) -> None:
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    sys.path.insert(0, os.path.dirname(arguments[0]))
    runpy.run_path(arguments[0], run_name="__main__")
