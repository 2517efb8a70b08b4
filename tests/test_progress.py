"""The progress bar, the lines without a terminal, and the rate and time left that they tell."""

import contextlib
import os
import pty
import re
import subprocess
import sys
import termios
import time

import pytest

from imagesearch.progress import KINDS_SHOWN, MAX_KINDS, Progress
from imagesearch.records import Document, ImageFile
from tests.pictures import Picture
from tests.running import Scripts
from tests.server import ROOT


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


def test_kinds_beyond_the_first_thousand_are_counted_together() -> None:
    progress = Progress()
    for number in range(MAX_KINDS + 50):
        progress.count_skipped(f".{number}")
    for _ in range(2):  # asking changes nothing
        assert progress.summary().endswith(f".9, {MAX_KINDS + 50 - KINDS_SHOWN:,} other")
