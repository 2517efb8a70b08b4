"""The page of results, in a real browser: it renders, asks nobody for anything, and escapes what it shows."""

import io
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page

from imagesearch import results_page
from imagesearch.files import file_sha256
from imagesearch.paths import path_to_text
from imagesearch.records import FileMetadata, IndexMetadata, ModelInfo
from tests.pictures import Picture, image
from tests.running import Scripts
from tests.server import ROOT

ODD = ["<script>alert(1)", '"><img src=x onerror=alert(1)>', "two words & more", "new\nline", "émoji 🦅 100% #1?"]


class Files:
    """An index's file metadata for hits in files that are as they were indexed, or that `changed` names."""

    def __init__(self, changed: str = "") -> None:
        self.changed = changed
        self.metadata: dict[str, FileMetadata] = {}

    def response(self, paths: list[Path | str]) -> dict[str, Any]:
        """A response with these files as hits."""
        hits = []
        for number, path in enumerate(paths):
            text = path_to_text(str(path))
            desc = path_to_text(os.path.basename(os.path.dirname(path)))
            hits.append({"_id": text, "_score": 1 - 0.01 * number, "fields": {"file_path": [text], "desc": [desc]}})
            if os.path.exists(path):
                sha256 = "other" if self.changed and self.changed in text else file_sha256(Path(path))
                self.metadata[text] = FileMetadata(0, 0, sha256)
        return {"hits": {"hits": hits}}

    def get_file_metadata(self, ids: list[str]) -> dict[str, FileMetadata]:
        return {id_: self.metadata[id_] for id_ in ids if id_ in self.metadata}


METADATA = IndexMetadata(ModelInfo("thumbnail"), "/")


def write_page(path: Path, files: Files, results: list[tuple[str, dict[str, Any]]]) -> None:
    """Writes a page as search.py does."""
    page = results_page.Page(path, files, "images", METADATA)  # type: ignore[arg-type]  # only its file metadata is read
    for query, response in results:
        with page.open_query(query):
            page.add(query, response)
    assert page.write()


@pytest.fixture
def page_file(tmp_path: Path, picture: Picture) -> Path:
    """A page with two queries and odd names, a file that is gone and one that is damaged."""
    hits: list[Path | str] = [picture(f"images/{name}/{n}.jpg", size=(640, 400 + n)) for n, name in enumerate(ODD)]
    raw = os.fsdecode(os.fsencode(tmp_path) + b"/images/caf\xe9.jpg")
    image((300, 300), 1).save(raw)
    (tmp_path / "images" / "damaged.jpg").write_bytes(b"no image")
    exif = Image.Exif()
    exif[0x0112] = 6
    query = picture("query.jpg", size=(900, 500), exif=exif)
    page = tmp_path / "pages" / "results.html"
    page.parent.mkdir()
    more: list[Path | str] = [raw, tmp_path / "images" / "gone.jpg", tmp_path / "images" / "damaged.jpg"]
    files = Files()
    results = [(str(query), files.response([*hits, *more])), (str(hits[0]), files.response([query]))]
    write_page(page, files, results)
    return page


