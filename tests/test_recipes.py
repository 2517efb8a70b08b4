"""The commands of docs/recipes.md, word for word, on a folder with planted duplicates and pictures in wrong folders."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pictures import image
from tests.running import Scripts
from tests.server import ROOT, unavailable

TEXT = (ROOT / "docs" / "recipes.md").read_text()
SHELL = re.findall(r"^```sh\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
PYTHON = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
NAMES, DUPLICATES, _, WRONG_FOLDERS, SHARE, _ = SHELL
LOCAL, ELASTIC, CLUSTERS = PYTHON

COLORS = {"Cardinal": (200, 30, 40), "Bluebird": (40, 80, 200), "Goldfinch": (220, 190, 30)}


def plant(folder: Path) -> tuple[set[tuple[str, str]], set[str]]:
    """Writes pictures of three classes by color; returns the pairs of duplicates and the paths in wrong folders."""
    pairs, wrong = set(), set()
    for name, color in COLORS.items():
        (folder / "images" / name).mkdir(parents=True)
        for number in range(15):
            tint = Image.new("RGB", (300, 200), color)
            picture = Image.blend(tint, image((300, 200), hash_of(name, number)), 0.25)
            path = f"images/{name}/{number}.png"
            picture.save(folder / path)
            if number < 3:
                other = f"images/{name}/copy-{number}.jpg"
                changed = [
                    picture,  # encoded again
                    picture.resize((150, 100)),
                    picture.crop((8, 5, 292, 195)),  # 5% less
                ][number]
                changed.save(folder / other, quality=80)
                first, second = sorted([f"./{path}", f"./{other}"])
                pairs.add((first, second))
    for number, (name, color) in enumerate([("Bluebird", COLORS["Cardinal"]), ("Goldfinch", COLORS["Bluebird"])]):
        path = f"images/{name}/stray-{number}.png"
        Image.blend(Image.new("RGB", (300, 200), color), image((300, 200), 900 + number), 0.25).save(folder / path)
        wrong.add(f"./{path}")
    return pairs, wrong


def hash_of(name: str, number: int) -> int:
    return sum(name.encode()) * 100 + number


@pytest.fixture
def recipes(scripts: Scripts) -> Scripts:
    """The scripts in a folder where the commands of the recipes work as they stand."""
    if not shutil.which("jq"):
        unavailable(
            "there is no jq on the PATH, which the recipes need: install it (Debian: apt-get install jq);"
            " that leaves docs/recipes.md untested"
        )
    for name in ("create.py", "search.py", "imagesearch"):
        (scripts.folder / name).symlink_to(ROOT / name)
    (scripts.folder / "bin").mkdir()
    (scripts.folder / "bin" / "python3").symlink_to(sys.executable)
    scripts.environment["PATH"] = f"{scripts.folder / 'bin'}:{os.environ['PATH']}"
    scripts.environment["PYTHONPATH"] = ":".join([str(ROOT), *sys.path[1:]])
    return scripts


def shell(scripts: Scripts, command: str) -> str:
    command = command.replace("search.py", f"search.py --index {scripts.index}")
    done = subprocess.run(
        ["bash", "-ec", f"set -o pipefail; {command}"],
        cwd=scripts.folder,
        env=scripts.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_python(scripts: Scripts, code: str) -> str:
    code = code.replace("'images'", f"'{scripts.index}'").replace('"images"', f'"{scripts.index}"')
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=scripts.folder, env=scripts.environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def test_the_recipes_find_what_was_planted(recipes: Scripts) -> None:
    pairs, wrong = plant(recipes.folder)
    recipes.create()
    shell(recipes, NAMES)
    # The score that the recipe tells to look for: of these pictures, by this model, the copies are above it.
    found = {tuple(line.split("\t")) for line in shell(recipes, DUPLICATES.replace("0.98", "0.9995")).splitlines()}
    assert found == pairs
    assert set(shell(recipes, WRONG_FOLDERS).split()) == wrong
    assert 0.9 < float(shell(recipes, SHARE)) < 1


def test_the_vectors_are_those_of_the_index(recipes: Scripts) -> None:
    plant(recipes.folder)
    recipes.create()
    shown = "\nprint(vectors.shape, vectors.dtype, len(set(paths)), abs(vectors).max() <= 1)"
    code = ELASTIC if "ES_URL" in recipes.environment else LOCAL
    assert run_python(recipes, f"{code}{shown}\n{CLUSTERS}").startswith("(56, 768) float32 56 True\n")
    with Image.open(recipes.folder / "clusters.png") as sheet:
        assert sheet.size == (1200, 1000)
        assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 100
