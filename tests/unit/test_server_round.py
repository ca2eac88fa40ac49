"""Rounds with a server over fakes: the order of calls, who is left out, and a server that fails or dies."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from actors.attendance import request
from actors.driver import Driver
from actors.local_pool import LocalPool
from actors.site_pool import Outcome
from gcml_ray.config import Config
from gcml_ray.console.run import RunConsole
from gcml_ray.errors import ClusterError
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.push.wire import Buffer
from gcml_ray.records import RoundRecord, SiteFailure
from gcml_ray.seeding import numpy_generator
from tests.fakes import FakeTrainers, Fault, calls_of, fake_config, final_weights, weights_file
from tests.runs import RecordingListener, RecordingTracker, drive, run_locally

FEDAVG: dict[str, Any] = {"name": "fedavg"}


def config_of(folder: Path, **federation: Any) -> Config:
    return fake_config(folder, method=FEDAVG, federation=federation)


def draw(site: str, number: int) -> Buffer:
    return numpy_generator(7, "train", site, number).standard_normal(8, dtype=np.float32)


# --- a round ------------------------------------------------------------------------------------


def test_all_sites_go_on_with_the_mean_of_what_they_have_learnt(tmp_path: Path) -> None:
    """From 0, round 1: the mean of the draws; round 2 adds the mean of the next ones."""
    mean: Buffer = np.zeros(8, dtype=np.float32)
    for number in (1, 2):
        mean = np.mean([mean + draw(site, number) for site in "ABC"], axis=0, dtype=np.float32)
    weights = final_weights(run_locally(config_of(tmp_path, rounds=2)).folder)
    assert set(weights) == {"A", "B", "C", "server"}
    for values in weights.values():
        np.testing.assert_array_equal(values, mean)


def test_a_round_is_recorded_whole(tmp_path: Path) -> None:
    (record,) = run_locally(config_of(tmp_path, rounds=1)).folder.rounds()
    edges = [("A", "server"), ("B", "server"), ("C", "server"), ("server", "A"), ("server", "B"), ("server", "C")]
    assert [(push.sender, push.receiver) for push in record.pushes] == edges
    assert {push.size_bytes for push in record.pushes} == {32}
    assert [(report.site, report.peers, report.merge) for report in record.trained] == [
        (site, ("server",), "server") for site in "ABC"
    ]
    assert [report.validation_dice for report in record.trained] == [0.5] * 3
    assert set(record.trained[0].seconds) == {"train", "validate"}
    assert set(record.stage_seconds) == {"train", "push", "adopt"}


def test_warmup_and_cooldown_are_without_the_server(tmp_path: Path) -> None:
    run = run_locally(config_of(tmp_path, warmup_rounds=1, cooldown_rounds=2))
    assert [len(record.pushes) for record in run.folder.rounds()] == [0, 6, 0, 0]
    assert calls_of(run.folder, "server", "train") == [2]
    assert calls_of(run.folder, "A", "adopt") == [2]


def test_listener_and_tracker_hear_of_sites_only_and_once_a_round(tmp_path: Path) -> None:
    run = run_locally(config_of(tmp_path))
    assert [info.site for info in run.listener.ready] == ["A", "B", "C"]
    assert [info.site for info in run.tracker.infos] == ["A", "B", "C"]
    assert run.trained("A") == [1, 2, 3, 4]
    assert {report.site for report in run.listener.evaluated} == {"A", "B", "C"}


def test_console_shows_a_round_whose_server_failed(tmp_path: Path) -> None:
    out = io.StringIO()
    config = config_of(tmp_path, rounds=2)
    folder = RunFolder.create(config.output.folder, config)
    faults = (Fault("server", 1, "train", "raise"),)
    pool = LocalPool(config, config.output.folder, run_id="run", make_trainer=FakeTrainers(faults))
    with RunConsole(Console(file=out, force_terminal=True, width=200, highlight=False), title="t") as shown:
        stop = threading.Event()
        driver = Driver(config, pool, folder, tracker=RecordingTracker(), listener=shown, stop=stop)
        driver.run(["A", "B", "C"], resume=None)
    text = out.getvalue()
    assert "! server: train raised: broken train of server in round 1 (ValueError at fakes.py:" in text
    assert "3/6 pushes" in text
    assert "6/6 pushes" in text


# --- sites that fail ------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["train", "export"])
def test_a_site_that_fails_is_left_out_of_the_mean_and_gets_it_all_the_same(tmp_path: Path, stage: Any) -> None:
    run = run_locally(config_of(tmp_path, rounds=1), Fault("B", 1, stage, "raise"))
    assert run.summary.status == "finished"
    assert run.failures() == [("B", 1, "raised", "skip")]
    mean = np.mean([draw("A", 1), draw("C", 1)], axis=0, dtype=np.float32)
    for values in final_weights(run.folder).values():
        np.testing.assert_array_equal(values, mean)


def test_a_site_that_cannot_adopt_is_back_in_the_next_round(tmp_path: Path) -> None:
    run = run_locally(config_of(tmp_path, rounds=2), Fault("B", 1, "adopt", "raise"))
    assert run.failures() == [("B", 1, "raised", "skip")]
    first, second = run.folder.rounds()
    assert [report.validation_dice for report in first.trained] == [0.5, None, 0.5]
    assert [report.validation_dice for report in second.trained] == [0.5, 0.5, 0.5]
    weights = final_weights(run.folder)
    np.testing.assert_array_equal(weights["A"], weights["B"])


def test_a_site_that_never_adopts_is_dropped_although_it_trains(tmp_path: Path) -> None:
    faults = [Fault("B", number, "adopt", "raise") for number in (1, 2, 3, 4)]
    run = run_locally(config_of(tmp_path), *faults)
    assert list(run.summary.dropped) == ["B"]
    assert len(run.folder.rounds()[3].pushes) == 4


# --- sites that come later ------------------------------------------------------------------------


def test_a_site_that_joins_begins_with_the_last_mean(tmp_path: Path) -> None:
    """As every participant of FedAvg does; weights of its own would weigh as much as all that the others learnt."""
    mean: Buffer = np.zeros(8, dtype=np.float32)
    for number, sites in ((1, "AB"), (2, "AB"), (3, "ABC"), (4, "ABC")):
        mean = np.mean([mean + draw(site, number) for site in sites], axis=0, dtype=np.float32)
    run = run_locally(config_of(tmp_path, schedule={"C": {"joins": 3}}))
    for values in final_weights(run.folder).values():
        np.testing.assert_allclose(values, mean, rtol=1e-6)
    assert calls_of(run.folder, "C", "adopt") == [2, 3, 4]
    third = run.folder.rounds()[2]
    assert len(third.plan.edges) == len(third.pushes) == 7
    arrivals = [push for push in third.pushes if push.receiver == "C"]
    assert [(push.sender, push.round_number, push.accepted) for push in arrivals] == [
        ("server", 2, True),
        ("server", 3, True),
    ]


def test_a_joining_site_gets_a_mean_that_is_in_no_checkpoint_yet(tmp_path: Path) -> None:
    config = fake_config(
        tmp_path, method=FEDAVG, federation={"schedule": {"C": {"joins": 3}}}, output={"checkpoint_every": 4}
    )
    assert calls_of(run_locally(config).folder, "C", "adopt") == [2, 3, 4]


def test_a_site_that_has_adopted_since_it_came_back_does_not_get_the_mean_again(tmp_path: Path) -> None:
    """B dies as it trains and is back before the others adopt."""
    config = config_of(tmp_path).model_copy(update={"chaos": "kill:B@r2"})
    run = run_locally(config)
    assert run.failures() == [("B", 2, "died", "restart")]
    assert calls_of(run.folder, "B", "adopt") == [1, 2, 3, 4]
    assert [push.reason for record in run.folder.rounds() for push in record.pushes if push.reason] == []


def test_a_site_that_joins_in_the_warm_up_trains_alone_until_there_is_a_mean(tmp_path: Path) -> None:
    run = run_locally(config_of(tmp_path, warmup_rounds=2, schedule={"C": {"joins": 2}}))
    assert calls_of(run.folder, "C", "adopt") == [3, 4]


def test_a_site_that_comes_back_from_an_older_checkpoint_gets_the_last_mean(tmp_path: Path) -> None:
    """C leaves before round 2 and is back in round 4: what it had learnt is two means old."""

    def ask(record: RoundRecord) -> None:
        if wish := {1: "remove", 3: "add"}.get(record.plan.round_number):
            request(tmp_path / "run", wish, "C")  # type: ignore[arg-type]

    run = run_locally(config_of(tmp_path, rounds=5), listener=RecordingListener(on_end=ask))
    assert run.restored("C") == [0, 1]
    assert calls_of(run.folder, "C", "adopt") == [1, 3, 4, 5]
    means: list[Buffer] = [np.zeros(8, dtype=np.float32)]
    for number, sites in enumerate(("ABC", "AB", "AB", "ABC", "ABC"), start=1):
        learnt = [means[-1] + draw(site, number) for site in sites]
        means.append(np.mean(learnt, axis=0, dtype=np.float32))
    np.testing.assert_allclose(final_weights(run.folder)["C"], means[-1], rtol=1e-6)


def test_after_a_resume_a_site_without_a_newer_checkpoint_gets_the_last_mean(tmp_path: Path) -> None:
    """C joins before round 5, whose record is lost with the driver: the resume starts it from nothing."""

    def ask(record: RoundRecord) -> None:
        if record.plan.round_number == 4:
            request(folder, "add", "C")

    def ask_and_crash(record: RoundRecord) -> None:
        ask(record)
        if record.plan.round_number == 5:
            raise MemoryError("killed")

    sections: dict[str, Any] = {"federation": {"rounds": 7, "sites": ["A", "B"]}, "output": {"checkpoint_every": 2}}
    folder = tmp_path / "whole" / "run"
    config = fake_config(tmp_path / "whole", method=FEDAVG, **sections)
    whole = run_locally(config, listener=RecordingListener(on_end=ask))
    folder = tmp_path / "broken" / "run"
    config = fake_config(tmp_path / "broken", method=FEDAVG, **sections)
    with pytest.raises(MemoryError, match="killed"):
        run_locally(config, listener=RecordingListener(on_end=ask_and_crash))
    resumed = run_locally(config, resume=True)
    fifth = resumed.folder.rounds()[4]
    arrivals = [(push.sender, push.round_number) for push in fifth.pushes if push.receiver == "C"]
    assert arrivals == [("server", 4), ("server", 5)]
    for site, values in final_weights(whole.folder).items():
        np.testing.assert_array_equal(final_weights(resumed.folder)[site], values)


# --- a server that fails ----------------------------------------------------------------------------


def test_without_a_mean_the_sites_go_on_with_their_own_weights(tmp_path: Path) -> None:
    run = run_locally(config_of(tmp_path, rounds=1), Fault("server", 1, "train", "raise"))
    assert run.failures() == [("server", 1, "raised", "skip")]
    (record,) = run.folder.rounds()
    assert [push.receiver for push in record.pushes] == ["server"] * 3
    assert [report.merge for report in record.trained] == [""] * 3
    assert [report.validation_dice for report in record.trained] == [0.5] * 3
    np.testing.assert_array_equal(np.load(weights_file(run.folder.checkpoints("A"), 1)), draw("A", 1))


class DyingServerPool(LocalPool):
    """Its server dies when it forms the mean of a round; as with Ray, it is there again but not started."""

    dies_in = 2

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Says that the server died instead of running its call."""
        if self._queue and self._queue[0][0] == "server" and self._queue[0][1::2] == ("train", self.dies_in):
            self.dies_in = 0
            self._queue.popleft()
            self._create("server")
            return [Outcome("server", "train", failure=SiteFailure("server", 2, "train", "died", "killed"))]
        return super().wait(timeout_s)


