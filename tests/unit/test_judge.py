"""Which incoming models are left out, and what a receiver remembers of their senders."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gcml_ray.config import Config
from gcml_ray.config.defence import DefenceConfig
from gcml_ray.files.record_json import from_json, to_json
from gcml_ray.model.learner import Learner
from gcml_ray.push.wire import Buffer, PushHeader, checksum
from gcml_ray.records import Judgement, TrainReport
from gcml_ray.training.judge import Facts, compare_weights, dice_share, may_repeat, objection, suspicion_after
from gcml_ray.training.trainer import SiteTrainer
from tests.makers import make_config
from tests.trainer_runs import OTHER_NETWORK, make_trainer, order, without_clocks

DICE = st.floats(0, 1, width=16)
DEFENCE = DefenceConfig(max_norm_ratio=3.0, min_cosine=0.1, min_own_dice=0.2, min_dice_share=0.25)
KEEP = {"name": "gcml", "topology": {"name": "ring"}, "merge": "keep_local"}
ON = {"weights": True, "validation": True}


# --- the rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        (Facts(), ""),
        (Facts(norm_ratio=1.0, cosine=0.9, dice=0.5, own_dice=0.5), ""),
        (Facts(is_replay=True, norm_ratio=1.0), "replay"),
        (Facts(norm_ratio=2.9), ""),
        (Facts(norm_ratio=3.1), "norm"),
        (Facts(norm_ratio=0.35), ""),
        (Facts(norm_ratio=0.32), "norm"),
        (Facts(norm_ratio=float("inf")), "norm"),
        (Facts(norm_ratio=1.0, cosine=0.1), ""),
        (Facts(norm_ratio=1.0, cosine=0.09), "direction"),
        (Facts(norm_ratio=1.0, cosine=-1.0), "direction"),
        (Facts(dice=0.0, own_dice=0.19), ""),
        (Facts(dice=0.2, own_dice=0.8), ""),
        (Facts(dice=0.19, own_dice=0.8), "validation"),
        (Facts(dice=None, own_dice=0.8), ""),
    ],
)
def test_objection_names_the_first_thing_that_is_wrong(facts: Facts, word: str) -> None:
    assert objection(facts, DEFENCE, suspicion=0).partition(":")[0] == word


def test_sender_that_was_refused_must_do_better_up_to_twice_as_much() -> None:
    """A quarter of the own Dice at first; each refusal asks for a quarter of that more."""
    assert [dice_share(DEFENCE, suspicion) for suspicion in range(6)] == [0.25, 0.3125, 0.375, 0.4375, 0.5, 0.5]
    facts = Facts(dice=0.31, own_dice=0.8)
    assert [bool(objection(facts, DEFENCE, suspicion=count)) for count in range(5)] == [False, False, False, True, True]


def judged(sender: str, *, accepted: bool) -> Judgement:
    return Judgement(sender, accepted, "" if accepted else "norm: ...", 1.0, 1.0, None, None)


def test_suspicion_rises_with_each_refusal_and_falls_with_each_acceptance() -> None:
    refused, accepted = judged("A", accepted=False), judged("A", accepted=True)
    assert suspicion_after({}, [refused]) == {"A": 1}
    assert suspicion_after({"A": 2, "B": 1}, [accepted]) == {"A": 1, "B": 1}
    assert suspicion_after({"A": 1}, [accepted]) == {}
    assert suspicion_after({"A": 4}, [refused]) == {"A": 4}
    assert suspicion_after({}, [accepted]) == {}


# --- measuring -----------------------------------------------------------------------------------


def test_weights_are_compared_by_norm_and_angle() -> None:
    """|(3, 4)| = 5, |(8, 6)| = 10; (3 x 8 + 4 x 6) / (5 x 10) = 0.96."""
    facts = compare_weights(torch.tensor([3.0, 4.0]), torch.tensor([8.0, 6.0]), common_init=True)
    assert facts.norm_ratio == pytest.approx(2.0)
    assert facts.cosine == pytest.approx(0.96)


def test_the_angle_between_large_vectors_is_exact() -> None:
    """Sums over millions of float32 values lose a tenth of a per mille if they are taken in one go."""
    values = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0))
    facts = compare_weights(values, 2 * values, common_init=True)
    assert facts.norm_ratio == pytest.approx(2.0, abs=1e-6)
    assert facts.cosine == pytest.approx(1.0, abs=1e-6)


def test_direction_means_nothing_where_sites_started_apart() -> None:
    assert compare_weights(torch.ones(2), -torch.ones(2), common_init=False) == Facts(norm_ratio=pytest.approx(1.0))


def test_weights_that_are_all_zero_have_no_direction() -> None:
    assert compare_weights(torch.ones(2), torch.zeros(2), common_init=True) == Facts(norm_ratio=0.0)
    assert compare_weights(torch.zeros(2), torch.ones(2), common_init=True).norm_ratio == float("inf")


# --- at a receiver -------------------------------------------------------------------------------


def push(trainer: SiteTrainer, weights: Any, *, round_number: int, sender: str = "B") -> tuple[PushHeader, Buffer]:
    """A well-formed push of these weights."""
    header, own = trainer.export("run", round_number)
    buffer = np.array(weights, dtype=np.float32)
    assert buffer.shape == own.shape
    return replace(header, sender=sender, checksum=checksum(buffer)), buffer


def receiver(folder: Path, *, merge: str = "keep_local", **defence: Any) -> SiteTrainer:
    """Site A after one round."""
    trainer = make_trainer(make_config(folder, method=KEEP | {"merge": merge}, defence=ON | defence))
    trainer.train_round(order(1), [])
    return trainer


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> SiteTrainer:
    """A receiver for many judgements by Dice alone."""
    return receiver(tmp_path_factory.mktemp("shared"), weights=False, min_own_dice=0.2, min_dice_share=0.25)


def one_round(trainer: SiteTrainer, weights: Any) -> TrainReport:
    return trainer.train_round(order(2), [push(trainer, weights, round_number=2)])


def own_weights(trainer: SiteTrainer) -> Buffer:
    weights: Buffer = trainer.export("run", 2)[1].copy()
    return weights


@pytest.mark.parametrize(
    ("change", "word"), [(lambda own: -own, "direction"), (lambda own: 100 * own, "norm"), (np.zeros_like, "norm")]
)
def test_harmful_weights_are_refused_and_the_site_trains_as_if_they_had_not_come(
    tmp_path: Path, change: Any, word: str
) -> None:
    attacked, alone = receiver(tmp_path / "attacked"), receiver(tmp_path / "alone")
    report = one_round(attacked, change(own_weights(attacked)))
    expected = alone.train_round(order(2), [])
    assert [(one.sender, one.accepted, one.reason.partition(":")[0]) for one in report.judged] == [("B", False, word)]
    assert report.peers == ()
    assert torch.equal(attacked.local.model.flat, alone.local.model.flat)
    assert without_clocks(replace(report, judged=())) == without_clocks(expected)


def test_honest_weights_are_accepted_and_learnt_from(tmp_path: Path) -> None:
    trainer = receiver(tmp_path)
    report = one_round(trainer, 1.01 * own_weights(trainer))
    (judgement,) = report.judged
    assert report.peers == ("B",)
    assert (judgement.accepted, judgement.reason) == (True, "")
    assert judgement.norm_ratio == pytest.approx(1.01, abs=1e-4)
    assert judgement.cosine == pytest.approx(1.0, abs=1e-5)
    assert report.seconds["judge"] > 0


def test_model_that_fails_on_own_cases_is_refused_by_them_alone(tmp_path: Path) -> None:
    """With ``min_own_dice: 0`` and ``min_dice_share: 1``, a model that is worse than the own one is too bad."""
    trainer = receiver(tmp_path, weights=False, min_own_dice=0.0, min_dice_share=1.0)
    own_dice = trainer.evaluator.patch_dice(trainer.local, 2)
    report = one_round(trainer, np.zeros_like(own_weights(trainer)))
    (judgement,) = report.judged
    assert judgement.own_dice == pytest.approx(own_dice)
    assert judgement.dice is not None
    assert judgement.dice < own_dice
    assert (judgement.accepted, judgement.reason.partition(":")[0]) == (False, "validation")
    assert (judgement.norm_ratio, judgement.cosine) == (None, None)


def test_incoming_model_is_not_scored_before_the_own_one_has_learnt_something(tmp_path: Path) -> None:
    trainer = receiver(tmp_path, min_own_dice=1.0)
    (judgement,) = one_round(trainer, own_weights(trainer)).judged
    assert judgement.own_dice is not None
    assert judgement.dice is None


@pytest.mark.parametrize(("incoming", "own"), [(0.25, None), (0.24, 0.9), (0.22, 0.9)])
def test_own_model_is_scored_only_where_the_incoming_one_would_not_do_beside_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, incoming: float, own: float | None
) -> None:
    """A quarter of the own Dice is asked for: 0.25 of the best possible 1, 0.225 of an own 0.9."""
    trainer = receiver(tmp_path, weights=False, min_own_dice=0.2, min_dice_share=0.25)
    trainer.files.state = replace(trainer.files.state, best_dice=0.8)
    monkeypatch.setattr(
        trainer.evaluator, "patch_dice", lambda learner, _, **__: 0.9 if learner is trainer.local else incoming
    )
    (judgement,) = one_round(trainer, own_weights(trainer) * 1.01).judged
    assert (judgement.dice, judgement.own_dice) == (incoming, own)
    assert judgement.accepted == (incoming >= 0.225)


@given(
    own=st.tuples(DICE, DICE),
    incoming=st.tuples(DICE, DICE),
    best=st.sampled_from([-1.0, 0.8]),
    suspicion=st.integers(0, 4),
)
@settings(deadline=None)
def test_leaving_patches_out_changes_no_decision(
    shared: SiteTrainer, own: tuple[float, float], incoming: tuple[float, float], best: float, suspicion: int
) -> None:
    """As if both models had been scored on both patches, whichever was looked at first."""
    trainer, defence = shared, shared.config.defence
    trainer.files.state = replace(trainer.files.state, best_dice=best, best_patch_dice=-1.0, suspicion={"B": suspicion})
    looked_at: list[int] = []

    def patch_dice(learner: Learner, _: int, *, enough: float = math.inf) -> float:
        scores = own if learner is trainer.local else incoming
        needed = 1 if scores[0] >= 2 * enough else 2
        looked_at.append(needed)
        return sum(scores[:needed]) / needed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.evaluator, "patch_dice", patch_dice)
        pushes = trainer.exchange.incoming([push(trainer, own_weights(trainer), round_number=2)], own_round=1)
        _, (judgement,) = trainer.judge.screen(pushes, trainer.local, trainer.exchange)
    facts = Facts(dice=sum(incoming) / 2, own_dice=sum(own) / 2)
    assert judgement.accepted == (not objection(facts, defence, suspicion=suspicion))
    assert looked_at


def test_own_model_that_has_learnt_something_is_not_scored_first_again_after_a_resume_either(tmp_path: Path) -> None:
    """Its validation Dice would still say nothing: no round was validated."""
    trainer = receiver(tmp_path, min_own_dice=0.01, min_dice_share=0.01)
    trainer.files.state = replace(trainer.files.state, best_dice=-1.0)
    (first,) = one_round(trainer, own_weights(trainer)).judged
    assert first.own_dice is not None
    assert first.own_dice > 0.01
    trainer.files.state = replace(trainer.files.state, best_dice=-1.0)
    trainer.files.save(trainer.local, trainer.personal)
    restored = make_trainer(trainer.config, folder=Path(trainer.config.output.folder), resume_round=2)
    for site in (trainer, restored):
        (again,) = site.train_round(order(3), [push(site, 1.01 * own_weights(site), round_number=3)]).judged
        assert again.own_dice is None
        assert again.dice is not None


def test_nothing_is_judged_where_the_defence_is_off(tmp_path: Path) -> None:
    trainer = receiver(tmp_path, weights=False, validation=False)
    report = one_round(trainer, -own_weights(trainer))
    assert report.judged == ()
    assert report.peers == ("B",)


def test_weights_of_another_network_are_judged_by_their_predictions_alone(tmp_path: Path) -> None:
    method = {"name": "gml", "topology": {"name": "ring"}}
    config = make_config(tmp_path, site_networks={"B": OTHER_NETWORK}, method=method, defence=ON | {"min_own_dice": 0})
    trainer, other = make_trainer(config), make_trainer(config, site="B", folder=tmp_path / "other")
    report = trainer.train_round(order(2), [other.export("run", 2)])
    (judgement,) = report.judged
    assert (judgement.norm_ratio, judgement.cosine) == (None, None)
    assert judgement.dice is not None


def test_the_same_weights_again_are_refused_after_a_resume_too(tmp_path: Path) -> None:
    trainer = receiver(tmp_path)
    weights = own_weights(trainer)
    assert one_round(trainer, weights).peers == ("B",)
    restored = make_trainer(trainer.config, folder=Path(trainer.config.output.folder), resume_round=2)
    for site in (trainer, restored):
        (judgement,) = site.train_round(order(3), [push(site, weights, round_number=3)]).judged
        assert judgement.reason.startswith("replay")
    assert restored.train_round(order(4), [push(restored, 1.01 * weights, round_number=4)]).peers == ("B",)


def test_a_site_whose_privacy_is_spent_may_repeat_itself(tmp_path: Path) -> None:
    private = {"mode": "dp_sgd", "noise_multiplier": 1.0, "max_grad_norm": 1.0, "delta": 1e-5, "epsilon_limit": 3.0}
    assert not may_repeat(make_config(tmp_path, method=KEEP))
    assert may_repeat(make_config(tmp_path, method={"name": "gml", "topology": {"name": "ring"}}, privacy=private))


def test_the_same_weights_again_are_honest_where_a_site_may_keep_what_it_had(tmp_path: Path) -> None:
    trainer = receiver(tmp_path, merge="select_best")
    weights = own_weights(trainer)
    assert one_round(trainer, weights).peers == ("B",)
    again = trainer.train_round(order(3), [push(trainer, weights, round_number=3)])
    assert again.peers == ("B",)
    assert trainer.state.suspicion == {}


def test_suspicion_survives_a_resume(tmp_path: Path) -> None:
    trainer = receiver(tmp_path)
    one_round(trainer, -own_weights(trainer))
    restored = make_trainer(trainer.config, folder=Path(trainer.config.output.folder), resume_round=2)
    assert restored.state.suspicion == {"B": 1}


def test_defence_is_part_of_the_identity(tmp_path: Path) -> None:
    on, off = make_config(tmp_path, defence=ON), make_config(tmp_path, defence={"validation": False})
    assert on.identity != off.identity
    assert Config.model_validate(on.model_dump(by_alias=True)).identity == on.identity


# --- records -------------------------------------------------------------------------------------

REPORT = TrainReport("A", 1, (), 1, {}, {}, "", {}, None, False, {}, 0.1, 1)


def test_judgements_survive_json() -> None:
    report = replace(REPORT, judged=(Judgement("B", False, "norm: 4", 4.0, None, None, 0.5),))
    assert from_json(TrainReport, to_json(report)) == report


def test_reports_of_older_runs_have_no_judgements() -> None:
    old = to_json(REPORT).replace(', "judged": []', "")
    assert "judged" not in old
    assert from_json(TrainReport, old).judged == ()
