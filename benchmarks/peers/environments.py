"""A virtual environment a framework: their requirements contradict each other, and ours.

``benchmarks/requirements-peers.txt`` pins them; a line ``# [name]`` begins the part of an environment, lines before
the first one belong to all.
"""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements-peers.txt"
INSTALL_LIMIT_S = 3600


def parse_requirements(text: str) -> dict[str, tuple[str, ...]]:
    """Requirements by environment."""
    common: list[str] = []
    parts: dict[str, list[str]] = {}
    current = common
    for line in map(str.strip, text.splitlines()):
        if heading := re.fullmatch(r"# \[(\w+)\]", line):
            current = parts.setdefault(heading[1], [])
        elif line and not line.startswith("#"):
            current.append(line)
    return {name: (*common, *lines) for name, lines in parts.items()}


def python_of(folder: Path, environment: str) -> Path:
    """The interpreter of an environment."""
    return folder / environment / "bin" / "python"


def make_environments(folder: Path) -> None:
    """Makes the environments that are not there yet.

    Raises:
        subprocess.CalledProcessError: pip could not install one.
    """
    for name, requirements in parse_requirements(REQUIREMENTS.read_text(encoding="utf-8")).items():
        done = folder / name / "installed.txt"
        wanted = "\n".join(requirements)
        if done.exists() and done.read_text(encoding="utf-8") == wanted:
            continue
        print(f"making {folder / name} ...", file=sys.stderr, flush=True)
        venv.create(folder / name, with_pip=True, clear=True)
        pip = [str(python_of(folder, name)), "-m", "pip", "install", "--quiet", "-r", "/dev/stdin"]
        subprocess.run(pip, input=wanted, text=True, check=True, timeout=INSTALL_LIMIT_S)
        done.write_text(wanted, encoding="utf-8")
