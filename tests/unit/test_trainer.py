import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from gcml_ray.data.datalist import read_datalist
from gcml_ray.errors import ConfigError, DataError
from gcml_ray.methods.rounds import IncomingModel
from gcml_ray.networks.registry import fingerprint
from tests.makers import make_config
from tests.pushes import refusal
from tests.trainer_runs import (
    RING,
    TROUBLESOME,
    make_trainer,
    order,
    push_from_b,
    run,
    started,
    two_networks,
    weights,
    without_clocks,
)

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
    trainer.exchange.learner_for(trainer.config.network)
    assert torch.equal(torch.get_rng_state(), before)


def test_building_a_learner_leaves_the_generators_of_gpus_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``torch.manual_seed`` would seed them too, and only the CPU's state is put back afterwards."""
    trainer = make_trainer(make_config(tmp_path))
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    trainer.exchange.learner_for(trainer.config.network)
    assert seeds == []
    torch.manual_seed(0)
    assert seeds == [0], "the watching itself works"


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


def test_only_gcml_rays_own_warnings_while_loading_are_notes(tmp_path: Path) -> None:
    def chatter(stage: str, step: int, num_steps: int) -> None:
        del step, num_steps
        logging.getLogger("elsewhere").warning("not ours, during %s", stage)
        logging.getLogger("gcml_ray.data").info("no warning")

    _, info = started(make_config(tmp_path), on_progress=chatter)
    assert info.notes == ()


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
    assert [without_clocks(report) for report in run(one, [1, 2])] == [
        without_clocks(report) for report in run(other, [1, 2])
    ]
    assert torch.equal(weights(one), weights(other))


def test_without_evaluation_there_is_no_score_and_no_best(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path))
    report = trainer.train_round(order(2, evaluate=False), [])
    assert (report.validation_dice, report.is_best, trainer.state.best_file) == (None, False, "")


def test_a_score_of_the_merge_in_a_round_without_evaluation_is_the_merges_alone(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path))
    trainer.train_round(order(1), [])
    before = trainer.state.best_file
    report = trainer.train_round(order(2, evaluate=False), [push_from_b(trainer, 2)])
    assert report.merge in report.candidate_dice
    assert (report.validation_dice, report.is_best, trainer.state.best_file) == (None, False, before)


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
    opened = trainer.exchange.open_incoming(IncomingModel(header.sender, 4, torch.from_numpy(buffer))).model
    assert np.array_equal(opened.flat[: opened.num_sent].numpy(), buffer)
    assert torch.equal(opened.flat[opened.num_sent :], model.flat[model.num_sent :])
    assert all(torch.equal(opened.counters()[name], counter) for name, counter in model.counters().items())


def test_the_ramp_up_of_lambda_starts_with_the_first_exchange_round(tmp_path: Path) -> None:
    """Warm-up is round 1. With 1 ramp-up round, round 2 has half of lambda and round 3 all of it."""

    def trained(round_number: int, dcml: dict[str, float]) -> torch.Tensor:
        method = {"name": "gcml", "topology": RING, "merge": "keep_local", "dcml": dcml}
        trainer = make_trainer(make_config(tmp_path, method=method))
        run(trainer, [round_number])
        return weights(trainer)

    ramped = {"lambda": 0.4, "ramp_up_rounds": 1}
    assert torch.equal(trained(2, ramped), trained(2, {"lambda": 0.2}))
    assert torch.equal(trained(3, ramped), trained(3, {"lambda": 0.4}))
    assert not torch.equal(trained(3, ramped), trained(3, {"lambda": 0.2}))


# --- different architectures -----------------------------------------------------------------------


def test_sites_with_different_networks_learn_from_each_other(tmp_path: Path) -> None:
    config = two_networks(tmp_path)
    trainer, sender = make_trainer(config), make_trainer(config, site="B")
    assert trainer.local.model.num_sent != sender.local.model.num_sent
    push = sender.export("run", 2)
    assert refusal(*push, trainer.expectation("run", "B", peers=frozenset("B"))) == ""
    report = trainer.train_round(order(2), [push])
    assert (report.merge, report.peers) == ("keep_local", ("B",))
    assert "mutual" in report.losses


def test_a_push_of_the_wrong_site_s_architecture_is_refused(tmp_path: Path) -> None:
    config = two_networks(tmp_path)
    header, buffer = make_trainer(config).export("run", 1)
    lying = replace(header, sender="B")
    reason = refusal(lying, buffer, make_trainer(config).expectation("run", "B", peers=frozenset("B")))
    assert reason.startswith(f"architecture: {fingerprint(config.network, config.data)} is not")


def test_the_maker_writes_what_it_promises(tmp_path: Path) -> None:
    config = make_config(tmp_path, num_sites=3, spatial_dims=2)
    counts = [sum(case.site == site for case in read_datalist(config.data.datalist)) for site in "ABC"]
    assert counts == [5, 6, 7]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"data": {"patch_size": (12, 12, 7)}}, r"data.patch_size \(12, 12, 7\) does not fit network unet"),
        (
            {"evaluation": {"window_size": (12, 12, 7)}},
            r"evaluation.window_size \(12, 12, 7\) does not fit",
        ),
    ],
)
def test_sizes_that_the_network_does_not_take_are_refused_before_the_first_round(
    tmp_path: Path, section: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        make_trainer(make_config(tmp_path, spatial_dims=3, **section))
