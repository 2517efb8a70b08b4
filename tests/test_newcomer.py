"""What a newcomer meets: default models, words that help, and progress that tells the truth."""

import contextlib
import os
import pty
import re
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from imagesearch.progress import Progress
from imagesearch.records import Document, ImageFile
from tests.pictures import Picture, averaging_model
from tests.running import Scripts, counts
from tests.server import ROOT


def test_without_model_create_uses_that_of_the_index(scripts: Scripts, picture: Picture) -> None:
    """And does not try to download CLIP first."""
    picture("images/a.png")
    model = averaging_model(scripts.folder / "model.onnx")
    for name, suffix in (("thumbnail", ""), (str(model), "-x")):
        scripts.index += suffix
        scripts.create("--model", name)
        picture("images/b.png", seed=len(name))
        done = scripts.run("create.py")
        assert done.returncode == 0, done.stderr
        assert counts(done.stderr).keys() <= {"new", "updated", "unchanged"}
    model.rename(scripts.folder / "moved.onnx")
    done = scripts.run("create.py")
    assert done.returncode == 2 and "use --model FILE to say where it is now" in done.stderr


def test_a_mistyped_class_names_the_nearest(scripts: Scripts, picture: Picture) -> None:
    for number in range(12):
        picture(f"images/{('Bald_Eagle', 'Golden_Eagle', 'Osprey')[number % 3]}/{number}.png", seed=number)
    scripts.create()
    done = scripts.run("search.py", "images/Osprey/2.png", "--desc", "bald_eagel")
    assert done.returncode == 1
    nearest = "has no image of class bald_eagel among its 3 classes; did you mean Bald_Eagle"
    assert f"The index {scripts.index} {nearest}" in done.stderr
    done = scripts.run("search.py", "images/Osprey/2.png", "--desc", "zzz")
    assert "among its 3 classes (Bald_Eagle, Golden_Eagle, Osprey). An image's class" in done.stderr


def test_parts_of_a_local_file_are_warned_about(local: Scripts, picture: Picture) -> None:
    picture("images/a.png")
    assert "must not write to one index file on a network share" in local.create("--part", "1/2")


def on_a_terminal(local: Scripts, columns: int, *arguments: str) -> list[str]:
    """What create.py shows on a terminal of so many columns, line by line, as it overwrites them."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    command = [sys.executable, str(ROOT / "create.py"), "--model", "thumbnail", "--index", local.index, *arguments]
    shown = b""
    with subprocess.Popen(command, cwd=local.folder, env=local.environment | {"TERM": "xterm"}, stderr=theirs):
        os.close(theirs)
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(ours, 4096):
                shown += part
    os.close(ours)
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", shown.decode()))


@pytest.mark.parametrize(("columns", "bar"), [(40, False), (79, False), (80, True), (200, True)])
def test_progress_fits_the_terminal(columns: int, bar: bool, local: Scripts, picture: Picture) -> None:
    for number in range(30):
        picture(f"images/{number}.png", size=(8, 8), seed=number)
    (local.folder / "images" / "bad.png").write_bytes(b"no image")
    lines = on_a_terminal(local, columns, "--db", "x.db")
    states = [line for line in lines if re.search(r"\d+/31", line)]
    assert states and "31/31, 1 unreadable" in states[-1]
    assert all(len(line) < columns for line in states)
    assert any("|" in line for line in states) == bar


class Clock:
    """Time that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def embedded(number: int, is_copy: bool = False) -> Document:
    return Document(ImageFile("", str(number), "", 0, 0), "", None, is_copy=is_copy)  # type: ignore[arg-type]


def test_rate_and_time_left_count_only_what_is_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run first finds 90,000 unchanged images within a second: they promise nothing."""
    clock = Clock(monkeypatch)
    progress = Progress()
    progress._total = 100_000
    for _ in range(90_000):
        progress.count_unchanged()
    clock.now += 1
    progress.start_embedding()
    progress.count_written(embedded(0))
    assert progress._status() == "90,001/100,000"  # no estimate from a single image
    for number in range(1, 400):
        clock.now += 0.01
        progress.count_written(embedded(number))
    assert re.fullmatch(r"90,400/100,000, 100/s, 2m left", progress._status())
    for number in range(1000):
        progress.count_written(embedded(number, is_copy=True))
    assert progress._status().startswith("91,400/100,000, 100/s")


def test_without_a_terminal_a_line_every_30_seconds(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    progress = Progress()
    progress.start_embedding()
    for number in range(650):
        clock.now += 0.1
        progress.count_written(embedded(number))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"\d+ images, 10/s", lines[0])


def test_examples_of_curl_fail_with_the_body() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for line in path.read_text().splitlines():
            if re.match(r"(\s*|.*&& )curl ", line) and "localhost" not in line:
                assert "--fail-with-body" in line, (path, line)


def test_models_are_ignored_by_git(tmp_path: Path) -> None:
    names = ["clip.onnx", "model.onnx.data", "imagesearch.db", "images/a.jpg"]
    done = subprocess.run(["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == names
