"""Rounds without a barrier, with fake trainers in one process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from actors.async_rounds import AsyncRounds
from actors.local_pool import LocalPool
from actors.mailbox import Mailbox
from actors.site_pool import Outcome
from gcml_ray.config import Config
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.push.wire import Expectation, PushHeader, TensorSpec, checksum
from gcml_ray.records import PushReceipt, PushReport, RoundRecord
from tests.fakes import FakeTrainers, Fault, calls_of, fake_config
from tests.runs import RecordingListener, Run, drive, run_locally


def async_config(tmp_path: Path, **federation: Any) -> Config:
    return fake_config(tmp_path, federation={"mode": "async"} | federation)


def reported(records: tuple[RoundRecord, ...]) -> Counter[tuple[str, int]]:
    return Counter((report.site, report.round_number) for record in records for report in record.trained)


def test_every_site_does_all_its_rounds_once(tmp_path: Path) -> None:
    run = run_locally(async_config(tmp_path))
    assert (run.summary.status, run.failures()) == ("finished", [])
    assert reported(run.folder.rounds()) == Counter((site, number) for site in "ABC" for number in range(1, 5))


def test_pushes_follow_the_graph_of_the_senders_round(tmp_path: Path) -> None:
    """A ring: A to B, B to C, C to A, while the receiver still has a round to use them in."""
    run = run_locally(async_config(tmp_path))
    pushes = [push for record in run.folder.rounds() for push in record.pushes]
    assert {(push.sender, push.receiver) for push in pushes} == {("A", "B"), ("B", "C"), ("C", "A")}
    assert all(push.accepted for push in pushes)


def test_nobody_pushes_in_warmup_and_cooldown(tmp_path: Path) -> None:
    run = run_locally(async_config(tmp_path, rounds=6, warmup_rounds=2, cooldown_rounds=2))
    used = [report.round_number for record in run.folder.rounds() for report in record.trained if report.peers]
    assert used
    assert set(used) <= {3, 4}


def test_no_site_is_ever_more_than_a_round_ahead_of_the_records(tmp_path: Path) -> None:
    """B is slow: the others report several of their rounds while it does one."""
    listener = RecordingListener()
    ahead: list[int] = []

    def note(record: RoundRecord) -> None:
        newest = max(report.round_number for report in listener.trained)
        ahead.append(newest - record.plan.round_number)

    listener.on_end = note
    slow = [Fault("B", number, "train", "slow", seconds=0.1) for number in range(1, 7)]
    run_locally(async_config(tmp_path, rounds=6), *slow, listener=listener)
    assert len(ahead) >= 6
    assert max(ahead) <= 1


def test_site_that_raises_does_its_round_again(tmp_path: Path) -> None:
    """The fault is there in both attempts at round 2: three in a row would drop B."""
    run = run_locally(async_config(tmp_path), Fault("B", 2, "train", "raise"))
    assert run.summary.dropped == {"B": "train, raised: broken train of B in round 2"}
    assert calls_of(run.folder, "B", "train") == [1, 2, 2, 2]
    assert run.trained("A") == run.trained("C") == [1, 2, 3, 4]


def pushes_of(run: Run, sender: str) -> list[tuple[int, str]]:
    """Round and, where it was refused, the reason of each push, in the order of the records."""
    pushes = [push for record in run.folder.rounds() for push in record.pushes if push.sender == sender]
    return [(push.round_number, push.reason) for push in pushes]


def test_site_that_goes_back_to_an_older_checkpoint_is_heard_at_once(tmp_path: Path) -> None:
    """B dies in its fifth round and has a checkpoint of the third: its pushes of rounds 3 and 4 are news again."""
    config = fake_config(tmp_path, federation={"mode": "async", "rounds": 8}, output={"checkpoint_every": 3})
    run = run_locally(config.model_copy(update={"chaos": "kill:B@r5"}))
    assert run.failures() == [("B", 5, "died", "restart")]
    assert calls_of(run.folder, "B", "train") == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert pushes_of(run, "B")[:7] == [(number, "") for number in (0, 1, 2, 3, 4, 3, 4)]


@pytest.mark.parametrize("fault", ["kill:B@r4", "raise:B@r4"])
def test_what_a_site_has_pushed_is_not_pushed_again_when_its_round_is_repeated(tmp_path: Path, fault: str) -> None:
    """The receivers have these weights; sent again they would only cost bytes, and with noise some privacy."""
    config = async_config(tmp_path, rounds=6).model_copy(update={"chaos": fault})
    run = run_locally(config)
    assert [(site, number) for site, number, _, _ in run.failures()] == [("B", 4)]
    rounds = [number for number, _ in pushes_of(run, "B")]
    assert len(rounds) == len(set(rounds)) > 3
    assert [reason for _, reason in pushes_of(run, "B") if reason] == []


def test_stop_finishes_the_rounds_in_flight_and_resume_does_the_rest(tmp_path: Path) -> None:
    config = async_config(tmp_path, rounds=6)
    stopped = run_locally(config, listener=RecordingListener(stop_after=2))
    assert stopped.summary.status == "stopped"
    before = reported(stopped.folder.rounds())
    state = stopped.folder.read_state()
    assert state.site_rounds == {site: max(n for s, n in before if s == site) for site in "ABC"}
    resumed = run_locally(config, resume=True)
    assert resumed.summary.status == "finished"
    assert reported(resumed.folder.rounds()) == Counter((s, n) for s in "ABC" for n in range(1, 7))


def test_crash_of_the_driver_loses_at_most_what_is_not_in_a_record(tmp_path: Path) -> None:
    def crash(record: Any) -> None:
        if record.plan.round_number == 3:
            raise MemoryError("killed")

    config = async_config(tmp_path, rounds=6)
    with pytest.raises(MemoryError, match="killed"):
        run_locally(config, listener=RecordingListener(on_end=crash))
    resumed = run_locally(config, resume=True)
    assert reported(RunFolder(tmp_path / "run").rounds()) == Counter((s, n) for s in "ABC" for n in range(1, 7))
    assert resumed.summary.status == "finished"


def test_rounds_that_are_done_again_after_a_resume_are_read_once(tmp_path: Path) -> None:
    """The driver dies after record 3; checkpoints are of round 2, so every site does its round 3 a second time."""

    def crash(record: Any) -> None:
        if record.plan.round_number == 3:
            raise MemoryError("killed")

    config = fake_config(tmp_path, federation={"mode": "async", "rounds": 6}, output={"checkpoint_every": 2})
    with pytest.raises(MemoryError, match="killed"):
        run_locally(config, listener=RecordingListener(on_end=crash))
    resumed = run_locally(config, resume=True)
    assert calls_of(resumed.folder, "A", "train").count(3) == 2
    assert reported(resumed.folder.rounds()) == Counter((s, n) for s in "ABC" for n in range(1, 7))


@pytest.mark.parametrize("method", [{"name": "fedavg"}, {"name": "dpsgd", "topology": {"name": "ring"}}])
def test_methods_that_need_a_barrier_are_refused(tmp_path: Path, method: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"mode async cannot run method {method['name']}"):
        fake_config(tmp_path, method=method, federation={"mode": "async"})


# --- the mailbox without a barrier -------------------------------------------------------------

LAYOUT = (TensorSpec("weights", (2,), "float32", 0),)
WEIGHTS = np.zeros(2, dtype=np.float32)


def deliver(mailbox: Mailbox, sender: str, number: int) -> str:
    header = PushHeader("run", number, sender, 1, "tiny", "ct", LAYOUT, 2, "float32", checksum(WEIGHTS))
    expected = Expectation("run", frozenset("ABC"), "tiny", "ct", LAYOUT, 2, 0, 9)
    return mailbox.deliver(header, WEIGHTS, expect=lambda _: expected)


def test_without_a_barrier_the_push_that_waited_longest_makes_room() -> None:
    mailbox = Mailbox(2, keeps_newest=True)
    assert [deliver(mailbox, "A", 1), deliver(mailbox, "B", 1), deliver(mailbox, "A", 2)] == ["", "", ""]
    assert deliver(mailbox, "C", 1) == ""
    assert [(header.sender, header.round_number) for header, _ in mailbox.take()] == [("A", 2), ("C", 1)]


def test_push_that_was_used_cannot_be_sent_again() -> None:
    mailbox = Mailbox(2, keeps_newest=True)
    assert deliver(mailbox, "A", 3) == ""
    mailbox.take()
    assert deliver(mailbox, "A", 3).startswith("duplicate: round 3 of A has been here")
    assert deliver(mailbox, "A", 2).startswith("duplicate")
    assert deliver(mailbox, "A", 4) == ""


class SlowPushPool(LocalPool):
    """Answers A's push after its round 2 only when nothing else is open."""

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Puts it behind all others."""
        for _ in range(len(self._queue)):
            site, method, _, number = self._queue[0]
            if (site, method, number) != ("A", "push", 2):
                break
            self._queue.rotate(-1)
        return super().wait(timeout_s)


def test_the_receipts_of_pushes_that_are_open_at_the_end_are_on_record(tmp_path: Path) -> None:
    config = async_config(tmp_path, rounds=3)
    folder = config.output.folder
    run = drive(config, SlowPushPool(config, folder, run_id="run", make_trainer=FakeTrainers()))
    assert run.summary.status == "finished"
    assert ("A", 2) in {(push.sender, push.round_number) for push in run.folder.transfers()}


def test_nobody_pushes_to_a_receiver_that_did_not_answer_until_it_reports_a_round_or_is_back(tmp_path: Path) -> None:
    """Else every sender would wait for it again and again, and send nothing to the others meanwhile."""
    roster = SimpleNamespace(
        members={site: SimpleNamespace(checkpoint_round=0) for site in "ABC"},
        is_busy=lambda _: False,
        take_returned=lambda: ["B"],
        succeeded=lambda *_, **__: None,
    )
    driver: Any = SimpleNamespace(config=async_config(tmp_path), roster=roster, note_refusals=lambda _: None)
    rounds = AsyncRounds(driver)
    receipts = (
        PushReceipt(1, "A", "B", False, "unreachable: the receiver did not answer in time", 8),
        PushReceipt(1, "A", "C", False, "stale: from round 1", 8),
    )
    has_answered: list[Callable[[], None]] = [
        rounds._welcome,
        lambda: rounds._trained(SimpleNamespace(site="B", round_number=1)),  # type: ignore[arg-type]
    ]
    for answer in has_answered:
        assert rounds._can_use("B")
        rounds._take_in([Outcome("A", "push", result=PushReport("A", 1, receipts))])
        assert [rounds._can_use(site) for site in "BC"] == [False, True]
        answer()
        assert rounds._can_use("B")
