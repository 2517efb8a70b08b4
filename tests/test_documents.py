"""What README, docs/ and CONTRIBUTING say is so: their commands, word for word, their options and links."""

import contextlib
import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import apsw
import numpy as np
import pillow_heif
import pytest
import sqlite_vec
from PIL import Image

from tests.conftest import unavailable
from tests.pictures import Picture, Pictures, averaging_model, image, png
from tests.running import Scripts, environment
from tests.server import ROOT, Bucket

README = (ROOT / "README.md").read_text()
pytestmark = pytest.mark.slow
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]


def blocks(text: str, language: str = "sh") -> list[str]:
    """The blocks of code of a document, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def as_project(scripts: Scripts) -> Scripts:
    """Makes the scripts' folder one where commands work as they stand."""
    if not shutil.which("jq"):
        unavailable("no jq (Debian: apt-get install jq); that leaves docs/recipes.md untested")
    for name in ("create.py", "search.py", "imagesearch"):
        (scripts.folder / name).symlink_to(ROOT / name)
    scripts.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return scripts


@pytest.fixture
def project(scripts: Scripts) -> Scripts:
    return as_project(scripts)


@pytest.fixture
def project_on_file(scripts_on_file: Scripts) -> Scripts:
    return as_project(scripts_on_file)


def run(project: Scripts, commands: str) -> str:
    """Runs commands of a document, with the project's index in place of `images`; their output."""
    named = re.sub(r"(search|create)\.py(?![^\n]*--index)", rf"\g<0> --index {project.index}", commands)
    done = project.shell(f"set -eo pipefail; {named}")
    assert done.returncode == 0, done.stderr
    return done.stdout


# README


def test_readme_leads_from_pictures_to_the_closest_match(hub: dict[str, str], project_on_file: Scripts) -> None:
    """The first commands of a newcomer as they stand, with CLIP from a hub on this machine."""
    project = project_on_file
    for seed in range(6):
        path = project.folder / "images" / ("Osprey" if seed % 2 else "Bald_Eagle") / f"{seed}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image((300, 200), seed).save(path)
    image((320, 214), 3).save(project.folder / "myimage.jpg")
    steps = [block for block in blocks(README) if re.match(r"python3 (create|search)\.py(?! +#| --images)", block)]
    assert len(steps) == 4
    project.environment |= {name: hub[name] for name in ("HF_ENDPOINT", "HF_HOME")}
    done = project.shell("set -e; " + "".join(steps))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    fields = {"file_path": ["./images/Osprey/3.jpg"], "desc": ["Osprey"]}
    assert [line["hits"]["hits"][0]["fields"] for line in lines] == 3 * [fields]
    assert (project.folder / "results.html").exists()
    sample = json.loads(blocks(README, "json")[0])
    assert form(sample) == form(lines[1])
    assert re.search(r"^\d+ new in [\d.]+ s; index images, ", blocks(README, "text")[0], re.MULTILINE)
    assert re.search(r"^6 new in [\d.]+ s; index images, ", done.stderr, re.MULTILINE)


def form(value: object) -> object:
    """The names and types of JSON."""
    if isinstance(value, dict):
        return {name: form(each) for name, each in value.items()}
    return [form(each) for each in value] if isinstance(value, list) else type(value)


def test_readmes_bucket_commands_work_on_a_local_server(s3: dict[str, str], project: Scripts) -> None:
    """The exports are those of a local server."""
    exports, commands = blocks(README[README.index("## Images in a bucket") :])[:2]
    assert set(re.findall(r"(\w+)=", exports)) <= s3.keys()
    Bucket(s3, "birds").put({f"photos/{seed}.jpg": png(seed) for seed in range(4)} | {"new/heron.jpg": png(3)})
    project.environment |= s3
    shown = run(project, commands.replace("create.py", "create.py --model thumbnail"))
    assert '"file_path": ["s3://birds/photos/3.jpg"], "desc": ["photos"]' in shown


def test_readmes_guard_keeps_what_is_no_url_out_of_es_url() -> None:
    """In a folder without state, `terraform output -raw` prints a warning and exits with 0."""
    guard = next(line for line in README.splitlines() if line.startswith("case"))
    for value, kept in (("https://admin:x@host:1", True), ("╷ Warning: No outputs found", False), ("", False)):
        command = f'ES_URL="$1"; {guard}; echo "${{ES_URL-unset}}"'
        shown = subprocess.run(["bash", "-c", command, "", value], stdout=subprocess.PIPE, text=True, check=True).stdout
        assert shown.splitlines()[-1] == (value if kept else "unset")


# Recipes


