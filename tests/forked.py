"""Runs of the scripts in processes forked from one that has made their imports: a tenth of the CPU time.

`start` looks at the environment and the arguments when it is imported, so each fork imports it itself. What needs a new
Python is run by `Scripts.start`.
"""

import multiprocessing
import os
import pkgutil
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import PIL

import imagesearch

MODULES = [module.name for module in pkgutil.walk_packages(imagesearch.__path__, "imagesearch.")]
# What they import only when it is needed.
LATER = ["elasticsearch", "jinja2", "obstore.store", "onnx", "onnxruntime", "pi_heif", "PIL.ImageCms", "tqdm"]
LATER += [f"PIL.{plugin}" for plugin in PIL._plugins]

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as imagesearch/start.py does, before numpy is imported

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([*LATER, *(name for name in MODULES if name != "imagesearch.start")])


def run(arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """Runs Python with these arguments, the first one a script, as `subprocess.run` does; stdin is empty."""
    with tempfile.TemporaryDirectory() as outputs:
        paths = [Path(outputs, name) for name in ("stdout", "stderr")]
        process = _context.Process(target=_run_script, args=(arguments, folder, dict(environment), paths))
        process.start()
        try:
            process.join()
        finally:
            process.kill()
        texts = [path.read_text() if path.exists() else "" for path in paths]
    assert process.exitcode is not None
    return subprocess.CompletedProcess(arguments, process.exitcode, *texts)


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
