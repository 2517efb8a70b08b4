"""--prune deletes what is gone, and nothing because of where it is run."""

import os
import shutil
import signal
import sqlite3
import time
from pathlib import Path

from imagesearch.folder import _has_other_case
from tests.pictures import Picture, image
from tests.running import Scripts, counts, end, rows, signals, wait_until


def images(picture: Picture, count: int = 6) -> list[Path]:
    return [picture(f"images/{number % 2}/{number}.png", size=(8, 8), seed=number) for number in range(count)]


def test_an_emptied_folder_is_pruned_only_on_request(scripts: Scripts, picture: Picture) -> None:
    paths = images(picture)
    scripts.create()
    for path in paths:
        path.unlink()
    stderr = scripts.create("--prune", code=2)
    assert "--prune would delete all 6 documents below ./images" in stderr
    assert "there are no images at all. If that is intended, use --prune-all." in stderr
    assert "There are no images below ./images" in scripts.create(code=2)
    assert counts(scripts.create("--prune-all")) == {"deleted": 6}
    assert "There are no images" in scripts.create("--prune", code=2)
    shutil.rmtree(scripts.folder / "images")
    assert "No such file or directory" in scripts.create("--prune-all", code=2)  # an unmounted disk


def test_the_documents_of_a_folder_that_is_gone_can_be_deleted(scripts: Scripts, picture: Picture) -> None:
    images(picture)
    scripts.create()
    (scripts.folder / "images").rename(scripts.folder / "photos")
    assert counts(scripts.create("--images", "photos")) == {"new": 6, "known": 6}
    assert "make an empty one in its place and use --prune-all" in scripts.create("--prune", code=2)
    (scripts.folder / "images").mkdir()
    assert counts(scripts.create("--prune-all")) == {"deleted": 6}


def test_another_folder_of_the_same_name_prunes_nothing(scripts: Scripts, picture: Picture) -> None:
    """Two checkouts use one index; the second has images of its own."""
    images(picture)
    scripts.create("--db", scripts.folder / "shared.db")
    home, other = scripts.folder, scripts.folder / "other"
    picture("other/images/new.png")
    scripts.folder = other
    stderr = scripts.create("--prune", "--db", home / "shared.db", code=2)
    assert f"The paths in the index are relative to {home}" in stderr
    assert counts(scripts.create("--db", home / "shared.db")) == {"new": 1}  # under its own name
    assert counts(scripts.create("--db", home / "shared.db", "--images", other / "images", "--prune")) == {
        "unchanged": 1
    }
    scripts.folder = home
    assert counts(scripts.create("--db", home / "shared.db", "--prune")) == {"unchanged": 6}


def test_the_same_path_with_other_images_prunes_nothing(scripts: Scripts, picture: Picture) -> None:
    """As on another machine, where the same folder has other images."""
    images(picture)
    scripts.create()
    shutil.rmtree(scripts.folder / "images")
    for number in range(3):
        picture(f"images/{number}-new.png", seed=100 + number)
    stderr = scripts.create("--prune", code=2)
    assert "delete all 6 documents" in stderr and "the 3 images there look new" in stderr
    assert counts(scripts.create("--prune-all")) == {"new": 3, "deleted": 6}


def test_a_disk_that_is_unmounted_during_the_run_prunes_nothing(local: Scripts, many_images: Path) -> None:
    shutil.copytree(many_images / "images", local.folder / "images")
    process = local.start("create.py", "--model", "thumbnail", "--prune")
    wait_until(lambda: process.poll() is not None or rows(local.folder / "imagesearch.db") > 0)
    (local.folder / "images").rename(local.folder / "disk")
    (local.folder / "images").mkdir()  # as an empty mount point
    code, stderr = end(process)
    assert code == 2, stderr
    written = counts(stderr)["new"]
    assert f"--prune would delete all {written:,} documents below ./images" in stderr
    assert rows(local.folder / "imagesearch.db") == written


def test_what_was_deleted_before_an_interruption_is_counted(local: Scripts, picture: Picture) -> None:
    database = local.folder / "imagesearch.db"
    _, *gone = images(picture)
    local.create()
    for path in gone:
        path.unlink()
    lock = sqlite3.connect(database, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")  # the deletion waits for it
    process = local.start("create.py", "--model", "thumbnail", "--prune")
    wait_until(lambda: is_waiting(process.pid))
    process.send_signal(signal.SIGINT)
    lock.execute("ROLLBACK")
    code, stderr = end(process)
    assert code == 130, stderr
    assert rows(database) == 1
    assert counts(stderr) == {"unchanged": 1, "deleted": 5}


def is_waiting(pid: int) -> bool:
    """True if a script that handles SIGTERM, which it does from the beginning of its work, uses no CPU."""
    if signal.SIGTERM not in signals(pid, "SigCgt"):
        return False

    def cpu_ticks() -> list[str]:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]

    before = cpu_ticks()
    time.sleep(0.5)
    return cpu_ticks() == before


