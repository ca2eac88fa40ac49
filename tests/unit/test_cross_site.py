"""Every site's personalised model scored at every other site: what travels, what comes back, what fails alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from actors.local_pool import LocalPool
from gcml_ray.config import Config
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.model.checkpoint import load_model_file
from gcml_ray.networks.registry import build_network
from gcml_ray.records import CaseScore
from gcml_ray.training.trainer import SiteTrainer
from tests.fakes import FakeTrainer, Fault, fake_config, final_weights, first_weight_as_dice
from tests.makers import make_config
from tests.message_audit import AuditedLocalPool, Book, assert_only_weights_and_records
from tests.runs import Run, drive, run_locally, run_real

ON = {"cross_site": True}


def scored(folder: RunFolder) -> set[tuple[str, str]]:
    """(whose model, where) of all rows."""
    return {(score.model, score.site) for score in folder.cross_site()}


# --- the protocol, with fakes ------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [{"name": "gcml", "topology": {"name": "ring"}}, {"name": "local"}, {"name": "fedavg"}]
)
def test_every_model_is_scored_at_every_site_whatever_the_method_sends(tmp_path: Path, method: dict[str, Any]) -> None:
    run = run_locally(fake_config(tmp_path, method=method, evaluation=ON))
    assert scored(run.folder) == {(owner, site) for owner in "ABC" for site in "ABC"}
    assert run.failures() == []


def test_what_is_scored_is_the_owners_model(tmp_path: Path) -> None:
    """The fake's Dice of a visitor follows from its first weight."""
    run = run_locally(fake_config(tmp_path, evaluation=ON))
    weights = final_weights(run.folder)
    away = [score for score in run.folder.cross_site() if score.model != score.site]
    assert len(away) == 6
    assert all(score.dice == first_weight_as_dice(weights[score.model]) for score in away)


def test_at_home_stands_what_the_test_said(tmp_path: Path) -> None:
    run = run_locally(fake_config(tmp_path, evaluation=ON))
    home = [score.dice for score in run.folder.cross_site() if score.model == score.site == "B"]
    assert home == [score.dice for score in run.folder.cases() if (score.site, score.model) == ("B", "personalised")]


def test_nothing_travels_unless_asked_for(tmp_path: Path) -> None:
    run = run_locally(fake_config(tmp_path))
    assert not run.folder.cross_site_file.exists()
    assert "visit" not in (run.folder.checkpoints("A") / "calls.txt").read_text()


@pytest.mark.parametrize(
    ("stage", "missing"), [("visit", {("B", "A"), ("B", "C")}), ("score_visitor", {("A", "B"), ("C", "B")})]
)
def test_site_that_fails_is_left_out_and_the_run_is_finished(
    tmp_path: Path, stage: Any, missing: set[tuple[str, str]]
) -> None:
    run = run_locally(fake_config(tmp_path, evaluation=ON), Fault("B", 4, stage, "raise"))
    assert run.summary.status == "finished"
    assert scored(run.folder) == {(owner, site) for owner in "ABC" for site in "ABC"} - missing
    assert {(site, decision) for site, _, _, decision in run.failures()} == {("B", "skip")}


class RaisesOnce(FakeTrainer):
    """B cannot score the first visitor that it gets: its memory is full for a moment."""

    has_raised = False

    def note(self, stage: str, number: int) -> None:
        super().note(stage, number)
        if (self.site, stage) == ("B", "score_visitor") and not self.has_raised:
            self.has_raised = True
            raise MemoryError("out of memory")


def test_a_model_that_could_not_be_scored_may_come_again(tmp_path: Path) -> None:
    config = fake_config(tmp_path, evaluation=ON)

    def make(config: Config, site: str, folder: Path, *, use_gpu: bool, on_progress: Any) -> FakeTrainer:
        del use_gpu
        return RaisesOnce(config, site, folder, num_values=8, on_progress=on_progress)

    run = drive(config, LocalPool(config, config.output.folder, run_id="run", make_trainer=make))
    assert len(scored(run.folder)) == 9
    assert run.summary.untested == ()


def test_signed_runs_sign_visits_too(tmp_path: Path) -> None:
    run = run_locally(fake_config(tmp_path, evaluation=ON, wire={"sign": True}))
    assert len(scored(run.folder)) == 9


# --- real models -------------------------------------------------------------------------------

BATCH_NORM = {"name": "unet", "options": {"channels": [4, 8], "strides": [2], "num_res_units": 1, "norm": "BATCH"}}
ROUNDS = {"rounds": 2, "warmup_rounds": 0}


def trainer_of(run: Run, config: Config, site: str) -> SiteTrainer:
    """A site as it is after the run."""
    trainer = SiteTrainer(config, site, run.folder.path, use_gpu=False, on_progress=lambda *_: None)
    trainer.start(resume_round=config.federation.rounds)
    return trainer


