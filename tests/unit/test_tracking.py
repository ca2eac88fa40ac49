from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from gcml_ray.config import Config
from gcml_ray.errors import ConfigError
from gcml_ray.records import (
    CaseScore,
    Edge,
    EvaluationReport,
    Judgement,
    PushReceipt,
    RoundPlan,
    RoundRecord,
    SiteFailure,
    TrainReport,
)
from gcml_ray.tracking.client import tracking_uri
from gcml_ray.tracking.metrics import (
    federation_metrics,
    federation_score_metrics,
    flat_params,
    safe_key,
    score_metrics,
    site_metrics,
    training_metrics,
)
from gcml_ray.tracking.run import NullTracker, build_tracker
from tests.made_up_run import made_up_config, made_up_evaluation, made_up_infos, made_up_round

SITES = ("CS", "DU", "HT")


def make_report(site: str, *, dice: float | None) -> TrainReport:
    return TrainReport(
        site=site,
        round_number=5,
        peers=("CS",),
        num_steps=20,
        losses={"segmentation": 0.5, "mutual": 0.25},
        regions={"pull": 6.0},
        merge="mix",
        candidate_dice={"local_after": 0.5, "mix": 0.75},
        validation_dice=dice,
        is_best=True,
        seconds={"train": 10.0},
        learning_rate=0.001,
        peak_memory_bytes=3 * 2**20,
    )


def make_round() -> RoundRecord:
    """CS pushes to DU (taken) and to HT (refused); HT then fails; CS and DU are evaluated."""
    return RoundRecord(
        plan=RoundPlan(5, "exchange", SITES, (Edge("CS", "DU"), Edge("CS", "HT"))),
        trained=(make_report("CS", dice=0.5), make_report("DU", dice=0.75)),
        pushes=(
            PushReceipt(5, "CS", "DU", accepted=True, reason="", size_bytes=100),
            PushReceipt(5, "CS", "HT", accepted=False, reason="stale", size_bytes=40),
        ),
        failures=(SiteFailure("HT", 5, "train", "died", "killed"),),
        seconds=12.0,
        stage_seconds={"push": 1.0},
    )


def make_evaluation(site: str, dice: Sequence[float]) -> EvaluationReport:
    scores = tuple(
        CaseScore(site, f"case{index}", "test", "personalised", "left/right", value, math.nan if index else 3.0, 0.5)
        for index, value in enumerate(dice)
    )
    return EvaluationReport(site, "test", "personalised", round_number=30, scores=scores, seconds=1.0)


# --- names and numbers -------------------------------------------------------------------------


def test_federation_metrics_count_everything_of_a_round() -> None:
    assert federation_metrics(make_round()) == {
        "time/round_s": 12.0,
        "time/push_s": 1.0,
        "participation/num_trained": 2,
        "participation/num_failed": 1,
        "participation/num_senders": 1,
        "participation/num_receivers": 1,
        "traffic/round_bytes": 140,
        "traffic/num_accepted": 1,
        "traffic/num_refused": 1,
        "CS/val/dice/after_round": 0.5,
        "DU/val/dice/after_round": 0.75,
        "val/dice/mean": 0.625,
        "val/dice/worst": 0.5,
    }


def test_round_without_evaluation_has_no_dice() -> None:
    record = replace(make_round(), trained=(make_report("CS", dice=None),))
    assert not [name for name in federation_metrics(record) if "dice" in name]


def test_metrics_of_a_site_say_what_it_did() -> None:
    assert training_metrics(make_report("DU", dice=0.75)) == {
        "train/loss/segmentation": 0.5,
        "train/loss/mutual": 0.25,
        "train/learning_rate": 0.001,
        "mutual/region_share/pull": 6.0,
        "val/dice/after_round": 0.75,
        "val/candidate_dice/local_after": 0.5,
        "val/candidate_dice/mix": 0.75,
        "merge/kept/local_after": 0.0,
        "merge/kept/mix": 1.0,
        "time/train_s": 10.0,
        "memory/peak_mib": 3.0,
    }
    assert site_metrics(make_round(), "DU") == {
        "participation/has_trained": 1.0,
        "traffic/sent_bytes": 0,
        "traffic/received_bytes": 100,
        "traffic/num_taken": 1,
        "traffic/num_refused": 0,
    }


