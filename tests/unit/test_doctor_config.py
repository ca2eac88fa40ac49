import itertools
import socket
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.cluster import Node
from actors.doctor import check_config
from gcml_ray.config import Config
from gcml_ray.doctor import case_reading, configuration, first_steps, probe
from gcml_ray.doctor.forecast_costs import SiteCosts
from gcml_ray.doctor.machine import Check, Machine
from gcml_ray.files.run_folder import RunFolder
from tests.tiny_federation import (
    SHAPE,
    edit_datalist,
    headers_of,
    make_config,
    make_federation,
    write_case,
    write_image,
)

MACHINE = Machine(num_cpus=4, memory_bytes=10**11, shm_bytes=5 * 10**10)


def checks_of(config: Config) -> dict[str, Check]:
    return {check.name: check for check in check_config(config, MACHINE, [])}


def verdicts(config: Config) -> dict[str, str]:
    return {name: check.verdict for name, check in checks_of(config).items()}


# --- where results go --------------------------------------------------------------------------


def test_an_output_folder_below_a_file_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = make_config(tmp_path, output={"folder": str(tmp_path / "file" / "run")})
    assert configuration.check_output_folder(config).verdict == "FAIL"


def test_an_output_folder_with_a_run_warns(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    folder = RunFolder.create(config.output.folder, config)
    assert configuration.check_output_folder(config).verdict == "PASS"  # it has not begun: `gcml run` takes it
    folder.rounds_file.touch()
    check = configuration.check_output_folder(config)
    assert check.verdict == "WARN"
    assert "--resume" in check.remedy


def test_a_folder_as_tracking_uri_fails(tmp_path: Path) -> None:
    config = make_config(tmp_path, tracking={"enabled": True, "uri": str(tmp_path / "mlruns")})
    assert configuration.check_tracking(config).verdict == "FAIL"


def test_a_tracking_server_that_is_down_fails(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        told = uri.replace("//", "//ann:pa55@")
        check = configuration.check_tracking(make_config(tmp_path, tracking={"enabled": True, "uri": told}))
    assert check.verdict == "FAIL"
    assert "cannot be reached" in check.detail
    assert "pa55" not in check.detail


def test_a_tracking_server_that_listens_passes(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        check = configuration.check_tracking(make_config(tmp_path, tracking={"enabled": True, "uri": uri}))
    assert check.verdict == "PASS"


def test_a_file_that_is_no_database_fails(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database, " * 100)
    config = make_config(tmp_path, tracking={"enabled": True})
    assert "not a database" in configuration.check_tracking(config).detail


def test_a_database_to_be_made_and_one_that_is_there_pass(tmp_path: Path) -> None:
    config = make_config(tmp_path, tracking={"enabled": True})
    assert configuration.check_tracking(config).verdict == "PASS"
    assert not (tmp_path / "mlflow.db").exists()
    sqlite3.connect(tmp_path / "mlflow.db").execute("CREATE TABLE runs (id INT)").connection.close()
    assert configuration.check_tracking(config).verdict == "PASS"


def test_a_database_below_a_file_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    uri = f"sqlite:///{tmp_path}/file/mlflow.db"
    assert configuration.check_tracking(make_config(tmp_path, tracking={"enabled": True, "uri": uri})).verdict == (
        "FAIL"
    )


# --- cases -------------------------------------------------------------------------------------


def test_a_missing_datalist_fails(tmp_path: Path) -> None:
    assert checks_of(make_config(tmp_path))["datalist"].verdict == "FAIL"


def test_a_site_that_the_datalist_does_not_have_fails(tmp_path: Path) -> None:
    config = make_federation(tmp_path, federation={"sites": ["A", "C"]})
    check = checks_of(config)["datalist"]
    assert check.verdict == "FAIL"
    assert "['C']" in check.detail


@pytest.mark.parametrize("change", [{"schedule": {"A": {"joins": 99}}}, {"chaos": "kill:C"}])
def test_a_schedule_or_faults_that_a_run_would_refuse_fail(tmp_path: Path, change: dict[str, Any]) -> None:
    config = make_federation(tmp_path, federation={"schedule": change.get("schedule", {})})
    check = checks_of(config.model_copy(update={"chaos": change.get("chaos", "")}))["sites"]
    assert (check.verdict, check.remedy) == ("FAIL", "mend federation.schedule or chaos as it says")


def test_a_site_with_too_few_cases_fails_and_the_other_is_checked(tmp_path: Path) -> None:
    config = make_federation(tmp_path)
    edit_datalist(tmp_path, lambda entry: None if entry["site"] == "A" and entry["case"] > "A1" else entry)
    found = verdicts(config)
    assert found["cases A"] == "FAIL"
    assert (found["cases B"], found["step B"], found["forecast"]) == ("PASS", "PASS", "WARN")


def test_a_missing_file_fails_and_is_reported_once(tmp_path: Path) -> None:
    config = make_federation(tmp_path)
    (tmp_path / "A3.nii.gz").unlink()
    found = checks_of(config)
    assert found["files"].verdict == "FAIL"
    assert "A3.nii.gz" in found["files"].detail
    assert found["headers"].verdict == "PASS"


def test_a_label_on_another_grid_fails_by_its_header(tmp_path: Path) -> None:
    config = make_federation(tmp_path)
    write_image(tmp_path / "B4_seg.nii.gz", np.zeros((8, 8, 7), dtype=np.uint8))
    check = checks_of(config)["headers"]
    assert check.verdict == "FAIL"
    assert "case B/B4" in check.detail
    assert "(8, 8, 7)" in check.detail


def test_a_missing_channel_fails_by_the_header(tmp_path: Path) -> None:
    config = make_federation(tmp_path, data={"channels": ["t1", "t2"]})
    check = checks_of(config)["headers"]
    assert check.verdict == "FAIL"
    assert "1 channel(s)" in check.detail


def test_an_unknown_label_value_fails_on_reading_and_the_other_site_goes_on(tmp_path: Path) -> None:
    config = make_federation(tmp_path)
    write_case(tmp_path, "A0", value=7)
    found = checks_of(config)
    assert found["read A"].verdict == "FAIL"
    assert "holds the values 7" in found["read A"].detail
    assert (found["step B"].verdict, found["forecast"].verdict) == ("PASS", "WARN")


def test_nan_in_an_image_fails_on_reading(tmp_path: Path) -> None:
    config = make_federation(tmp_path)
    write_image(tmp_path / "B0.nii.gz", np.full(SHAPE, np.nan, dtype=np.float32))
    assert "NaN" in checks_of(config)["read B"].detail


def test_an_unknown_label_value_beyond_the_first_case_fails(tmp_path: Path) -> None:
    config = make_federation(tmp_path)
    write_case(tmp_path, "B4", value=7)
    found = checks_of(config)
    assert (found["read B"].verdict, found["all cases"].verdict) == ("PASS", "FAIL")
    assert "12 of 12 cases read, 1 of them are bad:\n  - case B/B4: label " in found["all cases"].detail


def test_reading_that_takes_too_long_ends_and_says_how_many_cases_were_read(tmp_path: Path) -> None:
    """A0, B0 and A1 begin after 20, 40 and 60 s by this clock; B1 would after 80 s."""
    config = make_federation(tmp_path)
    seconds = itertools.count(0, 20)
    write_case(tmp_path, "B1", value=7)
    found = headers_of(tmp_path, config, ["A0", "A1", "B0", "B1"])
    check = case_reading.check_voxels([each.case for each in found], config.data, clock=lambda: next(seconds))
    assert check.verdict == "PASS"
    assert check.detail.startswith("3 of 4 cases read in 60 s (`gcml inspect` reads all): ")


def test_ct_warns_where_0_means_no_image(tmp_path: Path) -> None:
    """CT: water is 0, air -1000."""
    config = make_federation(tmp_path)
    write_image(tmp_path / "B0.nii.gz", np.random.default_rng(0).normal(-500, 300, SHAPE).round())
    cases = [each.case for each in headers_of(tmp_path, config, ["A0", "B0"])]
    check = case_reading.check_voxels(cases, config.data)
    assert check.verdict == "WARN"
    assert "whole numbers, some below 0" in check.detail
    assert "set data.normalise: all" in check.remedy
    assert case_reading.check_voxels(cases, config.data.model_copy(update={"normalise": "all"})).verdict == "PASS"


def test_a_case_without_any_labelled_voxel_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_case(tmp_path, "A0", value=0)
    config = make_config(tmp_path)
    data, _ = probe.read_first_case(config, headers_of(tmp_path, config, ["A0"])[0].case)
    check = first_steps.check_sample(data, config.data)
    assert check.verdict == "WARN"
    assert "no voxel is labelled lesion" in check.detail
    assert not caplog.text, "one case says nothing of its site"


# --- network and steps -------------------------------------------------------------------------


def test_a_patch_that_the_network_cannot_take_fails_with_one_that_it_can(tmp_path: Path) -> None:
    config = make_config(tmp_path, data={"patch_size": [8, 8, 7]})
    (check,) = first_steps.check_patches(config, [])
    assert check.verdict == "FAIL"
    assert "(8, 8, 8) fits" in check.detail


def test_cases_that_are_smaller_than_a_patch_warn(tmp_path: Path) -> None:
    write_case(tmp_path, "A0")
    config = make_config(tmp_path, data={"patch_size": [16, 8, 8]})
    found = {check.name: check for check in first_steps.check_patches(config, headers_of(tmp_path, config, ["A0"]))}
    assert found["patch size"].verdict == "WARN"
    assert "case A0: (8, 8, 8)" in found["patch size"].detail


def test_windows_that_pad_a_case_beyond_what_training_showed_warn(tmp_path: Path) -> None:
    write_case(tmp_path, "A0")  # (8, 8, 8)
    for window, patch, expected in (
        ([8, 8, 16], [8, 8, 8], ["WARN"]),  # a margin of zeros that no patch had
        ([8, 8, 16], [8, 8, 16], []),  # training patches have the same margin; the line above says so
        ([8, 8, 8], [4, 4, 4], []),  # larger than a patch, and full of image
        (None, [8, 8, 8], []),
    ):
        config = make_config(tmp_path, data={"patch_size": patch}, evaluation={"window_size": window})
        found = list(first_steps.check_windows(config, headers_of(tmp_path, config, ["A0"])))
        assert [check.verdict for check in found] == expected


def test_a_network_that_cannot_be_built_fails_and_nothing_is_raised(tmp_path: Path) -> None:
    config = make_federation(tmp_path, network={"options": {"chanels": [2, 4]}})
    found = verdicts(config)
    assert (found["network unet"], found["step A"], found["step B"], found["forecast"]) == (
        "FAIL",
        "FAIL",
        "FAIL",
        "WARN",
    )


def test_a_loss_that_is_not_finite_fails() -> None:
    costs = SiteCosts("A", 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0, on_gpu=False)
    found = probe.Probe(costs, {"segmentation": 0.5, "mutual step: mutual": float("nan")})
    check = first_steps.check_probe(found, is_mutual=True)
    assert check.verdict == "FAIL"
    assert "mutual step: mutual nan" in check.detail


def test_a_diverging_step_is_found(tmp_path: Path) -> None:
    """A step of size 1e30 overflows float32 activations at once."""
    config = make_federation(tmp_path, optimiser={"learning_rate": 1e30})
    assert verdicts(config)["step A"] == "FAIL"


def test_the_pre_flight_leaves_nothing_behind(tmp_path: Path) -> None:
    config = make_federation(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    checks_of(config)
    assert sorted(tmp_path.rglob("*")) == before


def test_pooled_training_takes_one_place_on_the_cluster(tmp_path: Path) -> None:
    config = make_federation(tmp_path, method={"name": "pooled"}, resources={"pool": "ray", "cpus_per_site": 1.0})
    one_cpu = [Node("n1", 1.0, 0.0, {})]
    assert {check.name: check for check in check_config(config, MACHINE, one_cpu)}["capacity"].verdict == "PASS"
