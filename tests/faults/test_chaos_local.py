"""Faults on purpose in one process: each happens where it should, once where it should, and the run goes on."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors import faulty_trainer
from actors.faulty_trainer import FaultyTrainer, with_chaos
from actors.listener import NullListener
from actors.run import run_federation
from actors.site_pool import SiteDiedError
from gcml_ray.chaos import parse_chaos
from gcml_ray.config import Config
from gcml_ray.errors import ConfigError, SiteError
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.push.wire import Buffer, PushHeader
from gcml_ray.records import TrainOrder
from tests.fakes import FakeTrainers, calls_of, fake_config
from tests.makers import make_config
from tests.pushes import refusal
from tests.runs import Run, run_locally, run_real
from tests.waiting import Clock

ORDERS = [TrainOrder(number, "exchange", evaluate=True, checkpoint=True) for number in range(1, 5)]


def chaotic(config: Config, text: str) -> Config:
    """The same federation with faults."""
    return Config.model_validate(config.model_dump(by_alias=True) | {"chaos": text})


def run_fakes(folder: Path, text: str, **sections: Any) -> Run:
    """Three fake sites, four rounds."""
    return run_locally(chaotic(fake_config(folder, **sections), text))


def run_two(folder: Path, text: str, **sections: Any) -> Run:
    """Two real sites with tiny cases, three rounds."""
    config = chaotic(make_config(folder, **sections), text)
    return run_real(config)


# --- breakdowns ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("kill:B@r2", "died", "kill:B@r2, in round 2, train"),
        ("hang:B@r2", "late", "hang:B@r2"),
        ("raise:B@r2", "raised", "raise:B@r2"),
        ("oom:B@r2", "raised", "oom:B@r2"),
        ("kill:B@r2@push", "died", "in round 2, push"),
    ],
)
def test_breakdown_is_a_failure_of_that_site_and_round_and_the_run_goes_on(
    tmp_path: Path, text: str, kind: str, words: str
) -> None:
    run = run_fakes(tmp_path, text)
    assert [(site, number, how) for site, number, how, _ in run.failures()] == [("B", 2, kind)]
    assert words in run.listener.failures[0][0].message
    assert run.summary.status == "finished"
    assert run.trained("A") == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "kind"), [("kill:server@r2", "died"), ("raise:server@r2", "raised"), ("disk:server@r2", "raised")]
)
def test_breakdown_of_the_server_happens_where_it_works(tmp_path: Path, text: str, kind: str) -> None:
    run = run_two(tmp_path, text, method={"name": "fedavg"})
    assert [(site, number, how) for site, number, how, _ in run.failures()] == [("server", 2, kind)]
    assert run.summary.status == "finished"
    assert run.trained("A") == [1, 2, 3]


@pytest.mark.parametrize("text", ["raise:B@merge@r3", "raise:B@validate@r3", "raise:B@checkpoint@r3"])
def test_breakdown_reaches_every_stage_of_real_training(tmp_path: Path, text: str) -> None:
    method = {"name": "gcml", "topology": {"name": "ring"}, "merge": "val_weighted"}
    run = run_two(tmp_path, text, method=method)
    assert [(site, number) for site, number, _, _ in run.failures()] == [("B", 3)]
    assert run.trained("A") == [1, 2, 3]


def test_breakdown_while_loading_ends_the_run_at_its_start(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="chaos: raise:B@load"):
        run_two(tmp_path, "raise:B@load")


def test_full_disk_costs_a_checkpoint_and_the_site_goes_back_to_the_one_before(tmp_path: Path) -> None:
    run = run_two(tmp_path, "disk:B@r2")
    assert [(f.site, f.round_number, f.error_type) for f, _ in run.listener.failures] == [("B", 2, "OSError")]
    assert "No space left on device" in run.listener.failures[0][0].message
    assert run.trained("B") == [1, 3]


def test_weights_that_become_nan_are_refused_by_the_site_itself(tmp_path: Path) -> None:
    """With ``keep_local`` nothing but the site's own check stands between NaN and the next round."""
    run = run_two(tmp_path, "nan:B@r2", method={"name": "gcml", "topology": {"name": "ring"}, "merge": "keep_local"})
    assert "NaN" in run.listener.failures[0][0].message
    assert run.trained("B") == [1, 3]


