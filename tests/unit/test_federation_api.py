"""``Federation(config).run()``: results, callbacks, stopping, going on."""

from __future__ import annotations

import io
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gcml_ray
from actors.listener import Listener
from actors.run import run_federation
from gcml_ray import Federation, FederationResult
from gcml_ray.callbacks import EVENTS, CallbackList, Progress
from gcml_ray.config.file import save_config
from gcml_ray.errors import CheckpointError, ConfigError, DataError
from gcml_ray.federation import ScoreTable
from gcml_ray.records import CaseScore
from tests.fakes import FakeTrainers, Fault, fake_config
from tests.tiny_federation import SHAPE, make_federation


@pytest.fixture
def fake_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites of a few numbers in place of networks; A is skipped in round 2."""
    trainers = FakeTrainers((Fault("A", 2, "train", "raise"),))
    monkeypatch.setattr("actors.run.run_federation", partial(run_federation, make_trainer=trainers))


class Events:
    """Keeps the names of the events, all but the one that comes by the clock."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name in EVENTS and name != "on_status":
            return lambda *_: self.seen.append(name)
        raise AttributeError(name)

    def __dir__(self) -> list[str]:
        return ["on_start"]


# --- a whole run -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FederationResult:
    """A real run of two sites and two rounds."""
    folder = tmp_path_factory.mktemp("api")
    config = make_federation(folder, federation={"rounds": 2, "warmup_rounds": 1, "cooldown_rounds": 0})
    return Federation(config).run(callbacks=[])


def test_result_has_status_folder_rounds_and_every_case_score(finished: FederationResult) -> None:
    assert (finished.status, finished.folder.name, len(finished.rounds)) == ("finished", "run", 2)
    assert {(score.site, score.case, score.model) for score in finished.scores} == {
        (site, f"{site}5", model) for site in "AB" for model in ("personalised", "before_gossip")
    }
    assert finished.sites == ("A", "B")


def test_validation_dice_has_a_point_a_validated_round(finished: FederationResult) -> None:
    points = finished.validation_dice()
    assert {site: [number for number, _ in each] for site, each in points.items()} == {"A": [1, 2], "B": [1, 2]}


def test_model_of_a_site_predicts_on_the_grid_of_the_image(finished: FederationResult) -> None:
    image = np.random.default_rng(0).normal(size=SHAPE)
    labels = finished.model("B").predict((image, np.eye(4))).labels
    assert labels is not None
    assert labels.shape == SHAPE


def test_a_result_can_be_read_from_its_folder_later(finished: FederationResult) -> None:
    again = FederationResult.read(finished.folder)
    assert (again.status, again.config, again.rounds) == (finished.status, finished.config, finished.rounds)
    assert str(again.table()) == str(finished.table())


def test_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not the folder of a run"):
        FederationResult.read(tmp_path)


# --- tables ------------------------------------------------------------------------------------


def result_with(tmp_path: Path, *scores: CaseScore) -> FederationResult:
    return FederationResult("finished", tmp_path, fake_config(tmp_path), scores, (), {})


def score(site: str, case: str, class_name: str, dice: float, hd95: float) -> CaseScore:
    return CaseScore(site, case, "test", "personalised", class_name, dice, hd95, surface_dice=1.0)


def test_site_score_is_the_mean_over_cases_and_classes_of_what_is_defined(tmp_path: Path) -> None:
    scores = (score("A", "a1", "x", 0.2, 3.0), score("A", "a1", "y", 0.4, math.nan), score("A", "a2", "x", 0.9, 5.0))
    (only,) = result_with(tmp_path, *scores).site_scores()
    assert (only.site, only.num_cases) == ("A", 2)
    assert only.dice == pytest.approx((0.2 + 0.4 + 0.9) / 3)
    assert only.hd95 == pytest.approx((3.0 + 5.0) / 2)


def test_every_site_weighs_the_same_in_the_mean_of_sites(tmp_path: Path) -> None:
    scores = (score("A", "a1", "x", 0.2, 1.0), score("A", "a2", "x", 0.4, 1.0), score("B", "b1", "x", 0.9, 1.0))
    assert result_with(tmp_path, *scores).table().rows[-1][:4] == (
        "mean of sites",
        "personalised",
        3,
        pytest.approx((0.3 + 0.9) / 2),
    )


def test_table_is_text_and_html_and_shows_what_is_undefined_as_a_dash() -> None:
    table = ScoreTable(("site", "Dice"), (("<A>", 0.5), ("B", math.nan)))
    assert str(table) == "site  Dice\n<A>   0.500\nB     -"
    assert table._repr_html_() == (
        "<table><tr><th>site</th><th>Dice</th></tr><tr><td>&lt;A&gt;</td><td>0.500</td></tr>"
        "<tr><td>B</td><td>-</td></tr></table>"
    )


