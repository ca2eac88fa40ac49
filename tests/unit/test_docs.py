"""The documents agree with the code: keys and defaults of the configuration, links, names of files."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gcml_ray.comparison.cells import summarise
from gcml_ray.comparison.config import load_comparison
from gcml_ray.comparison.output import finished_cells
from gcml_ray.comparison.table import cells, headings
from gcml_ray.config import Config
from gcml_ray.networks.registry import BUILDERS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REQUIRED = "required"
ROW = re.compile(r"^\| `([^`]+)` \|[^|]*\| (.+?) \|", re.MULTILINE)  # key, default
LINK = re.compile(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)")
PATH_CELL = re.compile(r"`((?:gcml_ray|actors|tune|configs|docs|benchmarks|tests)/[\w./-]*)`")


def keys_of_config(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key as a user writes it, dotted, with its field; sections are entered, all variants of one too."""
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        sections = list(sections_in(field.annotation))
        for section in sections:
            yield from keys_of_config(section, f"{key}.")
        if not sections:
            yield key, field


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that an annotation allows: itself, or the members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from sections_in(member)


def default_of(field: FieldInfo) -> Any:
    """A default as YAML has it."""
    if field.is_required():
        return REQUIRED
    return list(field.default) if isinstance(field.default, tuple) else field.default


def defaults_of_config() -> dict[str, list[Any]]:
    """Every key with its different defaults: some variants of a section share a key, but not its default."""
    defaults: dict[str, list[Any]] = {}
    for key, field in keys_of_config(Config):
        if default_of(field) not in defaults.setdefault(key, []):
            defaults[key].append(default_of(field))
    return defaults


def documented() -> dict[str, list[Any]]:
    """Key and defaults of every row of ``docs/configuration.md``; of several, each has its variant in brackets."""
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    return {key: [yaml.safe_load(one.strip("`")) for one in _each(default)] for key, default in ROW.findall(text)}


def _each(default: str) -> list[str]:
    return [default] if "(`" not in default else [one.partition(" (")[0] for one in default.split("), ")]


def test_every_key_of_the_configuration_is_documented_and_no_other() -> None:
    assert set(documented()) == set(defaults_of_config())


def test_documented_defaults_are_those_of_the_configuration() -> None:
    rows = documented()
    assert {key: rows.get(key) for key in defaults_of_config()} == defaults_of_config()


def test_every_network_is_named() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| `network.name`"))
    assert [name for name in BUILDERS if f"`{name}`" not in row] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_in_tables_exist(page: Path) -> None:
    """A folder must hold something: git keeps no empty one."""
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    named = PATH_CELL.findall("\n".join(rows))
    assert [name for name in named if not has_content(ROOT / name)] == []


def has_content(path: Path) -> bool:
    """Whether a file exists, or a folder that is not empty."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def test_every_page_is_in_the_site() -> None:
    """``make docs`` makes ``index.md``, ``pages.md``, ``changelog.md`` and ``notebook.md`` from other files."""
    nav = re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")} - {"README.md"}
    assert sorted(nav) == sorted(pages | {"index.md", "pages.md", "changelog.md", "notebook.md"})


@pytest.mark.parametrize(
    "name",
    ["compare_hippocampus", "compare_retina", "compare_lgg", "ablate_hippocampus", "ablate_lgg", "ablate_retina"],
)
def test_tables_of_the_comparison_hold_what_the_committed_cells_say(name: str) -> None:
    """All columns up to the interval, and what was sent; p-values and seconds are not compared."""
    comparison = load_comparison(ROOT / "configs" / f"{name}.yaml")
    comparison = comparison.model_copy(update={"results": str(ROOT / comparison.results)})
    rows = summarise(finished_cells(comparison), bounds=comparison.bounds)
    sent = headings(rows, unit="").index("MB sent")
    made = [cells(row, is_best=row is rows[0]) for row in rows]
    page = (ROOT / "docs" / "comparison.md").read_text()
    section = page.partition(f"`gcml compare configs/{name}.yaml`")[2].partition("\n### ")[0]
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    assert [[*row[:6], row[-2]] for row in shown[2:]] == [[*row[:6], row[sent]] for row in made]
