"""Made-up embeddings in the four shapes that decide how well approximate search works.

CLIP's own are not published with this project. Photographs are clustered in few directions: ImageNet's intrinsic
dimension is 26 to 43 (Pope et al., https://arxiv.org/abs/2104.08894). And a few channels of trained transformers are
far larger than the others (https://arxiv.org/abs/2310.13040), with a value that is constant or one that varies.
"""

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from imagesearch.records import DIMENSIONS

DIRECTIONS = 64  # of the 768, in which embeddings are clustered
CHANNELS = np.arange(6) * 100 + 7  # the outliers

Embeddings = NDArray[np.float32]  # shape (n, 768)


def clustered(size: int, seed: int) -> Embeddings:
    """`size` embeddings around a tenth as many centers; all of it in 64 directions, but for a little noise."""
    shared = np.random.default_rng(0)  # the same centers for every seed
    directions = np.linalg.qr(shared.standard_normal((DIMENSIONS, DIRECTIONS)))[0].T.astype(np.float32)
    centers = shared.standard_normal((max(1, size // 10), DIRECTIONS), np.float32)
    random = np.random.default_rng(seed)
    spread = np.float32(0.5) * random.standard_normal((size, DIRECTIONS), np.float32)
    embeddings = (centers[random.integers(0, len(centers), size)] + spread) @ directions
    for rows in np.array_split(embeddings, size // 10_000 + 1):
        rows += np.float32(0.01) * random.standard_normal(rows.shape, np.float32)
    return embeddings


def massive(size: int, seed: int) -> Embeddings:
    """Clustered, with six channels that have a constant of 50 standard deviations besides."""
    embeddings = clustered(size, seed)
    embeddings[:, CHANNELS] += 50 * embeddings[:1000].std()
    return embeddings


def outliers(size: int, seed: int) -> Embeddings:
    """Clustered, with six channels that vary 30 times as much."""
    embeddings = clustered(size, seed)
    embeddings[:, CHANNELS] *= 30
    return embeddings


def random(size: int, seed: int) -> Embeddings:
    """Random in all directions: the worst case of any graph."""
    return np.random.default_rng(seed).standard_normal((size, DIMENSIONS), np.float32)


SHAPES: dict[str, Callable[[int, int], Embeddings]] = {
    "clustered": clustered,
    "massive": massive,
    "outliers": outliers,
    "random": random,
}


def recall(found: Iterable[set[int]], nearest_rows: NDArray[np.int64]) -> float:
    """Returns the share of the rows from `nearest` that were found, by a set for each query."""
    hits = sum(len(rows & set(right.tolist())) for rows, right in zip(found, nearest_rows, strict=True))
    return hits / nearest_rows.size


def nearest(embeddings: Embeddings, queries: Embeddings, k: int) -> NDArray[np.int64]:
    """Returns the rows of the `k` embeddings with the greatest cosine to each query, by comparing with all of them."""
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    cosines = np.concatenate(
        [
            queries @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T
            for rows in np.array_split(embeddings, len(embeddings) // 10_000 + 1)
        ],
        axis=1,
    )
    return np.argpartition(-cosines, k - 1, axis=1)[:, :k]
