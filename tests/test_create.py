"""create.py as a user runs it, on the local file and on a real Elasticsearch over TLS."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from imagesearch.parallel import available_cpus
from tests.pictures import Picture, Pictures, averaging_model, image
from tests.running import Scripts, counts, end, patched, skipped, summary
from tests.server import ROOT

pytestmark = pytest.mark.slow

# Python imports it at its start: each call of the model appends a byte to a file.
COUNTING = """
import imagesearch.models as models
embed = models.Thumbnail.create_embedding
def counting(self, pixels):
    with open({path!r}, "ab") as file:
        file.write(b".")
    return embed(self, pixels)
models.Thumbnail.create_embedding = counting
"""


@pytest.fixture
def model_calls(scripts: Scripts) -> Path:
    """A file that has a byte for each call of the model by create.py in a new Python."""
    path = scripts.folder / "calls"
    path.touch()
    scripts.environment |= patched(scripts.folder, source=COUNTING.format(path=str(path)))
    return path


def test_a_second_run_embeds_only_what_changed(scripts: Scripts, bird_images: list[Path], picture: Picture) -> None:
    assert counts(scripts.create()) == {"new": 31}
    assert counts(scripts.create()) == {"unchanged": 31}
    picture("images/Osprey/4.png", seed=9999)  # other content
    os.utime(bird_images[0])  # touched, same content
    picture("images/Osprey/new.png")
    assert counts(scripts.create()) == {"new": 1, "updated": 1, "unchanged": 30}
    assert counts(scripts.create()) == {"unchanged": 32}
    (hit,) = scripts.hits(bird_images[14])
    assert hit["fields"]["file_path"] == ["./images/Osprey/4.png"]
    assert hit["_score"] == pytest.approx(1, abs=1e-5)


def test_a_renamed_folder_is_not_embedded_again(scripts: Scripts, model_calls: Path, pictures: Pictures) -> None:
    pictures(40, folder="images/unsorted")
    assert counts(scripts.create(new_python=True)) == {"new": 40}
    before = scripts.embeddings()
    (scripts.folder / "images" / "unsorted").rename(scripts.folder / "images" / "Osprey")
    assert counts(scripts.create("--prune", new_python=True)) == {"new": 40, "known": 40, "deleted": 40}
    assert model_calls.stat().st_size == 40
    assert scripts.embeddings() == {path.replace("unsorted", "Osprey"): bits for path, bits in before.items()}
    (hit,) = scripts.search("images/Osprey/7.png", new_python=True)[0]["hits"]["hits"]
    assert hit["fields"] == {"file_path": ["./images/Osprey/7.png"], "desc": ["Osprey"]}


def test_copies_are_embedded_once(scripts: Scripts, model_calls: Path, picture: Picture) -> None:
    for number in range(30):
        picture(f"images/{number}.png", size=(8, 8), seed=number % 3)
    found = counts(scripts.create(new_python=True))
    embedded = model_calls.stat().st_size
    assert 3 <= embedded <= 3 * available_cpus()  # the same content may be embedded on two CPUs at one moment
    assert found == {"new": 30, "known": 30 - embedded}
    picture("images/0.png", size=(8, 8), seed=1)  # the content of 1.png
    picture("images/new.png", size=(8, 8), seed=99)
    assert counts(scripts.create(new_python=True)) == {"new": 1, "updated": 1, "known": 1, "unchanged": 29}
    assert model_calls.stat().st_size == embedded + 1
    embedded = model_calls.stat().st_size
    scripts.index += "-other"  # another index is no source of embeddings
    assert counts(scripts.create(new_python=True))["new"] == 31
    assert model_calls.stat().st_size >= embedded + 4


def test_unreadable_images_are_named_and_the_rest_goes_on(scripts: Scripts, bird_images: list[Path]) -> None:
    for path in bird_images[:25]:
        path.write_bytes(b"no image")
    for name in ("notes.txt", "more.txt", ".hidden.png", "x.a \x1b]0;title\x07"):
        (scripts.folder / "images" / name).write_text("no image")
    stderr = scripts.create(exits=1)
    assert counts(stderr) == {"new": 6, "unreadable": 25}
    assert {"2 .txt", "1 hidden"} <= set(skipped(stderr)) and "\x1b" not in stderr
    assert "Cannot read ./images/Bald_Eagle/0.png: not an image that Pillow can read\n" in stderr
    named = re.findall(r"Cannot read (\S+):", stderr)  # all of them: stderr is no terminal
    assert sorted(named) == sorted(f"./{path.relative_to(scripts.folder)}" for path in bird_images[:25])
    assert named == re.findall(r"Cannot read (\S+):", scripts.create(exits=1))  # in the listing's order, each time
    assert "Fix or move them, or leave them: the others are indexed." in stderr


def test_an_index_of_another_model_is_refused_and_left_alone(scripts: Scripts, bird_images: list[Path]) -> None:
    scripts.create()
    model = averaging_model(scripts.folder / "model.onnx")
    (scripts.folder / "images" / "new.png").write_bytes(bird_images[0].read_bytes())
    stderr = scripts.create("--model", model, exits=2)
    assert "made with --model thumbnail" in stderr and "--index" in stderr
    assert counts(scripts.create()) == {"new": 1, "known": 1, "unchanged": 31}


def test_without_model_create_uses_that_of_the_index(scripts: Scripts, picture: Picture) -> None:
    """And does not try to download CLIP first. A file is known by its content; where it is now is recorded."""
    picture("images/a.png")
    model = averaging_model(scripts.folder / "model.onnx")
    scripts.create("--model", model)
    done = scripts.shell(f"{sys.executable} {ROOT}/create.py --index {scripts.index}")
    assert done.returncode == 0 and counts(done.stderr) == {"unchanged": 1}, done.stderr
    model.rename(scripts.folder / "moved.onnx")
    done = scripts.shell(f"{sys.executable} {ROOT}/create.py --index {scripts.index}")
    assert done.returncode == 2 and "use --model FILE to say where it is now" in done.stderr
    assert counts(scripts.create("--model", "moved.onnx")) == {"unchanged": 1}
    assert scripts.hits(picture("new.png"))[0]["fields"]["file_path"] == ["./images/a.png"]


def test_clip_that_cannot_be_downloaded_names_both_ways_on(scripts: Scripts, bird_images: list[Path]) -> None:
    stderr = scripts.create("--model", "clip", exits=1)
    assert stderr.splitlines()[-1].startswith("create.py: CLIP could not be downloaded")
    assert "--model FILE" in stderr and "--model thumbnail" in stderr
    assert scripts.count() == 0


def test_a_run_says_which_index_and_model_are_used_and_what_it_did(scripts: Scripts, picture: Picture) -> None:
    """In two lines, without a terminal; without a rate, if there is little to do.

    With the start method of macOS, Python itself would report a semaphore that nobody has closed.
    """
    picture("images/a.png")
    spawning = patched(scripts.folder, source='import multiprocessing; multiprocessing.set_start_method("spawn")')
    where = r"https://localhost:\d+" if scripts.on_elasticsearch else rf"{scripts.index}\.db"
    first = rf"Index {scripts.index} in {where}, made with the model thumbnail \(a baseline, not CLIP\)\.\n"
    for number in ("1 new", "0 new, 1 unchanged"):
        stderr = scripts.create(new_python=True, **spawning)
        last = rf"{number} in \d+\.\d s; index {scripts.index}, the model thumbnail"
        assert re.match(first, stderr) and re.match(last, summary(stderr))
        assert scripts.on_elasticsearch or stderr.count("\n") == 2


def test_no_images_is_reported_in_one_line(scripts: Scripts) -> None:
    assert "./images: No such file or directory. Put your images there" in scripts.create(exits=2)
    (scripts.folder / "images").mkdir()
    (scripts.folder / "images" / "notes.txt").write_text("no image")
    assert scripts.create(exits=2).startswith("create.py: There are no images below ./images.")
    assert scripts.count() == 0 and not scripts.database.exists()


def test_names_and_classes_are_whole_whatever_they_hold(scripts: Scripts) -> None:
    names = ["plain", "two words", "quo\"te's", "new\nline", "🦅 émoji", "<script>alert(1)", "tab\tand\\back"]
    for seed, name in enumerate([*names, os.fsdecode(b"caf\xe9")]):
        folder = scripts.folder / "images" / name
        folder.mkdir(parents=True)
        image((40, 30), seed).save(folder / "x.png")
        if seed == 0:
            (folder / "gone.png").write_bytes((folder / "x.png").read_bytes())
    assert counts(scripts.create())["new"] == 9
    (scripts.folder / "images" / "plain" / "gone.png").unlink()
    assert counts(scripts.create("--prune")) == {"unchanged": 8, "deleted": 1}
    for name in [*names, os.fsdecode(b"caf\xe9")]:
        text = os.fsencode(name).decode("utf-8", "backslashreplace")
        (hit,) = scripts.hits(scripts.folder / "images" / name / "x.png", "--desc", text)
        assert hit["fields"] == {"file_path": [f"./images/{text}/x.png"], "desc": [text]}
        assert hit["_score"] == pytest.approx(1, abs=1e-5)


def test_a_project_that_was_moved_or_copied_keeps_its_names(scripts: Scripts, pictures: Pictures) -> None:
    """Those of a local index belong to the folder of its file, though the first project is still there."""
    home = scripts.home
    pictures(6, folder="project/images")
    scripts.folder = scripts.home = home / "project"
    scripts.create()
    if not scripts.on_elasticsearch:
        scripts.folder = scripts.home = Path(shutil.copytree(home / "project", home / "copy"))
        (scripts.folder / "images" / "0.png").unlink()
        assert counts(scripts.create("--prune")) == {"unchanged": 5, "deleted": 1}
    scripts.folder = scripts.home = (home / "project").rename(home / "moved")
    (scripts.folder / "images" / "0.png").unlink()
    assert counts(scripts.create("--prune")) == {"unchanged": 5, "deleted": 1}
    scripts.search("images/1.png", "-k", 5, "--html", "page.html")
    assert (scripts.folder / "page.html").read_text().count('role="img"') == 6


def test_an_older_index_is_used_unless_its_names_would_be_wrong(scripts_on_file: Scripts, picture: Picture) -> None:
    """It recorded the working directory, and may be elsewhere itself."""
    scripts = scripts_on_file
    picture("images/a.png")
    scripts.create()
    folder = f"UPDATE metadata SET record = json_set(record, '$.folder', '{scripts.folder}')"
    scripts.change(f"PRAGMA user_version = 3; {folder}")
    assert counts(scripts.create()) == {"unchanged": 1}
    (scripts.folder / "elsewhere").mkdir()
    moved = scripts.database.rename(scripts.folder / "elsewhere" / "moved.db")
    assert "its names are relative to" in scripts.run("search.py", "images/a.png", "--db", moved).stderr


def test_a_link_has_one_name(scripts: Scripts, pictures: Pictures, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever folder it was reached from: the way to it, links as they are."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for path in pictures(3, folder="there"):
        path.rename(elsewhere / path.name)
    (scripts.folder / "images").mkdir()
    (scripts.folder / "images" / "pics").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(scripts.folder / "images")
    assert counts(scripts.create()) == {"new": 3}
    assert counts(scripts.create("--images", "images/pics")) == {"unchanged": 3}
    assert scripts.paths() == [f"./images/pics/{number}.png" for number in range(3)]
    lines = scripts.search("images/pics", "images/pics/1.png", "--exclude-self")
    assert [line["image"] for line in lines] == [*scripts.paths(), "images/pics/1.png"]
    assert all(line["hits"]["max_score"] < 0.999 for line in lines)


def test_an_index_is_used_from_another_folder(scripts: Scripts, picture: Picture) -> None:
    """Relative paths stay relative to the folder that the index was made in."""
    picture("images/a.png")
    picture("elsewhere/images/b.png", seed=5)
    scripts.create()
    scripts.folder /= "elsewhere"
    assert counts(scripts.create("--prune")) == {"new": 1}  # under its own name
    assert scripts.paths() == ["./elsewhere/images/b.png", "./images/a.png"]
    (response,) = scripts.search("../images/a.png", "--html", "page.html")
    assert response["hits"]["hits"][0]["fields"]["file_path"] == ["./images/a.png"]
    assert 'href="../images/a.png"' in (scripts.folder / "page.html").read_text()


def test_folders_that_link_to_each_other_are_searched_once(scripts_on_file: Scripts, picture: Picture) -> None:
    for name in "abcdefg":
        picture(f"images/{name}/{name}.png")
    for name in "abcdefg":
        for other in set("abcdefg") - {name}:
            (scripts_on_file.folder / "images" / name / other).symlink_to(f"../{other}")
    assert counts(scripts_on_file.create()) == {"new": 7}
    assert scripts_on_file.paths() == [f"./images/{name}/{name}.png" for name in "abcdefg"]


def test_a_local_index_is_one_file(scripts_on_file: Scripts, bird_images: list[Path]) -> None:
    """Named after the index; deleted by deleting the file, replaced by renaming another. An empty file becomes one."""
    scripts, folder = scripts_on_file, scripts_on_file.folder
    (folder / "birds.db").touch()
    assert scripts.run("search.py", bird_images[0], "--index", "birds").returncode == 2
    assert counts(scripts.create("--index", "birds")) == {"new": 31}
    scripts.create("--db", folder / "other.db", "--images", "images/Osprey")
    assert sorted(path.name for path in folder.glob("*.db*")) == ["birds.db", "other.db"]
    assert scripts.search(bird_images[0], "--index", "birds")[0]["hits"]["hits"][0]["_index"] == "birds"
    (folder / "other.db").rename(folder / "birds.db")
    assert len(scripts.hits(bird_images[0], "-k", 99, "--index", "birds")) == 10


def test_parts_at_once_are_disjoint_and_together_all(scripts: Scripts, pictures: Pictures) -> None:
    pictures(60, classes=3)
    processes = [scripts.start("create.py", "--part", f"{part}/4") for part in (1, 2, 3, 4)]
    ends = [end(process) for process in processes]
    assert [code for code, _ in ends] == [0, 0, 0, 0], ends
    new = [counts(stderr)["new"] for _, stderr in ends]
    assert sum(new) == 60 and min(new) >= 5  # each image was new to one part only
    assert counts(scripts.create("--part", "2/4")) == {"unchanged": new[1]}
    assert counts(scripts.create()) == {"unchanged": 60}


def test_a_bare_folder_has_its_own_name_as_class(scripts_on_file: Scripts, picture: Picture) -> None:
    picture("images/a.png")
    scripts_on_file.create()
    Image.new("RGB", (9, 9), "red").save(scripts_on_file.folder / "query.png")
    (hit,) = scripts_on_file.hits("query.png")
    assert hit["fields"] == {"file_path": ["./images/a.png"], "desc": ["images"]}