# --- configuration -----------------------------------------------------------------------------


def test_configuration_may_be_an_object_a_file_or_plain_values(tmp_path: Path) -> None:
    config = fake_config(tmp_path)
    save_config(config, tmp_path / "c.yaml")
    given = (config, tmp_path / "c.yaml", str(tmp_path / "c.yaml"), config.model_dump(mode="json", by_alias=True))
    for one in given:
        assert Federation(one).config == config
        assert Federation(one, overrides=["federation.rounds=9"]).config.federation.rounds == 9


def test_wrong_override_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"federation\.rouns"):
        Federation(fake_config(tmp_path), overrides=["federation.rouns=9"])


def test_sites_and_folder_are_known_before_the_run(tmp_path: Path) -> None:
    federation = Federation(fake_config(tmp_path))
    assert (federation.sites, federation.folder) == (("A", "B", "C"), tmp_path / "run")


# --- callbacks ---------------------------------------------------------------------------------


def test_events_are_those_of_the_driver_and_the_end() -> None:
    assert set(EVENTS) == {name for name in dir(Listener) if name.startswith("on_")} | {"on_end"}
    assert [name for name in EVENTS if not hasattr(CallbackList, name)] == []


@pytest.mark.usefixtures("fake_sites")
def test_every_callback_hears_every_event_in_order(tmp_path: Path) -> None:
    first, second = Events(), Events()
    Federation(fake_config(tmp_path, federation={"rounds": 2})).run([first, second])
    one_round = ["on_round_begin", *["on_site_trained"] * 3, "on_round_end"]
    with_failure = ["on_round_begin", *["on_site_trained"] * 2, "on_failure", "on_round_end"]
    start, end = ["on_connected", "on_start", *["on_site_ready"] * 3], [*["on_evaluated"] * 3, "on_end"]
    assert first.seen == [*start, *one_round, *with_failure, *end]
    assert second.seen == first.seen


@pytest.mark.usefixtures("fake_sites")
def test_error_in_a_callback_is_logged_once_and_the_run_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def on_round_end(self, _: object) -> None:
            raise ValueError("no such plot")

    events = Events()
    with caplog.at_level(logging.ERROR):
        result = Federation(fake_config(tmp_path)).run([Broken(), events])
    assert result.status == "finished"
    assert events.seen.count("on_round_end") == 4
    (logged,) = (each for each in caplog.records if each.name == "gcml_ray.callbacks")
    assert "on_round_end raised" in logged.getMessage()
    assert "no such plot" in str(logged.exc_info)
    assert "no such plot" in (result.folder / "log.txt").read_text()


def test_misspelt_event_is_an_error_before_the_run(tmp_path: Path) -> None:
    class Misspelt:
        def on_round_ends(self, record: object) -> None: ...

    federation = Federation(fake_config(tmp_path))
    with pytest.raises(ConfigError, match=r"Misspelt\.on_round_ends is no event; did you mean on_round_end\?"):
        federation.run([Misspelt()])
    assert not federation.folder.exists()


def test_object_without_events_and_a_class_in_place_of_an_object_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"(?s)2 problem.*int has no method of an event.*Progress is a class: give"):
        CallbackList([3, Progress])


@pytest.mark.usefixtures("fake_sites")
def test_callback_that_asks_for_a_stop_ends_the_run_after_the_round(tmp_path: Path) -> None:
    federation = Federation(fake_config(tmp_path))

    class StopAfterTwo:
        def on_round_end(self, record: Any) -> None:
            if record.plan.round_number == 2:
                federation.stop()

    stopped = federation.run([StopAfterTwo()])
    assert (stopped.status, len(stopped.rounds), stopped.scores) == ("stopped", 2, ())
    assert federation.run([], resume=True).status == "finished", "an earlier stop does not end the next run"


@pytest.mark.usefixtures("fake_sites")
def test_stop_before_a_run_stops_that_run(tmp_path: Path) -> None:
    federation = Federation(fake_config(tmp_path))
    federation.stop()
    assert federation.run([]).status == "stopped"
    assert federation.run([]).status == "finished"


def test_overrides_may_be_one_text_or_values_by_key(tmp_path: Path) -> None:
    base = fake_config(tmp_path).model_dump(mode="json", by_alias=True)
    folder = f"{tmp_path}/a: #2"
    config = Federation(base, {"federation.rounds": 3, "output.folder": folder}).config
    assert (config.federation.rounds, config.output.folder) == (3, folder)
    assert Federation(base, "federation.rounds=3").config.federation.rounds == 3


