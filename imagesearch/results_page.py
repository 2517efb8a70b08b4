"""The results as an HTML page: one file, no scripts, nothing loaded from anywhere."""

import base64
import functools
import hashlib
import html
import io
import math
import os
import posixpath
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from PIL import Image, ImageCms

from imagesearch.errors import ImageSearchError, InterruptedRunError, UsageError, describe_error
from imagesearch.files import atomic_write
from imagesearch.images import image_extensions, open_rgb
from imagesearch.index import Index
from imagesearch.parallel import available_cpus
from imagesearch.paths import BUCKET_URL, file_path_to_local, index_folder, path_to_text, query_name, quote_path
from imagesearch.records import FileMetadata, IndexMetadata, OpenedImage
from imagesearch.sources import open_location, open_query

PREVIEW_SIZE = 320  # pixels of a preview's longer side, at most
PREVIEW_QUALITY = 75
RECENT_PICTURES = 2000  # whose HTML is kept, some 15 kB each, for the next sections
READERS = 16  # pictures that are read at once, at least; reading from a bucket is mostly waiting

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d1d1f; --soft: #5c5c66; --card: #f3f3f6; --line: #d5d5dd;
  --mark: #0f62fe; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16161a; --ink: #f1f1f4; --soft: #acacb8; --card: #222228; --line: #3a3a44; --mark: #78a9ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 90rem; padding: 1.5rem clamp(1rem, 4vw, 3rem); background: var(--paper);
  color: var(--ink); font: 1rem/1.45 system-ui, sans-serif; }
header { margin-bottom: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0; }
section + section { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 2rem; }
.query { display: flex; flex-wrap: wrap; gap: 1.25rem; align-items: end; margin-bottom: 1.5rem; }
.query img, .query .missing { width: min(20rem, 100%); }
h2 { font-size: 1.15rem; margin: 0; overflow-wrap: anywhere; }
p { margin: .25rem 0; color: var(--soft); overflow-wrap: anywhere; }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(12.5rem, 45%), 1fr)); }
li { background: var(--card); border-radius: .6rem; overflow: hidden; break-inside: avoid; }
li img, li .missing { aspect-ratio: 1; width: 100%; object-fit: contain; background: var(--paper);
  border: 1px solid var(--card); border-radius: .6rem; display: block; }
img { max-width: 100%; height: auto; border-radius: .6rem; }
.missing { display: grid; place-content: center; min-height: 8rem; padding: 1rem; color: var(--soft);
  text-align: center; border: 2px dashed var(--line); border-radius: .6rem; }
li div { padding: .6rem .8rem .8rem; }
li strong { display: block; overflow-wrap: anywhere; }
li p { font-size: .8rem; }
.score { float: right; color: var(--soft); font-variant-numeric: tabular-nums; margin-left: .5rem; }
a { color: inherit; }
a:focus-visible { outline: 3px solid var(--mark); outline-offset: 2px; }
@media print { body { padding: 0; max-width: none; } li { border: 1px solid var(--line); } }
"""

# The page may load the pictures inside it and this style: no scripts, no requests, no forms.
STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY = f"default-src 'none'; img-src data:; style-src 'sha256-{STYLE_HASH}'; base-uri 'none'; form-action 'none'"

TITLE = "<title>Nearest images</title>"  # by which a page of results is known, and may be overwritten

HEAD = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="referrer" content="no-referrer">
{TITLE}
<style>{STYLE}</style>
</head>
<body>
"""


def check_page_path(text: str, images: Sequence[str]) -> Path:
    """Returns the path of the page. Raises UsageError for a file that should not be overwritten."""
    path = Path(text)
    problem = ""
    if any(image != "-" and os.path.exists(image) and path.exists() and path.samefile(image) for image in images):
        problem = "is one of the images to search for"
    elif path.suffix.lower() in image_extensions():
        problem = "has the name of an image"
    elif path.is_dir():
        problem = "is a folder"
    elif path.exists() and not path.is_file():
        problem = "is not a regular file"
    elif not path.parent.is_dir():
        problem = "is in a folder that does not exist"
    elif path.exists():
        try:
            with path.open("rb") as file:
                start = file.read(1000).decode(errors="replace")
        except OSError as error:
            problem = f"cannot be read ({describe_error(error)})"
        else:
            problem = "" if not start or TITLE in start else "is not a page of results"
    if problem:
        raise UsageError(f"--html {quote_path(text)}: the file {problem}. Use --html with the name of a new file.")
    return path


