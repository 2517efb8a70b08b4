"""terraform/: formatted, valid, and its own tests pass, wherever Terraform and the provider can be had."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server import ROOT

UNTESTED = "that leaves the database's definition untested"
FOLDER = ROOT / "terraform"
THREE = {"ibmcloud_api_key", "region", "elastic_password"}


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


def test_it_is_formatted() -> None:
    if not shutil.which("terraform"):
        pytest.skip(f"there is no terraform on the PATH: install it; {UNTESTED}")
    done = terraform("fmt", "-check", "-recursive")
    assert done.returncode == 0, done.stdout


def test_it_is_valid(initialized: Path) -> None:
    done = terraform("validate", folder=initialized)
    assert done.returncode == 0, done.stderr


def test_its_own_tests_pass(initialized: Path) -> None:
    done = terraform("test", folder=initialized)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"Success! (\d+) passed, 0 failed", done.stdout)
    assert passed
    runs = sum(path.read_text().count('\nrun "') for path in FOLDER.glob("tests/*.tftest.hcl"))
    assert int(passed[1]) == runs


@pytest.mark.parametrize(
    ("password", "rule"),
    [
        ("Hunter2", "must have 15 to 32 characters"),
        ("hunter2-hunter2", "must have a lowercase letter, an uppercase letter and a digit"),
        ("Hunter2/hunter2x", "may have only letters A-Z and a-z, digits, - and _"),
    ],
)
def test_a_refused_password_fails_at_plan_time_and_is_not_shown(password: str, rule: str, initialized: Path) -> None:
    refused = initialized / "refused"  # with a mock of the provider, which would ask IBM Cloud for the account
    refused.mkdir(exist_ok=True)
    (refused / "refused.tftest.hcl").write_text('mock_provider "ibm" {}\n\nrun "refused" {\n  command = plan\n}\n')
    variables = ["-var=ibmcloud_api_key=key", "-var=region=eu-de", f"-var=elastic_password={password}"]
    done = terraform("test", "-test-directory=refused", *variables, folder=initialized)
    assert done.returncode == 1
    shown = " ".join((done.stdout + done.stderr).replace("│", "").split())
    assert f"elastic_password {rule}" in shown
    assert "hunter2" not in (done.stdout + done.stderr).lower()


def test_three_variables_are_enough_and_the_example_shows_them() -> None:
    text = (FOLDER / "variables.tf").read_text()
    blocks = re.findall(r'variable "(\w+)" \{\n(.*?)\n\}', text, re.DOTALL)
    assert {name for name, body in blocks if "default " not in body} == THREE
    assert all("description" in body for _, body in blocks)
    assert all(
        "validation {" in body for name, body in blocks if name not in ("elastic_password", "deletion_protection")
    )
    example = (FOLDER / "terraform.tfvars.example").read_text()
    assert set(re.findall(r"^(\w+) +=", example, re.MULTILINE)) == THREE


def test_secrets_and_state_stay_out_of_git() -> None:
    names = [
        "terraform.tfvars",
        "my.auto.tfvars",
        "terraform.tfstate",
        "terraform.tfstate.backup",
        "plan.tfplan",
        "ca.pem",
    ]
    paths = [f"terraform/{name}" for name in names]
    done = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == paths
    assert "sensitive   = true" in (FOLDER / "outputs.tf").read_text()