@pytest.mark.usefixtures("fake_sites")
def test_stop_while_the_sites_start_gives_a_result_and_the_run_can_be_begun_again(tmp_path: Path) -> None:
    federation = Federation(fake_config(tmp_path))

    class StopAtFirst:
        def on_site_ready(self, info: Any) -> None:
            del info
            federation.stop()

    stopped = federation.run([StopAtFirst()])
    assert (stopped.status, stopped.rounds, stopped.scores) == ("stopped", (), ())
    assert federation.run([]).status == "finished"


@pytest.mark.usefixtures("fake_sites")
def test_interrupt_leaves_a_folder_that_can_be_resumed(tmp_path: Path) -> None:
    class Interrupt:
        def on_round_begin(self, plan: Any) -> None:
            if plan.round_number == 3:
                raise KeyboardInterrupt

    events = Events()
    config = fake_config(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        Federation(config).run([events, Interrupt()])
    assert events.seen[-1] == "on_end"
    assert FederationResult.read(config.output.folder).status == "stopped"
    result = Federation.open(config.output.folder).run([], resume=True)
    assert (result.status, [each.plan.round_number for each in result.rounds]) == ("finished", [1, 2, 3, 4])


# --- going on ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake_sites")
def test_resume_under_another_configuration_is_refused_and_names_the_key(tmp_path: Path) -> None:
    config = fake_config(tmp_path)
    Federation(config).run([])
    other = Federation(config, overrides=["federation.rounds=9", "method.dcml.beta=0.7"])
    with pytest.raises(ConfigError, match=r"rounds \(4 there, 9 here\), method\.dcml\.beta \(.*, 0\.7 here\).*\.open"):
        other.run([], resume=True)


@pytest.mark.usefixtures("fake_sites")
def test_a_refused_resume_blames_what_decides_the_result_alone(tmp_path: Path) -> None:
    config = fake_config(tmp_path)
    Federation(config).run([])
    other = Federation(config, overrides=["resources.amp=bf16", "federation.late_factor=9", "output.num_overlays=1"])
    with pytest.raises(ConfigError, match=r"differs in resources\.amp \('default' there, 'bf16' here\)\. Use"):
        other.run([], resume=True)


@pytest.mark.usefixtures("fake_sites")
def test_second_run_into_the_same_folder_is_refused(tmp_path: Path) -> None:
    federation = Federation(fake_config(tmp_path, federation={"rounds": 1}))
    federation.run([])
    with pytest.raises(ConfigError, match="already holds a run"):
        federation.run([])


def test_open_names_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not the folder of a run"):
        Federation.open(tmp_path)


def test_bad_input_is_raised_and_callbacks_hear_of_the_end(tmp_path: Path) -> None:
    config = fake_config(tmp_path)
    Path(config.data.datalist).unlink()
    ended: list[str] = []
    callback = type("Ends", (), {"on_end": lambda _, status: ended.append(status)})()
    with pytest.raises(DataError, match=r"datalist\.json"):
        Federation(config).run([callback])
    assert ended == ["failed"]


# --- progress ----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("fake_sites")
def test_progress_writes_one_line_anew_on_a_terminal_and_a_line_a_round_elsewhere(tmp_path: Path) -> None:
    live, plain = Terminal(), io.StringIO()
    Federation(fake_config(tmp_path)).run([Progress(live), Progress(plain)])
    assert live.getvalue().count("\n") == 2, "the failure's line stays, and the last one"
    assert live.getvalue().rstrip().endswith("fake: round 4/4, finished")
    lines = plain.getvalue().splitlines()
    failed = lines.pop(2)
    assert failed.startswith("A, round 2, train: broken train of A in round 2 (ValueError at fakes.py:")
    assert failed.endswith("-> skip")
    assert [line.split(" (")[0].split(",")[0] for line in lines] == [
        "fake: 3 sites are loading",
        *(f"fake: round {number}/4 exchange" for number in (1, 2, 3, 4)),
        "fake: round 4/4",
    ]
    assert "1 site(s) skipped" in lines[2]


@pytest.mark.usefixtures("fake_sites")
def test_empty_list_of_callbacks_is_silent_and_the_default_is_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Federation(fake_config(tmp_path / "a", federation={"rounds": 1})).run([])
    assert capsys.readouterr().out == ""
    Federation(fake_config(tmp_path / "b", federation={"rounds": 1})).run()
    assert "round 1/1, finished" in capsys.readouterr().out


def test_package_gives_its_names_and_no_others() -> None:
    assert gcml_ray.Federation is Federation
    with pytest.raises(AttributeError, match="no attribute 'Federations'"):
        _ = gcml_ray.Federations  # type: ignore[attr-defined]
