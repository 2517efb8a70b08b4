"""The parts that `create.py` and `search.py` share: files, CLIP embeddings and the two kinds of index."""
