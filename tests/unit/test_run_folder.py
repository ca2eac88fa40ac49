from __future__ import annotations

import csv
import errno
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from gcml_ray.config import Config
from gcml_ray.errors import CheckpointError, ConfigError
from gcml_ray.files.record_json import from_json, to_json
from gcml_ray.files.run_folder import RunFolder, RunState
from gcml_ray.files.site_names import check_site_name
from gcml_ray.records import CaseScore, Edge, PushReceipt, RoundPlan, RoundRecord, SiteFailure, TrainReport


def make_config(folder: Path) -> Config:
    return Config.model_validate(
        {
            "name": "two-sites",
            "data": {
                "datalist": "data.json",
                "channels": ["t1"],
                "labels": {"background": 0, "lesion": 1},
                "spacing_is_real": True,
                "patch_size": [8, 8, 8],
            },
            "network": {"name": "unet"},
            "optimiser": {"learning_rate": 0.001},
            "method": {"name": "local"},
            "federation": {"rounds": 4, "local_steps": 2},
            "output": {"folder": str(folder)},
        }
    )


def make_report(site: str, round_number: int, *, loss: float = 0.5) -> TrainReport:
    return TrainReport(
        site=site,
        round_number=round_number,
        peers=("CS",),
        num_steps=2,
        losses={"segmentation": loss},
        regions={},
        merge="local_after",
        candidate_dice={"local_after": 0.6},
        validation_dice=None,
        is_best=False,
        seconds={"train": 0.25},
        learning_rate=0.001,
        peak_memory_bytes=1024,
    )


def make_round(number: int, *, loss: float = 0.5) -> RoundRecord:
    return RoundRecord(
        plan=RoundPlan(round_number=number, phase="exchange", sites=("CS", "DU"), edges=(Edge("CS", "DU"),)),
        trained=(make_report("DU", number, loss=loss),),
        pushes=(PushReceipt(number, "CS", "DU", accepted=number != 2, reason="", size_bytes=100, seconds=0.5),),
        failures=(SiteFailure("CS", number, "train", "raised", 'said "no"\u2028twice\n', "trace"),),
        seconds=1.5,
        finished_at="2025-01-01T00:00:00+00:00",
        stage_seconds={"push": 0.5},
    )


def make_score(case: str, *, model: str = "personalised", site: str = "CS", hd95: float = 2.0) -> CaseScore:
    return CaseScore(site, case, "test", model, "lesion, left", dice=0.1 + 0.2, hd95=hd95, surface_dice=0.9)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def started(folder: RunFolder) -> RunFolder:
    folder.path.mkdir()
    for number in (1, 2, 3):
        folder.append_round(make_round(number))
    return folder


# --- making and opening ------------------------------------------------------------------------


def test_create_writes_a_config_that_open_finds(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "runs" / "first", make_config(tmp_path))
    assert RunFolder.open(tmp_path / "runs" / "first").config_file.read_text().count("two-sites") == 1


def test_create_refuses_a_folder_that_holds_a_run(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", make_config(tmp_path)).write_state(RunState(0, "running", ("A",)))
    with pytest.raises(ConfigError, match=r"output\.folder: .*already holds a run.*gcml run --resume .*run"):
        RunFolder.create(tmp_path / "run", make_config(tmp_path))


def test_a_run_that_failed_to_start_may_be_tried_again_in_its_folder(tmp_path: Path) -> None:
    first = RunFolder.create(tmp_path / "run", make_config(tmp_path))
    first.tracking_file.write_text("{}")
    assert not RunFolder.create(tmp_path / "run", make_config(tmp_path)).tracking_file.exists()


def test_create_accepts_an_existing_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert RunFolder.create(tmp_path / "run", make_config(tmp_path)).config_file.is_file()


def test_site_name_that_is_too_long_for_files_is_refused() -> None:
    assert check_site_name("s" * 100) == "s" * 100
    with pytest.raises(ConfigError, match=r"ssss\.\.\. has 101 characters and cannot name files: 100 at most"):
        check_site_name("s" * 101)


@pytest.mark.parametrize("name", ["a_file/run", "n" * 300], ids=["below a file", "name too long for the disk"])
def test_folder_that_cannot_be_made_names_the_key_and_the_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "a_file").write_text("")
    with pytest.raises(ConfigError, match=rf"output\.folder: .*{name}"):
        RunFolder.create(tmp_path / name, make_config(tmp_path))


def test_open_refuses_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not the folder of a run: it holds no config\.yaml"):
        RunFolder.open(tmp_path)


def test_open_refuses_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not the folder of a run: it is not a folder"):
        RunFolder.open(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["", "a b", "../up", "..", ".hidden", "a/b", "Klinik Köln", "a\n"])