def test_failed_site_is_shown_as_not_trained() -> None:
    assert site_metrics(make_round(), "HT")["participation/has_trained"] == 0.0


def test_undefined_distances_are_left_out_of_the_mean_and_counted() -> None:
    metrics = score_metrics(make_evaluation("CS", [0.5, 1.0, 0.0]), distance_unit="voxel")
    assert metrics["test/hd95_voxel/personalised"] == 3.0
    assert metrics["test/hd95_num_undefined/personalised"] == 2.0


def test_class_names_become_valid_metric_names() -> None:
    metrics = score_metrics(make_evaluation("CS", [0.5, 1.0]), distance_unit="mm")
    assert metrics["test/dice_by_class/personalised/left/right"] == 0.75


def test_federation_scores_are_over_sites_not_cases() -> None:
    metrics = federation_score_metrics([make_evaluation("CS", [0.5, 0.5, 0.5]), make_evaluation("DU", [1.0])])
    assert metrics["test/dice_mean/personalised"] == 0.75
    assert metrics["test/dice_worst/personalised"] == 0.5
    assert metrics["DU/test/dice/personalised"] == 1.0


def test_params_are_flat_and_cut_at_500_characters() -> None:
    flat = flat_params({"a": {"b": 1, "c": [1, 2]}, "d": None, "e": "x" * 501, "f": True, "g": {}})
    assert flat == {"a.b": "1", "a.c": "[1, 2]", "d": "null", "e": "x" * 497 + "...", "f": "true", "g": "{}"}


@pytest.mark.parametrize(
    ("key", "expected"),
    [("a/b", "a/b"), ("(core)", "_core_"), ("a//b", "a/_/b"), ("a/../b", "a/_/b"), ("ödem", "ödem")],
)
def test_keys_are_made_acceptable_to_mlflow(key: str, expected: str) -> None:
    assert safe_key(key) == expected


# --- which tracker, and where ------------------------------------------------------------------


def test_tracking_switched_off_gives_the_null_tracker(tmp_path: Path) -> None:
    plain = made_up_config(tmp_path).model_dump(by_alias=True) | {"tracking": {"enabled": False}}
    assert isinstance(build_tracker(Config.model_validate(plain), tmp_path), NullTracker)


def test_runs_of_one_parent_folder_share_a_database(tmp_path: Path) -> None:
    uris = {tracking_uri(made_up_config(tmp_path), tmp_path / name) for name in ("first", "second")}
    assert uris == {f"sqlite:///{tmp_path}/mlflow.db"}


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns"])
def test_folder_as_tracking_uri_is_refused(tmp_path: Path, uri: str) -> None:
    plain = made_up_config(tmp_path).model_dump(by_alias=True) | {"tracking": {"uri": uri}}
    with pytest.raises(ConfigError, match=r"tracking\.uri: .*mlruns.*sqlite:"):
        build_tracker(Config.model_validate(plain), tmp_path)


