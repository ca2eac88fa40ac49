"""A site that trains privately: what it reports, remembers and refuses, and when it stops."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from gcml_ray.config import Config
from gcml_ray.console.run import RunConsole
from gcml_ray.errors import CheckpointError, ConfigError
from gcml_ray.files.record_json import from_json, to_json
from gcml_ray.methods import METHODS
from gcml_ray.model.learner import Learner, Statistics, learning_rate
from gcml_ray.privacy.accounting import Ledger, epsilon_of
from gcml_ray.privacy.training import check_network, private_step
from gcml_ray.records import RoundPlan, RoundRecord, TrainReport
from gcml_ray.seeding import derive_seed
from gcml_ray.tracking.metrics import federation_metrics, training_metrics
from tests.makers import make_config
from tests.trainer_runs import make_trainer, order, push_from_b, run, weights

PRIVATE = {"mode": "dp_sgd", "noise_multiplier": 1.0, "max_grad_norm": 1.0, "delta": 1e-2, "seeded": True}
TRUSTING = {"weights": False, "validation": False}  # the made-up pushes of these tests would be refused


def private_config(folder: Path, *, privacy: dict[str, Any] | None = None, **sections: Any) -> Config:
    return make_config(folder, privacy=PRIVATE | (privacy or {}), defence=TRUSTING, **sections)


# --- a site ----------------------------------------------------------------------------------------


def test_training_reports_the_epsilon_of_all_steps_so_far(tmp_path: Path) -> None:
    """Site A: 3 training cases, 2 a step; 2 steps a round."""
    reports = run(make_trainer(private_config(tmp_path)), [1, 2])
    expected = [epsilon_of(1.0, sample_rate=2 / 3, num_steps=steps, delta=1e-2) for steps in (2, 4)]
    assert [report.privacy_epsilon for report in reports] == expected


def test_seeded_training_repeats_itself_and_secret_noise_does_not(tmp_path: Path) -> None:
    def trained(name: str, *, seeded: bool) -> Tensor:
        (tmp_path / name).mkdir()
        trainer = make_trainer(private_config(tmp_path / name, privacy={"seeded": seeded}))
        run(trainer, [1])
        return weights(trainer)

    first = trained("a", seeded=True)
    assert torch.equal(first, trained("b", seeded=True))
    assert not torch.equal(trained("c", seeded=False), trained("d", seeded=False))


def test_mode_none_changes_nothing_bit_for_bit(tmp_path: Path) -> None:
    """Against a loop that knows nothing of privacy: forward, backward, one step of the optimiser."""
    config = make_config(tmp_path)
    trainer, plain = make_trainer(config), make_trainer(config, folder=tmp_path / "plain")
    (report,) = run(trainer, [1])
    learner = plain.local
    torch.manual_seed(derive_seed(7, "torch", "A", 1))
    learner.model.module.train()
    for step, batch in enumerate(plain.data.batches(1, 2)):
        learner.set_learning_rate(learning_rate(config.optimiser, config.federation, round_number=1, step=step))
        learner.model.gradient.zero_()
        plain.loss(learner.forward(batch.image), batch.label).backward()
        learner.optimiser.step()
    assert torch.equal(weights(trainer), weights(plain))
    assert report.privacy_epsilon is None
    assert not list(tmp_path.rglob("privacy.json"))


@pytest.mark.parametrize(
    "method",
    [
        {"name": "gml", "topology": {"name": "ring"}},
        {"name": "gcml", "topology": {"name": "ring"}, "merge": "replace"},
        {"name": "defkt", "topology": {"name": "ring"}},
        {"name": "proxyfl", "topology": {"name": "ring"}, "alpha": 0.5, "beta": 0.5},
        {"name": "ditto", "lambda": 0.1},
        {"name": "fedprox", "mu": 0.1},
    ],
    ids=lambda method: method["name"],
)
def test_every_optimiser_step_of_every_model_is_private(
    tmp_path: Path, method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a method trains beside the local model: no learner steps but at the end of a private step."""
    steps: list[bool] = []
    inside: list[int] = []
    plain_step = Learner.take_step

    def private(*arguments: Any, **options: Any) -> Statistics:
        inside.append(1)
        try:
            return private_step(*arguments, **options)
        finally:
            inside.pop()

    def watched(learner: Learner) -> None:
        steps.append(bool(inside) and not learner.is_collecting)
        plain_step(learner)

    monkeypatch.setattr("gcml_ray.privacy.training.private_step", private)
    monkeypatch.setattr(Learner, "take_step", watched)
    trainer = make_trainer(private_config(tmp_path, method=method))
    has_pushes = method["name"] not in ("ditto", "fedprox")
    (report,) = [trainer.train_round(order(2), [push_from_b(trainer, 2)] if has_pushes else [])]
    num_models = 1 if method["name"] == "fedprox" else 2
    assert steps == [True] * (report.num_steps * num_models)
    assert method["name"] in METHODS


