"""Says what is wrong with a wheel: files that it lacks, and differences from a second one, built from the sdist.

usage: python .ci/check_wheel.py WHEEL [SECOND_WHEEL]
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("gcml_ray", "actors", "tune")


def sources() -> set[str]:
    """Every file that an installed gcml-ray must have."""
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*"))
    return {path.relative_to(ROOT).as_posix() for path in files if path.is_file() and "__pycache__" not in path.parts}


def contents(wheel: str) -> dict[str, int]:
    """The files of a wheel with their checksums; its RECORD lists the others."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.CRC for info in archive.infolist() if not info.filename.endswith("/RECORD")}


def problems(wheel: str, second: str | None) -> list[str]:
    """One line each."""
    found = contents(wheel)
    packed = {name for name in found if name.split("/")[0] in PACKAGES}
    lines = [f"{wheel} lacks {name}" for name in sorted(sources() - packed)]
    lines += [f"{wheel} has {name}, which is no source" for name in sorted(packed - sources())]
    if second is not None:
        other = contents(second)
        names = sorted(name for name in {**found, **other} if found.get(name) != other.get(name))
        lines += [f"{name} differs between {wheel} and {second}" for name in names]
    return lines


if __name__ == "__main__":
    sys.exit("\n".join(problems(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)) or 0)
