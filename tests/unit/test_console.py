import errno
import io
import os
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from actors.failure_policy import Decision
from gcml_ray.console.clock import Clock
from gcml_ray.console.run import RunConsole, round_line
from gcml_ray.records import (
    WAITS_FOR_ROOM,
    Edge,
    PushReceipt,
    RoundPlan,
    RoundRecord,
    SiteFailure,
    SiteInfo,
    SiteStatus,
    TrainReport,
)
from tests.fakes import fake_config


def report(site: str, dice: float | None) -> TrainReport:
    return TrainReport(site, 2, (), 5, {"segmentation": 0.4}, {}, "", {}, dice, False, {"train": 1.0}, 1e-3, 10**8)


def record(number: int = 2, *, seconds: float = 3.0) -> RoundRecord:
    plan = RoundPlan(number, "exchange", ("A", "B", "C"), (Edge("A", "B"), Edge("B", "A")))
    pushes = (
        PushReceipt(number, "A", "B", True, "", 2_000_000, 0.1),
        PushReceipt(number, "B", "A", False, "stale: round 1", 2_000_000, 0.1),
    )
    failure = SiteFailure("C", number, "train", "died", "killed")
    return RoundRecord(plan, (report("A", 0.6), report("B", 0.8)), pushes, (failure,), seconds)


def test_a_rounds_line_says_who_trained_who_was_skipped_and_why(tmp_path) -> None:
    line = round_line(fake_config(tmp_path, sites=("A", "B", "C")), record(), left="0:01:00")
    assert "trained A, B; skipped C (train died)" in line
    assert "val Dice 0.700" in line
    assert "1/2 pushes, 2.0 MB" in line


def test_a_rounds_line_names_nobody_where_all_trained(tmp_path) -> None:
    everybody = replace(record(), failures=(), trained=tuple(report(site, 0.5) for site in "ABC"))
    assert "MB  trained all 3  (left" in round_line(
        fake_config(tmp_path, sites=("A", "B", "C")), everybody, left="0:01:00"
    )


def test_a_rounds_line_says_who_was_late(tmp_path) -> None:
    late = replace(record(), failures=(), late=("C",))
    assert "skipped C (late)" in round_line(fake_config(tmp_path, sites=("A", "B", "C")), late, left="")


def test_a_rounds_line_says_who_was_left_out(tmp_path) -> None:
    without = replace(record(), left_out={"D": "restarting", "E": "busy"})
    line = round_line(fake_config(tmp_path, sites=("A", "B", "C", "D", "E")), without, left="")
    assert "skipped C (train died), D (restarting), E (busy)" in line


def test_time_left_is_the_mean_of_past_rounds_of_the_phase(tmp_path) -> None:
    config = fake_config(
        tmp_path, sites=("A", "B", "C"), federation={"rounds": 10, "warmup_rounds": 0, "cooldown_rounds": 0}
    )
    clock = Clock()
    assert clock.left(config, 0) == ""
    clock.add(record(1, seconds=2.0))
    clock.add(record(2, seconds=4.0))
    assert clock.left(config, 2) == "0:00:24"  # eight rounds of three seconds


@pytest.mark.parametrize("is_terminal", [True, False])
def test_failures_and_refusals_are_said_on_a_terminal_and_in_a_log(tmp_path, is_terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=200, highlight=False)
    with RunConsole(console, title="demo") as shown:
        shown.on_connected("a cluster of two nodes")
        shown.on_start(fake_config(tmp_path, sites=("A", "B", "C")), ["A", "B", "C"])
        shown.on_site_ready(SiteInfo("A", 5, 1, 2, 1000, 4000, "cpu", "here", 1, 0, 2.5, ("one note",)))
        shown.on_round_begin(record().plan)
        shown.on_failure(record().failures[0], Decision.RESTART)
        shown.on_round_end(record())
    text = out.getvalue()
    assert "A: 5/1/2 training/validation/test cases, 1,000 parameters on cpu, ready in 2.5 s" in text
    assert "demo: running on a cluster of two nodes" in text
    assert "note: one note" in text
    assert "! C: train died: killed -> restart" in text
    assert "! A refused B's push: stale: round 1" in text
    assert ("learns from" in text) == is_terminal


def test_sites_that_wait_for_room_are_named_once_and_only_after_a_while(tmp_path: Path, monkeypatch) -> None:
    out = io.StringIO()
    waiting = [SiteStatus("B", 0, WAITS_FOR_ROOM, 0, 0), SiteStatus("A", 0, WAITS_FOR_ROOM, 0, 0)]
    with RunConsole(Console(file=out, width=200), title="demo") as shown:
        shown.on_start(fake_config(tmp_path, sites=("A", "B", "C")), ["A", "B", "C"])
        shown.on_status(waiting)
        assert "no process yet" not in out.getvalue()
        assert shown.rows["A"].stage == WAITS_FOR_ROOM
        monkeypatch.setattr("gcml_ray.console.run.PATIENCE_S", -1.0)
        shown.on_status([])
        assert "no process yet" not in out.getvalue()
        shown.on_status(waiting)
        shown.on_status(waiting)
    assert out.getvalue().count("A, B: no process yet; other jobs hold the CPUs or GPUs that are asked for") == 1