def opened(browser: Browser, path: Path, width: int = 1280, scheme: Any = "light") -> tuple[Page, list[str]]:
    """The page as the browser shows it, and whatever it complained of or asked for."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    noise: list[str] = []
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("dialog", lambda dialog: noise.append(dialog.message))
    page.on("request", lambda request: noise.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(path.as_uri())
    assert noise.pop(0) == path.as_uri()
    return page, noise


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_renders_without_a_word_or_a_request(width: int, scheme: str, browser: Browser, page_file: Path) -> None:
    page, noise = opened(browser, page_file, width, scheme)
    assert noise == []
    sizes = page.eval_on_selector_all("img", "all => all.map(i => [i.complete, i.naturalWidth, i.naturalHeight])")
    assert len(sizes) == 9  # two queries, five odd names, one that is no UTF-8, one in the second section
    assert all(complete and 0 < max(w, h) <= 320 for complete, w, h in sizes)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    columns = page.eval_on_selector("ol", "list => getComputedStyle(list).gridTemplateColumns.split(' ').length")
    assert columns == (2 if width == 390 else 5)
    background = page.eval_on_selector("body", "body => getComputedStyle(body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 22, 26)"}[scheme]


def test_text_is_text_whatever_it_holds(browser: Browser, page_file: Path) -> None:
    page, _ = opened(browser, page_file)
    assert page.locator("script").count() == 0
    classes = [text.strip() for text in page.locator("section:first-of-type li strong").all_text_contents()]
    assert classes == [*ODD, "images", "images", "images"]
    assert "caf\\xe9.jpg" in page.locator("body").inner_text()


def test_the_policy_forbids_scripts(browser: Browser, page_file: Path) -> None:
    page, noise = opened(browser, page_file)
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
    )
    page.evaluate("new Image().src = 'http://127.0.0.1:9/pixel'")
    assert page.evaluate("window.ran") is None
    assert sum("Content Security Policy" in line for line in noise) == 2


def test_files_that_are_gone_or_damaged_have_a_box_that_says_so(browser: Browser, page_file: Path) -> None:
    page, _ = opened(browser, page_file)
    assert page.locator(".missing").all_text_contents() == ["gone.jpg is gone", "damaged.jpg cannot be read"]


def test_pictures_lead_to_their_originals(browser: Browser, page_file: Path) -> None:
    page, _ = opened(browser, page_file)
    links = page.eval_on_selector_all("a", "all => all.map(a => a.href)")
    paths = [os.fsencode(unquote(urlsplit(link).path, errors="surrogateescape")) for link in links]
    assert len(paths) == 9
    assert all(os.path.exists(path) for path in paths)
    page.locator("a").first.click()
    assert page.url.endswith("/query.jpg")


def test_it_can_be_heard_and_used_without_a_mouse(browser: Browser, page_file: Path) -> None:
    page, _ = opened(browser, page_file)
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.get_by_role("main").count() == page.get_by_role("heading", level=1).count() == 1
    assert page.get_by_role("region", name="Nearest to query.jpg").count() == 1
    assert all(page.eval_on_selector_all("img", "all => all.map(i => i.alt)"))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "A"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast_enough(scheme: str) -> None:
    """WCAG 2.2, 1.4.3: at least 4.5 to 1, on the paper and on the cards."""
    light, dark = results_page.STYLE.split("@media (prefers-color-scheme: dark)")[:2]
    colors = dict(re.findall(r"--(\w+): #([0-9a-f]+);", light if scheme == "light" else dark))

    def luminance(name: str) -> float:
        digits = colors[name] if len(colors[name]) == 6 else "".join(digit * 2 for digit in colors[name])
        parts = [int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for ink in ("ink", "soft"):
        for paper in ("paper", "card"):
            low, high = sorted((luminance(ink), luminance(paper)))
            assert (high + 0.05) / (low + 0.05) >= 4.5


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image((640, 400), 1).save(tmp_path / "a.jpg", exif=exif)
    with (tmp_path / "a.jpg").open("rb") as stream:
        preview = Image.open(io.BytesIO(results_page.preview(stream)))
    assert preview.format == "WEBP"
    assert preview.size == (200, 320)


@pytest.mark.slow
def test_a_hundred_photographs_make_a_small_page_soon(tmp_path: Path) -> None:
    from sklearn.datasets import load_sample_images

    paths: list[Path | str] = [tmp_path / f"{number}.jpg" for number in range(100)]
    for number, path in enumerate(paths):
        if number < 2:
            Image.fromarray(load_sample_images().images[number]).resize((4000, 3000)).save(path, quality=90)
        else:
            shutil.copy(paths[number % 2], path)
    page = tmp_path / "results.html"
    files = Files()
    started = time.process_time()  # of all threads, whatever else the machine does
    write_page(page, files, [(str(paths[0]), files.response(paths))])
    assert time.process_time() - started < 8
    assert page.stat().st_size < 3_000_000


def test_search_writes_the_page_beside_the_json(scripts: Scripts, picture: Picture, browser: Browser) -> None:
    for number in range(30):
        picture(f"images/{number % 3}/{number}.png", seed=number)
    scripts.create()
    queries = [picture("a.png", seed=3), picture("b.png", seed=4)]
    (scripts.folder / "c.png").write_text("not an image")
    done = scripts.run("search.py", *queries, "c.png", "-k", 12, "--html", "my results.html")
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("\n") == 3
    assert "The page of results is 'my results.html'." in done.stderr
    page, noise = opened(browser, scripts.folder / "my results.html")
    assert noise == []
    assert page.locator("section").count() == 3
    assert page.locator("li img").count() == 24
    assert "Cannot read c.png: not an image that Pillow can read" in page.locator("section").nth(2).inner_text()
    done = scripts.run("search.py", queries[0], "--html", "missing/results.html")
    assert done.returncode == 2 and done.stdout == ""
    assert "--html missing/results.html: the file is in a folder that does not exist" in done.stderr


def test_a_closed_pipe_gives_no_traceback(local: Scripts, picture: Picture) -> None:
    path = picture("images/a.png")
    local.create()
    script = f"{sys.executable} {ROOT / 'search.py'} --index {local.index} {path} {path} {path} | head -c 1; echo"
    done = subprocess.run(
        ["bash", "-c", script], cwd=local.folder, env=local.environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "{\n"
    assert done.stderr == ""


def test_a_file_that_changed_since_it_was_indexed_is_not_shown(tmp_path: Path, picture: Picture) -> None:
    files = Files(changed="b.png")
    paths: list[Path | str] = [picture("images/a.png"), picture("images/b.png")]
    write_page(tmp_path / "results.html", files, [(str(paths[0]), files.response(paths))])
    html = (tmp_path / "results.html").read_text()
    assert html.count("<img") == 2  # the query and a.png
    assert "b.png has changed since it was indexed" in html


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--html", "1.png", "2.png"), "is one of the images to search for|has the name of an image"),
        (("--html", "copy", "copy"), "is one of the images to search for"),
        (("--html", "new.jpg", "2.png"), "has the name of an image"),
        (("--html", "notes.txt", "2.png"), "is not a page of results"),
        (("--html", "folder", "2.png"), "is a folder"),
        (("--html", "pipe", "2.png"), "is not a regular file"),
    ],
)
def test_html_overwrites_nothing_but_a_page(
    arguments: tuple[str, ...], problem: str, local: Scripts, picture: Picture
) -> None:
    picture("images/a.png")
    for name in ("1.png", "2.png"):
        picture(name)
    shutil.copy(local.folder / "1.png", local.folder / "copy")
    (local.folder / "notes.txt").write_text("notes")
    (local.folder / "folder").mkdir()
    os.mkfifo(local.folder / "pipe")
    local.create()
    before = {path: path.read_bytes() for path in local.folder.iterdir() if path.is_file() and path.suffix != ".db"}
    done = local.run("search.py", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert re.search(rf"^search.py: --html \S+: the file ({problem})\. Use --html", done.stderr, re.MULTILINE)
    assert before == {path: path.read_bytes() for path in before}
    for _ in range(2):  # the second time, it overwrites a page
        assert local.run("search.py", "2.png", "--html", "page").returncode == 0


def test_a_page_is_kept_if_no_query_could_be_answered(local: Scripts, picture: Picture) -> None:
    path = picture("images/a.png")
    local.create()
    local.search(path, "--html", "page.html")
    before = (local.folder / "page.html").read_bytes()
    done = local.run("search.py", "missing.png", "--html", "page.html")
    assert done.returncode == 1
    assert "page of results" not in done.stderr
    assert (local.folder / "page.html").read_bytes() == before


def test_the_page_finds_the_pictures_from_another_folder(local: Scripts, picture: Picture) -> None:
    path = picture("images/a.png")
    local.create()
    (local.folder / "elsewhere").mkdir()
    database = local.folder / "imagesearch.db"
    local.folder /= "elsewhere"
    local.search(path, "--db", database, "--html", "page.html")
    html = (local.folder / "page.html").read_text()
    assert html.count("<img") == 2
    assert 'href="../images/a.png"' in html


def test_the_page_leaves_other_files_alone(local: Scripts, picture: Picture) -> None:
    path = picture("images/a.png")
    local.create()
    (local.folder / "target").mkdir()
    backup = local.folder / "target" / "results.html.backup.tmp"
    backup.write_text("mine")
    os.utime(backup, (0, 0))
    (local.folder / "link.html").symlink_to("target/results.html")
    done = local.run("search.py", path, "--html", "link.html")
    assert done.returncode == 0 and "The page of results is link.html." in done.stderr
    assert (local.folder / "link.html").is_symlink() and (local.folder / "target" / "results.html").is_file()
    assert backup.read_text() == "mine"
    other = local.folder / "other.html"
    other.write_text("<!DOCTYPE html><title>My page</title>")
    assert "is not a page of results" in local.run("search.py", path, "--html", other).stderr
    assert local.run("search.py", path, "--html", "link.html").returncode == 0  # our own is overwritten


def test_the_page_says_what_was_searched(local: Scripts, picture: Picture) -> None:
    paths = [picture(f"images/Osprey/{number}.png", seed=number) for number in range(3)]
    other = picture("other.png", seed=77)
    local.create()
    local.run("search.py", *paths[:1], "--html", "one.html")
    page = (local.folder / "one.html").read_text()
    assert f"Index {local.index}, made with the model thumbnail (a baseline, not CLIP)" in page
    assert "The nearest image; a score of 1" in page and ">1.0000</span>" in page
    local.run("search.py", other, "--html", "none.html", "--min-score", "0.9999", "--desc", "Osprey")
    page = (local.folder / "none.html").read_text()
    assert "No image of class Osprey with a score of at least 0.9999" in page