COLORS = {"Cardinal": (200, 30, 40), "Bluebird": (40, 80, 200), "Goldfinch": (220, 190, 30)}
RECIPES = (ROOT / "docs" / "recipes.md").read_text()
NEAREST, GROUPS, GROUPS_PAGE, WRONG_FOLDERS, SHARE, COMPARISON, _ = blocks(RECIPES)
LOCAL, ELASTIC, CLUSTERS = blocks(RECIPES, "python")


def plant(images: Path) -> tuple[set[str], set[str]]:
    """Makes pictures of three classes by color; the lines of groups of duplicates and of those in wrong folders."""

    def tinted(color: tuple[int, int, int], seed: int) -> Image.Image:
        return Image.blend(Image.new("RGB", (300, 200), color), image((300, 200), seed), 0.25)

    groups, wrong = set(), set()
    for name, color in COLORS.items():
        folder = images / name
        folder.mkdir(parents=True)
        for number in range(40):
            tinted(color, sum(name.encode()) * 100 + number).save(folder / f"{number}.png")
        first = Image.open(folder / "0.png")
        first.resize((150, 100)).save(folder / "smaller.jpg", quality=80)
        Image.open(folder / "1.png").crop((3, 2, 297, 198)).save(folder / "cut.jpg", quality=80)
        for copy in ("copy 1.png", "copy 2.png"):
            shutil.copy(folder / "2.png", folder / copy)
        for group in (("0.png", "smaller.jpg"), ("1.png", "cut.jpg"), ("2.png", "copy 1.png", "copy 2.png")):
            groups.add("\t".join(f"./images/{name}/{each}" for each in sorted(group)))
    for name, color in (("Bluebird", COLORS["Cardinal"]), ("Goldfinch", COLORS["Bluebird"])):
        wrong.add(f"./images/{name}/stray.heic")
        pillow_heif.from_pillow(tinted(color, sum(color))).save(images / name / "stray.heic", quality=95)
    return groups, wrong


def test_the_recipes_find_what_was_planted(project: Scripts) -> None:
    groups, wrong = plant(project.folder / "images")
    (project.folder / "images" / "notes.txt").write_text("no image")
    project.create()
    # The score that the recipe tells to look for: of these pictures, by this model, the copies are above it.
    run(project, "".join([NEAREST, GROUPS, GROUPS_PAGE]).replace("0.98", "0.9995"))
    found = [line.split("\t") for line in (project.folder / "groups.tsv").read_text().splitlines()]
    assert {"\t".join(sorted(group)) for group in found} == groups
    for group in found:  # the largest file first
        sizes = [(project.folder / name).stat().st_size for name in group]
        assert sizes[0] == max(sizes)
    assert (project.folder / "groups.html").read_text().count("<section") == len(groups) == 9
    run(project, WRONG_FOLDERS)
    assert set((project.folder / "wrong.txt").read_text().splitlines()) == wrong
    assert (project.folder / "wrong.html").read_text().count("<section") == len(wrong)
    assert 0.9 < float(run(project, SHARE)) < 1
    if project.on_elasticsearch:
        compared = COMPARISON.replace("images/Osprey", "images/Cardinal").replace("MODEL=clip", "MODEL=thumbnail")
        assert float(run(project, compared)) > 0.99

    shown = "\nprint(vectors.shape, vectors.dtype, len(set(paths)), abs(vectors).max() <= 1)"
    code = f"{ELASTIC if project.on_elasticsearch else LOCAL}{shown}\n{CLUSTERS}"
    code = code.replace('"images"', f'"{project.index}"').replace("images.db", project.database.name)
    done = project.shell(f"python3 -c {shlex.quote(code)}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(134, 768) float32 134 True\n")  # 3 × (40 + 4) + 2
    with Image.open(project.folder / "clusters.png") as sheet:
        assert sheet.size == (1200, 1000)
        assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 100


# The other pages


def test_the_sql_of_the_local_index_works(scripts_on_file: Scripts, picture: Picture) -> None:
    for seed in range(8):
        picture(f"images/Osprey/{seed}.jpg", seed=seed)
    scripts_on_file.index = "images"
    scripts_on_file.create()
    text = (ROOT / "docs" / "local-index.md").read_text()
    with contextlib.closing(sqlite3.connect(scripts_on_file.database)) as database:
        queries = re.findall(r"^sqlite3 images.db '(.*)'$", text, re.MULTILINE)
        assert len(queries) == 3
        assert all(database.execute(query).fetchall() for query in queries)
    with contextlib.closing(apsw.Connection(str(scripts_on_file.database))) as connection:
        connection.enable_load_extension(True)
        connection.load_extension(sqlite_vec.loadable_path())
        rows = connection.execute(blocks(text, "sql")[0]).fetchall()
    assert len(rows) == 8 and rows[0] == ("./images/Osprey/7.jpg", pytest.approx(0, abs=1e-6))