def test_a_server_that_dies_restarts_from_its_own_checkpoint_and_the_next_pushes_go_on(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run = drive(config, DyingServerPool(config, config.output.folder, run_id="run", make_trainer=FakeTrainers()))
    assert run.summary.status == "finished"
    assert run.failures() == [("server", 2, "died", "restart")]
    assert [len(record.pushes) for record in run.folder.rounds()] == [6, 3, 6, 6]
    assert all(push.accepted for record in run.folder.rounds() for push in record.pushes)
    assert calls_of(run.folder, "server", "start") == [0, 0]
    assert calls_of(run.folder, "server", "train") == [1, 3, 4]


def test_a_run_cannot_go_on_without_its_server(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    folder = RunFolder.create(config.output.folder, config)
    faults = tuple(Fault("server", number, "train", "raise") for number in (1, 2, 3))
    pool = LocalPool(config, config.output.folder, run_id="run", make_trainer=FakeTrainers(faults))
    listener = RecordingListener()
    driver = Driver(config, pool, folder, tracker=RecordingTracker(), listener=listener, stop=listener.stop)
    with pytest.raises(ClusterError, match=r"the server is lost .*go on with gcml run --resume"):
        driver.run(["A", "B", "C"], resume=None)
    assert folder.read_state().last_complete_round == 2


class LostServerPool(DyingServerPool):
    """Its server dies in the last round and cannot be started again."""

    dies_in = 4

    def start(self, site: str, *, resume_round: int) -> None:
        """Loses the start of a server that has died."""
        if site != "server" or self.dies_in:
            super().start(site, resume_round=resume_round)


def test_a_server_that_is_lost_after_its_last_round_does_not_keep_the_sites_from_their_test(tmp_path: Path) -> None:
    config = config_of(tmp_path, rejoin_timeout_s=0.5)
    run = drive(config, LostServerPool(config, config.output.folder, run_id="run", make_trainer=FakeTrainers()))
    assert run.summary.status == "finished"
    assert {report.site for report in run.summary.evaluations} == {"A", "B", "C"}


@pytest.mark.parametrize("lost_in", [2, 3])
def test_rounds_without_exchange_need_no_server(tmp_path: Path, lost_in: int) -> None:
    """Two rounds of exchange, two alone; the server is lost for good as it forms its last mean, or after it."""
    config = config_of(tmp_path, cooldown_rounds=2, rejoin_timeout_s=0.5)
    pool = LostServerPool(config, config.output.folder, run_id="run", make_trainer=FakeTrainers())
    pool.dies_in = lost_in
    run = drive(config, pool)
    assert run.summary.status == "finished"
    assert run.trained("A") == [1, 2, 3, 4]


def test_a_resume_in_the_rounds_without_exchange_starts_no_server(tmp_path: Path) -> None:
    config = config_of(tmp_path, cooldown_rounds=2)
    run_locally(config, listener=RecordingListener(stop_after=3))
    resumed = run_locally(config, Fault("server", 0, "start", "raise"), resume=True)
    assert resumed.summary.status == "finished"


def test_a_resume_that_only_tests_starts_no_server(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run_locally(config)
    resumed = run_locally(config, Fault("server", 0, "start", "raise"), resume=True)
    assert {report.site for report in resumed.summary.evaluations} == {"A", "B", "C"}


def test_resume_gives_the_weights_of_an_unbroken_run(tmp_path: Path) -> None:
    whole = final_weights(run_locally(config_of(tmp_path / "whole")).folder)
    config = config_of(tmp_path / "broken")
    run_locally(config, listener=RecordingListener(stop_after=2))
    resumed = final_weights(run_locally(config, resume=True).folder)
    for name, values in whole.items():
        np.testing.assert_array_equal(resumed[name], values)
