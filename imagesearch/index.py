"""What both kinds of index offer, and which one is used."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from imagesearch.embed import Document, Stored
from imagesearch.models import ModelRecord

# Says why a run waits, waits that many seconds, and gives False when the run is to end instead.
Pause = Callable[[float, str], bool]


class Index(Protocol):
    """An index of embeddings, on Elasticsearch (`elastic.Elastic`) or in a local file (`local.Local`)."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def model(self) -> ModelRecord | None:
        """Which model made the index's embeddings; None where there is no such index."""

    def create(self, record: ModelRecord) -> None:
        """Creates the index. One that came into being meanwhile is left as it is."""

    def stored(self, ids: Sequence[str]) -> dict[str, Stored]:
        """What the index holds of each of these documents that it has, by `_id`."""

    def write(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Writes documents, in bulk, and gives each one back once the index has it."""

    def paths(self, folder: str) -> Iterator[tuple[str, str]]:
        """`_id` and `file_path` of every document below `folder`."""

    def delete(self, ids: Sequence[str]) -> int:
        """Deletes documents; gives how many there were."""

    def refresh(self) -> None:
        """Makes everything written visible to the next search."""

    def search(self, embedding: NDArray[np.float32], k: int, desc: str | None) -> dict[str, Any]:
        """Elasticsearch's response for the `k` documents nearest to `embedding`, of class `desc` if given."""
