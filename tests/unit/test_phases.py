"""Phases, the rhythm of evaluation and checkpoints, and which models are tested."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gcml_ray.gossip.phases import models_to_test, order_of, phase_of, rounds_left
from tests.fakes import fake_config


def test_evaluation_and_checkpoints_come_by_their_rhythm_and_at_the_end(tmp_path: Path) -> None:
    """Ten rounds, one of warm-up, which is evaluated too; every fourth one evaluated, every third one written."""
    config = fake_config(
        tmp_path,
        federation={"rounds": 10, "warmup_rounds": 1, "evaluate_every": 4},
        output={"checkpoint_every": 3},
    )
    orders = [order_of(config, number) for number in range(1, 11)]
    assert [order.round_number for order in orders if order.evaluate] == [1, 4, 8, 10]
    assert [order.round_number for order in orders if order.checkpoint] == [3, 6, 9, 10]


@pytest.mark.parametrize("rounds", [3, 4, 10])
def test_rounds_left_are_those_that_follow(tmp_path: Path, rounds: int) -> None:
    federation = fake_config(
        tmp_path, federation={"rounds": rounds, "warmup_rounds": 2, "cooldown_rounds": 1}
    ).federation
    for done in range(rounds + 1):
        phases = Counter(phase_of(federation, number) for number in range(done + 1, rounds + 1))
        assert {phase: count for phase, count in rounds_left(federation, done).items() if count} == phases


def test_warm_up_that_was_not_done_has_no_model_to_test(tmp_path: Path) -> None:
    config = fake_config(tmp_path, federation={"warmup_rounds": 2})
    assert models_to_test(config, last_round=1) == ("personalised",)
    assert models_to_test(config, last_round=2) == ("personalised", "before_gossip")


@pytest.mark.parametrize(
    ("sections", "models"),
    [
        ({}, ("personalised",)),
        ({"federation": {"warmup_rounds": 1}}, ("personalised", "before_gossip")),
        ({"method": {"name": "ditto", "lambda": 0.1}}, ("personalised", "shared")),
        ({"evaluation": {"ensemble_peers": 1}}, ("personalised", "ensemble")),
    ],
)
def test_models_that_exist_are_tested(tmp_path: Path, sections: dict[str, Any], models: tuple[str, ...]) -> None:
    assert models_to_test(fake_config(tmp_path, **sections)) == models
