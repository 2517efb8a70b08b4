"""What a newcomer meets: default models, words that help, and progress that tells the truth."""

import subprocess
from pathlib import Path

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


def test_models_are_ignored_by_git(tmp_path: Path) -> None:
    names = ["clip.onnx", "model.onnx.data", "imagesearch.db", "images/a.jpg"]
    done = subprocess.run(["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == names
