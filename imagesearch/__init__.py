"""The parts that `create.py` and `search.py` share: files, CLIP embeddings and the two kinds of index."""

import os

# Before numpy is imported: its BLAS threads would spin on the cores that the model works on. A scan of the
# local index is bound by memory, and no slower with one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