def model_file(run: Run, owner: str) -> Path:
    return run.folder.path / "checkpoints" / owner / "personalised.safetensors"


def scores_by_hand(run: Run, config: Config, *, owner: str, site: str) -> list[float]:
    """The owner's file, loaded into a trainer of the other site and scored there."""
    trainer = trainer_of(run, config, site)
    learner = trainer.exchange.learner_for(config.network_of(owner))
    load_model_file(model_file(run, owner), learner.model)
    report = trainer.evaluator.evaluate(learner, split="test", model=owner, round_number=2, on_progress=lambda *_: None)
    return [score.dice for score in report.scores]


METHODS = pytest.mark.parametrize(
    "sections",
    [
        {"network": BATCH_NORM, "method": {"name": "fedbn"}},
        {"network": BATCH_NORM, "method": {"name": "gossip_avg", "topology": {"name": "ring"}, "buffers": "keep"}},
        {"method": {"name": "ditto", "lambda": 0.1}},
        {"method": {"name": "gossip_avg", "topology": {"name": "ring"}}, "wire": {"encoding": "int8"}},
    ],
    ids=["norms stay local", "buffers stay local", "personal model", "encoded pushes"],
)


@METHODS
def test_scores_away_are_those_of_the_owners_file(tmp_path: Path, sections: dict[str, Any]) -> None:
    config = make_config(tmp_path, spatial_dims=2, evaluation=ON, federation=ROUNDS, **sections)
    run = run_real(config)
    for owner, site in (("A", "B"), ("B", "A")):
        away = [score.dice for score in run.folder.cross_site() if (score.model, score.site) == (owner, site)]
        assert away == scores_by_hand(run, config, owner=owner, site=site)


@METHODS
def test_the_whole_model_travels_as_it_is_used_at_home(tmp_path: Path, sections: dict[str, Any]) -> None:
    """Every value of A's file is in B's learner, those included that the method keeps local."""
    config = make_config(tmp_path, spatial_dims=2, evaluation=ON, federation=ROUNDS, **sections)
    run = run_real(config)
    a, b = trainer_of(run, config, "A"), trainer_of(run, config, "B")
    b.visits.score(*a.visits.export("run/visit"))
    arrived = b.exchange.learner_for(config.network).model.flat.clone()
    home = a.exchange.learner_for(config.network).model
    home.flat.zero_()
    load_model_file(model_file(run, "A"), home)
    assert torch.equal(arrived, home.flat)
    load_model_file(model_file(run, "B"), home)
    assert not torch.equal(arrived, home.flat)


def test_models_of_another_network_are_scored_too(tmp_path: Path) -> None:
    wide = {"name": "unet", "options": {"channels": [8, 16], "strides": [2], "num_res_units": 1}}
    method = {"name": "proxyfl", "alpha": 0.5, "beta": 0.5, "topology": {"name": "ring"}}
    config = make_config(
        tmp_path, spatial_dims=2, evaluation=ON, federation=ROUNDS, method=method, site_networks={"B": wide}
    )
    run = run_real(config)
    away = [score.dice for score in run.folder.cross_site() if (score.model, score.site) == ("B", "A")]
    assert away == scores_by_hand(run, config, owner="B", site="A")


def test_only_weights_and_small_records_cross_a_sites_border(tmp_path: Path) -> None:
    config = make_config(tmp_path, spatial_dims=2, evaluation=ON, federation=ROUNDS)
    network = build_network(config.network, config.data)
    book = Book(tmp_path / "messages.jsonl", sum(parameter.numel() for parameter in network.parameters()))
    run = drive(config, AuditedLocalPool(config, book))
    assert len(scored(run.folder)) == 4
    assert_only_weights_and_records(book, senders="AB")
    assert {"call visit", "answer score_visitor"} <= book.read().keys()


# --- configuration -----------------------------------------------------------------------------


def test_switch_is_no_part_of_the_identity(tmp_path: Path) -> None:
    assert fake_config(tmp_path, evaluation=ON).identity == fake_config(tmp_path).identity


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"method": {"name": "pooled"}}, "cross_site would be ignored: method pooled has one model"),
        (
            {"privacy": {"mode": "update_noise", "noise_multiplier": 1.0, "max_update_norm": 1.0, "delta": 1e-5}},
            "without noise",
        ),
    ],
)
def test_where_it_contradicts_the_rest_it_is_refused(tmp_path: Path, sections: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        fake_config(tmp_path, evaluation=ON, **sections)


def test_rows_survive_the_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    rows = (CaseScore("A", "c1", "test", "B", "lesion", 0.5, 2.5, 0.25),)
    folder.write_cross_site(rows)
    assert folder.cross_site() == rows
