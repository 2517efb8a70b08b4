"""What the README says is so: its options, its commands, its messages."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import image
from tests.server import ROOT
from tools.readme import README, with_help

TEXT = README.read_text()
COMMANDS = re.findall(r"^```sh\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse lays help out differently in each Python version")
def test_its_options_are_those_of_help() -> None:
    assert with_help(TEXT) == TEXT, "run `make readme`"


@pytest.mark.parametrize("script", ["create.py", "search.py"])
def test_help_names_every_option_and_variable(script: str) -> None:
    shown = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in ("--index", "--db", "--model", "--insecure", "ES_URL", "ES_CA_CERT", "ES_API_KEY", "examples:"):
        assert name in shown


def test_its_steps_lead_from_images_to_the_closest_match(hub: dict[str, str], tmp_path: Path) -> None:
    """Steps 7 and 8 as they stand, with CLIP from a hub on this machine."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".git", ".venv", "build", ".*_cache", "__pycache__"))
    for seed in range(6):
        path = clone / "images" / ("Osprey" if seed % 2 else "Bald_Eagle") / f"{seed}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image((300, 200), seed).save(path)
    image((320, 214), 3).save(clone / "myimage.jpg")
    steps = [block for block in COMMANDS if block.startswith(("python3 create.py", "python3 search.py"))]
    assert [block.split()[1] for block in steps[:2]] == ["create.py", "search.py"]
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "python3").symlink_to(sys.executable)
    surroundings = hub | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": ":".join(sys.path[1:])}
    done = subprocess.run(
        ["sh", "-ec", "".join(steps[:2])], cwd=clone, env=surroundings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert '"fields": {"file_path": ["./images/Osprey/3.jpg"], "desc": ["Osprey"]}' in done.stdout


def test_its_terraform_outputs_exist() -> None:
    outputs = set(re.findall(r'output "(\w+)"', (ROOT / "terraform" / "outputs.tf").read_text()))
    used = set(re.findall(r"terraform output -raw (\w+)", TEXT))
    assert {"ES_URL", "ES_CA_CERT"} == used <= outputs


def test_its_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make (\w+)", "\n".join([*COMMANDS, *re.findall(r"`make \w+`", TEXT)]))) <= targets


def test_its_messages_are_those_of_the_code() -> None:
    sources = [ROOT / "create.py", ROOT / "search.py", *(ROOT / "imagesearch").glob("*.py")]
    code = re.sub(r'"\s+f?"', "", " ".join(source.read_text() for source in sources))
    table = TEXT[TEXT.index("## When something fails") :]
    for message in re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE):
        for part in message.split("…"):
            assert part.strip() in code, message


def test_its_links_within_the_project_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
