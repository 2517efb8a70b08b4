"""What README, docs/ and CONTRIBUTING say is so: their commands, word for word, their options and links."""

import contextlib
import json
import os
import re
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
from tests.pictures import image
from tests.running import Scripts, environment
from tests.server import ROOT, S3
from tools.drawings import SCENES, draw_landscape

README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]


def blocks(text: str, language: str = "sh") -> list[str]:
    """The blocks of code of a document, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def project(scripts: Scripts) -> Scripts:
    """The scripts in a folder where commands work as they stand, on each kind of index."""
    if not shutil.which("jq"):
        unavailable("no jq (Debian: apt-get install jq); that leaves docs/recipes.md untested")
    for name in ("create.py", "search.py", "imagesearch"):
        (scripts.folder / name).symlink_to(ROOT / name)
    (scripts.folder / "bin").mkdir()
    (scripts.folder / "bin" / "python3").symlink_to(sys.executable)
    scripts.environment["PATH"] = f"{scripts.folder / 'bin'}:{os.environ['PATH']}"
    scripts.environment["PYTHONPATH"] = ":".join(sys.path[1:])
    return scripts


def run(project: Scripts, commands: str) -> str:
    """Runs commands of a document, with the project's index in place of `images`; their output."""
    named = re.sub(r"(search|create)\.py(?![^\n]*--index)", rf"\g<0> --index {project.index}", commands)
    done = project.shell(f"set -o pipefail; {named}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_python(project: Scripts, code: str) -> str:
    code = code.replace('"images"', f'"{project.index}"').replace("images.db", f"{project.index}.db")
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=project.folder, env=project.environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


# README


def test_its_commands_lead_from_pictures_to_the_closest_match(hub: dict[str, str], tmp_path: Path) -> None:
    """The first commands of a newcomer as they stand, with CLIP from a hub on this machine."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".git", ".venv", "build", ".*_cache", "__pycache__"))
    for seed in range(6):
        path = clone / "images" / ("Osprey" if seed % 2 else "Bald_Eagle") / f"{seed}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image((300, 200), seed).save(path)
    image((320, 214), 3).save(clone / "myimage.jpg")
    steps = [block for block in blocks(README) if re.match(r"python3 (create|search)\.py(?! +#| --images)", block)]
    assert len(steps) == 4
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    surroundings = hub | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": ":".join(sys.path[1:])}
    command = ["sh", "-ec", "".join(steps)]
    done = subprocess.run(command, cwd=clone, env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["hits"]["hits"][0]["fields"] for line in lines] == 3 * [
        {"file_path": ["./images/Osprey/3.jpg"], "desc": ["Osprey"]}
    ]
    assert (clone / "results.html").exists()


def test_its_sample_is_the_scripts_own_form(scripts_on_file: Scripts) -> None:
    scripts_on_file.index = "images"
    for number in range(12):
        scene = list(SCENES)[number % len(SCENES)]
        path = scripts_on_file.folder / "images" / scene / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_landscape(scene, number).save(path)
    stderr = scripts_on_file.create()
    draw_landscape("Desert", 500).save(scripts_on_file.folder / "Desert-500.jpg")
    ours = scripts_on_file.search("Desert-500.jpg")[0]
    sample = json.loads(blocks(README, "json")[0])

    def form(value: object) -> object:
        if isinstance(value, dict):
            return {name: form(each) for name, each in value.items()}
        return [form(each) for each in value] if isinstance(value, list) else type(value)

    assert form(sample) == form(ours)
    (summary,) = [line for line in blocks(README, "text")[0].splitlines() if " new in " in line]
    numbers = re.compile(r"\d[\d.,]*")
    assert numbers.sub("0", summary) == numbers.sub("0", stderr.splitlines()[-1])


def test_its_bucket_commands_work_on_a_local_server(s3: dict[str, str], project: Scripts) -> None:
    """The exports are those of a local server."""
    exports, commands = blocks(README[README.index("## Images in a bucket") :])[:2]
    assert set(re.findall(r"(\w+)=", exports)) <= s3.keys()
    with contextlib.suppress(AssertionError):  # the other index's test has made it
        S3.put(s3, "birds")
    for seed in range(4):
        path = project.folder / f"{seed}.jpg"
        image((60, 40), seed).save(path)
        S3.put(s3, "birds", f"photos/{seed}.jpg", path.read_bytes())
    S3.put(s3, "birds", "new/heron.jpg", path.read_bytes())
    project.environment |= s3
    shown = run(project, commands.replace("create.py", "create.py --model thumbnail"))
    assert '"file_path": ["s3://birds/photos/3.jpg"], "desc": ["photos"]' in shown


def test_its_guard_keeps_what_is_no_url_out_of_es_url() -> None:
    """In a folder without state, `terraform output -raw` prints a warning and exits with 0."""
    guard = next(line for line in README.splitlines() if line.startswith("case"))
    for value, kept in (("https://admin:x@host:1", True), ("╷ Warning: No outputs found", False), ("", False)):
        command = f'ES_URL="$1"; {guard}; echo "${{ES_URL-unset}}"'
        shown = subprocess.run(["bash", "-c", command, "", value], stdout=subprocess.PIPE, text=True, check=True).stdout
        assert shown.splitlines()[-1] == (value if kept else "unset")


def test_its_terraform_outputs_exist() -> None:
    outputs = set(re.findall(r'output "(\w+)"', (ROOT / "terraform" / "outputs.tf").read_text()))
    assert {"ES_URL", "ES_CA_CERT"} == set(re.findall(r"terraform output -raw (\w+)", README)) <= outputs


# Recipes


COLORS = {"Cardinal": (200, 30, 40), "Bluebird": (40, 80, 200), "Goldfinch": (220, 190, 30)}
RECIPES = (ROOT / "docs" / "recipes.md").read_text()
NEAREST, GROUPS, GROUPS_PAGE, WRONG_FOLDERS, SHARE, COMPARISON, _ = blocks(RECIPES)
LOCAL, ELASTIC, CLUSTERS = blocks(RECIPES, "python")


@pytest.fixture
def planted(project: Scripts) -> tuple[Scripts, set[str], set[str]]:
    """Pictures of three classes by color, indexed; the lines of groups of duplicates and of those in wrong folders."""
    groups, wrong = set(), set()
    for name, color in COLORS.items():
        (project.folder / "images" / name).mkdir(parents=True)
        for number in range(40):
            tint = Image.new("RGB", (300, 200), color)
            picture = Image.blend(tint, image((300, 200), sum(name.encode()) * 100 + number), 0.25)
            paths = [f"images/{name}/{number}.png"]
            picture.save(project.folder / paths[0])
            copies: dict[int, list[Image.Image | None]] = {
                0: [picture],  # encoded again
                1: [picture.resize((150, 100))],
                2: [picture.crop((8, 5, 292, 195))],  # 5% less
                3: [None, None],  # a triple of exact copies
            }
            for copy, each in enumerate(copies.get(number, [])):
                paths.append(f"images/{name}/copy {number}-{copy}.{'jpg' if each else 'png'}")
                if each:
                    each.save(project.folder / paths[-1], quality=80)
                else:
                    shutil.copy(project.folder / paths[0], project.folder / paths[-1])
            if len(paths) > 1:
                groups.add("\t".join(sorted(f"./{path}" for path in paths)))
    for number, (name, color) in enumerate([("Bluebird", COLORS["Cardinal"]), ("Goldfinch", COLORS["Bluebird"])]):
        path = f"images/{name}/stray-{number}.heic"
        stray = Image.blend(Image.new("RGB", (300, 200), color), image((300, 200), 900 + number), 0.25)
        pillow_heif.from_pillow(stray).save(project.folder / path, quality=95)
        wrong.add(f"./{path}")
    (project.folder / "images" / "notes.txt").write_text("no image")
    project.create()
    return project, groups, wrong


def test_the_recipes_find_what_was_planted(planted: tuple[Scripts, set[str], set[str]]) -> None:
    project, groups, wrong = planted
    # The score that the recipe tells to look for: of these pictures, by this model, the copies are above it.
    run(project, "".join([NEAREST, GROUPS, GROUPS_PAGE]).replace("0.98", "0.9995"))
    found = [line.split("\t") for line in (project.folder / "groups.tsv").read_text().splitlines()]
    assert {"\t".join(sorted(group)) for group in found} == groups
    assert len(groups) == 12 and sum(group.count("\t") == 2 for group in groups) == 3
    for first, *others in found:
        sizes = [(project.folder / name).stat().st_size for name in (first, *others)]
        assert sizes[0] == max(sizes)
    assert (project.folder / "groups.html").read_text().count("<section") == 12
    run(project, WRONG_FOLDERS)
    assert set((project.folder / "wrong.txt").read_text().splitlines()) == wrong
    assert (project.folder / "wrong.html").read_text().count("<section") == len(wrong)
    assert 0.9 < float(run(project, SHARE)) < 1
    if project.on_elasticsearch:
        compared = COMPARISON.replace("images/Osprey", "images/Cardinal").replace("MODEL=clip", "MODEL=thumbnail")
        assert float(run(project, compared)) > 0.99


def test_the_vectors_are_those_of_the_index(planted: tuple[Scripts, set[str], set[str]]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed; that leaves the recipe of clusters untested")
    project, _, _ = planted
    shown = "\nprint(vectors.shape, vectors.dtype, len(set(paths)), abs(vectors).max() <= 1)"
    code = ELASTIC if project.on_elasticsearch else LOCAL
    count = 3 * (40 + 3 + 2) + 2
    assert run_python(project, f"{code}{shown}\n{CLUSTERS}").startswith(f"({count}, 768) float32 {count} True\n")
    with Image.open(project.folder / "clusters.png") as sheet:
        assert sheet.size == (1200, 1000)
        assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 100


# The other pages


def test_the_sql_of_the_local_index_works(scripts_on_file: Scripts) -> None:
    for seed in range(8):
        path = scripts_on_file.folder / "images" / "Osprey" / f"{seed}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image((30, 20), seed).save(path)
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


def test_another_model_replaces_a_local_index(project: Scripts) -> None:
    if project.on_elasticsearch:
        pytest.skip("of the local file alone; tests/test_elasticsearch.py has the other")
    from tests.pictures import averaging_model

    project.index = "images"
    averaging_model(project.folder / "other.onnx")
    (project.folder / "images").mkdir()
    image((30, 20), 1).save(project.folder / "images" / "a.png")
    project.create()
    commands = blocks((ROOT / "docs" / "models.md").read_text())[-1]
    assert project.shell(commands).returncode == 0
    assert project.search("images/a.png")[0]["hits"]["max_score"] == pytest.approx(1, abs=1e-6)
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


def test_examples_of_curl_fail_with_the_body() -> None:
    for document in DOCUMENTS:
        for line in document.read_text().splitlines():
            if re.match(r"(\s*|.*&& )curl ", line) and "localhost" not in line:
                assert "--fail-with-body" in line, (document, line)


# Installing


@pytest.mark.slow
def test_make_demo_says_what_it_does_and_leaves_the_users_files_alone(tmp_path: Path) -> None:
    users = [ROOT / "images", *(ROOT / "images").rglob("*"), *ROOT.glob("*.db*")]
    before = {path: path.stat().st_mtime_ns for path in users}
    surroundings = environment(tmp_path) | {"ES_URL": "https://u:p@localhost:9"}  # the demo is local all the same
    venv = Path(sys.prefix)
    (venv / "installed").touch()
    command = ["make", "demo", f"VENV={venv}"]
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


def pins(name: str) -> set[str]:
    """The requirements of a compiled file, each with its version and at least one hash."""
    text = re.sub(r"^ *#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE).replace("\\\n", "")
    requirements = {re.sub(r" +--hash=sha256:[0-9a-f]{64}", "", line).strip() for line in text.splitlines()}
    requirements.discard("")
    assert text.count("--hash=sha256:") >= len(requirements)
    assert all(re.match(r"[\w.-]+==[\w.]+( ; .+)?$", line) for line in requirements)
    return requirements


def test_every_requirement_is_pinned_and_the_tests_use_the_same_versions() -> None:
    ours = pins("requirements.txt")
    assert ours <= pins("requirements-dev.txt")
    assert not {"transformers", "scikit-learn", "scipy"} & {line.partition("==")[0] for line in ours}
    ignored = ["clip.onnx", "model.onnx.data", "images.db", "images/a.jpg"]
    done = subprocess.run(["git", "check-ignore", *ignored], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ignored


@pytest.mark.slow
def test_the_install_of_readme_is_enough(tmp_path: Path) -> None:
    """In an environment of its own: CLIP's class, a bucket and the hub's client load, and a search works."""
    (install,) = re.findall(r"`pip (install --no-deps -r requirements\.txt)`", README)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "--quiet", *install.split()], cwd=ROOT, check=True)
    code = (
        "from imagesearch.models.clip import import_imgbeddings; import_imgbeddings()\n"
        "from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url\n"
        "import imagesearch.sources.bucket, imagesearch.index.elasticsearch, imagesearch.models.int8\n"
        "from imagesearch.images import heif_format; heif_format()\n"
    )
    subprocess.run([python, "-c", code], cwd=ROOT, env=environment(tmp_path), check=True)
    (tmp_path / "images").mkdir()
    image((30, 20), 1).save(tmp_path / "images" / "a.png")
    for arguments in (["create.py", "--model", "thumbnail"], ["search.py", "images/a.png", "--html", "page.html"]):
        subprocess.run(
            [python, ROOT / arguments[0], *arguments[1:]], cwd=tmp_path, env=environment(tmp_path), check=True
        )


@pytest.mark.slow
def test_the_pins_fit_what_they_were_compiled_from(tmp_path: Path) -> None:
    unused = subprocess.run(
        ["make", "--always-make", "--dry-run", "pin"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in ("requirements", "requirements-dev"):
        (tmp_path / f"{name}.txt").write_bytes((ROOT / f"{name}.txt").read_bytes())
        (command,) = re.findall(rf"uv (pip compile .*{name}\.in) -o", unused.replace("\\\n", " "))
        arguments = command.replace("--upgrade", "").replace('"make pin"', "make-pin").split()
        uv = Path(sys.executable).parent / "uv"
        subprocess.run([uv, *arguments, "-o", str(tmp_path / f"{name}.txt")], cwd=ROOT, check=True)
        found = [
            re.findall(r"^[^\s#].*$", path.read_text(), re.MULTILINE)
            for path in (ROOT / f"{name}.txt", tmp_path / f"{name}.txt")
        ]
        assert found[0] == found[1]
