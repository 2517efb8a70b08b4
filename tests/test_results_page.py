"""The page of results, in a real browser: it renders, asks nobody for anything, and escapes what it shows."""

import io
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image, ImageCms
from playwright.sync_api import Browser, sync_playwright
from playwright.sync_api import Page as BrowserPage

from imagesearch import results_page
from imagesearch.locations import path_to_text
from imagesearch.sources.queries import find_queries, open_query
from tests.conftest import unavailable
from tests.pictures import Picture, image
from tests.running import Scripts

pytestmark = pytest.mark.slow

ODD = ["<script>alert(1)", '"><img src=x onerror=alert(1)>', "two words & more", "new\nline", "émoji 🦅 100% #1?"]


def response(paths: list[Path | str]) -> dict[str, Any]:
    """A response with these files as hits."""
    hits = []
    for number, path in enumerate(paths):
        fields = {
            "file_path": [path_to_text(str(path))],
            "desc": [path_to_text(os.path.basename(os.path.dirname(path)))],
        }
        hits.append({"_score": 1 - 0.01 * number, "fields": fields})
    return {"hits": {"hits": hits}}


def write_page(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Writes a page as search.py does."""
    page = results_page.Page(path, "/", "Index images", "", [])
    for query in find_queries(list(results), "/"):
        with open_query(query.image) as opened:
            page.keep_preview(query, opened)
        page.add(query, results[query.name], leave_out_empty=False)
    assert page.write()


@pytest.fixture
def page_path(tmp_path: Path, picture: Picture) -> Path:
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
    write_page(page, {str(query): response([*hits, *more]), str(hits[0]): response([query])})
    return page


def _is_own(request: Any) -> bool:
    """True for the page itself, and the pictures inside it."""
    return bool(request.is_navigation_request() or request.url.startswith("data:"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The system's Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        unavailable("no Chromium (Debian: apt-get install chromium); that leaves how the page looks untested")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def browser_page(browser: Browser) -> Iterator[BrowserPage]:
    """A page of the browser; whatever it complains of or asks for is in its `noise`."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    noise: list[str] = []
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("dialog", lambda dialog: noise.append(dialog.message))
    page.on("request", lambda request: None if _is_own(request) else noise.append(request.url))
    page.noise = noise  # type: ignore[attr-defined]
    yield page
    page.close()


@pytest.mark.parametrize(("width", "columns"), [(390, 2), (1280, 5)])
@pytest.mark.parametrize(("scheme", "paper"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(22, 22, 26)")])
def test_the_page_renders_without_a_request(
    width: int, columns: int, scheme: Any, paper: str, browser_page: Any, page_path: Path
) -> None:
    browser_page.emulate_media(color_scheme=scheme)
    browser_page.set_viewport_size({"width": width, "height": 900})
    browser_page.goto(page_path.as_uri())
    assert browser_page.noise == []
    shown = browser_page.eval_on_selector_all(
        ".picture", "all => all.map(i => [getComputedStyle(i).backgroundImage, i.clientWidth, i.clientHeight])"
    )
    assert len(shown) == 9  # two queries, five odd names, one that is no UTF-8, one in the second section
    assert all(url.startswith('url("data:image/webp;') and width > 0 and height > 0 for url, width, height in shown)
    assert browser_page.evaluate("document.documentElement.scrollWidth") <= width
    grid = "list => getComputedStyle(list).gridTemplateColumns.split(' ').length"
    assert browser_page.eval_on_selector("ol", grid) == columns
    assert browser_page.eval_on_selector("body", "body => getComputedStyle(body).backgroundColor") == paper


def test_text_is_text_and_scripts_are_forbidden(browser_page: Any, page_path: Path) -> None:
    browser_page.goto(page_path.as_uri())
    assert browser_page.locator("script").count() == 0
    classes = browser_page.locator("section:first-of-type li strong").all_text_contents()
    assert [text.strip() for text in classes] == [*ODD, "images", "images", "images"]
    assert "caf\\xe9.jpg" in browser_page.locator("body").inner_text()
    assert browser_page.locator(".missing").all_text_contents() == ["gone.jpg is gone", "damaged.jpg cannot be read"]
    script = "document.createElement('script'), {textContent: 'window.ran = 1'}"
    browser_page.evaluate(f"document.body.append(Object.assign({script}))")
    browser_page.evaluate("new Image().src = 'http://127.0.0.1:9/pixel'")
    assert browser_page.evaluate("window.ran") is None
    assert sum("Content Security Policy" in line for line in browser_page.noise) == 2


def test_the_page_can_be_heard_and_used_without_a_mouse(browser_page: Any, page_path: Path) -> None:
    browser_page.goto(page_path.as_uri())
    assert browser_page.locator("html").get_attribute("lang") == "en"
    assert browser_page.get_by_role("main").count() == browser_page.get_by_role("heading", level=1).count() == 1
    assert browser_page.get_by_role("region", name="Nearest to query.jpg").count() == 1
    assert browser_page.get_by_role("img", name="query.jpg").count() == 2
    assert all(browser_page.eval_on_selector_all("[role=img]", "all => all.map(i => i.ariaLabel)"))
    browser_page.keyboard.press("Tab")
    assert browser_page.evaluate("document.activeElement.tagName") == "A"
    assert browser_page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    links = browser_page.eval_on_selector_all("a", "all => all.map(a => a.href)")
    paths = [os.fsencode(unquote(urlsplit(link).path, errors="surrogateescape")) for link in links]
    assert len(paths) == 9 and all(os.path.exists(path) for path in paths)


def test_names_break_between_parts_beside_tall_pictures(browser_page: Any, tmp_path: Path, picture: Picture) -> None:
    tall = picture("tall.png", size=(100, 320))
    write_page(tmp_path / "page.html", {str(tall): response([picture("images/zebra_grazing-01.png")])})
    assert "zebra_<wbr>grazing-<wbr>01.png" in (tmp_path / "page.html").read_text()
    browser_page.goto((tmp_path / "page.html").as_uri())
    picture_top, text_top = (
        browser_page.eval_on_selector(selector, "each => each.getBoundingClientRect().top")
        for selector in (".query .picture", ".query h2")
    )
    assert abs(picture_top - text_top) < 20


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast_enough(scheme: str) -> None:
    """WCAG 2.2, 1.4.3: at least 4.5 to 1, on the paper and on the cards."""
    style = (Path(results_page.__file__).parent / "page.css").read_text()
    light, dark = style.split("@media (prefers-color-scheme: dark)")[:2]
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


def test_a_hundred_photographs_make_a_small_page_soon(tmp_path: Path) -> None:
    paths: list[Path | str] = [tmp_path / f"{number}.jpg" for number in range(100)]
    image((4000, 3000), 1).save(paths[0], quality=90)
    for path in paths[1:]:
        shutil.copy(paths[0], path)
    started = time.process_time()  # of all threads, whatever else the machine does
    write_page(tmp_path / "results.html", {str(paths[0]): response(paths)})
    assert time.process_time() - started < 8
    assert (tmp_path / "results.html").stat().st_size < 3_000_000


def test_search_writes_the_page_beside_the_json(scripts: Scripts, picture: Picture, browser_page: Any) -> None:
    for number in range(30):
        picture(f"images/{number % 3}/{number}.png", seed=number)
    scripts.create()
    queries = [picture("a.png", seed=3), picture("b.png", seed=4)]
    (scripts.folder / "c.png").write_text("not an image")
    done = scripts.run("search.py", *queries, "c.png", "-k", 12, "--html", "my results.html")
    assert done.returncode == 1 and done.stdout.count("\n") == 3
    assert "The page of results is 'my results.html'." in done.stderr
    browser_page.goto((scripts.folder / "my results.html").as_uri())
    assert browser_page.noise == []
    assert browser_page.locator("section").count() == 3
    assert browser_page.locator("li .picture").count() == 24
    reason = "Cannot read c.png: not an image that Pillow can read"
    assert reason in browser_page.locator("section").nth(2).text_content()
    assert f"Index {scripts.index}, made with the model thumbnail" in browser_page.locator("header").inner_text()
    options = ("--min-score", "0.9999", "--desc", "1", "--html", "none.html")
    scripts.run("search.py", queries[0], *options)
    text = (scripts.folder / "none.html").read_text()
    assert "No image of class 1 with a score of at least 0.9999" in text


def test_each_query_has_its_own_picture_and_link(scripts_on_file: Scripts, picture: Picture) -> None:
    """Also if it is damaged, asked for twice, or of the index while the working directory has one of its name."""
    picture("images/a.png")
    scripts_on_file.create()
    picture("elsewhere/images/a.png", seed=77)
    content = bytearray(picture("elsewhere/images/damaged.png").read_bytes())
    content[content.index(b"IDAT") + 8] ^= 255
    (scripts_on_file.folder / "elsewhere" / "images" / "damaged.png").write_bytes(content)
    scripts_on_file.folder /= "elsewhere"
    queries = ("../images", "images/a.png", "images/a.png", "images/damaged.png")
    done = scripts_on_file.run("search.py", *queries, "--html", "page.html")
    assert done.returncode == 1 and done.stdout.count("\n") == 4
    html = (scripts_on_file.folder / "page.html").read_text()
    sections = html.split("<section")[1:]
    links = [re.findall('href="([^"]+)"', section) for section in sections]
    assert links == [["../images/a.png"] * 2, *2 * [["images/a.png", "../images/a.png", "#query-1"]], []]
    pictures = [re.findall('class="picture ([^"]+)"', section) for section in sections]
    assert pictures[0][0] == pictures[0][1] != pictures[1][0] == pictures[2][0]


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ("2.png", "the file is an image, or has the name of one"),
        ("copy", "the file is an image, or has the name of one"),
        ("new.jpg", "the file is an image, or has the name of one"),
        ("notes.txt", "the file is not a page of results"),
        ("other.html", "the file is not a page of results"),
        ("folder", "the file is not a page of results"),
        ("pipe", "the file is not a page of results"),
        ("missing/page.html", "its folder does not exist"),
    ],
)
def test_html_overwrites_only_a_page(page: str, problem: str, scripts_on_file: Scripts, picture: Picture) -> None:
    picture("images/a.png")
    shutil.copy(picture("2.png"), scripts_on_file.folder / "copy")
    (scripts_on_file.folder / "notes.txt").write_text("notes")
    (scripts_on_file.folder / "other.html").write_text("<!DOCTYPE html><title>My page</title>")
    (scripts_on_file.folder / "folder").mkdir()
    os.mkfifo(scripts_on_file.folder / "pipe")
    scripts_on_file.create()
    before = {path: path.read_bytes() for path in scripts_on_file.folder.iterdir() if path.is_file()}
    done = scripts_on_file.run("search.py", "2.png", "copy", "--html", page)
    assert done.returncode == 2 and done.stdout == ""
    assert f"--html {page}: {problem}. Use --html with the name of a new file." in done.stderr
    assert before == {path: path.read_bytes() for path in before}


def test_a_page_is_replaced_and_kept_if_no_query_could_be_answered(scripts_on_file: Scripts, picture: Picture) -> None:
    path = picture("images/a.png")
    scripts_on_file.create()
    (scripts_on_file.folder / "target").mkdir()
    (scripts_on_file.folder / "page.html").symlink_to("target/page.html")
    for _ in range(2):
        scripts_on_file.search(path, "--html", "page.html")
    assert (scripts_on_file.folder / "page.html").is_symlink()
    before = (scripts_on_file.folder / "target" / "page.html").read_bytes()
    done = scripts_on_file.run("search.py", "missing.png", "--html", "page.html")
    assert done.returncode == 1 and "page of results" not in done.stderr
    assert (scripts_on_file.folder / "page.html").read_bytes() == before


def test_an_index_of_somebody_elses_does_not_choose_what_is_read(scripts_on_file: Scripts, picture: Picture) -> None:
    path = picture("images/a.png", seed=1)
    scripts_on_file.create()
    secret = picture("secret.png", seed=2).rename(scripts_on_file.folder / "secret.txt")
    for name in (secret, "-", "s3://birds/secret.png", "http://127.0.0.1:9/a.png", "./images/../secret.txt"):
        columns = f"'{name}', '{name}', \"desc\", size, mtime, sha256, embedding"
        scripts_on_file.change(f"INSERT INTO images SELECT {columns} FROM images LIMIT 1")
    scripts_on_file.search(path, "-k", 9, "--html", "page.html")
    html = (scripts_on_file.folder / "page.html").read_text()
    assert html.count('role="img"') == 2  # the query, and its document
    assert html.count("is not shown") == 4 and html.count("is gone") == 1


def test_a_page_of_many_has_each_preview_once(scripts_on_file: Scripts, picture: Picture, browser_page: Any) -> None:
    for number in range(40):
        picture(f"images/{number:02}.png", seed=number // 2)  # in pairs
    scripts_on_file.create()
    scripts_on_file.search("images", "--exclude-self", "-k", 12, "--html", "page.html")
    assert (scripts_on_file.folder / "page.html").read_text().count("data:image/webp;base64,") == 20 * 2
    browser_page.goto((scripts_on_file.folder / "page.html").as_uri())
    assert browser_page.locator("section").count() == 40 and browser_page.noise == []
    link = browser_page.locator("section").first.locator("li").first.get_by_role("link", name="its nearest")
    link.click()
    assert browser_page.url.endswith("#query-2")
    picture("images/alone.png", seed=99)
    scripts_on_file.create()
    scripts_on_file.search("images", "--exclude-self", "--min-score", "0.999", "--html", "page.html")
    html = (scripts_on_file.folder / "page.html").read_text()
    assert html.count("<section") == 40
    assert "No image with a score of at least 0.999: 1 query is left out." in html


# Previews


def swapped_profile() -> bytes:
    """LittleCMS's sRGB profile with the names of two colorants swapped: its red is green."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"none").replace(b"gXYZ", b"rXYZ").replace(b"none", b"gXYZ")


def shown(picture: Image.Image) -> np.ndarray:
    """The color in the middle as a viewer shows it, which takes an image without a profile as sRGB."""
    srgb, profile = ImageCms.createProfile("sRGB"), picture.info.get("icc_profile")
    picture = picture.convert("RGB")
    if profile:
        picture = ImageCms.profileToProfile(picture, ImageCms.ImageCmsProfile(io.BytesIO(profile)), srgb) or picture
    return np.array(picture.getpixel((100, 100)))


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P")])
def test_a_preview_is_upright_and_has_the_colors_of_the_file(kind: str, mode: str) -> None:
    picture = Image.new("RGB", (640, 400), (190, 80, 70))  # within sRGB
    if mode != "RGB":
        picture = picture.convert(mode, palette=Image.Palette.ADAPTIVE)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    picture.save(content, kind, icc_profile=swapped_profile(), exif=exif)
    webp, size = results_page.preview(content)
    preview, original = Image.open(io.BytesIO(webp)), Image.open(content)
    assert (preview.format, preview.size) == ("WEBP", size) == ("WEBP", (200, 320))
    assert np.abs(shown(preview) - shown(original)).max() < 6
    assert np.abs(np.array(original.convert("RGB").getpixel((100, 100))) - shown(original)).max() > 12