def test_site_names_that_cannot_name_a_folder_are_refused(folder: RunFolder, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a folder"):
        folder.checkpoints(name)


@pytest.mark.parametrize("name", ["CS", "hosp-a", "site_1.v2", "4"])
def test_ordinary_site_names_pass(name: str) -> None:
    assert check_site_name(name) == name


# --- rounds ------------------------------------------------------------------------------------


def test_rounds_come_back_equal(started: RunFolder) -> None:
    assert started.rounds() == (make_round(1), make_round(2), make_round(3))


def test_no_round_yet_reads_as_empty(folder: RunFolder) -> None:
    assert folder.rounds() == ()


def test_nan_is_written_as_null_and_comes_back_as_nan(folder: RunFolder) -> None:
    folder.append_round(make_round(1, loss=math.nan))
    plain = json.loads(folder.rounds_file.read_text(), parse_constant=lambda name: pytest.fail(f"bare {name}"))
    assert plain["trained"][0]["losses"] == {"segmentation": None}
    assert math.isnan(folder.rounds()[0].trained[0].losses["segmentation"])


@pytest.mark.parametrize("loss", [math.inf, -math.inf])
def test_infinity_is_strict_json_and_comes_back(loss: float) -> None:
    text = to_json(make_report("CS", 1, loss=loss))
    json.loads(text, parse_constant=lambda name: pytest.fail(f"bare {name}"))
    assert from_json(TrainReport, text).losses == {"segmentation": loss}


def test_infinity_of_an_older_file_reads_as_nan() -> None:
    old = to_json(make_report("CS", 1, loss=math.inf)).replace('"Infinity"', "null")
    assert math.isnan(from_json(TrainReport, old).losses["segmentation"])


def test_other_text_than_infinity_is_no_number() -> None:
    wrong = to_json(make_report("CS", 1, loss=math.inf)).replace('"Infinity"', '"inf"')
    with pytest.raises(ValueError, match="expected a number, got 'inf'"):
        from_json(TrainReport, wrong)


def test_validation_dice_of_none_stays_none() -> None:
    assert from_json(TrainReport, to_json(make_report("CS", 1))).validation_dice is None


def test_json_of_another_record_is_refused() -> None:
    with pytest.raises(ValueError, match="not a RunState"):
        from_json(RunState, to_json(make_round(1)))


def test_round_that_a_site_did_again_counts_where_it_was_done_last(folder: RunFolder) -> None:
    """Without a barrier DU did its rounds 1 and 2, went back to its checkpoint of round 1 and did round 2 again."""
    folder.path.mkdir()
    for number, (own_round, loss) in enumerate([(1, 0.9), (2, 0.8), (2, 0.7)], start=1):
        folder.append_round(replace(make_round(number), trained=(make_report("DU", own_round, loss=loss),)))
    rounds = folder.rounds()
    assert [[report.losses["segmentation"] for report in record.trained] for record in rounds] == [[0.9], [], [0.7]]
    assert [record.plan.sites for record in rounds] == [("CS", "DU"), ("CS",), ("CS", "DU")]


def test_torn_last_line_is_ignored_on_reading(started: RunFolder) -> None:
    started.rounds_file.write_bytes(started.rounds_file.read_bytes()[:-40])
    assert started.rounds() == (make_round(1), make_round(2))


def test_torn_last_line_is_cut_off_by_the_next_append(started: RunFolder) -> None:
    started.rounds_file.write_bytes(started.rounds_file.read_bytes()[:-40])
    RunFolder(started.path).append_round(make_round(3))
    assert RunFolder(started.path).rounds() == (make_round(1), make_round(2), make_round(3))


def test_transfers_of_a_torn_round_are_cut_off_by_the_next_append(started: RunFolder) -> None:
    started.rounds_file.write_bytes(started.rounds_file.read_bytes()[:-40])
    RunFolder(started.path).append_round(make_round(4))
    assert [row["round"] for row in read_transfers(started)] == ["1", "2", "4"]


def test_whole_last_line_without_newline_is_kept(started: RunFolder) -> None:
    started.rounds_file.write_bytes(started.rounds_file.read_bytes().removesuffix(b"\n"))
    RunFolder(started.path).append_round(make_round(4))
    assert [record.plan.round_number for record in started.rounds()] == [1, 2, 3, 4]


def test_damage_before_the_last_line_is_an_error_with_its_line(started: RunFolder) -> None:
    lines = started.rounds_file.read_text().splitlines()
    started.rounds_file.write_text("\n".join([lines[0], lines[1][:50], lines[2]]))
    with pytest.raises(CheckpointError, match=r"rounds\.jsonl, line 2 cannot be read"):
        started.rounds()


def test_truncate_drops_later_rounds_and_their_transfers(started: RunFolder) -> None:
    started.truncate_after(2)
    assert started.rounds() == (make_round(1), make_round(2))
    assert [row["round"] for row in read_transfers(started)] == ["1", "2"]


def test_append_after_truncate_goes_on(started: RunFolder) -> None:
    started.truncate_after(1)
    started.append_round(make_round(2))
    assert [record.plan.round_number for record in started.rounds()] == [1, 2]


def test_transfers_hold_every_push_with_its_fate(started: RunFolder) -> None:
    expected = {"round": "2", "sender": "CS", "receiver": "DU", "accepted": "no", "reason": ""}
    assert read_transfers(started)[1] == expected | {"size_bytes": "100", "seconds": "0.5"}


def read_transfers(folder: RunFolder) -> list[dict[str, str]]:
    with folder.transfers_file.open(newline="") as file:
        return list(csv.DictReader(file))


# --- state -------------------------------------------------------------------------------------


def test_state_comes_back_equal(started: RunFolder) -> None:
    state = RunState(last_complete_round=3, status="stopped", alive=("CS",), dropped={"DU": "died in round 2"})
    started.write_state(state)
    assert started.read_state() == state


def test_missing_state_is_a_clear_error(started: RunFolder) -> None:
    with pytest.raises(CheckpointError, match=r"state\.json does not exist"):
        started.read_state()


def test_damaged_state_is_a_clear_error(started: RunFolder) -> None:
    started.state_file.write_text('{"last_comp')
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        started.read_state()


def test_a_write_that_fails_leaves_the_old_state(started: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    old = RunState(last_complete_round=1, status="running", alive=("CS",))
    started.write_state(old)

    def full_disk(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gcml_ray.files.run_folder.os.fsync", full_disk)
    with pytest.raises(CheckpointError, match=r"No space left.*Make room on this disk, then `gcml run --resume"):
        started.write_state(replace(old, last_complete_round=2))
    with pytest.raises(CheckpointError, match="No space left"):
        started.append_round(make_round(4))
    with pytest.raises(
        CheckpointError, match=r"rounds\.jsonl cannot be written .No space left.*Make room on this disk"
    ):
        started.truncate_after(1)
    with pytest.raises(CheckpointError, match=r"chaos\.txt cannot be written .No space left.*Make room on this disk"):
        started.note_faults("kill:A@r1")
    assert started.read_state() == old
    assert not list(started.path.glob("*.tmp"))


# --- cases -------------------------------------------------------------------------------------


def test_cases_come_back_equal(started: RunFolder) -> None:
    scores = (make_score("a, b"), make_score('c "d"'))
    started.write_cases(scores)
    assert started.cases() == scores


def test_nan_distance_is_an_empty_cell_and_comes_back_as_nan(started: RunFolder) -> None:
    started.write_cases([make_score("a", hd95=math.nan)])
    assert started.cases_file.read_text().splitlines()[1].endswith(",,0.9")
    assert math.isnan(started.cases()[0].hd95)


def test_cases_of_the_same_site_and_model_are_replaced_and_others_kept(started: RunFolder) -> None:
    started.write_cases([make_score("a"), make_score("b")])
    started.write_cases([make_score("a", site="DU"), make_score("a", model="before_gossip")])
    started.write_cases([make_score("c")])
    found = {(score.site, score.model, score.case) for score in started.cases()}
    assert found == {("CS", "personalised", "c"), ("DU", "personalised", "a"), ("CS", "before_gossip", "a")}


def test_cases_with_a_missing_column_are_a_clear_error(started: RunFolder) -> None:
    started.cases_file.write_text("site,case\nCS,a\n")
    with pytest.raises(CheckpointError, match=r"cases\.csv cannot be read \(no column 'split'\).*let `gcml run"):
        started.cases()


def test_cases_cut_within_a_number_are_refused_and_not_read_as_another_number(started: RunFolder) -> None:
    started.write_cases([make_score("a")])
    content = started.cases_file.read_bytes()
    for num_bytes in range(1, 5):
        started.cases_file.write_bytes(content[:-num_bytes])
        with pytest.raises(CheckpointError, match=r"cases\.csv cannot be read \(it ends within a row\)"):
            started.cases()
    started.cases_file.write_bytes(content.replace(b"CS", b"\xff"))
    with pytest.raises(CheckpointError, match=r"cases\.csv cannot be read \('utf-8' codec .{1,80}\); its columns"):
        started.cases()