def test_another_model_replaces_a_local_index(project_on_file: Scripts, pictures: Pictures) -> None:
    """On the local file; tests/test_elasticsearch.py has the other."""
    project = project_on_file
    project.index = "images"
    averaging_model(project.folder / "other.onnx")
    pictures(1)
    project.create()
    assert project.shell(blocks((ROOT / "docs" / "models.md").read_text())[-1]).returncode == 0
    assert project.search("images/0.png")[0]["hits"]["max_score"] == pytest.approx(1, abs=1e-6)
    assert b"other.onnx" in project.database.read_bytes()


def test_options_are_those_of_the_scripts(scripts_on_file: Scripts) -> None:
    """Those of each command, and those that a document names without one."""
    known = {
        script: set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", scripts_on_file.run(f"{script}.py", "--help").stdout))
        for script in ("create", "search")
    }
    for document in DOCUMENTS:
        for line in document.read_text().splitlines():
            for script, command in re.findall(r"(?<!_)(create|search)\.py ([^|`<>&]*)", line):
                assert set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", command)) <= known[script], (document, line)
        named = set(re.findall(r"`(--[a-z][a-z-]+)", document.read_text()))
        assert named <= known["create"] | known["search"] | {"--no-deps"}, document


def test_links_and_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        text = document.read_text()
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (document.parent / target).exists(), (document, target)
        used = re.findall(r"`?\bmake ([a-z-]+)", "\n".join([*blocks(text), *re.findall(r"`make [a-z-]+`", text)]))
        assert set(used) <= targets, document


def test_contributing_names_every_module_and_no_other() -> None:
    named = set(re.findall(r"`(?:\w+/)*(\w+)\.py`", (ROOT / "CONTRIBUTING.md").read_text()))
    modules = {path.stem for path in (ROOT / "imagesearch").rglob("*.py")} - {"__init__"}
    others = {path.stem for folder in ("tests", "tools") for path in (ROOT / folder).glob("*.py")}
    assert modules <= named <= modules | others | {"create", "search"}


# Installing


def test_make_demo_says_what_it_does_and_leaves_the_users_files_alone(tmp_path: Path) -> None:
    users = [ROOT / "images", *(ROOT / "images").rglob("*"), *ROOT.glob("*.db*")]
    before = {path: path.stat().st_mtime_ns for path in users}
    surroundings = environment(tmp_path) | {"ES_URL": "https://u:p@localhost:9"}  # the demo is local all the same
    command = ["make", "demo", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/installed"]  # which is not made again
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, check=True)
    assert "CLIP could not be downloaded; continuing with --model thumbnail" in done.stdout
    assert "$ cd build/demo; python3 ../../create.py --model thumbnail" in done.stdout
    found = re.search(r"^(\d+) of 50 new landscapes found one of their own kind", done.stdout, re.MULTILINE)
    assert found and int(found[1]) >= 45
    assert "500 new" in done.stderr
    page = ROOT / "build" / "demo" / "results.html"
    assert f"Look at {page.as_uri()}" in done.stdout and page.read_text().count("<li>") == 6 * 10
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert set(ROOT.glob("*.db*")) <= before.keys()


def test_the_install_of_readme_is_enough(tmp_path: Path, pictures: Pictures) -> None:
    """In an environment of its own: CLIP's class, a bucket and the hub's client load, and a search works."""
    (install,) = re.findall(r"`pip (install --no-deps -r requirements\.txt)`", README)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    command = [sys.executable, "-m", "pip", "--quiet", "--python", python, *install.split(), "--no-compile"]  # sooner
    users = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}  # with pip's cache
    subprocess.run(command, cwd=ROOT, env=users, check=True)
    code = (
        "from imagesearch.models.clip import import_imgbeddings; import_imgbeddings()\n"
        "from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url\n"
        "import imagesearch.sources.bucket, imagesearch.index.elasticsearch, imagesearch.models.int8\n"
        "from imagesearch.images import heif_format; heif_format()\n"
    )
    subprocess.run([python, "-c", code], cwd=ROOT, env=environment(tmp_path), check=True)
    pictures(1)
    for script, *arguments in (
        ("create.py", "--model", "thumbnail"),
        ("search.py", "images/0.png", "--html", "a.html"),
    ):
        subprocess.run([python, ROOT / script, *arguments], cwd=tmp_path, env=environment(tmp_path), check=True)