class Page:
    """A page of results: for each query a section with its picture and its hits.

    `limits` says which of the index's images were searched; empty if all.
    """

    def __init__(self, path: Path, index: Index, name: str, metadata: IndexMetadata, limits: str = "") -> None:
        self._path = path
        self._index = index
        self._recent_picture = functools.lru_cache(RECENT_PICTURES)(self._hit_picture)
        self._folder = path_to_text(index_folder(metadata.folder))
        self._header = f"<p>Index {escape(name)}, made with {escape(metadata.model.description)}</p>"
        self._limits = escape(limits)
        self._results: list[tuple[str, dict[str, Any]]] = []
        self._previews: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @contextmanager
    def open_query(self, query: str) -> Iterator[OpenedImage]:
        """Opens a query as `sources.open_query` does, and keeps its preview."""
        with open_query(query) as image:
            picture = preview(image.stream)
            with self._lock:
                self._previews.setdefault(query, picture)
            yield image

    def add(self, query: str, response: dict[str, Any]) -> None:
        """Adds a section with Elasticsearch's response to a query, or with an error in the same form."""
        self._results.append((query, response))

    def write(self) -> bool:
        """Writes the page, unless no query was answered; returns True if it was written.

        Previews are made on all CPUs. Raises ImageSearchError if the file cannot be written.
        """
        if not any("hits" in response for _, response in self._results):
            return False
        before = signal.getsignal(signal.SIGINT)
        if before is not signal.SIG_IGN:  # it is ignored in a background job
            signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C removes the temporary file
        try:
            with atomic_write(Path(os.path.realpath(self._path))) as temporary:  # a symbolic link stays one
                self._write_sections(temporary)
        except KeyboardInterrupt:
            raise InterruptedRunError("The page of results was not written.", signal.SIGINT) from None
        except OSError as error:
            raise ImageSearchError(
                f"{quote_path(str(self._path))} cannot be written: {describe_error(error)}. Use another --html."
            ) from None
        finally:
            signal.signal(signal.SIGINT, before)
        return True

    def _write_sections(self, path: Path) -> None:
        threads = max(READERS, available_cpus())
        with path.open("w", encoding="utf-8") as page, ThreadPoolExecutor(threads) as pool:
            page.write(f"{HEAD}<header><h1>Nearest images</h1>\n{self._header}</header>\n<main>\n")
            for number, (query, response) in enumerate(self._results, 1):
                if "error" in response:
                    page.write(_error_section(number, query, response["error"]["reason"]))
                else:
                    page.writelines(self._section(number, query, response["hits"]["hits"], pool))
            page.write("</main>\n</body>\n</html>\n")

    def _section(self, number: int, query: str, hits: list[dict[str, Any]], pool: ThreadPoolExecutor) -> Iterator[str]:
        """Yields the HTML of one query: its picture, then its hits in order."""
        indexed: dict[str, FileMetadata] = {}
        with suppress(ImageSearchError):  # a shard is missing: what has changed since it was indexed is shown as it is
            indexed = self._index.get_file_metadata([hit["_id"] for hit in hits])
        file_paths = [(hit["fields"]["file_path"][0], indexed.get(hit["_id"])) for hit in hits]
        pictures = pool.map(self._recent_picture, file_paths)
        name, short_name = query_name(query), _short_name(query)
        yield f"""<section aria-labelledby="query-{number}">
<div class="query">
{self._query_picture(query, short_name)}
<div><h2 id="query-{number}">Nearest to {short_name}</h2>
{"" if escape(name) == short_name else f"<p>{breakable(name)}</p>"}
<p>{self._number_of_hits(len(hits))}</p></div>
</div>
<ol>
"""
        for hit, picture in zip(hits, pictures, strict=True):
            desc, file_path = escape(hit["fields"]["desc"][0]), breakable(hit["fields"]["file_path"][0])
            yield f"""<li>{picture}
<div><span class="score" title="(1 + cosine) / 2">{_rounded_down(hit["_score"])}</span><strong>{desc}</strong>
<p>{file_path}</p></div></li>
"""
        yield "</ol>\n</section>\n"

    def _number_of_hits(self, number: int) -> str:
        """Returns the HTML that says how many images a section has."""
        if number == 0:
            return f"No image{self._limits}"
        images = "The nearest image" if number == 1 else f"The {number:,} nearest images"
        return f"{images}{self._limits}; a score of 1 means the same picture"

    def _query_picture(self, query: str, name: str) -> str:
        """Returns the HTML of a query's preview, linked to its file, if it is one."""
        picture = _image_element(self._previews[query], name)
        return self._linked(picture, query) if query != "-" and os.path.isfile(query) else picture

    def _hit_picture(self, hit: tuple[str, FileMetadata | None]) -> str:
        """Returns the HTML of a hit's preview, linked to its file; or a box that says why there is none.

        Objects in a bucket are not linked: a signed link would stay valid for whoever has the page.
        """
        file_path, indexed = hit
        name = escape(posixpath.basename(file_path))
        in_bucket = BUCKET_URL.match(file_path)
        path = file_path if in_bucket else file_path_to_local(file_path, self._folder)
        try:
            with open_location(path) as image:
                if indexed and image.sha256 != indexed.sha256:
                    return f'<div class="missing">{name} has changed since it was indexed</div>'
                picture = _image_element(preview(image.stream), name)
        except FileNotFoundError:
            return f'<div class="missing">{name} is gone</div>'
        except Exception:  # Pillow raises nearly anything for a damaged file
            return f'<div class="missing">{name} cannot be read</div>'
        return picture if in_bucket else self._linked(picture, path)

    def _linked(self, picture: str, path: str) -> str:
        folder = os.fsencode(os.path.dirname(os.path.abspath(self._path)))
        link = quote(os.path.relpath(os.fsencode(os.path.abspath(path)), folder))
        return f'<a href="{link}">{picture}</a>'


