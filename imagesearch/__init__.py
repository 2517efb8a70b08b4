"""The parts that `create.py` and `search.py` share: files, CLIP embeddings and the two kinds of index."""

import importlib.util
import os
import sys

if importlib.util.find_spec("imgbeddings") is None:
    sys.exit("The dependencies are not installed: run pip install -r requirements.txt, or source .venv/bin/activate.")

# Before numpy is imported: its BLAS threads would spin on the cores that the model works on. A scan of the
# local index is bound by memory, and no slower with one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
