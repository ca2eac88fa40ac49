"""The winner's test: a run a seed, each tested once, beside the federation's own values, and no second winner."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from gcml_ray.config import Config
from gcml_ray.config.file import load_config, save_config
from gcml_ray.console.search import final_table
from gcml_ray.errors import CheckpointError, ClusterError
from gcml_ray.files.record_json import to_json
from gcml_ray.files.run_folder import RunFolder
from tests.fakes import FakeTrainers, Fault, calls_of
from tests.runs import RecordingListener
from tests.search_makers import make_search, searched, text_of
from tune.final import run_final
from tune.search_file import save_search
from tune.trial_config import best_config


@contextmanager
def watching(title: str) -> Iterator[tuple[RecordingListener, threading.Event]]:
    listener = RecordingListener()
    del title
    yield listener, listener.stop


def test_the_winner_is_trained_with_every_seed_and_each_tested_once(tmp_path: Path) -> None:
    search = searched(tmp_path)
    for _ in range(2):  # asked for again, it reads what is there
        final = run_final(search, watch=watching, make_trainer=FakeTrainers())
    assert final is not None
    assert [score.seed for score in final.scores] == [1, 2, 3]
    for seed in (1, 2, 3):
        run = RunFolder(search.folder / "final" / f"seed_{seed}")
        assert load_config(run.config_file).federation.seed == seed
        assert calls_of(run, "A", "train") == [1, 2, 3, 4]
        assert calls_of(run, "A", "evaluate") == [4]


def test_a_final_run_that_was_not_tested_everywhere_is_tested_again(tmp_path: Path) -> None:
    search = searched(tmp_path)
    with pytest.raises(ClusterError, match=r"not tested: B \(personalised\).*run the final again"):
        run_final(search, watch=watching, make_trainer=FakeTrainers((Fault("B", 4, "evaluate", "raise"),)))
    final = run_final(search, watch=watching, make_trainer=FakeTrainers())
    assert final is not None
    assert [sorted(score.site_dice) for score in final.scores] == [["A", "B", "C"]] * 3
    assert calls_of(RunFolder(search.folder / "final" / "seed_1"), "B", "train") == [1, 2, 3, 4]


def test_a_final_without_a_site_that_was_given_up_in_one_run_is_refused(tmp_path: Path) -> None:
    search = searched(tmp_path)
    faults = tuple(Fault("B", number, "train", "raise") for number in (1, 2, 3))

    def unlucky(config: Config, site: str, folder: Path, **options: Any) -> Any:
        return FakeTrainers(faults if config.federation.seed == 2 else ())(config, site, folder, **options)

    with pytest.raises(ClusterError, match=r"seed_2 has no test scores of B, .*delete the folder"):
        run_final(search, watch=watching, make_trainer=unlucky)


def test_stop_in_the_last_round_of_a_final_run_begins_no_other(tmp_path: Path) -> None:
    titles: list[str] = []

    @contextmanager
    def stop_late(title: str) -> Iterator[tuple[RecordingListener, threading.Event]]:
        titles.append(title)
        listener = RecordingListener(stop_after=4)
        yield listener, listener.stop

    search = searched(tmp_path)
    assert run_final(search, watch=stop_late, make_trainer=FakeTrainers()) is None
    assert len(titles) == 1
    assert run_final(search, watch=watching, make_trainer=FakeTrainers()) is not None
    assert calls_of(RunFolder(search.folder / "final" / "seed_1"), "A", "evaluate") == [4]


def test_the_final_score_is_the_mean_over_test_cases_then_sites(tmp_path: Path) -> None:
    """The fake's two cases score 0.8 and 0.6."""
    final = run_final(searched(tmp_path), watch=watching, make_trainer=FakeTrainers())
    assert final is not None
    assert final.scores[0].site_dice == pytest.approx({"A": 0.7, "B": 0.7, "C": 0.7})
    assert final.scores[0].mean_dice == pytest.approx(0.7)


def test_the_federations_own_values_are_tested_beside_the_winner(tmp_path: Path) -> None:
    """With the same seeds; the fake scores 0.7 whatever its values, so nothing is gained."""
    search = searched(tmp_path)
    final = run_final(search, watch=watching, make_trainer=FakeTrainers())
    assert final is not None
    assert [score.seed for score in final.default_scores] == [1, 2, 3]
    assert final.gain == pytest.approx(0.0)
    assert "within the spread of each other" in final.verdict
    for seed in (1, 2, 3):
        config = load_config(search.folder / "final" / f"default_seed_{seed}" / "config.yaml")
        assert (config.federation.seed, config.method.dcml.weight) == (seed, 0.1)  # type: ignore[union-attr]


def test_own_values_that_won_are_not_tested_twice(tmp_path: Path) -> None:
    final = run_final(searched(tmp_path, weight=0.1), watch=watching, make_trainer=FakeTrainers())
    assert final is not None
    assert final.default_scores == ()
    assert "own values won the search" in final.verdict
    assert "own" not in text_of(final_table(final))


def test_a_final_of_the_winner_alone_is_completed(tmp_path: Path) -> None:
    """As an older version left it; the winner's runs are not run again."""
    search = searched(tmp_path)
    first = run_final(search, watch=watching, make_trainer=FakeTrainers())
    assert first is not None
    (search.folder / "final.json").write_text(to_json(replace(first, default_scores=())))
    assert run_final(search, watch=watching, make_trainer=FakeTrainers()) == first
    assert calls_of(RunFolder(search.folder / "final" / "seed_1"), "A", "train") == [1, 2, 3, 4]


def test_final_runs_are_below_the_searchs_run_and_their_sites_below_them(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    search = make_search(tmp_path, base={"tracking": {"enabled": True, "uri": uri}}, final={"seeds": [1, 2, 3]})
    save_search(search)
    save_config(best_config(search, {"method.dcml.lambda": 0.25}), search.folder / "best.yaml")
    assert run_final(search, watch=watching, make_trainer=FakeTrainers()) is not None
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("gcml-ray")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    by_role = {role: [run for run in runs if run.data.tags["gcml.role"] == role] for role in ("search", "federation")}
    (parent,) = by_role["search"]
    assert parent.info.status == "FINISHED"
    assert {run.data.tags["mlflow.parentRunId"] for run in by_role["federation"]} == {parent.info.run_id}
    assert [run.data.tags["gcml.final"] for run in by_role["federation"]].count("winner") == 3
    parents = {run.data.tags["mlflow.parentRunId"] for run in runs if run.data.tags["gcml.role"] == "site"}
    assert parents == {run.info.run_id for run in by_role["federation"]}


def test_a_second_winner_is_not_tested(tmp_path: Path) -> None:
    run_final(searched(tmp_path), watch=watching, make_trainer=FakeTrainers())
    with pytest.raises(CheckpointError, match="would be tuning on test cases"):
        run_final(searched(tmp_path, weight=0.5), watch=watching, make_trainer=FakeTrainers())


def test_a_search_without_a_winner_has_nothing_to_test(tmp_path: Path) -> None:
    search = make_search(tmp_path)
    save_search(search)
    with pytest.raises(CheckpointError, match=r"no trial has finished"):
        run_final(search, watch=watching)