def test_a_folder_has_one_name_from_everywhere(scripts: Scripts, picture: Picture) -> None:
    images(picture)
    database = scripts.folder / "index.db"
    assert counts(scripts.create("--db", database)) == {"new": 6}
    (scripts.folder / "link").symlink_to("images")
    for given in (
        scripts.folder / "images",
        "./images/",
        "images/../images",
        "link",
        f"../{scripts.folder.name}/images",
    ):
        assert counts(scripts.create("--db", database, "--images", given)) == {"unchanged": 6}, given
    scripts.folder /= "images"
    assert counts(scripts.create("--db", database, "--images", ".")) == {"unchanged": 6}
    assert "are relative to" in scripts.create("--db", database, "--images", ".", "--prune", code=2)
    assert counts(scripts.create("--db", database, "--images", scripts.folder, "--prune")) == {"unchanged": 6}
    scripts.folder = scripts.folder.parent
    hits = scripts.search("images/0/0.png", "-k", 100, "--db", database)[0]["hits"]["hits"]
    assert sorted(hit["fields"]["file_path"][0] for hit in hits) == [
        f"./images/{n % 2}/{n}.png" for n in (0, 2, 4, 1, 3, 5)
    ]


def test_a_renamed_folder_is_copied_and_pruned(scripts: Scripts, picture: Picture) -> None:
    images(picture)
    scripts.create()
    os.rename(scripts.folder / "images" / "1", scripts.folder / "images" / "one")
    assert counts(scripts.create("--prune")) == {"new": 3, "known": 3, "unchanged": 3, "deleted": 3}
    assert len(scripts.paths()) == 6


def move_into_project(scripts: Scripts) -> None:
    """Moves the images into the folder `project`, where the scripts run from now on."""
    home, scripts.folder = scripts.folder, scripts.folder / "project"
    scripts.folder.mkdir()
    (home / "images").rename(scripts.folder / "images")


def test_a_project_folder_that_was_moved_keeps_its_names(scripts: Scripts, picture: Picture) -> None:
    images(picture)
    move_into_project(scripts)
    scripts.create()
    scripts.folder = scripts.folder.rename(scripts.folder.parent / "moved")
    (scripts.folder / "images" / "0" / "0.png").unlink()
    assert counts(scripts.create("--prune")) == {"unchanged": 5, "deleted": 1}
    scripts.search("images/1/1.png", "-k", 5, "--html", "page.html")
    assert (scripts.folder / "page.html").read_text().count("<img") == 6


def test_an_index_of_another_machine_is_not_overwritten(scripts: Scripts, picture: Picture) -> None:
    """Another machine has no such folder, but has images of its own at the same relative paths."""
    home = scripts.folder
    images(picture)
    move_into_project(scripts)
    scripts.create("--db", home / "shared.db")
    scripts.folder = scripts.folder.rename(home / "other")
    shutil.rmtree(scripts.folder / "images")
    picture("other/images/0/0.png", seed=100)
    stderr = scripts.create("--db", home / "shared.db", code=2)
    assert f"relative to {home}/project, which is not here, and the images in ./images look new" in stderr


def test_a_name_in_another_letter_case_is_another_name(tmp_path: Path) -> None:
    """On macOS and Windows, the file of a document can be found though its name has changed."""
    (tmp_path / "Osprey").mkdir()
    (tmp_path / "Osprey" / "a.png").touch()
    assert not _has_other_case(str(tmp_path / "Osprey" / "a.png"), str(tmp_path))
    assert _has_other_case(str(tmp_path / "Osprey" / "A.png"), str(tmp_path))
    assert _has_other_case(str(tmp_path / "osprey"), str(tmp_path))
    assert not _has_other_case(str(tmp_path / "Osprey" / "b.png"), str(tmp_path))


def test_two_names_with_the_same_text_are_not_one_document(local: Scripts) -> None:
    folder = local.folder / "images"
    folder.mkdir()
    for seed, name in enumerate([os.fsdecode(b"caf\xe9.png"), "caf\\xe9.png"]):
        image((30, 30), seed).save(folder / name)
    stderr = local.create(code=1)
    assert counts(stderr) == {"new": 1, "unreadable": 1}
    assert r"Cannot read './images/caf\xe9.png': names with \x80 to \xff stand for bytes" in stderr
