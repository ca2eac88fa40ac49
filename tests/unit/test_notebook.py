"""The stored notebook ``docs/quickstart.ipynb``: run, without errors, true to the code. ``make notebook`` runs it."""

from __future__ import annotations

import ast
import base64
import importlib
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK: dict[str, Any] = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))
CODE: list[dict[str, Any]] = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
OUTPUTS: list[dict[str, Any]] = [output for cell in CODE for output in cell["outputs"]]
PICTURES: list[str] = [output["data"]["image/png"] for output in OUTPUTS if "image/png" in output.get("data", {})]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_every_cell_was_run_from_top_to_bottom_without_error_or_warning() -> None:
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert [output for output in OUTPUTS if output["output_type"] == "error" or output.get("name") == "stderr"] == []


def test_run_finished_and_its_table_and_plots_are_there() -> None:
    said = "".join("".join(output.get("text", "")) for output in OUTPUTS)
    shown = "".join("".join(output.get("data", {}).get("text/html", "")) for output in OUTPUTS)
    assert "finished" in said
    assert "mean of sites" in shown
    assert len(PICTURES) == 3


def test_pictures_are_small_and_nothing_names_the_machine_that_ran_it() -> None:
    assert sum(len(base64.b64decode(picture)) for picture in PICTURES) < 200_000
    assert re.findall(r"(?:/home|/root|/tmp|/Users|site-packages)[^\"]*", json.dumps(OUTPUTS)) == []


def test_what_the_cells_import_from_gcml_ray_exists() -> None:
    """Plots aside, a cell can fail by a name that has gone: found here without running it."""
    missing = [
        f"{node.module}.{alias.name}"
        for cell in CODE
        for node in ast.walk(ast.parse(source(cell)))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("gcml_ray")
        for alias in node.names
        if not hasattr(importlib.import_module(str(node.module)), alias.name)
    ]
    assert missing == []


def test_methods_that_the_cells_call_exist() -> None:
    from gcml_ray import Federation, FederationResult  # noqa: PLC0415 - names of what the cells' variables hold

    holders = {"federation": Federation, "result": FederationResult}
    calls = [
        (node.value.id, node.attr)
        for cell in CODE
        for node in ast.walk(ast.parse(source(cell)))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in holders
    ]
    assert {("federation", "run"), ("federation", "stop"), ("result", "model"), ("result", "table")} <= set(calls)
    assert [f"{name}.{attribute}" for name, attribute in calls if not hasattr(holders[name], attribute)] == []