def _short_name(query: str) -> str:
    """Returns the HTML of a query's name without its folders."""
    name = query_name(query)
    return escape(posixpath.basename(name) or name)


def _rounded_down(score: float) -> str:
    """Returns a score with four digits; only that of the same picture is 1.0000."""
    return f"{math.floor(score * 10_000 + 0.01) / 10_000:.4f}"


def _error_section(number: int, query: str, reason: str) -> str:
    """Returns the HTML of a query that could not be read."""
    return f"""<section aria-labelledby="query-{number}">
<h2 id="query-{number}">{_short_name(query)}</h2>
<p>{escape(reason)}</p>
</section>
"""


def _image_element(webp: bytes, name: str) -> str:
    return f'<img src="data:image/webp;base64,{base64.b64encode(webp).decode()}" alt="{name}">'


def preview(stream: BinaryIO) -> bytes:
    """Returns the image in `stream` as a WebP of at most 320 pixels a side."""
    webp = io.BytesIO()
    with open_rgb(stream) as image:
        image.thumbnail((PREVIEW_SIZE, PREVIEW_SIZE))
        _convert_to_srgb(image)
        image.save(webp, "WEBP", quality=PREVIEW_QUALITY, method=2)
    return webp.getvalue()


def _convert_to_srgb(image: Image.Image) -> None:
    """Converts an RGB image from its ICC profile, if it has one of RGB, to sRGB."""
    profile = image.info.get("icc_profile") or b""
    if profile[16:20] != b"RGB ":  # of a grayscale or CMYK image, whose pixels are RGB by now
        return
    with suppress(ImageCms.PyCMSError, OSError):  # a damaged profile
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), inPlace=True)


def escape(text: str) -> str:
    r"""Returns `text` as HTML that shows it; a byte that is not UTF-8 as ``\xff``."""
    return html.escape(path_to_text(text))


def breakable(path: str) -> str:
    """Returns a path as HTML that may be broken between its parts."""
    return re.sub("([/_.-])", r"\1<wbr>", escape(path))
