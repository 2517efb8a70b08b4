"""`make demo` on the files of this clone, and the pinned requirements."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.running import environment
from tests.server import ROOT


@pytest.mark.slow
def test_make_demo_says_what_it_does_and_leaves_the_users_files_alone(tmp_path: Path) -> None:
    users = [ROOT / "images", *(ROOT / "images").rglob("*"), *ROOT.glob("imagesearch.db*")]
    before = {path: path.stat().st_mtime_ns for path in users}
    surroundings = environment(tmp_path) | {"ES_URL": "https://u:p@localhost:9"}  # the demo is local all the same
    done = subprocess.run(["make", "demo"], cwd=ROOT, env=surroundings, capture_output=True, text=True, check=True)
    assert "CLIP could not be downloaded; continuing with --model thumbnail" in done.stdout
    assert "$ cd build/demo; python3 ../../create.py --model thumbnail" in done.stdout
    found = re.search(r"^(\d+) of 50 held-out digits found one of their own class", done.stdout, re.MULTILINE)
    assert found
    assert 40 <= int(found[1]) < 50  # 8 by 8 pixels and no learning: good, not perfect
    assert "500 new" in done.stderr
    assert (ROOT / "build" / "demo" / "imagesearch.db").exists()
    assert f"Look at {(ROOT / 'build' / 'demo' / 'results.html').as_uri()}" in done.stdout
    assert (ROOT / "build" / "demo" / "results.html").read_text().count("<li>") == 5 * 12
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert (ROOT / "imagesearch.db" in before) == (ROOT / "imagesearch.db").exists()


def test_every_requirement_is_pinned_and_the_tests_use_the_same_versions() -> None:
    pins = {}
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = (ROOT / name).read_text().splitlines()
        requirements = [line for line in lines if line and not line.lstrip().startswith("#")]
        assert all(re.match(r"[\w.-]+==[\w.]+( ; .+)?$", line) for line in requirements)
        pins[name] = set(requirements)
    assert pins["requirements.txt"] <= pins["requirements-dev.txt"]


@pytest.mark.slow
def test_the_lock_fits_what_it_was_compiled_from(tmp_path: Path) -> None:
    surroundings = os.environ | {"PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}"}
    for name in ("requirements", "requirements-dev"):
        locked = ROOT / f"{name}.txt"
        copy = tmp_path / f"{name}.txt"
        copy.write_bytes(locked.read_bytes())
        command = ["uv", "pip", "compile", "--universal", "--python-version", "3.11", "--quiet"]
        subprocess.run([*command, f"{name}.in", "-o", str(copy)], cwd=ROOT, check=True, env=surroundings)
        pins = [re.findall(r"^[^\s#].*$", path.read_text(), re.MULTILINE) for path in (locked, copy)]
        assert pins[0] == pins[1]
