"""docs/options.md, generated from --help: `make options` writes it, a test compares it."""

import os
import re
import subprocess
import sys

from tests.server import ROOT

OPTIONS = ROOT / "docs" / "options.md"
MARK = re.compile(r"<!-- help (\S+) -->\n(?:```text\n.*?\n```\n)?", re.DOTALL)


def with_help(text: str) -> str:
    """Returns `text` with each script's --help, 100 columns wide, after its mark."""

    def block(mark: re.Match[str]) -> str:
        command = [sys.executable, mark[1], "--help"]
        environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1"}
        shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        return f"<!-- help {mark[1]} -->\n```text\n{shown.strip()}\n```\n"

    return MARK.sub(block, text)


if __name__ == "__main__":
    OPTIONS.write_text(with_help(OPTIONS.read_text()))
