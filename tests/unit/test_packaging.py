"""What an installed gcml-ray holds and needs, read from ``pyproject.toml``. ``make package`` builds and tries it."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gcml_ray.cli.tune import tune
from gcml_ray.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
SETUPTOOLS: dict[str, Any] = PROJECT["tool"]["setuptools"]
PACKAGES = ("gcml_ray", "actors", "tune")


def pins() -> dict[str, str]:
    """Name and version of every line of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def requirements() -> list[Requirement]:
    """Everything that gcml-ray or an extra of it names, but itself."""
    lines = [*PROJECT["project"]["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    return [each for each in map(Requirement, lines) if each.name != "gcml-ray"]


def wheel_check() -> Any:
    """The module ``.ci/check_wheel.py``."""
    spec = importlib.util.spec_from_file_location("check_wheel", ROOT / ".ci" / "check_wheel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- files -------------------------------------------------------------------------------------


def files_of_packages() -> list[Path]:
    """Every file below a package, from the root."""
    files = (file for package in PACKAGES for file in (ROOT / package).rglob("*") if file.is_file())
    return [file.relative_to(ROOT) for file in files if "__pycache__" not in file.parts]


def test_every_folder_with_files_is_packed() -> None:
    folders = {file.parent.as_posix().replace("/", ".") for file in files_of_packages()}
    assert folders == set(SETUPTOOLS["packages"])


def test_every_file_that_is_no_module_is_packed() -> None:
    """Templates, the demo's configuration, type information."""
    packed = {
        file.relative_to(ROOT)
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for file in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    assert {file for file in files_of_packages() if file.suffix != ".py"} == packed
    assert {Path(package, "py.typed") for package in PACKAGES} | {Path("gcml_ray/demo.yaml")} <= packed


def test_wheel_that_lacks_a_file_or_differs_from_the_sdists_is_found(tmp_path: Path) -> None:
    check = wheel_check()
    names = sorted(check.sources())
    for file, left_out in (("whole.whl", None), ("torn.whl", "gcml_ray/demo.yaml")):
        with zipfile.ZipFile(tmp_path / file, "w") as archive:
            for name in names:
                if name != left_out:
                    archive.writestr(name, name)
    whole, torn = str(tmp_path / "whole.whl"), str(tmp_path / "torn.whl")
    assert check.problems(whole, whole) == []
    assert check.problems(torn, None) == [f"{torn} lacks gcml_ray/demo.yaml"]
    assert check.problems(whole, torn) == [f"gcml_ray/demo.yaml differs between {whole} and {torn}"]


def test_command_is_a_function() -> None:
    module, _, name = PROJECT["project"]["scripts"]["gcml"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


# --- requirements ------------------------------------------------------------------------------


def test_extras_that_contain_others_name_existing_ones() -> None:
    own = [Requirement(line) for lines in EXTRAS.values() for line in lines if line.startswith("gcml-ray[")]
    assert {"all", "docs", "tune"} <= set(EXTRAS)
    assert [extra for each in own for extra in each.extras if extra not in EXTRAS] == []


def test_all_has_every_extra_for_users() -> None:
    (everything,) = (Requirement(line) for line in EXTRAS["all"])
    assert everything.extras == set(EXTRAS) - {"all", "docs", "test", "dev"}


def test_everything_that_is_required_is_pinned_within_its_range() -> None:
    pinned = pins()
    wrong = [str(each) for each in requirements() if not each.specifier.contains(pinned.get(each.name.lower(), "0"))]
    assert wrong == []


def test_pins_are_sorted_and_exact_and_none_stands_twice() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    names = [line.partition("==")[0].lower() for line in lines if not line.startswith("#")]
    assert [line for line in lines if not line.startswith("#") and not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    assert names == sorted(names)
    assert len({canonicalize_name(name) for name in names}) == len(names)


def test_oldest_python_is_the_same_for_pip_ruff_and_mypy() -> None:
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert PROJECT["tool"]["mypy"]["python_version"] == oldest
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    assert f"Programming Language :: Python :: {oldest}" in PROJECT["project"]["classifiers"]


def test_search_without_its_extra_names_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``None`` in ``sys.modules`` is how Python marks a module that must not be found."""
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"gcml tune needs optuna.*pip install 'gcml-ray\[tune\]'"):
        tune(config=tmp_path / "search.yaml")
