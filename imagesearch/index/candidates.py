"""Many searches at once: which rows may be among the nearest of each, by a matrix product in float32.

The candidates are all rows within a margin for rounding of the k-th best, so that an exact search of these alone finds
what an exact search of all rows finds.
"""

import itertools
from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from imagesearch.records import DIMENSIONS

# A cosine in float32 is off by at most 768 · eps, here and in sqlite-vec: two of them can be 2 · 768 · eps apart, and
# so can those of the k-th best row.
MARGIN = 4 * DIMENSIONS * float(np.finfo(np.float32).eps)  # 3.7e-4
MAX_CANDIDATES = 1 << 20  # for all searches together: 16 MB


class Candidates:
    """The rows seen so far that may be among the `k` nearest to each of some embeddings, shape (n, 768).

    Rows whose cosine is below `least` are not among them.
    """

    def __init__(self, embeddings: NDArray[np.float32], k: int, least: float) -> None:
        lengths = np.linalg.norm(embeddings.astype(np.float64), axis=1, keepdims=True)
        self._queries = (embeddings / lengths).astype(np.float32)
        self._k = k
        self._thresholds = np.full(
            len(embeddings), least - MARGIN, np.float32
        )  # a lower cosine is not among the nearest
        self._rowids = np.empty(0, np.int64)
        self._query_numbers = np.empty(0, np.int32)  # the search that each row is a candidate for
        self._cosines = np.empty(0, np.float32)
        self._kept = 0  # candidates after the last sorting
        self._too_many: set[int] = set()  # searches whose candidates are not kept

    def add(self, rowids: NDArray[np.int64], rows: NDArray[np.float32]) -> None:
        """Compares rows, shape (m, 768), with all embeddings."""
        lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))
        if not (np.isfinite(lengths).all() and lengths.all()):
            raise ValueError("an embedding is zero or not finite")
        cosines = rows @ self._queries.T
        cosines /= lengths[:, None]
        if not self._kept and len(rows) > self._k:  # sorting them all would take longer
            best = np.partition(cosines, len(rows) - self._k, axis=0)[len(rows) - self._k]
            self._thresholds = np.maximum(self._thresholds, best - np.float32(MARGIN))
        found, query_numbers = np.nonzero(cosines >= self._thresholds)
        self._extend(rowids[found], query_numbers.astype(np.int32), cosines[found, query_numbers])

    def _extend(
        self, rowids: NDArray[np.int64], query_numbers: NDArray[np.int32], cosines: NDArray[np.float32]
    ) -> None:
        self._rowids = np.concatenate([self._rowids, rowids])
        self._query_numbers = np.concatenate([self._query_numbers, query_numbers])
        self._cosines = np.concatenate([self._cosines, cosines])
        if len(self._rowids) > 2 * self._kept + len(self._queries):
            self._drop()

    def _drop(self) -> None:
        """Raises the thresholds to what is known by now, and drops what is below them."""
        order = np.lexsort((-self._cosines, self._query_numbers))
        rowids, numbers, cosines = self._rowids[order], self._query_numbers[order], self._cosines[order]
        starts = np.searchsorted(numbers, np.arange(len(self._queries) + 1))
        worst = starts[:-1] + self._k - 1
        full = worst < starts[1:]
        self._thresholds[full] = np.maximum(self._thresholds[full], cosines[worst[full]] - np.float32(MARGIN))
        keep = cosines >= self._thresholds[numbers]
        if np.count_nonzero(keep) > MAX_CANDIDATES:
            counts = np.bincount(numbers[keep], minlength=len(self._queries))
            self._too_many.update(np.flatnonzero(counts > MAX_CANDIDATES // len(self._queries)).tolist())
            self._thresholds[list(self._too_many)] = np.inf
            keep = cosines >= self._thresholds[numbers]
        self._rowids, self._query_numbers, self._cosines = rowids[keep], numbers[keep], cosines[keep]
        self._kept = len(self._rowids)

    @classmethod
    def merge(cls, parts: Sequence[Self]) -> list[list[int] | None]:
        """Returns the rowids that may be the nearest for each search, None where they are too many to keep."""
        whole, *others = parts
        for other in others:
            whole._too_many |= other._too_many
            whole._extend(other._rowids, other._query_numbers, other._cosines)
        whole._drop()
        ends = np.searchsorted(whole._query_numbers, np.arange(len(whole._queries) + 1))
        return [
            None if number in whole._too_many else whole._rowids[start:end].tolist()
            for number, (start, end) in enumerate(itertools.pairwise(ends))
        ]
