"""A slow site: the others do not wait for it without a barrier, and once with a deadline.

D's first round lasts until the others have done what they can do only if they do not wait for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gcml_ray.records import RoundRecord
from tests.cluster.ray_runs import run_on_ray
from tests.fakes import Fault, fake_config, release, run_folder
from tests.runs import RecordingListener, Run

pytestmark = pytest.mark.usefixtures("ray_local")

FAST = "ABC"


def run_beside_a_slow_site(
    folder: Path,
    is_enough: Callable[[RecordingListener], bool],
    *,
    is_last: Callable[[RoundRecord], bool] = lambda _: False,
    **federation: Any,
) -> Run:
    """A run in which the first round of D is over when it is enough, and which ends early after a last record."""
    config = fake_config(folder, sites=(*FAST, "D"), federation=federation)
    listener = RecordingListener()

    def look(_: object) -> None:
        if is_enough(listener):
            release(run_folder(config), "D", 1)

    def end(record: RoundRecord) -> None:
        look(record)
        if is_last(record):
            listener.stop.set()

    listener.on_trained, listener.on_end = look, end
    return run_on_ray(config, Fault("D", 1, "train", "held"), listener=listener)


def have_done(listener: RecordingListener, number: int) -> bool:
    """Whether all fast sites have reported a round."""
    return {report.site for report in listener.trained if report.round_number == number} >= set(FAST)


def test_without_a_barrier_the_others_do_all_their_rounds_while_a_slow_site_does_its_first(tmp_path: Path) -> None:
    run = run_beside_a_slow_site(tmp_path, lambda listener: have_done(listener, 10), mode="async", rounds=10)
    assert (run.summary.status, run.failures()) == ("finished", [])
    assert [report.site for report in run.listener.trained][-10:] == ["D"] * 10
    assert [run.trained(site) for site in "ABCD"] == [list(range(1, 11))] * 4
    assert {report.site for report in run.summary.evaluations} == set("ABCD")


def test_with_a_deadline_the_others_wait_once_for_a_slow_site(tmp_path: Path) -> None:
    """They have 20 s for a round of milliseconds; D goes on after their third."""
    run = run_beside_a_slow_site(
        tmp_path, lambda listener: len(listener.rounds) >= 3, mode="sync", rounds=6, round_deadline_s=20.0
    )
    records = run.folder.rounds()
    assert [record.late for record in records[:3]] == [("D",), (), ()]
    assert [record.left_out for record in records[:3]] == [{}, {"D": "busy"}, {"D": "busy"}]
    assert [run.trained(site) for site in FAST] == [list(range(1, 7))] * 3
    late = [report.round_number for record in records for report in record.trained if report.site == "D"]
    assert late == run.trained("D") == sorted(set(late)), "what a late site reports is in the records, once"
    assert late[0] == 1
    assert (run.summary.status, run.failures()) == ("finished", [])


def test_staleness_of_a_push_is_in_the_records_of_its_receiver(tmp_path: Path) -> None:
    """D trains its first round until the others have done six; A, who gets what it has learnt, takes no such thing.

    The fake trainer knows rounds alone. The run ends when that push is in a record.
    """

    def reasons(record: RoundRecord) -> list[str]:
        return [push.reason for push in record.pushes if (push.sender, push.round_number) == ("D", 1)]

    run = run_beside_a_slow_site(
        tmp_path,
        lambda listener: have_done(listener, 6),
        is_last=lambda record: bool(reasons(record)),
        mode="async",
        rounds=1000,
        max_staleness=2,
    )
    assert run.summary.status == "stopped"
    (reason,) = [reason for record in run.folder.rounds() for reason in reasons(record)]
    found = re.fullmatch(r"stale: round 1, the oldest accepted is (\d+)", reason)
    assert found, reason
    assert int(found[1]) >= 6 - 2
