"""What a terminal shows: the bar, the hits in lines; and what stays if there is none any more."""

import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from imagesearch.progress import KINDS_SHOWN, Progress
from tests.pictures import Pictures
from tests.running import BROKEN, MANY, Scripts, end, patched

pytestmark = pytest.mark.slow


# In a script: on two CPUs, an embedding takes at least 20 ms, so that there is time to see the bar on any machine.
SLOWLY = """
import time
import imagesearch.models.clip as clip
import imagesearch.parallel as parallel
parallel.available_cpus = lambda: 2
create_embedding = clip.Clip.create_embedding
def slowly(self, pixels):
    time.sleep(0.02)
    return create_embedding(self, pixels)
clip.Clip.create_embedding = slowly
"""


def on_a_terminal(
    scripts: Scripts, script: str, *arguments: object, columns: Any = 80, stdout: Any = "/dev/tty"
) -> tuple[int, str]:
    """Runs a script on a terminal; its exit code and what is shown."""
    command = shlex.join([sys.executable, *scripts.arguments(script, *arguments)])
    command = shlex.quote(f"stty rows 24 cols {columns}; {command} >{stdout}")
    done = scripts.shell(f"script -qec {command} /dev/null", TERM="xterm", SHELL="/bin/sh")
    assert not re.search(BROKEN, done.stdout), done.stdout
    return done.returncode, re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", done.stdout)


def test_the_bar_counts_what_is_embedded(scripts_on_file: Scripts, pictures: Pictures, small_clip: Path) -> None:
    """It begins when there is a rate to tell, here after half a second; broken links are not counted."""
    pictures(200)
    (scripts_on_file.folder / "images" / "bad.png").write_bytes(b"no image")
    (scripts_on_file.folder / "images" / "link.png").symlink_to("missing.png")
    sooner = {"imagesearch.progress.BAR_AFTER_SECONDS": 0.5}
    scripts_on_file.environment |= patched(scripts_on_file.folder, sooner, SLOWLY)
    code, shown = on_a_terminal(scripts_on_file, "create.py", "--model", small_clip, columns=40)
    assert code == 1
    assert "Preparing the model for this CPU" in shown
    states = [line for line in re.split(r"[\r\n]+", shown) if re.search(r"\d+/201", line)]
    done = [int(state.group(1)) for line in states if (state := re.search(r"(\d+)/201", line))]
    assert done == sorted(done) and done[-1] == 201 and "100%" in states[-1]
    assert 0 < done[0] < 201 and len(set(done)) > 4
    assert all(len(line) <= 40 for line in states)


def test_the_time_left_is_told_from_what_is_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from what is unchanged, which takes no time: a resumed run would seem to be at its end."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = Progress()
    progress.start("", [])
    for _ in range(1000):
        progress.count_unchanged()
    progress._bar.start_t -= 1
    progress.advance(4)
    rate = re.search(r"1004.* ([\d.]+) images/s", str(progress._bar))
    assert rate and 2 < float(rate[1]) <= 4


def test_without_a_terminal_there_is_a_line_now_and_then(scripts_on_file: Scripts, bird_images: list[Path]) -> None:
    """Every 30 seconds; here with each chunk."""
    settings = patched(scripts_on_file.folder, {"imagesearch.progress.LINE_INTERVAL_SECONDS": 0})
    stderr = scripts_on_file.create(new_python=True, **settings)
    assert "\n31 images done\n" in stderr


def test_kinds_beyond_the_first_ten_are_counted_together() -> None:
    progress = Progress()
    for number in range(KINDS_SHOWN + 50):
        progress.count_skipped(f".{number}")
    for _ in range(2):  # asking changes nothing
        assert progress.summary().endswith(".9, 50 other")


def test_many_unreadable_images_are_not_all_named_on_a_terminal(scripts_on_file: Scripts) -> None:
    (scripts_on_file.folder / "images").mkdir()
    for number in range(50):
        (scripts_on_file.folder / "images" / f"{number}.png").write_bytes(b"no image")
    code, shown = on_a_terminal(scripts_on_file, "create.py")
    assert code == 1
    assert shown.count("Cannot read") == 20 and shown.count("More files cannot be read") == 1


def test_a_terminal_shows_each_hit_in_a_line(scripts_on_file: Scripts, bird_images: list[Path]) -> None:
    scripts_on_file.create()
    _, shown = on_a_terminal(scripts_on_file, "search.py", bird_images[0])
    lines = re.split(r"[\r\n]+", shown.strip())
    assert lines[0].startswith(f"Index {scripts_on_file.index} in {scripts_on_file.index}.db, made with the model")
    assert lines[-1] == "1.0000000  Bald_Eagle  ./images/Bald_Eagle/0.png"
    code, shown = on_a_terminal(scripts_on_file, "search.py", "images/Osprey", "missing.png")
    assert code == 1
    assert re.search(r"\./images/Osprey/3\.png:\s+1\.0000000  Osprey  \./images/Osprey/3\.png", shown)
    assert shown.count("Cannot read missing.png") == 1


def test_a_terminal_shows_how_many_searches_are_done(many_on_file: Scripts) -> None:
    many_on_file.create()
    many_on_file.environment |= patched(many_on_file.home, {"imagesearch.progress.BAR_AFTER_SECONDS": 0})
    code, shown = on_a_terminal(many_on_file, "search.py", *["images"] * 3, stdout="/dev/null")
    assert code == 0 and re.search(rf"\d+/{3 * MANY} \[\d+:\d\d<", shown), shown[-300:]


@pytest.mark.parametrize("closing", ["2>&-", "2>/dev/full", "2>/dev/full <&-"])
def test_unwritable_messages_are_dropped(closing: str, scripts_on_file: Scripts, bird_images: list[Path]) -> None:
    search = f"SEARCH missing.png {bird_images[0]}"
    for command, code, lines in ((f"CREATE {closing}", 0, 0), (f"{search} {closing}", 1, 2)):
        done = scripts_on_file.shell(command)
        assert done.returncode == code
        assert len([json.loads(line) for line in done.stdout.splitlines()]) == lines


def test_results_that_cannot_be_written_are_an_error(scripts_on_file: Scripts, bird_images: list[Path]) -> None:
    scripts_on_file.create()
    for command, message in (
        (f"SEARCH {bird_images[0]} >/dev/full", "the results cannot be written: No space left on device."),
        (f"SEARCH {bird_images[0]} >&-", "the results cannot be written: Bad file descriptor."),
        ("SEARCH - <&-", "Cannot read standard input: it is empty"),
    ):
        done = scripts_on_file.shell(command)
        assert done.returncode == 1 and message in done.stderr, done.stderr


def test_a_run_goes_on_when_its_terminal_is_closed(many_on_file: Scripts) -> None:
    """As one that was disowned."""
    ours, theirs = os.openpty()
    process = many_on_file.start_paused(stderr=theirs, TERM="xterm")
    os.close(theirs)
    os.close(ours)
    many_on_file.go_on()
    assert process.wait() == 0
    assert many_on_file.count() == MANY


def test_ctrl_c_is_ignored_where_it_was(many_on_file: Scripts) -> None:
    """As in a background job of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = many_on_file.start_paused()
    finally:
        signal.signal(signal.SIGINT, before)
    process.send_signal(signal.SIGINT)
    many_on_file.go_on()
    code, stderr = end(process)
    assert code == 0, stderr
