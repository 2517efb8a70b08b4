"""What a source says about the files that are not indexed."""

from typing import Protocol


class Report(Protocol):
    """Is told of the files that are not indexed."""

    def count_skipped(self, kind: str) -> None:
        """Called with the kind of each file that is not an image: ``.txt``, ``without extension``, …"""

    def count_unreadable(self, path: str, reason: str) -> None:
        """Called for each image or folder that cannot be read."""


class _Silent:
    def count_skipped(self, kind: str) -> None: ...

    def count_unreadable(self, path: str, reason: str) -> None: ...


SILENT = _Silent()
