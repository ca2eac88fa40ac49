"""Malformed configuration files: a ConfigError that names the file, or values that are written as they were read."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gcml_ray.config.file import load_config, save_config
from gcml_ray.errors import ConfigError
from tests.faults.fuzzing import inputs, outcome, spoilt_bytes, spoilt_values

CONFIGS = Path(__file__).parents[2] / "configs"
VALID = ("phantom.yaml", "lgg.yaml", "brats.yaml", "panseg.yaml", "retina.yaml")
ODD_YAML = (
    "!!int abc", "!!float abc", "!!bool maybe", "!!timestamp abc", "2001-99-99", "2001-01-01 99:99:99", "!!binary '%'",
    "!!python/object:os.system x", "!!set {a, b}", "!!omap [a: 1]", "!!omap 3", "!!pairs [a]", "!!null x", "*nowhere",
    "&a [*a]", "&b {c: *b}", "{? [a] : b}", "{? {a: b} : c}", "{<<: 3}", "{<<: [1, 2]}", "{<<: {a: 1}}", "{1: 2}",
    "{null: x}", "{true: x}", "{1.5: x}", "{2001-01-01: x}", "\"\\ud800\"", "\"\\0\"", ".nan", ".inf", "-.inf", "1:90",
    "0x", "0b2", "08", "1_0", "1e999", "'", "\"", "|\n  a", ">-\n  b", "%TAG", "---\nb: 1", "...", "- a", "a: b: c",
    "@x", "`x`", "!x y", "9" * 5000, "[" * 2000, "{a: " * 2000, "!!str", "!!seq {}", "!!map []", "=", "<<",
    "{=: 1}", "!!value x",
)  # fmt: skip


@cache
def valid_text(name: str) -> str:
    return (CONFIGS / name).read_text(encoding="utf-8")


def check(folder: Path, content: bytes | str) -> None:
    """The property; whatever else the reader raises fails the test."""
    path = folder / "some.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    config = outcome(lambda: load_config(path), path, ConfigError)
    if isinstance(config, ConfigError):
        return
    again = folder / "again.yaml"
    save_config(config, again)
    assert load_config(again) == config
    assert config.identity == load_config(again).identity


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all inputs of this file."""
    return tmp_path_factory.mktemp("fuzz")


@inputs(0.3)
@given(st.sampled_from(VALID).flatmap(lambda name: spoilt_bytes(valid_text(name).encode())))
def test_damaged_text(folder: Path, content: bytes) -> None:
    check(folder, content)


@inputs(0.4)
@given(st.sampled_from(VALID).flatmap(lambda name: spoilt_values(yaml.safe_load(valid_text(name)))))
def test_wrong_values(folder: Path, content: Any) -> None:
    check(folder, yaml.safe_dump(content, sort_keys=False))


@st.composite
def with_odd_yaml(draw: st.DrawFn) -> str:
    """A valid file where some values or lines are replaced by what YAML reads in surprising ways."""
    lines = [line for line in valid_text(draw(st.sampled_from(VALID))).splitlines() if not line.startswith("#")]
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(lines) - 1))
        key, colon, _ = lines[at].partition(":")
        odd = draw(st.sampled_from(ODD_YAML))
        lines[at] = draw(st.sampled_from([f"{key}{colon} {odd}", odd, f"{odd}: {odd}", f"{key}: [{odd}]", f"? {odd}"]))
    return "\n".join(lines)


@inputs(0.3)
@given(with_odd_yaml())
def test_surprises_of_yaml(folder: Path, content: str) -> None:
    check(folder, content)


@pytest.mark.timeout(60)
def test_alias_that_doubles_thirty_times_is_refused_at_once(folder: Path) -> None:
    """A billion laughs: the file has 31 lines and 2^30 leaves."""
    lines = ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}" for n in range(1, 31)]
    check(folder, "\n".join(lines))
    lists = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 31)]
    check(folder, "\n".join(lists))
    check(folder, valid_text("phantom.yaml") + "\n" + "\n".join(lists))


def test_file_that_cannot_be_read_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(folder / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot read configuration"):
        load_config(folder)


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_numbers_that_are_not_finite_are_refused_with_their_line(folder: Path, value: str) -> None:
    """A saved configuration could not hold them."""
    path = folder / "infinite.yaml"
    path.write_text(f"name: x\nnetwork: {{name: unet, options: {{dropout: {value}}}}}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"line 2: .*{re.escape(value)} is no finite number"):
        load_config(path)