@pytest.mark.parametrize("is_terminal", [False, True])
def test_where_there_is_no_table_a_minute_of_silence_ends_with_what_the_sites_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=is_terminal)
    shown = RunConsole(console, title="t")
    shown.on_start(fake_config(tmp_path), ["A", "B"])
    statuses = [SiteStatus("A", 0, "load", 3, 9), SiteStatus("B", 0, "ready", 0, 0)]
    shown.on_status(statuses)
    assert "A load" not in console.file.getvalue()
    monkeypatch.setattr(shown, "_told_at", shown._told_at - 61)
    shown.on_status(statuses)
    shown.on_status(statuses)
    lines = [line for line in console.file.getvalue().splitlines() if line.endswith("A load 3/9, B ready")]
    assert len(lines) == (0 if is_terminal else 1)


def test_line_of_a_record_without_a_barrier_has_the_sites_own_rounds(tmp_path: Path) -> None:
    config = fake_config(tmp_path, sites=("A", "B", "C"), federation={"mode": "async", "rounds": 9})
    line = round_line(config, record(12), left="")
    assert line.startswith("record 12: rounds 2/9"), "every report of the made-up record is of round 2"


def test_time_left_without_a_barrier_is_the_pace_of_the_slowest_since_it_began_here(tmp_path: Path) -> None:
    """A has done 51 to 52 of 100 in 20 s and needs 480 s; C joined for the last 10 s: 99 rounds of 10 s."""
    config = fake_config(tmp_path, sites=("A", "B", "C"), federation={"mode": "async", "rounds": 100})
    clock = Clock()
    assert clock.left(config, 0) == ""
    clock.add(replace(record(50, seconds=10.0), trained=(replace(report("A", 0.5), round_number=51),)))
    clock.add(replace(record(51, seconds=10.0), trained=(replace(report("A", 0.5), round_number=52),)))
    assert clock.left(config, 51) == "0:08:00"
    clock.add(replace(record(52, seconds=10.0), trained=(replace(report("C", 0.5), round_number=1),)))
    assert clock.left(config, 52) == "0:16:30"
    clock.add(replace(record(53, seconds=10.0), trained=(replace(report("A", 0.5), round_number=45),)))
    assert clock.left(config, 53) == "0:33:00", "A goes back to an older checkpoint, C has one round in 20 s"


def test_live_table_has_whole_numbers_in_80_columns(tmp_path: Path) -> None:
    out = io.StringIO()
    with RunConsole(Console(file=out, force_terminal=True, width=80), title="demo") as shown:
        shown.on_start(fake_config(tmp_path, sites=("north", "south")), ["north", "south"])
        for site in ("north", "south"):
            shown.on_site_ready(SiteInfo(site, 22, 4, 11, 1000, 4000, "cpu", "here", 1, 0, 2.5))
        shown.rows["north"].loss, shown.rows["north"].validation_dice, shown.rows["north"].best_dice = 0.346, 0.457, 0.5
        shown.rows["north"].sent_bytes = shown.rows["north"].received_bytes = 1_234_500_000
        shown.on_status([SiteStatus("north", 2, "evaluate test", 10, 11), SiteStatus("south", 2, "train", 3, 10)])
    text = out.getvalue()
    for whole in ("22/4/11", "evaluate test", "0.346", "0.457", "0.500", "1234.5"):
        assert whole in text
    assert "…" not in text


def test_reader_who_leaves_ends_no_run(caplog: pytest.LogCaptureFixture) -> None:
    """`gcml run ... | head -1`: Rich answers a broken pipe with SystemExit, once."""

    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    console = Console(file=Gone())
    console.on_broken_pipe = lambda: (_ for _ in ()).throw(SystemExit(1))  # Rich's own turns stdout off as well
    RunConsole(console, title="mine").print_line("a line")
    assert "nobody reads the output any more" in caplog.text


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_terminal_that_is_gone_or_a_full_disk_ends_no_run(caplog: pytest.LogCaptureFixture, number: int) -> None:
    """Also where the live table is taken away at the end. From then on nothing is printed."""
    written = []

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            raise OSError(number, os.strerror(number))

    console = Console(file=Gone(), force_terminal=True)

    def be_quiet() -> None:
        console.quiet = True

    console.on_broken_pipe = be_quiet  # Rich's own turns stdout off as well
    shown = RunConsole(console, title="mine")
    shown.print_line("a line")
    num_tries = len(written)
    shown.print_line("another")
    assert len(written) == num_tries
    assert f"nobody reads the output any more ([Errno {number}]" in caplog.text
