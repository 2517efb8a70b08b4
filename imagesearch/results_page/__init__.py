"""The results as an HTML page: one file, no scripts, nothing loaded from anywhere."""

import base64
import contextlib
import hashlib
import io
import math
import os
import posixpath
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import orjson
from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape
from PIL import Image, ImageCms

from imagesearch.errors import ImageSearchError, UsageError, describe_error
from imagesearch.files import atomic_write
from imagesearch.images import image_extensions, open_rgb
from imagesearch.locations import bucket_of, kind_of, local_path, quote_path
from imagesearch.parallel import available_cpus, map_buffered
from imagesearch.records import ImageFile, OpenedImage
from imagesearch.sources.folder import open_file
from imagesearch.sources.queries import Query, open_query

PREVIEW_SIZE = 320  # pixels of a preview's longer side, at most
PREVIEW_QUALITY = 75
READERS = 16  # pictures that are read at once, at least; reading from a bucket is mostly waiting

TITLE = "<title>Nearest images</title>"  # by which a page of results is known, and may be overwritten


@dataclass(frozen=True)
class Picture:
    """A picture of the page, shown wherever it is a query or a hit.

    `css_class` is that of the rule with its preview, `link` leads to its file; `problem` is why there is no preview.
    """

    name: str
    css_class: str = ""
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

    Results and previews are kept in temporary files until the page is written. `description` says which index was
    searched, `limits` which of its images; it is empty if all. Hits in a bucket are shown only if it is one of
    `buckets`: the index may be somebody else's, and does not choose what is read with the user's credentials.
    """

    def __init__(self, path: Path, base: str, description: str, limits: str, buckets: Sequence[str]) -> None:
        self._path, self._base = path, base
        self._description, self._limits = description, limits
        self._buckets = buckets
        self._results = tempfile.TemporaryFile()  # noqa: SIM115  # a line of JSON for each section
        self._rules = tempfile.TemporaryFile()  # noqa: SIM115  # a line of CSS for each preview
        self._pictures: dict[str, Picture] = {}  # by the keys of `_key`
        self._sections: dict[str, int] = {}  # the number of the section of each query that was answered, likewise
        self._number_of_sections = self._number_of_rules = self._left_out = 0
        self._lock = threading.Lock()  # guards the pictures

    def keep_preview(self, query: Query, opened: OpenedImage) -> None:
        """Keeps the preview of a query that is open now. Safe to use from several threads."""
        if _key(query) not in self._pictures:
            self._add_picture(_key(query), query.name, query.image.file_path, opened)

    def add(self, query: Query, response: dict[str, Any], leave_out_empty: bool) -> None:
        """Adds a section with Elasticsearch's response to a query, or with an error in the same form.

        If `leave_out_empty`, one without hits is only counted.
        """
        section: dict[str, Any] = {"key": _key(query), "name": query.name}
        if "error" in response:
            section["error"] = response["error"]["reason"]
        else:
            hits = response["hits"]["hits"]
            if not hits and leave_out_empty:
                self._left_out += 1
                return
            section["hits"] = [[hit["_score"], hit["fields"]["desc"][0], hit["fields"]["file_path"][0]] for hit in hits]
            self._sections.setdefault(section["key"], self._number_of_sections + 1)
        self._number_of_sections += 1
        self._results.write(orjson.dumps(section, option=orjson.OPT_APPEND_NEWLINE))

    def write(self) -> bool:
        """Writes the page, unless no query was answered; returns True if it was written.

        Raises ImageSearchError if the file cannot be written.
        """
        if not self._sections and not self._left_out:
            return False
        self._add_other_pictures()
        environment = Environment(
            loader=PackageLoader("imagesearch", "results_page"), autoescape=True, trim_blocks=False
        )
        environment.filters["breakable"] = _breakable
        style = (Path(__file__).parent / "page.css").read_text()
        style_hash = hashlib.sha256(style.encode())
        for rule in _lines(self._rules):
            style_hash.update(rule)
        stream = environment.get_template("page.html").stream(
            title=Markup(TITLE),
            style=Markup(style),
            rules=(Markup(rule.decode()) for rule in _lines(self._rules)),
            style_hash=base64.b64encode(style_hash.digest()).decode(),
            description=self._description,
            left_out=self._left_out,
            limits=self._limits,
            sections=map(self._section, enumerate(_lines(self._results), 1)),
        )
        try:
            with atomic_write(Path(os.path.realpath(self._path))) as temporary:  # a symbolic link stays one
                stream.dump(str(temporary), encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise ImageSearchError(
                f"{quote_path(str(self._path))} cannot be written: {describe_error(error)}. Use another --html."
            ) from None
        return True

    def _section(self, numbered_line: tuple[int, bytes]) -> dict[str, Any]:
        """Returns what the template shows of a query: its picture, then its hits in order."""
        number, line = numbered_line
        result = orjson.loads(line)
        section = {"number": number, "name": result["name"], "short_name": _short_name(result["name"])}
        if "error" in result:
            return section | {"error": result["error"]}
        hits = [
            {
                "picture": self._pictures[file_path],
                "score": _rounded_down(score),
                "desc": desc,
                "file_path": file_path,
                "section": self._sections.get(file_path) if file_path != result["key"] else None,
            }
            for score, desc, file_path in result["hits"]
        ]
        picture = self._pictures[result["key"]]
        return section | {"picture": picture, "number_of_hits": self._number_of_hits(len(hits)), "hits": hits}

    def _number_of_hits(self, number: int) -> str:
        if number == 0:
            return f"No image{self._limits}"
        images = "The nearest image" if number == 1 else f"The {number:,} nearest images"
        return f"{images}{self._limits}; a score of 1 means the same picture"

    def _add_other_pictures(self) -> None:
        """Makes the previews of hits, and of queries that were not opened, on all CPUs."""
        results = map(orjson.loads, _lines(self._results))
        keys = (key for each in results if "hits" in each for key in (each["key"], *(hit[2] for hit in each["hits"])))
        missing = dict.fromkeys(key for key in keys if key not in self._pictures)
        with ThreadPoolExecutor(max(READERS, available_cpus())) as pool:
            for _ in map_buffered(pool, self._read_picture, missing, 2 * READERS):
                pass

    def _read_picture(self, file_path: str) -> None:
        """Adds the picture of a document. What is no image by its name is not read, nor from a bucket of others."""
        problem = ""
        try:
            if kind_of(file_path) == "bucket":
                if bucket_of(file_path) not in self._buckets:
                    problem = f"is not shown: use --images {bucket_of(file_path)} to have the page show it"
                else:
                    with open_query(ImageFile(file_path, file_path, "", 0, 0)) as opened:
                        self._add_picture(file_path, file_path, file_path, opened)
            elif posixpath.splitext(file_path)[1].lower() not in image_extensions():
                problem = "is not shown: it has no image's extension"
            else:
                with open_file(ImageFile(local_path(file_path, self._base), file_path, "", 0, 0)) as opened:
                    self._add_picture(file_path, file_path, file_path, opened)
        except FileNotFoundError:
            problem = "is gone"
        except (OSError, ValueError, ImageSearchError):
            problem = "cannot be read"
        if problem:
            self._pictures[file_path] = Picture(_short_name(file_path), problem=problem)

    def _add_picture(self, key: str, name: str, file_path: str, opened: OpenedImage) -> None:
        """Adds a picture with its preview, linked to its file if `file_path` is one.

        Objects in a bucket are not linked: a signed link would stay valid for whoever has the page.
        """
        try:
            webp, (width, height) = preview(opened.stream)
        except Exception:  # Pillow raises nearly anything for a damaged file
            self._pictures[key] = Picture(_short_name(name), problem="cannot be read")
            return
        is_file = file_path and kind_of(file_path) != "bucket"
        link = self._link(local_path(file_path, self._base)) if is_file else ""
        url = f"data:image/webp;base64,{base64.b64encode(webp).decode()}"
        with self._lock:
            self._number_of_rules += 1
            css_class = f"p{self._number_of_rules}"
            self._pictures[key] = Picture(_short_name(name), css_class, link)
            rule = f".{css_class}{{aspect-ratio:{width}/{height};max-width:{width}px;background-image:url({url})}}\n"
            self._rules.write(rule.encode())

    def _link(self, path: str) -> str:
        folder = os.fsencode(os.path.dirname(os.path.abspath(self._path)))
        return quote(os.path.relpath(os.fsencode(os.path.abspath(path)), folder))


def _key(query: Query) -> str:
    """Returns what identifies a query's picture; it is not shown: the URL of one from the web may hold a password."""
    return query.image.file_path or query.image.location


def _lines(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    yield from file


def _short_name(name: str) -> str:
    return posixpath.basename(name) or name


def preview(stream: BinaryIO) -> tuple[bytes, tuple[int, int]]:
    """Returns the image in `stream` as a WebP of at most 320 pixels a side, and its width and height."""
    webp = io.BytesIO()
    with open_rgb(stream) as image:
        image.thumbnail((PREVIEW_SIZE, PREVIEW_SIZE))
        _convert_to_srgb(image)
        image.save(webp, "WEBP", quality=PREVIEW_QUALITY, method=2)
        return webp.getvalue(), image.size


def _convert_to_srgb(image: Image.Image) -> None:
    """Converts an RGB image from its ICC profile, if it has one of RGB, to sRGB."""
    profile = image.info.get("icc_profile") or b""
    if profile[16:20] != b"RGB ":  # a grayscale or CMYK image, whose pixels are RGB by now
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
