"""`make demo`: the two scripts on a sample set, drawn landscapes, in build/demo.

500 are indexed, 50 others searched for.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from imagesearch.errors import ImageSearchError
from imagesearch.models.hub import clip_path
from tools.drawings import SCENES, draw_landscape

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "demo"
INDEXED, HELD_OUT, SHOWN = 500, 50, 6


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    queries = draw()
    model = choose_model()
    run("create.py", "--model", model)
    lines = run("search.py", *queries).splitlines()
    nearest = [json.loads(line)["hits"]["hits"][0]["fields"]["desc"][0] for line in lines]
    found = sum(query.startswith(desc) for query, desc in zip(queries, nearest, strict=True))
    print(f"\n{found} of {len(queries)} new landscapes found one of their own kind nearest, with --model {model}.")
    run("search.py", "-k", "10", "--html", "results.html", *queries[:SHOWN])
    print(f"Look at {(FOLDER / 'results.html').as_uri()}, then put your own pictures into images/.")


def draw() -> list[str]:
    """Draws those to be indexed below images/, and the others, whose names (`Beach-517.jpg`) it returns."""
    queries = []
    for number in range(INDEXED + HELD_OUT):
        scene = list(SCENES)[number % len(SCENES)]
        name = f"images/{scene}/{number}.jpg" if number < INDEXED else f"{scene}-{number}.jpg"
        (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
        draw_landscape(scene, number).save(FOLDER / name, quality=90)
        if number >= INDEXED:
            queries.append(name)
    return queries


def choose_model() -> str:
    """Returns `clip` if it is on this machine or can be downloaded, otherwise `thumbnail`, and says so."""
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
