"""What the README and docs/ say is so: options, commands, messages, links."""

import contextlib
import io
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import apsw
import pytest
import sqlite_vec

from tests.pictures import image
from tests.running import Scripts
from tests.server import ROOT, S3
from tools.options import OPTIONS, with_help

README = ROOT / "README.md"
TEXT = README.read_text()
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
COMMANDS = re.findall(r"^```sh\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11),
    reason="argparse lays help out otherwise than docs/options.md, which Python 3.11 makes",
)
def test_its_options_are_those_of_help() -> None:
    text = OPTIONS.read_text()
    assert with_help(text) == text, "run `make options`"


@pytest.mark.parametrize("script", ["create.py", "search.py"])
def test_help_names_every_option_and_variable(script: str) -> None:
    shown = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in ("--index", "--db", "--model", "--insecure", "ES_URL", "ES_CA_CERT", "ES_API_KEY", "examples:"):
        assert name in shown


def test_its_steps_lead_from_images_to_the_closest_match(hub: dict[str, str], tmp_path: Path) -> None:
    """The first commands of a newcomer as they stand, with CLIP from a hub on this machine."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".git", ".venv", "build", ".*_cache", "__pycache__"))
    for seed in range(6):
        path = clone / "images" / ("Osprey" if seed % 2 else "Bald_Eagle") / f"{seed}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image((300, 200), seed).save(path)
    image((320, 214), 3).save(clone / "myimage.jpg")
    steps = [block for block in COMMANDS if block.startswith(("python3 create.py", "python3 search.py"))]
    assert [block.split()[1] for block in steps[:2]] == ["create.py", "search.py"]
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "python3").symlink_to(sys.executable)
    surroundings = hub | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": ":".join(sys.path[1:])}
    (tryout,) = [block for block in steps if "--index tryout" in block]
    done = subprocess.run(
        ["sh", "-ec", "".join([*steps[:2], tryout])],
        cwd=clone,
        env=surroundings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"fields": {"file_path": ["./images/Osprey/3.jpg"], "desc": ["Osprey"]}') == 2


def test_its_terraform_outputs_exist() -> None:
    outputs = set(re.findall(r'output "(\w+)"', (ROOT / "terraform" / "outputs.tf").read_text()))
    used = set(re.findall(r"terraform output -raw (\w+)", TEXT))
    assert {"ES_URL", "ES_CA_CERT"} == used <= outputs


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        text = document.read_text()
        commands = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        used = re.findall(r"`?\bmake ([a-z-]+)", "\n".join([*commands, *re.findall(r"`make [a-z-]+`", text)]))
        assert set(used) <= targets, document


def test_links_within_the_project_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), (document, target)


def test_the_bucket_section_works_on_a_local_server(s3: S3, local: Scripts) -> None:
    """The commands of "Images in a bucket", word for word; the exports are those of a local server."""
    section = TEXT[TEXT.index("## Images in a bucket") :]
    exports, commands = re.findall(r"^```sh\n(.*?)^```", section, re.DOTALL | re.MULTILINE)[:2]
    assert set(re.findall(r"(\w+)=", exports)) <= s3.environment.keys()
    s3.put("birds")
    for seed in range(4):
        stream = io.BytesIO()
        image((60, 40), seed).save(stream, "JPEG")
        s3.put("birds", f"photos/{seed}.jpg", stream.getvalue())
    s3.put("birds", "new/heron.jpg", stream.getvalue())
    commands = commands.replace("create.py", f"{ROOT}/create.py --model thumbnail").replace(
        "search.py", f"{ROOT}/search.py"
    )
    bin_folder = local.folder / "bin"
    bin_folder.mkdir()
    (bin_folder / "python3").symlink_to(sys.executable)
    surroundings = local.environment | s3.environment
    surroundings |= {"PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": ":".join(sys.path[1:])}
    done = subprocess.run(
        ["sh", "-ec", commands], cwd=local.folder, env=surroundings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert '"file_path": ["s3://birds/photos/3.jpg"], "desc": ["photos"]' in done.stdout


def test_the_sql_of_the_local_index_works(local: Scripts) -> None:
    (local.folder / "images" / "Osprey").mkdir(parents=True)
    for seed in range(8):
        image((30, 20), seed).save(local.folder / "images" / "Osprey" / f"{seed}.jpg")
    local.index = "images"
    local.create()
    text = (ROOT / "docs" / "local-index.md").read_text()
    with contextlib.closing(sqlite3.connect(local.folder / "imagesearch.db")) as database:
        queries = re.findall(r"^sqlite3 imagesearch.db '(.*)'$", text, re.MULTILINE)
        assert len(queries) == 3
        assert all(database.execute(query).fetchall() for query in queries)
    search = re.findall(r"^```sql\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[0]
    database_ = apsw.Connection(str(local.folder / "imagesearch.db"))
    database_.enable_load_extension(True)
    database_.load_extension(sqlite_vec.loadable_path())
    rows = database_.execute(search).fetchall()
    assert len(rows) == 8 and rows[0] == ("./images/Osprey/7.jpg", pytest.approx(0, abs=1e-6))
    database_.close()


def test_contributing_names_every_module_and_no_other() -> None:
    named = set(re.findall(r"`(?:imagesearch/)?(\w+)\.py`", (ROOT / "CONTRIBUTING.md").read_text()))
    modules = {path.stem for path in (ROOT / "imagesearch").glob("*.py")} - {"__init__"}
    helpers = {path.stem for path in (ROOT / "tests").glob("*.py")}
    assert modules <= named <= modules | helpers | {"create", "search"}


def test_a_guard_keeps_what_is_no_url_out_of_es_url() -> None:
    """In a folder without state, `terraform output -raw` prints a warning and exits with 0."""
    guard = next(line for line in TEXT.splitlines() if line.startswith("case"))
    for value, kept in (("https://admin:x@host:1", True), ("╷ Warning: No outputs found", False), ("", False)):
        command = f'ES_URL="$1"; {guard}; echo "${{ES_URL-unset}}"'
        shown = subprocess.run(["bash", "-c", command, "", value], stdout=subprocess.PIPE, text=True, check=True).stdout
        assert shown.splitlines()[-1] == (value if kept else "unset")


def test_examples_of_curl_fail_with_the_body() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for line in path.read_text().splitlines():
            if re.match(r"(\s*|.*&& )curl ", line) and "localhost" not in line:
                assert "--fail-with-body" in line, (path, line)
