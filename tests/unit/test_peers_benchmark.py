"""The parts of ``benchmarks/peers`` that need no other framework: what sites leave, the judgement, table, files."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.peers import measure
from benchmarks.peers.__main__ import CONTENDERS, ROOT
from benchmarks.peers.environments import REQUIREMENTS, parse_requirements
from benchmarks.peers.measure import Measured, descendants, parse_loopback, parse_pss, run
from benchmarks.peers.results import (
    Result,
    Training,
    judge,
    missing_work,
    read_trainings,
    seconds_a_round,
    table,
    weight_difference,
)
from benchmarks.peers.results_file import read_csv, write_csv
from benchmarks.peers.run_gcml import METHODS
from benchmarks.peers.scenario import SCENARIOS, SITES, Case, config_values
from gcml_ray.config.file import parse_config

TWO_ROUNDS = dataclasses.replace(SCENARIOS["steps"], rounds=2)
WELL = Measured(seconds=20.0, peak_memory_bytes=300_000_000, loopback_bytes=4_000_000, problem="")
TITLES = {"gcml-ray": "ours", "flower": "theirs"}


def trainings(*ends: float, weights: tuple[float, ...] = (1.0, -2.0)) -> list[Training]:
    """All sites' trainings; the last site of round 1, 2... ends at ``ends[0]``, ``ends[1]``..., the others earlier."""
    return [
        Training(site, number, end - 0.1 * (len(SITES) - 1 - place), weights)
        for number, end in enumerate(ends, start=1)
        for place, site in enumerate(SITES)
    ]


def judged(done: Sequence[Training], measured: Measured = WELL, reference: tuple[float, ...] | None = None) -> Result:
    wanted = None if reference is None else dict.fromkeys(SITES, reference)
    return judge(done, measured, contender="flower", scenario=TWO_ROUNDS, repeat=1, reference=wanted)


def result(contender: str, **values: object) -> Result:
    plain = Result("steps", contender, 1, 0.5, 10.0, 100_000_000, 1_000_000, None, "")
    return dataclasses.replace(plain, **values)  # type: ignore[arg-type]


def test_a_round_lasts_from_the_last_site_of_one_to_the_last_site_of_the_next() -> None:
    assert seconds_a_round(trainings(10.0, 13.0, 18.0)) == pytest.approx(4.0)  # (18 - 10) / 2


