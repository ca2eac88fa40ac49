"""What changes the values of a configuration file: overrides, and paths, variables and home in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gcml_ray.config import GcmlMethod, LocalMethod, RingTopology
from gcml_ray.config.file import apply_override, load_config, parse_config, setting
from gcml_ray.errors import ConfigError
from tests.config_files import problems, values, write

# --- overrides -------------------------------------------------------------------------------


def test_override_sets_one_key_with_a_yaml_value(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path), ["federation.rounds=7", "optimiser.learning_rate=2e-4", "data.patch_size=[8, 8, 8]"]
    )
    assert (config.federation.rounds, config.optimiser.learning_rate) == (7, 0.0002)
    assert config.data.patch_size == (8, 8, 8)


def test_override_replaces_a_whole_section(tmp_path: Path) -> None:
    assert load_config(write(tmp_path), ["method={name: local}"]).method == LocalMethod(name="local")


def test_override_reaches_a_section_that_the_file_leaves_out(tmp_path: Path) -> None:
    assert load_config(write(tmp_path), ["evaluation.window_overlap=0.5"]).evaluation.window_overlap == 0.5


def test_later_override_wins_and_builds_on_earlier_ones(tmp_path: Path) -> None:
    overrides = ["method.topology={name: ring}", "method.merge=replace", "method.merge=keep_local"]
    method = load_config(write(tmp_path), overrides).method
    assert isinstance(method, GcmlMethod)
    assert (method.topology, method.merge) == (RingTopology(name="ring"), "keep_local")


def test_override_value_may_hold_an_equals_sign_and_null(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), ["name=a=b", "data.orientation=null"])
    assert (config.name, config.data.orientation) == ("a=b", None)


def test_override_of_one_section_leaves_its_yaml_alias_alone() -> None:
    network = {"name": "unet", "options": {}}
    config = parse_config(
        values(network=network, site_networks={"CS": network}, method={"name": "local"}),
        ["site_networks.CS.name=sanet"],
        source="test",
    )
    assert (config.network.name, config.site_networks["CS"].name) == ("unet", "sanet")
    assert network["name"] == "unet"


@pytest.mark.parametrize("override", ["federation.rounds", "=3", "federation..rounds=3", ".rounds=3"])
def test_override_without_key_or_value_is_refused(tmp_path: Path, override: str) -> None:
    assert problems(write(tmp_path), override) == [f"  override {override!r}: expected section.key=value"]


def test_override_below_a_plain_value_is_refused(tmp_path: Path) -> None:
    (line,) = problems(write(tmp_path), "optimiser.learning_rate.start=1")
    assert "optimiser.learning_rate is 0.001, which has no keys" in line


def test_override_that_is_not_yaml_is_refused(tmp_path: Path) -> None:
    (line,) = problems(write(tmp_path), "data.patch_size=[8, 8")
    assert "override 'data.patch_size=[8, 8': line 1: not valid YAML" in line


def test_override_of_an_unknown_key_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    unknown_section, unknown_key = problems(write(tmp_path), "federaton.rounds=3", "federation.local_step=3")[::-1]
    assert "federaton: unknown key; did you mean 'federation'?" in unknown_section
    assert "federation.local_step: unknown key; did you mean 'local_steps'?" in unknown_key


# --- paths -----------------------------------------------------------------------------------


def test_relative_paths_become_absolute_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load_config(path)
    assert config.data.datalist == str(tmp_path / "elsewhere" / "lists" / "all.json")
    assert config.output.folder == str(tmp_path / "elsewhere" / "runs" / "one")


def test_variables_and_home_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SITE_DATA", "/store/site")
    monkeypatch.setenv("HOME", "/home/someone")
    config = load_config(write(tmp_path), ["data.datalist=${SITE_DATA}/all.json", "output.folder=~/runs"])
    assert (config.data.datalist, config.output.folder) == ("/store/site/all.json", "/home/someone/runs")


def test_undefined_variable_is_named_with_its_key_beside_other_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SITE_DATA", raising=False)
    first, second = problems(write(tmp_path), "data.datalist=${SITE_DATA}/all.json", "federation.rounds=0")
    assert "data.datalist" in first
    assert "environment variable SITE_DATA is not set" in first
    assert "federation.rounds: received 0" in second


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("http://host:5000", "http://host:5000"),
        ("databricks", "databricks"),
        ("sqlite:///runs/a.db", "sqlite:////here/runs/a.db"),
        ("sqlite:////store/a.db", "sqlite:////store/a.db"),
        ("runs/mlruns", "/here/runs/mlruns"),
    ],
)
def test_only_local_tracking_uris_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found = load_config(write(tmp_path), [f"tracking.uri={uri}"]).tracking.uri
    assert found == expected.replace("/here", str(tmp_path))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("name=''", "name"),
        ("data.channels=[t1, t1]", "t1 stands in it more than once"),
    ],
)
def test_empty_and_repeated_names_are_refused(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(write(tmp_path), [override])


@pytest.mark.parametrize(
    "value", ["a: #1", "\x7f\x85", "\U0001f600", "null", "", Path("x y"), np.float32(0.5), [1, "a"]]
)
def test_a_setting_says_just_its_value(value: Any) -> None:
    values: dict[str, Any] = {}
    assert apply_override(values, setting("a.b", value)) == []
    assert values == {"a": {"b": str(value) if isinstance(value, Path) else value}}


def test_a_setting_that_no_file_could_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a\.b: received <object object .*; must be text, a number"):
        setting("a.b", object())
