"""Searches over the fake federation, one that is over, rounds of their trials, and the text of their tables."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from gcml_ray.config.file import save_config
from gcml_ray.records import PushReceipt, RoundPlan, RoundRecord, TrainReport
from tests.fakes import fake_config
from tune.search_file import load_search, save_search
from tune.trial_config import Search, best_config

WEIGHT = {"method.dcml.lambda": {"name": "log_uniform", "low": 0.01, "high": 1.0}}


def write_search(folder: Path, *, base: dict[str, Any] | None = None, **keys: Any) -> Path:
    """A search over the fake federation; ``keys`` replace its own."""
    save_config(fake_config(folder, **(base or {})), folder / "base.yaml")
    values: dict[str, Any] = {
        "name": "fake",
        "base": "base.yaml",
        "folder": str(folder / "search"),
        "space": WEIGHT,
        "searcher": {"name": "random"},
        "scheduler": {"name": "none"},
        "budget": {"trials": 2},
    }
    path = folder / "search_file.yaml"
    path.write_text(yaml.safe_dump(values | keys))
    return path


def make_search(folder: Path, **keys: Any) -> Search:
    return load_search(write_search(folder, **keys))


def searched(folder: Path, *, weight: float = 0.25) -> Search:
    """A search that is over, with its winner."""
    search = make_search(folder, final={"seeds": [1, 2, 3]})
    save_search(search)
    save_config(best_config(search, {"method.dcml.lambda": weight}), search.folder / "best.yaml")
    return search


def record(number: int, dice: dict[str, float | None], *, sent_bytes: int = 0) -> RoundRecord:
    plan = RoundPlan(number, "exchange", tuple(dice), ())
    trained = tuple(
        TrainReport(site, number, (), 2, {}, {}, "", {}, value, False, {}, 1e-3, 0) for site, value in dice.items()
    )
    return RoundRecord(plan, trained, (PushReceipt(number, "A", "B", True, "", sent_bytes),), (), seconds=2.0)


def text_of(table: Table) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()
