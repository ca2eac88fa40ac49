import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor

from gcml_ray.config import Config
from gcml_ray.data.datalist import read_datalist
from gcml_ray.errors import CheckpointError, DataError
from gcml_ray.evaluation import Evaluator
from gcml_ray.learner import Learner
from gcml_ray.networks.registry import fingerprint
from gcml_ray.records import EvaluationReport, SiteInfo, TrainOrder, TrainReport
from gcml_ray.trainer import BEFORE_GOSSIP, PERSONALISED, SiteTrainer
from gcml_ray.wire import Buffer, PushHeader, refusal
from tests.makers import make_config

RING = {"name": "ring"}
TROUBLESOME = {  # everything that could make a resumed round differ: dropout, running statistics, counters
    "name": "unet",
    "options": {"channels": [4, 8], "strides": [2], "num_res_units": 1, "norm": "BATCH", "dropout": 0.2},
}
OTHER_NETWORK = {"name": "unet", "options": {"channels": [4, 4], "strides": [2], "num_res_units": 0}}
Push = tuple[PushHeader, Buffer]


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


def no_progress(stage: str, step: int, num_steps: int) -> None:
    del stage, step, num_steps


def make_trainer(
    config: Config,
    *,
    site: str = "A",
    folder: Path | None = None,
    resume_round: int | None = 0,
    use_gpu: bool = False,
    on_progress: Callable[[str, int, int], None] = no_progress,
) -> SiteTrainer:
    trainer, _ = started(
        config, site=site, folder=folder, resume_round=resume_round, use_gpu=use_gpu, on_progress=on_progress
    )
    return trainer


def started(
    config: Config, *, site: str = "A", folder: Path | None = None, resume_round: int | None = 0, **options: Any
) -> tuple[SiteTrainer, SiteInfo]:
    options = {"use_gpu": False, "on_progress": no_progress} | options
    trainer = SiteTrainer(config, site, folder or Path(config.output.folder), **options)
    return trainer, trainer.start(resume_round=resume_round)


def order(round_number: int, *, evaluate: bool = True, checkpoint: bool = True) -> TrainOrder:
    phase = "warmup" if round_number == 1 else "exchange"
    return TrainOrder(round_number, phase, evaluate=evaluate, checkpoint=checkpoint)  # type: ignore[arg-type]


def push_from_b(trainer: SiteTrainer, round_number: int) -> Push:
    """What B could send in a round: the initial weights of the common architecture, shaken; read-only as on the wire."""
    model = trainer._learner_for(trainer.config.network_of("B")).model  # noqa: SLF001 - only its size is asked for
    noise = np.random.default_rng(round_number).normal(0, 0.1, model.num_sent).astype(np.float32)
    noise.flags.writeable = False
    return PushHeader("run", round_number, "B", 4, "", "", (), noise.size, "float32", ""), noise


def run(trainer: SiteTrainer, rounds: Sequence[int], *, with_pushes: bool = True) -> list[TrainReport]:
    """Trains the rounds; B's push comes in from round 2 on."""
    return [
        trainer.train_round(order(number), [push_from_b(trainer, number)] if with_pushes and number > 1 else [])
        for number in rounds
    ]


def weights(trainer: SiteTrainer) -> Tensor:
    return trainer.local.model.flat.clone()


# --- start ---------------------------------------------------------------------------------------


def test_a_site_says_what_it_has(tmp_path: Path) -> None:
    trainer, info = started(make_config(tmp_path), site="B")
    assert (info.site, info.num_train, info.num_validation, info.num_test) == ("B", 4, 1, 1)
    assert info.num_parameters == sum(part.numel() for part in trainer.local.model.module.parameters())
    assert (info.push_bytes, info.restored_round, info.device) == (4 * trainer.local.model.num_sent, 0, "cpu")
    assert info.notes == ()


@pytest.mark.parametrize(("common", "same"), [(True, True), (False, False)])
def test_initial_weights_are_common_to_all_sites_where_asked(tmp_path: Path, common: bool, same: bool) -> None:
    config = make_config(tmp_path, federation={"common_init": common})
    assert torch.equal(weights(make_trainer(config)), weights(make_trainer(config, site="B"))) == same


