"""terraform/: formatted, valid, and its own tests pass, wherever Terraform and the provider can be had."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server import ROOT

pytestmark = pytest.mark.slow

UNTESTED = "that leaves the database's definition untested"
FOLDER = ROOT / "terraform"


def terraform(*arguments: str, folder: Path = FOLDER) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["terraform", f"-chdir={folder}", *arguments, "-no-color"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def initialized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of terraform/ with the provider installed: the registry's, or that of `TERRAFORM_PLUGIN_DIR`."""
    if not shutil.which("terraform"):
        pytest.skip(f"there is no terraform on the PATH: install it; {UNTESTED}")
    copy = tmp_path_factory.mktemp("terraform") / "terraform"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*", "*.tfvars"))
    plugins = os.environ.get("TERRAFORM_PLUGIN_DIR")
    done = terraform(
        "init", "-backend=false", "-input=false", *([f"-plugin-dir={plugins}"] if plugins else []), folder=copy
    )
    if done.returncode:
        assert not plugins, done.stderr
        why = re.search(r"Error: (.+)", done.stderr)
        pytest.skip(
            f"Terraform could not install the provider IBM-Cloud/ibm ({why[1] if why else done.returncode}):"
            f" go online, or set TERRAFORM_PLUGIN_DIR to a folder that has it; {UNTESTED}"
        )
    return copy


def test_terraforms_files_are_formatted() -> None:
    if not shutil.which("terraform"):
        pytest.skip(f"there is no terraform on the PATH: install it; {UNTESTED}")
    done = terraform("fmt", "-check", "-recursive")
    assert done.returncode == 0, done.stdout


def test_terraforms_files_are_valid_and_their_own_tests_pass(initialized: Path) -> None:
    for command in ("validate", "test"):
        done = terraform(command, folder=initialized)
        assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"Success! (\d+) passed, 0 failed", done.stdout)
    assert passed
    runs = sum(path.read_text().count('\nrun "') for path in FOLDER.glob("tests/*.tftest.hcl"))
    assert int(passed[1]) == runs


def test_secrets_and_state_stay_out_of_git() -> None:
    names = ("terraform.tfvars", "my.auto.tfvars", "terraform.tfstate", "terraform.tfstate.backup", "a.tfplan", "a.pem")
    paths = [f"terraform/{name}" for name in names]
    done = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == paths
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not re.findall(r"^.*\.(?:pem|tfvars|tfstate|db)$", tracked, re.MULTILINE)
    for name, secrets in (("variables.tf", 2), ("outputs.tf", 1)):
        assert len(re.findall(r"sensitive +=  *true", (FOLDER / name).read_text())) >= secrets
