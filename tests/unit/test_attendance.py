"""Sites that join or leave during a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.attendance import request
from gcml_ray.errors import CheckpointError, ConfigError
from tests.fake_runs import RecordingListener, run_locally
from tests.fakes import calls_of, fake_config


def sites_of_rounds(run: Any) -> list[str]:
    return ["".join(record.plan.sites) for record in run.folder.rounds()]


def test_schedule_lets_sites_join_and_leave(tmp_path: Path) -> None:
    schedule = {"B": {"joins": 3}, "C": {"leaves": 3}}
    run = run_locally(fake_config(tmp_path, federation={"schedule": schedule}))
    assert sites_of_rounds(run) == ["AC", "AC", "AB", "AB"]
    assert run.summary.dropped == {"C": "left before round 3, as scheduled"}
    assert {report.site for report in run.summary.evaluations} == {"A", "B"}


def ask(folder: Path, wishes: dict[int, tuple[Any, str]]) -> RecordingListener:
    """A listener that leaves requests at the end of rounds."""

    def on_end(record: Any) -> None:
        if record.plan.round_number in wishes:
            request(folder, *wishes[record.plan.round_number])

    return RecordingListener(on_end=on_end)


def test_requests_are_followed_before_the_next_round_and_a_returning_site_goes_on(tmp_path: Path) -> None:
    config = fake_config(tmp_path, federation={"rounds": 6})
    listener = ask(tmp_path / "run", {1: ("remove", "B"), 3: ("add", "B")})
    run = run_locally(config, listener=listener)
    assert sites_of_rounds(run) == ["ABC", "AC", "AC", "ABC", "ABC", "ABC"]
    assert [info.restored_round for info in run.listener.ready if info.site == "B"] == [0, 1]
    assert calls_of(run.folder, "B", "train") == [1, 4, 5, 6]
    assert run.summary.dropped == {}
    assert list((tmp_path / "run" / "requests").iterdir()) == []


@pytest.mark.parametrize(("wish", "site"), [("add", "A"), ("add", "stranger")])
def test_request_that_cannot_be_followed_is_put_aside_and_the_run_goes_on(tmp_path: Path, wish: Any, site: str) -> None:
    run = run_locally(fake_config(tmp_path), listener=ask(tmp_path / "run", {1: (wish, site)}))
    assert sites_of_rounds(run) == ["ABC"] * 4
    assert [path.suffix for path in (tmp_path / "run" / "requests").iterdir()] == [".refused"]


def test_last_site_cannot_leave(tmp_path: Path) -> None:
    config = fake_config(tmp_path, sites=("A", "B"))
    run = run_locally(config, listener=ask(tmp_path / "run", {1: ("remove", "A"), 2: ("remove", "B")}))
    assert sites_of_rounds(run) == ["AB", "B", "B", "B"]


def test_schedule_with_an_unknown_site_or_nobody_at_the_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"federation.schedule names \['X'\]"):
        run_locally(fake_config(tmp_path / "1", federation={"schedule": {"X": {"joins": 2}}}))
    late = {site: {"joins": 2} for site in "ABC"}
    with pytest.raises(ConfigError, match="at least one site must take part from round 1"):
        run_locally(fake_config(tmp_path / "2", federation={"schedule": late}))


def test_request_to_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not the folder of a run"):
        request(tmp_path / "nothing", "add", "A")
