import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gcml_ray.config import Config
from gcml_ray.errors import CheckpointError
from gcml_ray.model.checkpoint import load_model_file, saved_rounds
from gcml_ray.model.learner import Learner
from gcml_ray.records import BEFORE_GOSSIP, PERSONALISED, EvaluationReport
from gcml_ray.training.trainer import SiteTrainer
from tests.makers import make_config
from tests.trainer_runs import (
    RING,
    TROUBLESOME,
    make_trainer,
    order,
    run,
    two_networks,
    weights,
    without_clocks,
)

# --- resume --------------------------------------------------------------------------------------

METHODS = {
    "gcml": {"name": "gcml", "topology": RING, "buffers": "send"},
    "gcml-averaged": {"name": "gcml", "topology": RING, "merge": "val_weighted", "merge_first": "size_weighted"},
    "gml": {"name": "gml", "topology": RING, "buffers": "keep"},
    "gossip_avg": {"name": "gossip_avg", "topology": RING},
}


@pytest.mark.parametrize("resume_round", [1, 2])
@pytest.mark.parametrize("method", list(METHODS))
def test_a_resumed_run_ends_bit_for_bit_where_one_that_never_stopped_does(
    tmp_path: Path, method: str, resume_round: int
) -> None:
    """Round 1 alone, then two pushes; the network has dropout, running statistics and counters."""
    config = make_config(tmp_path, network=TROUBLESOME, method=METHODS[method])
    whole = make_trainer(config, folder=tmp_path / "whole")
    whole_reports = run(whole, [1, 2, 3])
    run(make_trainer(config, folder=tmp_path / "stopped"), range(1, resume_round + 1))
    torch.manual_seed(99)
    resumed = make_trainer(config, folder=tmp_path / "stopped", resume_round=resume_round)
    assert resumed.state.round_number == resume_round
    reports = run(resumed, range(resume_round + 1, 4))
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.state == whole.state
    assert [without_clocks(report) for report in reports] == [
        without_clocks(report) for report in whole_reports[resume_round:]
    ]
    for name, counter in whole.local.model.counters().items():
        assert torch.equal(resumed.local.model.counters()[name], counter)


def test_a_site_one_round_ahead_goes_back_and_comes_to_the_same_place(tmp_path: Path) -> None:
    config = make_config(tmp_path, network=TROUBLESOME)
    trainer = make_trainer(config)
    run(trainer, [1, 2, 3])
    back = make_trainer(config, resume_round=2)
    run(back, [3])
    assert torch.equal(weights(back), weights(trainer))


def test_a_round_that_is_not_there_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    run(make_trainer(config), [1])
    with pytest.raises(CheckpointError, match=r"site A has no checkpoint of round 5 in .*found \[1\]"):
        make_trainer(config, resume_round=5)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    run(make_trainer(make_config(tmp_path)), [1])
    with pytest.raises(CheckpointError, match="resume with the configuration that the run was started with"):
        make_trainer(make_config(tmp_path, optimiser={"learning_rate": 0.5}), resume_round=1)


def test_starting_afresh_ignores_old_checkpoints(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    trainer = make_trainer(config)
    start = weights(trainer)
    run(trainer, [1, 2])
    again = make_trainer(config, resume_round=0)
    assert torch.equal(weights(again), start)
    run(again, [1])
    assert saved_rounds(again.files.folder) == [1]


def test_no_checkpoint_is_written_where_none_was_asked_for(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path))
    trainer.train_round(order(2, evaluate=False, checkpoint=False), [])
    assert not trainer.files.folder.exists()


def test_with_different_networks_a_resumed_run_ends_where_the_whole_one_does(tmp_path: Path) -> None:
    config = two_networks(tmp_path, network=TROUBLESOME)
    whole = make_trainer(config, folder=tmp_path / "whole")
    run(whole, [1, 2, 3])
    run(make_trainer(config, folder=tmp_path / "stopped"), [1, 2])
    resumed = make_trainer(config, folder=tmp_path / "stopped", resume_round=2)
    run(resumed, [3])
    assert torch.equal(weights(resumed), weights(whole))