def test_fault_without_a_round_comes_back_until_the_site_is_dropped(tmp_path: Path) -> None:
    run = run_fakes(tmp_path, "raise:B")
    assert "B" in run.summary.dropped
    assert run.trained("A") == [1, 2, 3, 4]


def test_slow_site_takes_its_factor_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two steps lasts 20 s; with factor 4 they take 160 s instead of 40."""
    clock = Clock()
    monkeypatch.setattr(faulty_trainer, "time", clock)

    class Steady:
        def __init__(self, *_: Any, on_progress: Any, **__: Any) -> None:
            self.on_progress = on_progress

        def train_round(self, *_: Any) -> None:
            for step in (1, 2):
                clock.sleep(20)
                self.on_progress("train", step, 2)

    config = chaotic(fake_config(tmp_path), "slow:Bx4")
    trainer = with_chaos(config, "B", Steady)(config, "B", tmp_path, use_gpu=False, on_progress=lambda *_: None)
    trainer.train_round(ORDERS[0], [])
    assert clock.now == 160


# --- once means once -----------------------------------------------------------------------------


def test_killed_site_trains_that_round_no_second_time_and_does_not_die_in_the_next(tmp_path: Path) -> None:
    run = run_fakes(tmp_path, "kill:B@r2")
    assert calls_of(run.folder, "B", "train") == [1, 2, 3, 4]
    assert (run.folder.checkpoints("B") / "chaos_kill_train_r2.done").read_text() == "kill:B@r2\n"


def test_marker_survives_restart_so_a_repeated_round_does_not_die_again(tmp_path: Path) -> None:
    """A new trainer over the same folder stands for a new process."""
    config = chaotic(fake_config(tmp_path), "kill:B@r2")

    def trained_in_new_process() -> Any:
        trainer = with_chaos(config, "B", FakeTrainers())(
            config, "B", tmp_path / "run", use_gpu=False, on_progress=lambda *_: None
        )
        trainer.start(resume_round=0)
        return trainer.train_round(ORDERS[1], [])

    with pytest.raises(SiteDiedError, match="kill:B@r2"):
        trained_in_new_process()
    assert trained_in_new_process().round_number == 2


def test_site_without_a_fault_is_not_wrapped(tmp_path: Path) -> None:
    config = chaotic(fake_config(tmp_path), "kill:B@r2")
    factory = FakeTrainers()
    assert with_chaos(config, "A", factory) is factory


def test_site_with_a_fault_says_so_when_it_is_ready(tmp_path: Path) -> None:
    run = run_fakes(tmp_path, "slow:Bx2@r4")
    notes = {info.site: info.notes for info in run.listener.ready}
    assert notes == {"A": (), "B": ("chaos: slow:Bx2@r4",), "C": ()}


# --- lies ----------------------------------------------------------------------------------------


def pushes_of(folder: Path, text: str, rounds: int = 3) -> list[tuple[PushHeader, Buffer]]:
    """What a fake site A pushes before each round, having trained the ones before; copies."""
    config = chaotic(fake_config(folder), text)
    trainer: FaultyTrainer = with_chaos(config, "A", FakeTrainers())(  # type: ignore[assignment]
        config, "A", folder / "run", use_gpu=False, on_progress=lambda *_: None
    )
    trainer.start(resume_round=0)
    pushes = []
    for order in ORDERS[:rounds]:
        trainer.train_round(order, [])
        header, buffer = trainer.export("run", order.round_number + 1)
        assert refusal(header, buffer, trainer.expectation("run", "A", peers=frozenset("ABC"))) == "" or (
            parse_chaos(text)[0].kind in ("stale", "nan_push")
        )
        pushes.append((header, buffer.copy()))
    return pushes


def test_lies_change_the_weights_and_describe_them_well(tmp_path: Path) -> None:
    honest = pushes_of(tmp_path / "honest", "slow:Ax1")
    flipped = pushes_of(tmp_path / "flip", "flip:A@r3-")
    scaled = pushes_of(tmp_path / "scale", "scale:Ax100")
    drawn = pushes_of(tmp_path / "random", "random:A")
    np.testing.assert_array_equal(flipped[0][1], honest[0][1])
    np.testing.assert_array_equal(flipped[1][1], -honest[1][1])
    np.testing.assert_allclose(scaled[2][1], 100 * honest[2][1], rtol=1e-6)
    assert abs(np.corrcoef(drawn[2][1], honest[2][1])[0, 1]) < 0.95
    assert not np.array_equal(drawn[1][1], drawn[2][1])


def test_replay_sends_the_first_weights_under_a_new_round_and_stale_the_first_push_as_it_was(tmp_path: Path) -> None:
    replay, stale = pushes_of(tmp_path / "replay", "replay:A"), pushes_of(tmp_path / "stale", "stale:A")
    assert [header.round_number for header, _ in replay] == [2, 3, 4]
    assert [header.round_number for header, _ in stale] == [2, 2, 2]
    for pushes in (replay, stale):
        np.testing.assert_array_equal(pushes[2][1], pushes[0][1])


def test_nan_push_and_stale_push_are_refused_on_the_wire(tmp_path: Path) -> None:
    for text, words in (("nan_push:B@r2-", "not finite"), ("stale:B", "stale")):
        run = run_fakes(tmp_path / words.split()[0], text)
        reasons = {receipt.reason.split(":")[0] for record in run.listener.rounds for receipt in record.pushes}
        assert words in reasons


def test_impersonation_puts_another_name_on_the_push(tmp_path: Path) -> None:
    assert {header.sender for header, _ in pushes_of(tmp_path, "impersonate:A->C")} == {"C"}


def test_label_flipping_site_learns_the_wrong_class(tmp_path: Path) -> None:
    config = chaotic(make_config(tmp_path), "labels:A@r2-")
    trainer: Any = with_chaos(config, "A", _real_trainer)(
        config, "A", tmp_path / "run", use_gpu=False, on_progress=lambda *_: None
    )
    trainer.start(resume_round=0)
    honest = _labels(trainer.trainer, 1)
    assert set(honest) <= {0, 1}
    honest_again = _labels(trainer.trainer, 1)
    np.testing.assert_array_equal(honest, honest_again)
    wrong = _labels(trainer.trainer, 2)
    trainer.faults = ()
    np.testing.assert_array_equal(wrong, 1 - _labels(trainer.trainer, 2))


def _labels(trainer: Any, round_number: int) -> Any:
    return np.concatenate([batch.label.numpy().ravel() for batch in trainer.data.batches(round_number, 1)])


def _real_trainer(*arguments: Any, **options: Any) -> Any:
    from gcml_ray.training.trainer import SiteTrainer  # noqa: PLC0415 - torch only where it trains

    return SiteTrainer(*arguments, **options)


# --- a whole run ---------------------------------------------------------------------------------


def test_run_refuses_faults_of_unknown_sites_before_it_makes_a_folder(tmp_path: Path) -> None:
    config = chaotic(fake_config(tmp_path), "kill:X")
    with pytest.raises(ConfigError, match=r"chaos names \['X'\]"):
        run_federation(config, listener=NullListener(), stop=threading.Event(), make_trainer=FakeTrainers())
    assert not Path(config.output.folder).exists()


def test_run_with_chaos_says_in_its_log_that_it_gives_no_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = chaotic(fake_config(tmp_path), "slow:Ax1")
    with caplog.at_level(logging.WARNING):
        run_federation(config, listener=NullListener(), stop=threading.Event(), make_trainer=FakeTrainers(), test=False)
    assert "faults on purpose (chaos: slow:Ax1): what this run gives is no result" in caplog.text
    assert RunFolder(Path(config.output.folder)).faults() == ("slow:Ax1",)
    assert "no result" in (Path(config.output.folder) / "log.txt").read_text()