# --- what a site remembers ---------------------------------------------------------------------


def test_epsilon_goes_on_after_a_resume(tmp_path: Path) -> None:
    config = private_config(tmp_path)
    run(make_trainer(config), [1, 2])
    (report,) = run(make_trainer(config, resume_round=2), [3])
    assert report.privacy_epsilon == epsilon_of(1.0, sample_rate=2 / 3, num_steps=6, delta=1e-2)


def test_a_round_that_is_done_again_counts_again(tmp_path: Path) -> None:
    """Round 2 was pushed before the site went back to round 1: what it told is told."""
    config = private_config(tmp_path)
    run(make_trainer(config), [1, 2])
    (report,) = run(make_trainer(config, resume_round=1), [2])
    assert report.privacy_epsilon == epsilon_of(1.0, sample_rate=2 / 3, num_steps=6, delta=1e-2)


def test_a_round_that_broke_off_counts(tmp_path: Path) -> None:
    class EndedError(Exception):
        pass

    def end(stage: str, step: int, num_steps: int) -> None:
        del num_steps
        if (stage, step) == ("train", 1):
            raise EndedError

    config = private_config(tmp_path)
    with pytest.raises(EndedError):
        run(make_trainer(config, on_progress=end), [1])
    assert make_trainer(config).private.ledger.num_spent == 2  # type: ignore[union-attr]


def test_a_ledger_of_another_configuration_does_not_count_and_a_broken_one_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "privacy.json"
    Ledger(path, identity="one", sample_rate=0.5).spend(5)
    assert Ledger(path, identity="one", sample_rate=0.5).num_spent == 5
    assert Ledger(path, identity="other", sample_rate=0.5).num_spent == 0
    path.write_text("{")
    with pytest.raises(CheckpointError, match="counts the privacy"):
        Ledger(path, identity="one", sample_rate=0.5)


def test_a_site_that_has_trained_is_not_resumed_without_its_ledger(tmp_path: Path) -> None:
    config = private_config(tmp_path)
    trainer = make_trainer(config)
    run(trainer, [1])
    (trainer.files.folder / "privacy.json").unlink()
    with pytest.raises(CheckpointError, match=r"privacy\.json is not there any more: it counts the privacy"):
        make_trainer(config, resume_round=1)


def test_a_site_whose_number_of_cases_has_changed_is_not_resumed(tmp_path: Path) -> None:
    """Its steps so far were of another rate than those to come."""
    path = tmp_path / "privacy.json"
    Ledger(path, identity="one", sample_rate=0.5).spend(5)
    with pytest.raises(CheckpointError, match=r"5 steps that drew each case at rate 0\.5, now it would be 0\.4"):
        Ledger(path, identity="one", sample_rate=0.4)


