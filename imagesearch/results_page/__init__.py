"""The results as an HTML page: one file, no scripts, nothing loaded from anywhere."""

import base64
import contextlib
import functools
import hashlib
import io
import math
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape
from PIL import Image, ImageCms

from imagesearch.errors import ImageSearchError, UsageError, describe_error
from imagesearch.files import atomic_write
from imagesearch.images import image_extensions, open_rgb
from imagesearch.parallel import available_cpus
from imagesearch.paths import BUCKET_URL, file_path_to_local, index_folder, quote_path
from imagesearch.records import IndexMetadata, OpenedImage, Unreadable
from imagesearch.sources import Query, open_query

PREVIEW_SIZE = 320  # pixels of a preview's longer side, at most
PREVIEW_QUALITY = 75
RECENT_PICTURES = 2000  # that are kept, some 15 kB each, for the next sections
READERS = 16  # pictures that are read at once, at least; reading from a bucket is mostly waiting

TITLE = "<title>Nearest images</title>"  # by which a page of results is known, and may be overwritten


@dataclass(frozen=True)
class Picture:
    """A picture of the page: the data URL of its preview, and a link to its file, or else the problem it has."""

    name: str
    source: str = ""
    link: str = ""
    problem: str = ""


def check_page_path(text: str, images: Sequence[str]) -> Path:
    """Returns the path of the page. Raises UsageError for a file that should not be overwritten."""
    path = Path(text)
    problem = ""
    if path.suffix.lower() in image_extensions() or any(path.resolve() == Path(image).resolve() for image in images):
        problem = "the file is an image, or has the name of one"
    elif not path.parent.is_dir():
        problem = "its folder does not exist"
    elif path.exists():
        try:
            start = _beginning(path) if path.is_file() else "a folder or a device"
        except OSError as error:
            problem = f"the file cannot be read ({describe_error(error)})"
        else:
            problem = "" if not start or TITLE in start else "the file is not a page of results"
    if problem:
        raise UsageError(f"--html {quote_path(text)}: {problem}. Use --html with the name of a new file.")
    return path