# --- which models are kept -------------------------------------------------------------------------


@dataclass
class ScriptedEvaluator:
    """Gives one score after the other, and remembers which weights it was asked to evaluate."""

    scores: list[float]
    evaluated: list[Tensor] = field(default_factory=list)

    def validation_dice(self, learner: Learner) -> float:
        del learner
        return self.scores.pop(0)

    def evaluate(self, learner: Learner, **options: Any) -> EvaluationReport:
        self.evaluated.append(learner.model.flat.clone())
        return EvaluationReport("A", options["split"], options["model"], options["round_number"], (), 0.0)

    def draw(self, learner: Learner, scores: Sequence[object], folder: Path) -> None:
        """No pictures."""


def after_scores(config: Config, scores: Sequence[float]) -> tuple[SiteTrainer, ScriptedEvaluator, list[Tensor]]:
    """Trains alone for as many rounds as there are scores; the weights after each one."""
    trainer = make_trainer(config)
    trainer.evaluator = evaluator = ScriptedEvaluator(list(scores))  # type: ignore[assignment]
    flats = []
    for number in range(1, len(scores) + 1):
        trainer.train_round(order(number), [])
        flats.append(weights(trainer))
    return trainer, evaluator, flats


@pytest.mark.parametrize(
    ("scores", "best"), [((0.2, 0.8, 0.5), 2), ((0.9, 0.8, 0.5), 1), ((0.5, 0.8, 0.8), 3), ((0.0, 0.0, 0.0), 3)]
)
def test_the_personalised_model_is_the_best_on_validation_and_the_later_of_equals(
    tmp_path: Path, scores: tuple[float, ...], best: int
) -> None:
    trainer, evaluator, flats = after_scores(make_config(tmp_path), scores)
    report = trainer.evaluate(split="test", model=PERSONALISED)
    assert report.round_number == best
    assert torch.equal(evaluator.evaluated[0], flats[best - 1])
    assert (trainer.state.best_round, trainer.state.best_dice) == (best, max(scores))
    assert torch.equal(weights(trainer), flats[-1]), "evaluating must not touch the model in training"


def test_the_tested_model_is_kept_under_a_name_that_does_not_change(tmp_path: Path) -> None:
    trainer, _, flats = after_scores(make_config(tmp_path), (0.2, 0.8, 0.5))
    kept = trainer.files.folder / "personalised.safetensors"
    trainer.evaluate(split="validation", model=PERSONALISED)
    assert not kept.exists()
    trainer.evaluate(split="test", model=PERSONALISED)
    facts = load_model_file(kept, trainer.local.model)
    assert torch.equal(weights(trainer), flats[1])
    assert (facts["site"], facts["round"], facts["validation_dice"]) == ("A", "2", "0.8")


def test_a_site_that_has_trained_in_no_round_keeps_no_model_for_later(tmp_path: Path) -> None:
    trainer, evaluator, _ = after_scores(make_config(tmp_path), ())
    evaluator.scores = [0.1]
    report = trainer.evaluate(split="test", model=PERSONALISED)
    assert report.round_number == 0
    assert not (trainer.files.folder / "personalised.safetensors").exists()


def test_the_model_before_gossip_is_that_of_the_last_warm_up_round(tmp_path: Path) -> None:
    config = make_config(tmp_path, federation={"rounds": 4, "warmup_rounds": 2})
    trainer, evaluator, flats = after_scores(config, (0.9, 0.1, 0.2, 0.3))
    report = trainer.evaluate(split="test", model=BEFORE_GOSSIP)
    assert report.round_number == 2
    assert torch.equal(evaluator.evaluated[0], flats[1])


