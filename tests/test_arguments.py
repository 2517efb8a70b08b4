"""The command lines of both scripts: what is wrong is one line, and names are taken as users write them."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pictures import Pictures
from tests.running import Scripts, counts
from tests.server import ROOT

pytestmark = pytest.mark.slow

INVALID_INDICES = ("Images", "'a b'", "-a", "..", "a/b", "'a*'", "''", 256 * "x")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("create.py --imag x", "unrecognized arguments"),
        ("create.py --model missing.onnx", "no such file"),
        ("create.py --images ''", "must be a folder"),
        ("create.py --images https://example.com/a", "--images takes a folder, or a bucket"),
        ("create.py --images images/0.png", "is a file, not a folder"),
        ("create.py my photos", "to index a folder or bucket, use --images 'my photos'"),
        ("create.py --index birds.db", "for a file, use --db birds.db"),
        *((f"create.py --index={name}", "must be lowercase") for name in INVALID_INDICES),
        ("create.py --db :memory:", "must be the path of a file"),
        ("create.py --db images", "images is a folder"),
        ("create.py --db /nowhere/x.db", "there is no folder /nowhere"),
        ("create.py --db x.db --index x", "use one of the two"),
        ("create.py --index-type hnsw", "--index-type is for Elasticsearch"),
        ("create.py --index-type flat", "invalid choice"),
        *((f"create.py --part {part}", "must be I/N") for part in ("0/4", "5/4", "1", "1/0", "a/b", "1/2/3")),
        ("search.py", "the following arguments are required: IMAGE"),
        *((f"search.py a.png -k {k}", "must be a whole number from 1 to 10,000") for k in ("0", "20000", "ten")),
        *((f"search.py a.png --min-score {score}", "must be a number from 0 to 1") for score in ("2", "nan")),
        ("search.py - -", "can be read only once"),
        ("search.py a.png --html -", "must be the name of a file"),
    ],
)
def test_wrong_arguments_are_one_line(command: str, message: str, scripts_on_file: Scripts, pictures: Pictures) -> None:
    pictures(1)
    script, *arguments = shlex.split(command)
    done = scripts_on_file.run(script, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(rf"{script}: .*{re.escape(message)}.*\n", done.stderr), done.stderr


def test_db_is_refused_beside_es_url(scripts_on_file: Scripts) -> None:
    done = scripts_on_file.run("create.py", "--db", "x.db", ES_URL="https://u:p@localhost:9")
    assert done.returncode == 2 and "unset ES_URL, or leave out --db" in done.stderr


@pytest.mark.parametrize("script", ["create.py", "search.py"])
def test_help_names_options_variables_and_examples_and_shows_no_secret(script: str, scripts_on_file: Scripts) -> None:
    done = scripts_on_file.run(script, "--help", ES_URL="https://admin:hunter2@localhost:9")
    assert done.returncode == 0 and "hunter2" not in done.stdout
    for name in ("--index", "--db", "--model", "--insecure", "ES_URL", "ES_CA_CERT", "ES_API_KEY", "examples:"):
        assert name in done.stdout


def test_names_are_taken_as_users_write_them(scripts_on_file: Scripts, bird_images: list[Path]) -> None:
    scripts = scripts_on_file
    assert counts(scripts.create("--images", f"file://{scripts.folder}/images")) == {"new": 31}
    scripts.environment["HOME"] = str(scripts.folder)
    (scripts.folder / "link").symlink_to("images")
    for given in ("~/images", "./images/", "images/../images", "link/../images", f"../{scripts.folder.name}/images"):
        assert counts(scripts.create("--images", given)) == {"unchanged": 31}, given
    shutil.copy(bird_images[0], scripts.folder / "-k.png")
    for words in ((f"file://{bird_images[0]}",), ("~/images/Bald_Eagle/0.png",), ("--", "-k.png")):
        assert scripts.search(*words)[0]["hits"]["max_score"] == pytest.approx(1, abs=1e-6)
    between = scripts.search(bird_images[0], "-k", 2, bird_images[1], "--desc", "Osprey")  # options between images
    assert len(between) == 2
    for query, reason in (
        ("ftp://example.com/a.png", "only http://, https://, s3://, gs:// and az:// URLs are read"),
        ("golden retriever", "does not search by words"),
    ):
        done = scripts.run("search.py", query)
        assert done.returncode == 1 and reason in done.stderr
    (scripts.folder / "s3:" / "birds").mkdir(parents=True)
    shutil.copy(bird_images[0], scripts.folder / "s3:" / "birds" / "a.png")
    scripts.create("--images", "./s3://birds")
    assert "./s3:/birds/a.png" in scripts.paths()


def test_an_older_python_is_told_apart() -> None:
    """Before anything else, in a line."""
    pythons = [*Path.home().glob(".pyenv/versions/3.[89].*/bin/python3"), *Path("/usr/bin").glob("python3.[89]")]
    pythons += [*Path.home().glob(".pyenv/versions/3.10.*/bin/python3"), *Path("/usr/bin").glob("python3.10")]
    if not pythons:
        pytest.skip("there is no Python 3.8, 3.9 or 3.10 here; that leaves what it says untested")
    for script in ("create.py", "search.py"):
        done = subprocess.run([pythons[0], ROOT / script], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert re.fullmatch(r"Python 3\.11 or newer is needed; this is Python 3\.\d+\.\n", done.stderr)


def test_paths_are_utf_8_in_a_latin_1_locale(scripts_on_file: Scripts, bird_images: list[Path]) -> None:
    """A hit in a folder with an emoji, which Latin-1 has not; the locale need not be installed."""
    locale = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "en_US.ISO-8859-1"}
    if "iso8859-1" not in scripts_on_file.shell("locale -a").stdout:
        scripts_on_file.shell("localedef -i en_US -f ISO-8859-1 ./en_US.ISO-8859-1")
        locale["LOCPATH"] = str(scripts_on_file.folder)
    python = f"{sys.executable} -c 'import sys; print(sys.getfilesystemencoding())'"
    if "utf-8" in scripts_on_file.shell(python, **locale).stdout:
        pytest.skip("no Latin-1 locale can be made here; that leaves such locales untested")
    os.rename(scripts_on_file.folder / "images" / "Osprey", scripts_on_file.folder / "images" / "🦅")
    run = scripts_on_file.shell("CREATE --images images/🦅 && SEARCH images/🦅/3.png --html page.html", **locale)
    assert run.returncode == 0 and '"./images/🦅/3.png"' in run.stdout, run.stderr