def test_initial_weights_depend_on_the_seed(tmp_path: Path) -> None:
    one, other = (make_trainer(make_config(tmp_path, federation={"seed": seed})) for seed in (1, 2))
    assert not torch.equal(weights(one), weights(other))


def test_building_a_learner_leaves_torchs_generator_alone(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path))
    before = torch.get_rng_state()
    trainer._build_learner(trainer.config.network)  # noqa: SLF001 - happens in the middle of a round
    assert torch.equal(torch.get_rng_state(), before)


def test_a_gpu_that_is_not_there_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _, info = started(make_config(tmp_path), use_gpu=True)
    assert info.notes == ("a GPU was granted but CUDA is not available: training on the CPU",)
    assert info.device == "cpu"


def test_bad_data_stops_the_start_with_the_file(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    (tmp_path / "cases" / "A1_t1.nii").unlink()
    with pytest.raises(DataError, match=r"site A, case c1: .*A1_t1\.nii"):
        make_trainer(config)


# --- notes ---------------------------------------------------------------------------------------


def blank_channel(folder: Path, *names: str) -> None:
    """Makes image files constant, which loading warns of."""
    for name in names:
        volume = np.full((12, 12, 8), 5, dtype=np.uint8)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / "cases" / f"{name}.nii")


def test_warnings_while_loading_reach_the_driver_and_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(tmp_path)
    blank_channel(tmp_path, "A1_t2")
    _, info = started(config)
    assert info.notes == ("site A, case c1: channel t2 is 5 everywhere",)
    assert info.notes[0] in caplog.text


def test_many_warnings_are_cut_at_ten_and_counted(tmp_path: Path) -> None:
    """Site D has 6 + 2 cases of two channels, all blank: 16 warnings, 10 shown."""
    config = make_config(tmp_path, num_sites=4)
    blank_channel(tmp_path, *(f"D{case}_{channel}" for case in range(8) for channel in ("t1", "t2")))
    _, info = started(config, site="D")
    assert len(info.notes) == 11
    assert info.notes[-1] == "and 6 more warnings, see the site's log"


def test_what_is_logged_after_loading_or_by_others_is_no_note(tmp_path: Path) -> None:
    _, info = started(make_config(tmp_path))
    num_handlers = len(logging.getLogger("gcml_ray").handlers)
    _, again = started(make_config(tmp_path))
    assert len(logging.getLogger("gcml_ray").handlers) == num_handlers
    assert info.notes == again.notes == ()


def test_bad_data_leaves_no_handler_behind(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    (tmp_path / "cases" / "A1_t1.nii").unlink()
    handlers = list(logging.getLogger("gcml_ray").handlers)
    with pytest.raises(DataError):
        make_trainer(config)
    assert logging.getLogger("gcml_ray").handlers == handlers


# --- rounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("regions", [None, {"whole": ["box"], "core": ["box"]}])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_three_rounds_run_and_are_reported(tmp_path: Path, spatial_dims: int, regions: dict[str, Any] | None) -> None:
    config = make_config(tmp_path, spatial_dims=spatial_dims, data={"regions": regions})
    trainer = make_trainer(config)
    start = weights(trainer)
    first, second, third = run(trainer, [1, 2, 3])
    assert not torch.equal(weights(trainer), start)
    assert [report.round_number for report in (first, second, third)] == [1, 2, 3]
    assert [report.peers for report in (first, second, third)] == [(), ("B",), ("B",)]
    assert all(report.num_steps == 2 for report in (first, second, third))
    assert (set(first.losses), first.regions, first.merge) == ({"segmentation"}, {}, "")
    assert set(second.regions) == {"pull", "push", "omega"}
    assert second.merge in second.candidate_dice
    assert second.validation_dice == second.candidate_dice[second.merge]
    assert {"train", "merge", "validate", "checkpoint"} == set(second.seconds)
    assert all(value >= 0 for value in second.seconds.values())


def test_a_round_trained_once_more_from_the_same_state_is_the_same(tmp_path: Path) -> None:
    one = make_trainer(make_config(tmp_path, network=TROUBLESOME))
    other = make_trainer(make_config(tmp_path, network=TROUBLESOME), folder=tmp_path / "other")
    torch.manual_seed(99)  # what happened in the process before must not matter
    assert [replace_time(report) for report in run(one, [1, 2])] == [
        replace_time(report) for report in run(other, [1, 2])
    ]
    assert torch.equal(weights(one), weights(other))


def replace_time(report: TrainReport) -> TrainReport:
    return replace(report, seconds={}, peak_memory_bytes=0)


def test_without_evaluation_there_is_no_score_and_no_best(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path))
    report = trainer.train_round(order(2, evaluate=False), [])
    assert (report.validation_dice, report.is_best, trainer.state.best_file) == (None, False, "")


