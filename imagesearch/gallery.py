"""Results as a page to look at: one file, no scripts, nothing fetched from anywhere."""

import base64
import functools
import hashlib
import html
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

from imagesearch.embed import cores
from imagesearch.files import as_text, local_path, read

SIDE = 320  # pixels of a thumbnail's longer side, at most
QUALITY = 75

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d1d1f; --soft: #5c5c66; --card: #f3f3f6; --line: #d5d5dd;
  --mark: #0f62fe; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16161a; --ink: #f1f1f4; --soft: #acacb8; --card: #222228; --line: #3a3a44; --mark: #78a9ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 90rem; padding: 1.5rem clamp(1rem, 4vw, 3rem); background: var(--paper);
  color: var(--ink); font: 1rem/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 1.5rem; }
section + section { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 2rem; }
.query { display: flex; flex-wrap: wrap; gap: 1.25rem; align-items: end; margin-bottom: 1.5rem; }
.query img, .query .gone { width: min(20rem, 100%); }
h2 { font-size: 1.15rem; margin: 0; overflow-wrap: anywhere; }
p { margin: .25rem 0; color: var(--soft); overflow-wrap: anywhere; }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(12.5rem, 45%), 1fr)); }
li { background: var(--card); border-radius: .6rem; overflow: hidden; break-inside: avoid; }
li img, li .gone { aspect-ratio: 1; width: 100%; object-fit: contain; background: var(--paper);
  border: 1px solid var(--card); border-radius: .6rem; display: block; }
img { max-width: 100%; height: auto; border-radius: .6rem; }
.gone { display: grid; place-content: center; min-height: 8rem; padding: 1rem; color: var(--soft); text-align: center;
  border: 2px dashed var(--line); border-radius: .6rem; }
li div { padding: .6rem .8rem .8rem; }
li strong { display: block; overflow-wrap: anywhere; }
li p { font-size: .8rem; }
.score { float: right; color: var(--soft); font-variant-numeric: tabular-nums; margin-left: .5rem; }
a { color: inherit; }
a:focus-visible { outline: 3px solid var(--mark); outline-offset: 2px; }
@media print { body { padding: 0; max-width: none; } li { border: 1px solid var(--line); } }
"""


# What the page may load: the pictures inside it and this style. No scripts, no requests, no forms.
STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY = f"default-src 'none'; img-src data:; style-src 'sha256-{STYLE_HASH}'; base-uri 'none'; form-action 'none'"

HEAD = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="referrer" content="no-referrer">
<title>Nearest images</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>Nearest images</h1></header>
<main>
"""


def write_page(path: Path, answers: list[tuple[str, dict[str, Any]]]) -> None:
    """Writes the page: for each query image, by its path, a section with Elasticsearch's response to it.

    Thumbnails are made on all cores. Raises OSError where `path` cannot be written.
    """
    folder = os.path.dirname(os.path.abspath(path))
    with ThreadPoolExecutor(cores()) as pool, path.open("w", encoding="utf-8") as page:
        page.write(HEAD)
        for number, (query, response) in enumerate(answers, 1):
            page.writelines(section(number, query, response["hits"]["hits"], folder, pool))
        page.write("</main>\n</body>\n</html>\n")


def section(
    number: int, query: str, hits: list[dict[str, Any]], folder: str, pool: ThreadPoolExecutor
) -> Iterator[str]:
    """The HTML for one query, in pieces: its picture, then its hits in order, linked from `folder`."""
    found = [(hit, local_path(hit["fields"]["file_path"][0])) for hit in hits]
    pictures = pool.map(functools.partial(picture, folder), [query, *(path for _, path in found)])
    name = text(os.path.basename(query))
    yield f"""<section aria-labelledby="query-{number}">
<div class="query">
{next(pictures)}
<div><h2 id="query-{number}">Nearest to {name}</h2>
<p>{text(query)}</p>
<p>{len(hits)} {"image" if len(hits) == 1 else "images"}, the nearest first; a score of 1 is the same picture</p></div>
</div>
<ol>
"""
    for (hit, _), shown in zip(found, pictures, strict=True):
        fields = hit["fields"]
        yield f"""<li>{shown}
<div><span class="score" title="(1 + cosine) / 2">{hit["_score"]:.4f}</span><strong>{text(fields["desc"][0])}</strong>
<p>{text(fields["file_path"][0])}</p></div></li>
"""
    yield "</ol>\n</section>\n"


def picture(folder: str, path: str) -> str:
    """The thumbnail of the image in `path`, linked to it; or a box that says why there is none."""
    name = text(os.path.basename(path))
    try:
        data = base64.b64encode(thumbnail(path)).decode()
    except FileNotFoundError:
        return f'<div class="gone">{name} is gone</div>'
    except Exception:  # Pillow raises nearly anything for a damaged file
        return f'<div class="gone">{name} cannot be read</div>'
    link = quote(os.path.relpath(os.fsencode(os.path.abspath(path)), os.fsencode(folder)))
    return f'<a href="{link}"><img src="data:image/webp;base64,{data}" alt="{name}"></a>'


def thumbnail(path: str) -> bytes:
    """The image in `path` as a WebP of at most 320 pixels a side."""
    with open(path, "rb") as stream:
        image = read(stream)
    image.thumbnail((SIDE, SIDE))
    webp = io.BytesIO()
    image.save(webp, "WEBP", quality=QUALITY, method=2)
    return webp.getvalue()


def text(value: str) -> str:
    """`value` as HTML that shows it; what is no character, as in a name that is no UTF-8, as `\\xff`."""
    return html.escape(as_text(value))