def test_lines_of_all_sites_are_read(tmp_path: Path) -> None:
    line = {"site": "site1", "round": 1, "ended": 2.5, "weights": [0.5]}
    (tmp_path / "site1.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "site2.jsonl").write_text(json.dumps(line | {"site": "site2"}) + "\n")
    assert read_trainings(tmp_path) == (Training("site1", 1, 2.5, (0.5,)), Training("site2", 1, 2.5, (0.5,)))


def test_a_site_that_missed_a_round_is_no_result() -> None:
    done = trainings(1.0, 2.0)
    assert missing_work(done, TWO_ROUNDS) == ""
    assert "7 rounds together, not 8" in judged(done[:-1]).problem


def test_a_round_trained_twice_is_no_result() -> None:
    done = trainings(1.0, 2.0)
    assert missing_work([*done[:-1], done[0]], TWO_ROUNDS)


def test_a_run_that_failed_is_no_result_whatever_its_sites_left() -> None:
    failed = dataclasses.replace(WELL, problem="exit status 1: out of memory")
    assert judged(trainings(1.0, 2.0), failed).problem == "exit status 1: out of memory"


def test_other_weights_than_the_loops_are_no_result() -> None:
    done = trainings(1.0, 2.0, weights=(1.0, -2.0))
    assert judged(done, reference=(1.0, -2.001)).problem == ""  # 0.001 of 2.001
    assert "differ from FedAvg's by 4.8 %" in judged(done, reference=(1.0, -2.1)).problem  # 0.1 of 2.1


def test_weights_that_are_no_numbers_are_no_result() -> None:
    assert "differ" in judged(trainings(1.0, 2.0, weights=(1.0, float("nan"))), reference=(1.0, float("nan"))).problem


def test_where_the_loop_failed_nobody_is_shown_to_have_done_its_work() -> None:
    judgement = judge(trainings(1.0, 2.0), WELL, contender="flower", scenario=TWO_ROUNDS, repeat=1, reference={})
    assert "the bare loop failed" in judgement.problem


def test_difference_is_a_share_of_the_largest_weight() -> None:
    assert weight_difference({"site1": (1.0, 3.5)}, {"site1": (1.0, 4.0)}) == pytest.approx(0.125)  # 0.5 of 4


def test_table_shows_medians_and_ratios_to_ours() -> None:
    runs = [result("flower", round_s=value, repeat=number) for number, value in enumerate((9.0, 2.0, 1.5), start=1)]
    lines = table([result("gcml-ray"), *runs], TWO_ROUNDS, TITLES).splitlines()
    assert lines[-2:] == [
        "| ours | 0.50 | 1.00 | 10.0 | 1.00 | 100 | 1.00 | 1 |",
        "| theirs | 2.00 | 4.00 | 10.0 | 1.00 | 100 | 1.00 | 1 |",
    ]


def test_what_failed_is_named_and_not_a_row() -> None:
    text = table([result("gcml-ray"), result("flower", problem="not finished after 240 s")], TWO_ROUNDS, TITLES)
    assert "| theirs" not in text
    assert text.endswith("No result: theirs, run 1: not finished after 240 s")


def test_without_any_result_there_is_no_table() -> None:
    assert "|" not in table([result("flower", problem="died")], TWO_ROUNDS, TITLES)


def test_without_ours_there_are_no_ratios() -> None:
    assert "| theirs | 0.50 | - | 10.0 | - | 100 | - | 1 |" in table([result("flower")], TWO_ROUNDS, TITLES)


def test_csv_gives_back_the_results_and_leaves_failures_out(tmp_path: Path) -> None:
    runs = [result("gcml-ray", difference=1e-7), result("flower", problem="died, at once")]
    write_csv(tmp_path / "new" / "peers.csv", runs)
    assert read_csv(tmp_path / "new" / "peers.csv") == (runs[0],)
    assert read_csv(tmp_path / "none.csv") == ()


def test_pss_and_loopback_are_read_as_the_kernel_writes_them() -> None:
    assert parse_pss("Rss:  900 kB\nPss:  512 kB\nPss_Anon:  12 kB\n") == 512 * 1024
    assert parse_pss("") == 0
    assert parse_loopback("Inter-| Receive\n face |bytes\n    lo: 4711 9 0\n  eth0: 8 1 0\n") == 4711


def test_memory_is_that_of_the_whole_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LONGEST_PAUSE_S", 0.1)
    child = "import time; held = bytearray(b'x') * 60_000_000; print('held', flush=True); time.sleep(60)"
    parent = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); time.sleep(2.5); child.kill(); child.wait()"
    )
    measured = run([sys.executable, "-c", parent], environment={}, folder=tmp_path, limit_s=60)
    assert measured.problem == ""
    assert measured.peak_memory_bytes > 60_000_000


def test_a_run_over_its_limit_is_ended_with_all_its_children(tmp_path: Path) -> None:
    before = set(descendants(os.getpid()))
    measured = run(["sh", "-c", "sleep 60 & sleep 60"], environment={}, folder=tmp_path, limit_s=0.5)
    assert measured.problem == "not finished after 0.5 s"
    assert set(descendants(os.getpid())) <= before


def test_exit_status_and_last_words_of_a_failed_run_are_told(tmp_path: Path) -> None:
    measured = run(
        [sys.executable, "-c", "raise SystemExit('no such model')"], environment={}, folder=tmp_path, limit_s=60
    )
    assert measured.problem == "exit status 1: no such model"


def test_case_comes_back_from_its_folder(tmp_path: Path) -> None:
    case = Case("flower", SCENARIOS["large"], "datalist.json", 2)
    case.write(tmp_path / "run")
    assert Case.read(tmp_path / "run") == case


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=list(SCENARIOS))
@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_our_configurations_are_valid(scenario: object, method: dict[str, object], tmp_path: Path) -> None:
    case = Case("gcml-ray", scenario, "datalist.json", 2)  # type: ignore[arg-type]
    parse_config(config_values(case, tmp_path, method=method), source="test")


def test_every_environment_has_what_all_have_and_its_own() -> None:
    found = parse_requirements("# why\na==1\n\n# [one]\nb==2\n# [two]\nb==3\n")
    assert found == {"one": ("a==1", "b==2"), "two": ("a==1", "b==3")}


def test_every_contender_has_its_program_and_pinned_environment() -> None:
    parts = parse_requirements(REQUIREMENTS.read_text(encoding="utf-8"))
    for contender in CONTENDERS.values():
        assert (ROOT / "benchmarks" / "peers" / f"{contender.module}.py").exists()
        assert contender.environment in ("", *parts)
    assert all(line.count("==") == 1 for lines in parts.values() for line in lines), "every version is pinned"
