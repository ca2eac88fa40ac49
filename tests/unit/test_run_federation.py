from __future__ import annotations

import errno
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from actors.listener import NullListener
from actors.run import pool_for, run_federation, sites_of
from actors.site_pool import SitePool
from gcml_ray.errors import ConfigError, SiteError
from gcml_ray.files.run_folder import RunFolder
from tests.fakes import FakeTrainers, Fault, fake_config
from tests.runs import RecordingListener


def run(config: Any, *faults: Fault, resume: bool = False, stop_after: int = 0) -> tuple[Any, RecordingListener]:
    listener = RecordingListener(stop_after=stop_after)
    summary = run_federation(
        config, listener=listener, stop=listener.stop, resume=resume, make_trainer=FakeTrainers(faults)
    )
    return summary, listener


def test_sites_are_all_of_the_datalist_in_the_order_of_names(tmp_path: Path) -> None:
    assert sites_of(fake_config(tmp_path, sites=("north", "east", "west"))) == ("east", "north", "west")


def test_named_sites_are_a_choice_from_the_datalist(tmp_path: Path) -> None:
    assert sites_of(fake_config(tmp_path, federation={"sites": ["C", "A"]})) == ("A", "C")


def test_site_that_is_not_in_the_datalist_is_named(tmp_path: Path) -> None:
    config = fake_config(tmp_path, federation={"sites": ["A", "X"]}, site_networks={"Y": {"name": "unet"}})
    with pytest.raises(ConfigError, match=r"name \['X', 'Y'\], not in .*; it has \['A', 'B', 'C'\]"):
        sites_of(config)


def test_site_name_that_cannot_be_a_folder_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    config = fake_config(tmp_path, sites=("A", "B c"))
    with pytest.raises(ConfigError, match="'B c' cannot name a folder"):
        run(config)
    assert not (tmp_path / "run").exists()


def test_run_leaves_results_log_and_plots_in_its_folder(tmp_path: Path) -> None:
    summary, _ = run(fake_config(tmp_path), Fault("B", 2, "train", "raise"))
    folder = RunFolder(tmp_path / "run")
    assert summary.status == "finished"
    assert len(folder.rounds()) == 4
    assert len(folder.cases()) == 6
    assert list(folder.plots.iterdir())
    assert "site B failed in round 2, train (raised): broken train" in folder.log_file.read_text()


def test_stopped_run_can_be_resumed_to_its_end(tmp_path: Path) -> None:
    config = fake_config(tmp_path)
    assert run(config, stop_after=2)[0].status == "stopped"
    summary, listener = run(config, resume=True)
    assert summary.status == "finished"
    assert [plan.round_number for plan in listener.plans] == [3, 4]


def test_resume_of_a_run_that_stopped_before_its_first_round_starts_it(tmp_path: Path) -> None:
    config = fake_config(tmp_path)
    with pytest.raises(SiteError, match="broken start of A"):
        run(config, Fault("A", 0, "start", "raise"))
    assert run(config, resume=True)[0].last_round == 4


def test_folder_of_another_run_is_not_overwritten(tmp_path: Path) -> None:
    config = fake_config(tmp_path, federation={"rounds": 1})
    run(config)
    with pytest.raises(ConfigError, match="already holds a run"):
        run(config)


def test_run_without_a_folder_is_refused(tmp_path: Path) -> None:
    """An empty path would be the folder that the command was called in."""
    with pytest.raises(ConfigError, match=r"output\.folder is empty"):
        run(fake_config(tmp_path, output={"folder": ""}))


def test_pool_is_empty_after_an_error_inside_its_block(tmp_path: Path) -> None:
    pools: list[SitePool] = []

    def work_until_interrupted() -> None:
        options: dict[str, Any] = {
            "listener": NullListener(),
            "stop": threading.Event(),
            "make_trainer": FakeTrainers(),
        }
        with pool_for(fake_config(tmp_path), tmp_path, **options) as pool:
            pool.launch(["A", "B"])
            pools.append(pool)
            assert len(pool.statuses()) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work_until_interrupted()
    assert pools[0].statuses() == []


def test_why_a_run_could_not_start_is_in_its_log_with_the_line_of_the_code(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="broken start of B"):
        run(fake_config(tmp_path), Fault("B", 0, "start", "raise"))
    text = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert "broken start of B in round 0 (" in text
    assert " at fakes.py:" in text


def test_disk_that_takes_no_plots_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = fake_config(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("matplotlib.figure.Figure.savefig", full)
        assert run(config)[0].status == "finished"
    folder = RunFolder(tmp_path / "run")
    assert len(folder.cases()) == 6
    assert f"the plots in {folder.plots} cannot be written (No space left on device); the results are" in caplog.text
    assert not list(folder.plots.iterdir())
    assert run(config, resume=True)[0].status == "finished"  # as the message says
    assert list(folder.plots.iterdir())


def test_sites_in_this_process_are_freed_at_the_end_of_their_run(tmp_path: Path) -> None:
    """The next run of a comparison or a notebook begins without their cases and models."""
    made: list[weakref.ref[Any]] = []

    def make_trainer(*arguments: Any, **options: Any) -> Any:
        trainer = FakeTrainers()(*arguments, **options)
        made.append(weakref.ref(trainer))
        return trainer

    gc.collect()
    gc.disable()
    try:
        run_federation(
            fake_config(tmp_path),
            listener=NullListener(),
            stop=threading.Event(),
            resume=False,
            make_trainer=make_trainer,
        )
        assert len(made) == 3
        assert [trainer() for trainer in made if trainer() is not None] == []
    finally:
        gc.enable()
