"""Settings that change nothing here: ``gcml doctor`` names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gcml_ray.doctor.without_effect import check_effects
from tests.tiny_federation import make_config

DEFENCE = {"defence": {"min_cosine": 0.5}}


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"method": {"name": "fedavg"}, **DEFENCE}, "defence, as method fedavg has a server"),
        ({"method": {"name": "local"}, **DEFENCE}, "defence, as method local pushes nothing"),
        ({"method": {"name": "local"}, "wire": {"encoding": "int8"}}, "wire, as method local pushes nothing"),
        (
            {"method": {"name": "local"}, "federation": {"mode": "async", "late_factor": 5.0}},
            "federation.late_factor, as nobody waits",
        ),
    ],
)
def test_a_setting_without_effect_is_named_with_the_reason(tmp_path: Path, sections: dict[str, Any], told: str) -> None:
    (check,) = check_effects(make_config(tmp_path, **sections))
    assert check.verdict == "WARN"
    assert told in check.detail


@pytest.mark.parametrize("sections", [{}, DEFENCE, {"wire": {"encoding": "int8"}}, {"method": {"name": "fedavg"}}])
def test_settings_that_have_one_are_not(tmp_path: Path, sections: dict[str, Any]) -> None:
    assert not list(check_effects(make_config(tmp_path, **sections)))