def test_a_site_at_its_epsilon_limit_keeps_its_weights_says_so_and_still_pushes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two rounds of two steps fit below the limit, the third does not."""
    limit = epsilon_of(1.0, sample_rate=2 / 3, num_steps=5, delta=1e-2)
    trainer = make_trainer(private_config(tmp_path, privacy={"epsilon_limit": limit}))
    first = run(trainer, [1, 2])
    after_two = weights(trainer)
    with caplog.at_level(logging.WARNING, logger="gcml_ray.privacy.training"):
        (last,) = run(trainer, [3])
    assert [report.num_steps for report in (*first, last)] == [2, 2, 0]
    assert last.privacy_epsilon == first[-1].privacy_epsilon
    assert "site A stops training at round 3" in caplog.text
    assert torch.equal(weights(trainer), after_two)
    _, buffer = trainer.export("run", 4)
    assert np.array_equal(buffer, after_two.numpy())
    header = replace(trainer.export("run", 4)[0], sender="B")
    assert trainer.train_round(order(4), [(header, buffer)]).peers == (), "nobody has taught it"


# --- what cannot be private --------------------------------------------------------------------


def test_batchnorm_is_refused_by_the_name_of_its_layer(tmp_path: Path) -> None:
    network = {"name": "unet", "options": {"channels": [4, 8], "strides": [2], "norm": "BATCH"}}
    with pytest.raises(ConfigError, match=r"layer model\.0.*BatchNorm3d.*norm: INSTANCE or GROUP"):
        make_trainer(private_config(tmp_path, network=network))


def test_running_statistics_of_instance_norm_are_refused_and_plain_norms_are_not() -> None:
    check_network(nn.Sequential(nn.InstanceNorm3d(2, affine=True), nn.GroupNorm(1, 2)), name="net")
    with pytest.raises(ConfigError, match="layer 0"):
        check_network(nn.Sequential(nn.InstanceNorm3d(2, track_running_stats=True)), name="net")


@pytest.mark.parametrize(
    ("privacy", "sections", "words"),
    [
        ({"max_grad_norm": None}, {}, "dp_sgd needs max_grad_norm"),
        ({"max_update_norm": 1.0}, {}, "max_update_norm would be ignored by mode dp_sgd"),
        ({"mode": "none"}, {}, "would be ignored by mode none"),
        ({"noise_multiplier": 0.0, "epsilon_limit": 3.0}, {}, "epsilon is infinite without noise"),
        ({}, {"resources": {"amp": "fp16"}}, "resources.amp bf16"),
        ({}, {"resources": {"compile": True}}, "set resources.compile false"),
        ({}, {"data": {"num_workers": 2}}, "data.num_workers 2 would be ignored"),
        (
            {"mode": "update_noise", "max_grad_norm": None, "max_update_norm": 1.0},
            {"method": {"name": "local"}},
            "method local pushes nothing",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tmp_path: Path, privacy: dict[str, Any], sections: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        private_config(tmp_path, privacy=privacy, **sections)


@pytest.mark.parametrize(
    ("data", "delta", "words"),
    [({"batch_size": 4}, 1e-2, "site A has 3 training cases"), ({}, 0.4, "delta 0.4 promises nothing at site A")],
)
def test_a_site_with_too_few_cases_is_refused(tmp_path: Path, data: dict[str, Any], delta: float, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_trainer(private_config(tmp_path, privacy={"delta": delta}, data=data))


def test_privacy_is_part_of_a_runs_identity(tmp_path: Path) -> None:
    one, other = (private_config(tmp_path, privacy={"noise_multiplier": sigma}) for sigma in (1.0, 2.0))
    assert len({make_config(tmp_path).identity, one.identity, other.identity}) == 3


def test_infinite_epsilon_survives_and_reports_of_older_runs_can_be_read(tmp_path: Path) -> None:
    (report,) = run(make_trainer(private_config(tmp_path, privacy={"noise_multiplier": 0.0})), [1])
    text = to_json(report)
    assert report.privacy_epsilon == float("inf")
    assert from_json(TrainReport, text).privacy_epsilon == float("inf")
    assert (
        from_json(TrainReport, text.replace('"privacy_epsilon": "Infinity"', '"privacy_epsilon": null')).privacy_epsilon
        is None
    )
    assert from_json(TrainReport, text.replace(', "privacy_epsilon": "Infinity"', "")).privacy_epsilon is None


# --- what a person sees ------------------------------------------------------------------------


def record_of(*reports: TrainReport) -> RoundRecord:
    sites = tuple(report.site for report in reports)
    return RoundRecord(RoundPlan(1, "warmup", sites, ()), trained=reports, pushes=(), failures=(), seconds=1.0)


def report_of(site: str, epsilon: float | None, *, num_steps: int = 2) -> TrainReport:
    return TrainReport(site, 1, (), num_steps, {}, {}, "", {}, None, False, {}, 0.1, 0, privacy_epsilon=epsilon)


def test_metrics_hold_each_finite_epsilon_and_the_largest() -> None:
    record = record_of(report_of("A", 2.0), report_of("B", 3.0), report_of("C", float("inf")), report_of("D", None))
    assert federation_metrics(record)["privacy/epsilon_max"] == 3.0
    assert training_metrics(report_of("A", 2.0))["privacy/epsilon"] == 2.0
    assert not any("privacy/epsilon" in training_metrics(report_of("C", epsilon)) for epsilon in (float("inf"), None))
    assert "privacy/epsilon_max" not in federation_metrics(record_of(report_of("D", None)))


def test_the_console_says_once_that_a_site_trains_no_more(tmp_path: Path) -> None:
    text = io.StringIO()
    console = RunConsole(Console(file=text, width=200), title="run")
    console.on_start(private_config(tmp_path), ["A"])
    for num_steps in (2, 0, 0):
        console.on_site_trained(report_of("A", 4.25, num_steps=num_steps))
    assert text.getvalue().count("A trains no more: epsilon 4.25 is at its limit") == 1