def test_both_models_survive_a_resume(tmp_path: Path) -> None:
    config = make_config(tmp_path, federation={"rounds": 4, "warmup_rounds": 2})
    _, _, flats = after_scores(config, (0.1, 0.2, 0.9, 0.3))
    trainer = make_trainer(config, resume_round=4)
    trainer.evaluator = evaluator = ScriptedEvaluator([])  # type: ignore[assignment]
    rounds = [trainer.evaluate(split="test", model=model).round_number for model in (PERSONALISED, BEFORE_GOSSIP)]
    assert rounds == [3, 2]
    assert torch.equal(evaluator.evaluated[0], flats[2])
    assert torch.equal(evaluator.evaluated[1], flats[1])


def test_a_model_that_never_was_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path, federation={"warmup_rounds": 0}))
    with pytest.raises(CheckpointError, match=f"site A has no {BEFORE_GOSSIP} model"):
        trainer.evaluate(split="test", model=BEFORE_GOSSIP)


def test_site_that_was_never_validated_is_tested_with_the_model_it_has(tmp_path: Path) -> None:
    """The time of a run can be up before its first validation."""
    trainer = make_trainer(make_config(tmp_path))
    for number in (1, 2):
        trainer.train_round(order(number, evaluate=False), [])
    flat = trainer.own.model.flat.clone()
    report = trainer.evaluate(split="test", model=PERSONALISED)
    assert report.round_number == trainer.state.best_round == 2
    trainer.own.model.flat.zero_()
    assert trainer.files.load(PERSONALISED, trainer.own.model) == 2
    assert torch.equal(trainer.own.model.flat, flat)


def test_a_deleted_model_file_is_named(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path))
    run(trainer, [1])
    shutil.rmtree(trainer.files.folder)
    with pytest.raises(CheckpointError, match=r"model_00001\.safetensors does not exist"):
        trainer.evaluate(split="test", model=PERSONALISED)


def test_every_case_of_a_split_is_scored(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path))
    run(trainer, [1])
    report = trainer.evaluate(split="train", model=PERSONALISED)
    assert [(score.case, score.class_name) for score in report.scores] == [(f"c{n}", "box") for n in range(3)]


def test_quick_validation_and_the_full_report_agree(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path))
    (report,) = run(trainer, [1])
    scores = trainer.evaluate(split="validation", model=PERSONALISED).scores
    assert report.validation_dice == pytest.approx(float(np.mean([score.dice for score in scores])), abs=1e-6)


def test_validation_leaves_the_model_in_train_mode(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path, network=TROUBLESOME))
    run(trainer, [1, 2])
    assert all(part.training for part in trainer.local.model.module.modules())


def test_while_a_broken_round_is_undone_what_was_published_is_pushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a barrier another thread may export in the middle of it: never the initial weights."""
    method = {"name": "gcml", "topology": RING}
    trainer = make_trainer(make_config(tmp_path, federation={"rounds": 4, "mode": "async"}, method=method))
    run(trainer, [1, 2])
    _, published = trainer.export("run", 2)
    restore, seen = trainer.files.restore, []

    def restore_and_export(*arguments: Any, **options: Any) -> None:
        seen.append(trainer.export("run", 2))
        restore(*arguments, **options)

    monkeypatch.setattr(trainer.files, "restore", restore_and_export)
    trainer.is_spoilt = True  # as after an error within round 3
    trainer.train_round(order(3), [])
    ((header, buffer),) = seen
    assert header.round_number == 2
    assert np.array_equal(buffer, published)


def test_a_round_that_breaks_before_the_first_checkpoint_leaves_nothing_behind(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path, method={"name": "gcml", "topology": RING}))
    fresh, initial = trainer.state, weights(trainer)
    for number in (1, 2):
        trainer.train_round(order(number, checkpoint=False), [])
    assert trainer.state.best_round > 0
    trainer.is_spoilt = True  # as after an error within round 3
    _, pushed = trainer.export("run", 2)
    assert trainer.state == fresh
    assert np.array_equal(pushed, initial.numpy())
