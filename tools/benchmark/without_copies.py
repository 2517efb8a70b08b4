"""create.py without looking up contents in the index, for comparison."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from imagesearch import embed
from imagesearch.copies import Embedding


class _NoLookUp:
    """Computes every embedding."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> "_NoLookUp":
        return self

    def __exit__(self, *_: object) -> None: ...

    def get(self, _sha256: str, compute: Callable[[], Embedding]) -> tuple[Embedding, bool]:
        return compute(), False


vars(embed)["KnownEmbeddings"] = _NoLookUp
sys.argv[0] = str(Path(__file__).parents[2] / "create.py")
runpy.run_path(sys.argv[0], run_name="__main__")
