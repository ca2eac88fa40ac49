"""The command ``gcml tune``: which arguments go together, and how it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from gcml_ray.cli.running import STOPPED
from gcml_ray.cli.tune import tune
from gcml_ray.errors import GcmlError
from tests.search_makers import searched


def call(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(tune)
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a search file, or --resume or --final"),
        (["a.yaml", "--final", "b"], "give a search file, or --resume or --final"),
        (["--resume", "b", "--set", "budget.trials=3"], "cannot change a search that has begun"),
        (["a.yaml", "--retry-failed"], "ignored without --resume"),
        (["--final", "nowhere"], "nowhere is not the folder of a search"),
        (["nowhere.yaml"], "cannot read configuration nowhere.yaml"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments: list[str], words: str) -> None:
    result = call(*arguments)
    assert isinstance(result.exception, GcmlError)
    assert words in str(result.exception)


@pytest.mark.parametrize("is_at_once", [False, True])
def test_a_final_that_is_stopped_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_at_once: bool
) -> None:
    def stopped(*_: object, **__: object) -> None:
        if is_at_once:
            raise KeyboardInterrupt

    monkeypatch.setattr("tune.final.run_final", stopped)
    folder = str(searched(tmp_path).folder)
    result = call("--final", folder)
    assert result.exit_code == STOPPED
    assert f"stopped; continue with: gcml tune --final {folder}" in result.output.replace("\n", "")