def test_what_comes_in_is_not_changed(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path))
    header, _ = push_from_b(trainer, 2)
    buffer = np.full(header.num_values, 0.01, dtype=np.float32)  # writable, so that a write would show
    trainer.train_round(order(2), [(header, buffer)])
    assert (buffer == np.float32(0.01)).all()


def test_progress_is_told_and_may_stop_the_round(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    def stop_at_second_step(stage: str, step: int, num_steps: int) -> None:
        seen.append((stage, step, num_steps))
        if (stage, step) == ("train", 2):
            raise KeyboardInterrupt

    trainer = make_trainer(make_config(tmp_path), on_progress=stop_at_second_step)
    with pytest.raises(KeyboardInterrupt):
        trainer.train_round(order(1), [])
    assert seen == [*(("load", done, 5) for done in range(1, 6)), ("train", 1, 2), ("train", 2, 2)]
    assert trainer.state.round_number == 0


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
    assert [replace_time(report) for report in reports] == [
        replace_time(report) for report in whole_reports[resume_round:]
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


def test_resume_without_a_number_takes_the_newest_round(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    assert started(config, resume_round=None)[1].restored_round == 0
    run(make_trainer(config), [1, 2])
    assert started(config, resume_round=None)[1].restored_round == 2


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
    assert started(config, resume_round=None)[1].restored_round == 1


def test_no_checkpoint_is_written_where_none_was_asked_for(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path))
    trainer.train_round(order(2, evaluate=False, checkpoint=False), [])
    assert not trainer.checkpoints.exists()


# --- which models are kept -------------------------------------------------------------------------


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


@pytest.mark.parametrize("model", [PERSONALISED, BEFORE_GOSSIP])
def test_a_model_that_never_was_is_refused(tmp_path: Path, model: str) -> None:
    trainer = make_trainer(make_config(tmp_path, federation={"warmup_rounds": 0}))
    with pytest.raises(CheckpointError, match=f"site A has no {model} model"):
        trainer.evaluate(split="test", model=model)


def test_a_deleted_model_file_is_named(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path))
    run(trainer, [1])
    shutil.rmtree(trainer.checkpoints)
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
    assert isinstance(trainer.evaluator, Evaluator)
    assert all(part.training for part in trainer.local.model.module.modules())


# --- pushes --------------------------------------------------------------------------------------


def test_what_one_site_exports_another_accepts_until_it_is_stale(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    sender, receiver = make_trainer(config), make_trainer(config, site="B")
    header, buffer = sender.export("run", 1)
    assert np.array_equal(buffer, sender.local.model.flat.numpy())
    assert (header.sender, header.num_train, header.num_values) == ("A", 3, buffer.size)
    assert refusal(header, buffer, receiver.expectation("run", "A", peers=frozenset("A"))) == ""
    receiver.train_round(order(1), [])
    reason = refusal(header, buffer, receiver.expectation("run", "A", peers=frozenset("A")))
    assert reason == "stale: round 1, the oldest accepted is 2"


def test_a_push_with_another_meaning_of_its_labels_is_refused(tmp_path: Path) -> None:
    sender = make_trainer(make_config(tmp_path, data={"labels": {"background": 0, "lesion": 1}}))
    receiver = make_trainer(make_config(tmp_path), site="B")
    header, buffer = sender.export("run", 1)
    reason = refusal(header, buffer, receiver.expectation("run", "A", peers=frozenset("A")))
    assert reason.startswith("data contract")


@pytest.mark.parametrize("buffers", ["send", "keep"])
def test_running_statistics_travel_only_where_asked(tmp_path: Path, buffers: str) -> None:
    method = {"name": "gcml", "topology": RING, "buffers": buffers}
    trainer = make_trainer(make_config(tmp_path, network=TROUBLESOME, method=method))
    header, buffer = trainer.export("run", 1)
    assert any("running_mean" in spec.name for spec in header.layout) == (buffers == "send")
    assert buffer.size == header.num_values == trainer.local.model.num_sent


def test_an_incoming_model_starts_from_the_receivers_own_where_nothing_was_sent(tmp_path: Path) -> None:
    """Running statistics and counters of an earlier push must not be left over."""
    method = {"name": "gcml", "topology": RING, "buffers": "keep"}
    trainer = make_trainer(make_config(tmp_path, network=TROUBLESOME, method=method))
    run(trainer, [1, 2])
    (header, buffer), model = push_from_b(trainer, 3), trainer.local.model
    from gcml_ray.methods.rounds import IncomingModel  # noqa: PLC0415 - what a trainer makes of a push

    opened = trainer._open_incoming(IncomingModel(header.sender, 4, torch.from_numpy(buffer))).model  # noqa: SLF001
    assert np.array_equal(opened.flat[: opened.num_sent].numpy(), buffer)
    assert torch.equal(opened.flat[opened.num_sent :], model.flat[model.num_sent :])
    assert all(torch.equal(opened.counters()[name], counter) for name, counter in model.counters().items())


# --- different architectures -----------------------------------------------------------------------


def two_networks(folder: Path, **changes: Any) -> Config:
    method = {"name": "gcml", "topology": RING, "merge": "keep_local"}
    return make_config(folder, site_networks={"B": OTHER_NETWORK}, method=method, **changes)


def test_sites_with_different_networks_learn_from_each_other(tmp_path: Path) -> None:
    config = two_networks(tmp_path)
    trainer, sender = make_trainer(config), make_trainer(config, site="B")
    assert trainer.local.model.num_sent != sender.local.model.num_sent
    push = sender.export("run", 1)
    assert refusal(*push, trainer.expectation("run", "B", peers=frozenset("B"))) == ""
    report = trainer.train_round(order(1), [push])
    assert (report.merge, report.peers) == ("keep_local", ("B",))
    assert "mutual" in report.losses


def test_a_push_of_the_wrong_site_s_architecture_is_refused(tmp_path: Path) -> None:
    config = two_networks(tmp_path)
    header, buffer = make_trainer(config).export("run", 1)
    lying = replace(header, sender="B")
    reason = refusal(lying, buffer, make_trainer(config).expectation("run", "B", peers=frozenset("B")))
    assert reason.startswith(f"architecture: {fingerprint(config.network, config.data)} is not")


def test_with_different_networks_a_resumed_run_ends_where_the_whole_one_does(tmp_path: Path) -> None:
    config = two_networks(tmp_path, network=TROUBLESOME)
    whole = make_trainer(config, folder=tmp_path / "whole")
    run(whole, [1, 2, 3])
    run(make_trainer(config, folder=tmp_path / "stopped"), [1, 2])
    resumed = make_trainer(config, folder=tmp_path / "stopped", resume_round=2)
    run(resumed, [3])
    assert torch.equal(weights(resumed), weights(whole))


def test_the_maker_writes_what_it_promises(tmp_path: Path) -> None:
    config = make_config(tmp_path, num_sites=3, spatial_dims=2)
    counts = [sum(case.site == site for case in read_datalist(config.data.datalist)) for site in "ABC"]
    assert counts == [5, 6, 7]
