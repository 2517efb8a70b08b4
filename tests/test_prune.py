"""--prune deletes what is gone, and nothing because of where it is run or what could not be read."""

import shutil
from pathlib import Path

import pytest

from tests.pictures import Picture, Pictures
from tests.running import Scripts, counts, end

pytestmark = pytest.mark.slow


@pytest.fixture
def six_images(pictures: Pictures) -> list[Path]:
    return pictures(6, classes=2)


def test_what_is_gone_below_the_folder_is_deleted(scripts: Scripts, six_images: list[Path], picture: Picture) -> None:
    other = picture("other/a.png")
    picture("images-too/b.png")
    for folder in ("images", "other", "images-too"):
        scripts.create("--images", folder)
    for path in [*six_images[:2], other]:
        path.unlink()
    stderr = scripts.create()
    assert counts(stderr) == {"unchanged": 4}
    assert "Documents without an image: 2; --prune deletes them." in stderr
    stderr = scripts.create("--prune")
    assert counts(stderr) == {"unchanged": 4, "deleted": 2} and "Documents without" not in stderr
    left = [f"./{path.relative_to(scripts.folder)}" for path in six_images[2:]]
    assert scripts.paths() == sorted([*left, "./other/a.png", "./images-too/b.png"])
    assert "Documents without" not in scripts.create()
    assert [line["hits"]["hits"][0]["fields"]["file_path"][0] for line in scripts.search(*six_images[2:])] == left


def test_unreadable_files_are_not_among_documents_without_an_image(scripts: Scripts, six_images: list[Path]) -> None:
    scripts.create()
    six_images[0].unlink()
    six_images[1].write_bytes(b"damaged")
    (scripts.folder / "images" / "new.png").write_bytes(b"damaged")
    assert "Documents without an image: 1; --prune" in scripts.create(exits=1)
    assert counts(scripts.create("--prune", exits=1)) == {"unchanged": 4, "deleted": 1, "unreadable": 2}
    assert scripts.count() == 5  # the damaged one keeps its document


def test_only_what_cannot_be_read_is_kept(scripts: Scripts, six_images: list[Path], pictures: Pictures) -> None:
    """`images/usb` is a link to a disk that is unplugged; lost+found can be read by its owner only."""
    pictures(3, folder="disk/deep")
    (scripts.folder / "images" / "usb").symlink_to(scripts.folder / "disk")
    pictures(2, folder="images/lost")
    assert counts(scripts.create())["new"] == 11
    (scripts.folder / "disk").rename(scripts.folder / "unplugged")
    (scripts.folder / "images" / "lost").rename(scripts.folder / "elsewhere")
    (scripts.folder / "images" / "lost").symlink_to("/proc/1/task/0")
    six_images[0].unlink()
    stderr = scripts.create("--prune", exits=1)
    assert "Cannot read ./images/usb: a link whose target is missing" in stderr
    assert counts(stderr) == {"unchanged": 5, "deleted": 1, "unreadable": 2}
    assert scripts.count() == 10 and "./images/0/0.png" not in scripts.paths()


def test_an_emptied_folder_is_pruned_only_on_request(scripts: Scripts, six_images: list[Path]) -> None:
    scripts.create()
    for path in six_images:
        path.unlink()
    assert "There are no images below ./images" in scripts.create("--prune", exits=2)
    assert counts(scripts.create("--prune-all")) == {"deleted": 6}
    shutil.rmtree(scripts.folder / "images")
    assert "No such file or directory" in scripts.create("--prune-all", exits=2)  # an unmounted disk


def test_a_large_loss_is_pruned_only_on_request(scripts: Scripts, six_images: list[Path], picture: Picture) -> None:
    """As with a disk that is not mounted, or a subfolder that was moved away by mistake; refused each time."""
    scripts.create()
    shutil.rmtree(scripts.folder / "images")
    for number in range(3):
        picture(f"images/{number}-new.png", seed=100 + number)
    for before in ({"new": 3}, {"unchanged": 3}):
        stderr = scripts.create("--prune", exits=2)
        assert counts(stderr) == before
        assert "--prune would delete 6 documents below ./images, more than the number of images there (3)" in stderr
        assert "Documents without" not in stderr
    assert scripts.count() == 9
    assert counts(scripts.create("--prune-all")) == {"unchanged": 3, "deleted": 6}


def test_a_disk_that_is_unmounted_during_the_run_prunes_nothing(scripts_on_file: Scripts, many_images: Path) -> None:
    scripts = scripts_on_file
    shutil.copytree(many_images / "images", scripts.folder / "images")
    scripts.create("--images", "images/1")
    process = scripts.start_paused("--prune")
    (scripts.folder / "images").rename(scripts.folder / "disk")
    (scripts.folder / "images").mkdir()  # as an empty mount point
    scripts.go_on()
    code, stderr = end(process)
    assert code == 2, stderr
    assert "more than the number of images there (0)" in stderr and "deleted" not in counts(stderr)


def test_a_part_prunes_only_what_is_its_own(scripts: Scripts, pictures: Pictures) -> None:
    paths = pictures(50)
    scripts.create()
    for path in paths[:16]:
        path.unlink()
    deleted = [counts(scripts.create("--part", f"{part}/2", "--prune"))["deleted"] for part in (1, 2)]
    assert sum(deleted) == 16
    assert min(deleted) >= 3
    assert scripts.count() == 34