def _beginning(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(1000).decode(errors="replace")


class Page:
    """A page of results: for each query a section with its picture and its hits.

    `limits` says which of the index's images were searched; empty if all.
    """

    def __init__(self, path: Path, index: str, metadata: IndexMetadata, limits: str = "") -> None:
        self._path = path
        self._recent_picture = functools.lru_cache(RECENT_PICTURES)(self._hit_picture)
        self._folder = index_folder(metadata.folder)
        self._description = f"Index {index}, made with {metadata.model.description}"
        self._limits = limits
        self._results: list[tuple[str, dict[str, Any]]] = []
        self._query_pictures: dict[int, Picture] = {}  # by the query's number

    def keep_previews(self, queries: Iterable[Query | Unreadable]) -> Iterator[Query | Unreadable]:
        """Yields queries whose previews are kept when they are opened."""
        for number, query in enumerate(queries):
            if isinstance(query, Query):
                query = replace(query, open=functools.partial(self._open, query, number))
            yield query

    @contextlib.contextmanager
    def _open(self, query: Query, number: int) -> Iterator[OpenedImage]:
        with query.open() as image:
            self._query_pictures[number] = self._picture(query.file_path, query.name, image)
            yield image

    def add(self, name: str, response: dict[str, Any]) -> None:
        """Adds a section with Elasticsearch's response to a query, or with an error in the same form."""
        self._results.append((name, response))

    def write(self) -> bool:
        """Writes the page, unless no query was answered; returns True if it was written.

        Previews are made on all CPUs. Raises ImageSearchError if the file cannot be written.
        """
        if not any("hits" in response for _, response in self._results):
            return False
        environment = Environment(
            loader=PackageLoader("imagesearch", "results_page"), autoescape=True, trim_blocks=False
        )
        environment.filters["breakable"] = _breakable
        style = (Path(__file__).parent / "page.css").read_text()
        style_hash = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        with ThreadPoolExecutor(max(READERS, available_cpus())) as pool:
            stream = environment.get_template("page.html").stream(
                title=Markup(TITLE),
                style=Markup(style),
                style_hash=style_hash,
                description=self._description,
                sections=self._sections(pool),
            )
            try:
                with atomic_write(Path(os.path.realpath(self._path))) as temporary:  # a symbolic link stays one
                    stream.dump(str(temporary), encoding="utf-8", errors="backslashreplace")
            except OSError as error:
                raise ImageSearchError(
                    f"{quote_path(str(self._path))} cannot be written: {describe_error(error)}. Use another --html."
                ) from None
        return True

    def _sections(self, pool: ThreadPoolExecutor) -> Iterator[dict[str, Any]]:
        """Yields what the template shows of each query: its picture, then its hits in order."""
        for number, (name, response) in enumerate(self._results):
            section: dict[str, Any] = {"name": name, "short_name": posixpath.basename(name) or name}
            if "error" in response:
                yield section | {"error": response["error"]["reason"]}
                continue
            hits = response["hits"]["hits"]
            pictures = pool.map(self._recent_picture, [hit["fields"]["file_path"][0] for hit in hits])
            yield section | {
                "picture": self._query_pictures.pop(number),
                "number_of_hits": self._number_of_hits(len(hits)),
                "hits": [
                    {
                        "picture": picture,
                        "score": _rounded_down(hit["_score"]),
                        "desc": hit["fields"]["desc"][0],
                        "file_path": hit["fields"]["file_path"][0],
                    }
                    for hit, picture in zip(hits, pictures, strict=True)
                ],
            }

    def _number_of_hits(self, number: int) -> str:
        if number == 0:
            return f"No image{self._limits}"
        images = "The nearest image" if number == 1 else f"The {number:,} nearest images"
        return f"{images}{self._limits}; a score of 1 means the same picture"

    def _hit_picture(self, file_path: str) -> Picture:
        """Returns a hit's preview."""
        location = file_path if BUCKET_URL.match(file_path) else file_path_to_local(file_path, self._folder)
        try:
            with open_query(location) as image:
                return self._picture(file_path, file_path, image)
        except FileNotFoundError:
            return Picture(posixpath.basename(file_path), problem="is gone")
        except (OSError, ValueError, ImageSearchError):
            return Picture(posixpath.basename(file_path), problem="cannot be read")

    def _picture(self, file_path: str, name: str, image: OpenedImage) -> Picture:
        """Returns an image's preview, linked to its file, if `file_path` is one.

        Objects in a bucket are not linked: a signed link would stay valid for whoever has the page.
        """
        short_name = posixpath.basename(name) or name
        is_file = file_path and not BUCKET_URL.match(file_path)
        link = self._link(file_path_to_local(file_path, self._folder)) if is_file else ""
        try:
            return Picture(short_name, preview(image.stream), link)
        except Exception:  # Pillow raises nearly anything for a damaged file
            return Picture(short_name, problem="cannot be read")

    def _link(self, path: str) -> str:
        folder = os.fsencode(os.path.dirname(os.path.abspath(self._path)))
        return quote(os.path.relpath(os.fsencode(os.path.abspath(path)), folder))


def preview(stream: BinaryIO) -> str:
    """Returns the image in `stream` as the data URL of a WebP of at most 320 pixels a side."""
    webp = io.BytesIO()
    with open_rgb(stream) as image:
        image.thumbnail((PREVIEW_SIZE, PREVIEW_SIZE))
        _convert_to_srgb(image)
        image.save(webp, "WEBP", quality=PREVIEW_QUALITY, method=2)
    return f"data:image/webp;base64,{base64.b64encode(webp.getvalue()).decode()}"


def _convert_to_srgb(image: Image.Image) -> None:
    """Converts an RGB image from its ICC profile, if it has one of RGB, to sRGB."""
    profile = image.info.get("icc_profile") or b""
    if profile[16:20] != b"RGB ":  # of a grayscale or CMYK image, whose pixels are RGB by now
        return
    with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a damaged profile
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), inPlace=True)


def _rounded_down(score: float) -> str:
    """Returns a score with four digits; only that of the same picture is 1.0000."""
    return f"{math.floor(score * 10_000 + 0.01) / 10_000:.4f}"


def _breakable(path: str) -> Markup:
    """Returns a path as HTML that may be broken between its parts."""
    return Markup(re.sub("([/_-])", r"\1<wbr>", str(escape(path))))
