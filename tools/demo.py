"""`make demo`: the two scripts on a sample set, handwritten digits, in build/demo.

The digits come with scikit-learn: 8×8 pixels each, scanned at NIST (UCI Machine Learning Repository,
"Optical Recognition of Handwritten Digits", 1998). 500 are indexed, 50 others searched for.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from imagesearch.errors import ImageSearchError

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "demo"
INDEXED, HELD_OUT, SHOWN = 500, 50, 5
IMAGE_SIZE = 128


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    queries = write_digits()
    model = choose_model()
    run("create.py", "--model", model)
    lines = run("search.py", *queries).splitlines()
    nearest = [json.loads(line)["hits"]["hits"][0]["fields"]["desc"][0] for line in lines]
    found = sum(desc == Path(query).stem.split("-")[0] for query, desc in zip(queries, nearest, strict=True))
    print(f"\n{found} of {len(queries)} held-out digits found one of their own class nearest, with --model {model}.")
    run("search.py", "-k", "12", "--html", "results.html", *queries[:SHOWN])
    print(f"Look at {(FOLDER / 'results.html').as_uri()}, then put your own pictures into images/.")


def write_digits() -> list[str]:
    """Writes the digits to be indexed below images/, and the others, whose names (`3-517.png`) it returns."""
    digits = load_digits()
    queries = []
    for number in range(INDEXED + HELD_OUT):
        ink = np.asarray(digits.images[number]) / 16  # 0 to 16 in the data set
        picture = Image.fromarray(np.uint8(255 - 255 * ink)).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        digit = digits.target[number]
        name = f"images/{digit}/{number}.png" if number < INDEXED else f"{digit}-{number}.png"
        (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(FOLDER / name)
        if number >= INDEXED:
            queries.append(name)
    return queries


def choose_model() -> str:
    """Returns `clip` if it is on this machine or can be downloaded, otherwise `thumbnail`, and says so."""
    from imagesearch.hub import clip_path

    try:
        clip_path()
    except ImageSearchError:
        print("CLIP could not be downloaded; continuing with --model thumbnail, which needs no download.", flush=True)
        return "thumbnail"
    return "clip"


def run(script: str, *arguments: str) -> str:
    """Runs a script in the demo's folder, on the local index, and shows the command; returns its stdout."""
    few = [*arguments[:5], "…"] if len(arguments) > 5 else arguments
    print("\n$ cd build/demo; python3", f"../../{script}", *few, flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "ES_URL"}
    command = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(command, cwd=FOLDER, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


if __name__ == "__main__":
    main()