# --- a real database ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Run]]:
    """A run of two rounds, broken off and resumed for a third, in sqlite; its runs by name."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    folder.mkdir()
    config = made_up_config(folder)
    first = build_tracker(config, folder)
    first.start(config)
    first.log_sites(made_up_infos(SITES))
    first.log_round(made_up_round(1, SITES))
    first.log_round(made_up_round(2, SITES))
    second = build_tracker(config, folder)
    second.start(config)
    second.log_sites(made_up_infos(SITES))
    second.log_round(made_up_round(3, SITES))
    second.log_scores([made_up_evaluation(site, "personalised") for site in SITES])
    (folder / "plots").mkdir()
    (folder / "plots" / "dice.png").write_bytes(b"png")
    second.log_artifacts([folder / "plots"])
    (folder / "personalised.safetensors").write_bytes(b"weights")
    second.log_model("DU", folder / "personalised.safetensors")
    second.finish("finished")
    client = MlflowClient(tracking_uri(config, folder))
    experiment = client.get_experiment_by_name("gcml-ray")
    assert experiment is not None
    return folder, {str(run.info.run_name): run for run in client.search_runs([experiment.experiment_id])}


def test_sites_are_child_runs_of_the_federation(tracked: tuple[Path, dict[str, Run]]) -> None:
    _, runs = tracked
    parent = runs["made-up"].info.run_id
    assert {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()} == {
        "made-up": None,
        **dict.fromkeys(SITES, parent),
    }


def test_run_with_faults_on_purpose_has_a_tag_that_says_so(tmp_path: Path) -> None:
    """Also where they come with a resume."""
    config = made_up_config(tmp_path)
    for chaos in ("", "kill:CS@r3"):
        tracker = build_tracker(config, tmp_path)
        tracker.start(config.model_copy(update={"chaos": chaos}))
        client = MlflowClient(tracking_uri(config, tmp_path))
        experiment = client.get_experiment_by_name("gcml-ray")
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.data.tags.get("gcml.chaos") == (chaos or None)


def test_judged_models_are_counted() -> None:
    judged = tuple(Judgement("HT", is_good, "", None, None, None, None) for is_good in (True, False, True))
    record = replace(make_round(), trained=(replace(make_report("CS", dice=None), judged=judged),))
    metrics = federation_metrics(record)
    assert (metrics["defence/num_judged"], metrics["defence/num_rejected"]) == (3, 1)


def test_resume_goes_on_with_the_same_runs(tracked: tuple[Path, dict[str, Run]]) -> None:
    folder, runs = tracked
    client = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    history = client.get_metric_history(runs["DU"].info.run_id, "participation/has_trained")
    assert [metric.step for metric in history] == [1, 2, 3]
    assert json.loads((folder / "tracking.json").read_text())["run_id"] == runs["made-up"].info.run_id


def test_config_and_site_facts_are_parameters(tracked: tuple[Path, dict[str, Run]]) -> None:
    _, runs = tracked
    assert runs["made-up"].data.params["federation.rounds"] == "30"
    assert runs["HT"].data.params["num_train"] == "22"


def test_test_scores_reach_the_database(tracked: tuple[Path, dict[str, Run]]) -> None:
    _, runs = tracked
    scores = [score.dice for score in made_up_evaluation("DU", "personalised").scores]
    assert runs["DU"].data.metrics["test/dice/personalised"] == pytest.approx(sum(scores) / len(scores))


def test_artifacts_lie_beside_the_database(tracked: tuple[Path, dict[str, Run]]) -> None:
    folder, runs = tracked
    artifacts = folder.parent / "mlartifacts" / runs["made-up"].info.run_id / "artifacts"
    assert (artifacts / "plots" / "dice.png").read_bytes() == b"png"


def test_a_model_lies_with_its_site(tracked: tuple[Path, dict[str, Run]]) -> None:
    folder, runs = tracked
    artifacts = folder.parent / "mlartifacts" / runs["DU"].info.run_id / "artifacts"
    assert (artifacts / "model" / "personalised.safetensors").read_bytes() == b"weights"


def test_lost_database_begins_a_new_run(tracked: tuple[Path, dict[str, Run]], caplog: pytest.LogCaptureFixture) -> None:
    """``tracking.json`` names a run that the database does not know."""
    folder, _ = tracked
    config = made_up_config(folder)
    second = folder.parent / "second"
    second.mkdir()
    recorded = json.loads((folder / "tracking.json").read_text())
    (second / "tracking.json").write_text(json.dumps(recorded | {"run_id": "0" * 32}))
    tracker = build_tracker(config, second)
    tracker.start(config)
    tracker.log_sites(made_up_infos(("CS",)))
    recorded = json.loads((second / "tracking.json").read_text())
    assert "MLflow has no run 00000000000000000000000000000000 any more: a new one begins" in caplog.messages
    assert recorded["run_id"] != "0" * 32


IMPORTED_AHEAD = """
import sys, threading
from pathlib import Path
from gcml_ray.tracking.client import import_lean_client
from gcml_ray.tracking.run import build_tracker
from tests.made_up_run import made_up_config
config = made_up_config(Path(sys.argv[1]))
threading.Thread(target=import_lean_client).start()
tracker = build_tracker(config, Path(sys.argv[1]))
tracker.start(config)
sys.exit(tracker.num_failures)
"""


def test_tracker_waits_for_the_import_of_another_thread(tmp_path: Path) -> None:
    """`gcml run` imports MLflow ahead, in a thread; whoever imports a part of it meanwhile gets half a module."""
    command = [sys.executable, "-c", IMPORTED_AHEAD, str(tmp_path / "run")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)  # noqa: S603 - ours
    assert done.returncode == 0, done.stderr
