"""The contract of a source of images, and which one is used: a folder or a bucket."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from imagesearch.errors import UsageError
from imagesearch.locations import kind_of
from imagesearch.records import ImageFile, ListingReport, OpenedImage, Unreadable


class Source(Protocol):
    """A folder or a bucket that holds images. Safe to use from several threads."""

    @property
    def name(self) -> str:
        """What the `file_path` of each of its images begins with: ``./images``, ``/srv/photos``, ``s3://birds``."""

    def buffered_bytes(self, image: ImageFile) -> int:
        """Returns how much memory the content of an image takes while it is open."""

    def find_images(self, report: ListingReport) -> Iterator[ImageFile]:
        """Yields every image at any depth; in a folder, sorted by name.

        `report` is told of hidden files and folders, other files, folders that were already found, and what cannot be
        read. Raises ImageSearchError if the source cannot be listed.
        """

    def open_images(
        self, images: Sequence[ImageFile]
    ) -> AbstractContextManager[tuple[list[OpenedImage], list[Unreadable]]]:
        """Returns a context with the images that can be read, as they are now, and those that cannot.

        Raises ImageSearchError if the source cannot be reached.
        """


def open_source(location: str, base: str) -> Source:
    """Returns the bucket or folder that ``--images`` names; names in a folder are relative to `base`.

    Raises UsageError if it cannot be listed.
    """
    match kind_of(location):
        case "bucket":
            from imagesearch.sources.bucket import BucketSource

            return BucketSource(location)
        case "web" | "other URL":
            raise UsageError("--images takes a folder, or a bucket as s3://bucket/folder, gs://… or az://…")
        case _:
            from imagesearch.sources.folder import FolderSource

            return FolderSource(location, base)
