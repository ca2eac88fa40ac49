"""One HTML page about a run or a comparison: what it says of each kind of run, and that a browser draws it."""

from __future__ import annotations

import builtins
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import pytest
from PIL import Image

from gcml_ray.cli.main import main
from gcml_ray.config import LocalMethod, Method
from gcml_ray.errors import DataError
from gcml_ray.files.run_folder import RunFolder, RunState
from gcml_ray.records import CaseScore, Judgement, PushReceipt, SiteFailure
from gcml_ray.report.page.gossip_charts import gossip_graph, push_map
from gcml_ray.report.page.parts import chart_text
from gcml_ray.report.page.records import read_run, site_dice
from gcml_ray.report.page.run import FAILURES, text_without_secrets
from gcml_ray.report.page.run_charts import WAITING, stage_seconds
from gcml_ray.report.page.summary import METHODS, explained
from gcml_ray.report.page.write import write_report
from gcml_ray.wording import without_secrets
from tests.made_up_run import made_up_config, made_up_round
from tests.report_runs import SITES, make_run, without_pushes

SECTIONS = [
    "summary", "dice", "cases", "overlays", "gossip", "teaching", "regions", "time", "failures", "config",
]  # fmt: skip
NASTY = "<img src=x onerror=alert(1)>"


def page_of(folder: RunFolder, **options: Any) -> str:
    """The page without scripts: what a reader sees, but for the charts."""
    text = write_report(folder.path, with_regions=False, **options).read_text(encoding="utf-8")
    return re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)


def charts_of(page: Path) -> list[dict[str, Any]]:
    """The specifications of a page's charts."""
    found = re.findall(r"<script type=\"application/json\"[^>]*>(.*?)</script>", page.read_text(), flags=re.DOTALL)
    return [json.loads(text) for text in found]


# --- the page ----------------------------------------------------------------------------------


def test_finished_run_has_every_section_in_order(tmp_path: Path) -> None:
    assert re.findall(r'<section id="(\w+)"', page_of(make_run(tmp_path / "run"))) == SECTIONS


def test_without_a_barrier_the_slowest_site_says_how_far_the_run_is(tmp_path: Path) -> None:
    """Six records, and site FG is in its third round."""
    federation = {"rounds": 6, "local_steps": 20, "mode": "async"}
    folder = make_run(tmp_path / "run", rounds=6, federation=federation)
    records = folder.rounds()
    folder.truncate_after(0)
    for record in records:
        slow = min(record.plan.round_number, 3)
        own = [replace(each, round_number=slow) if each.site == "FG" else each for each in record.trained]
        folder.append_round(replace(record, trained=tuple(own)))
    page = page_of(folder)
    assert "the slowest site has done 3 of 6 rounds" in page
    assert "6 of 6" not in page


def test_page_asks_no_other_file_or_server_for_anything(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run"))
    assert re.findall(r"<link|@import|(?:src|href)=\"(?!#|data:)[^\"]*", page) == []
    assert "default-src 'none'" in page


def test_texts_of_users_are_never_markup(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=2)
    folder.write_cases([CaseScore("CS", NASTY, "test", "personalised", NASTY, 0.5, 3.0, 0.5)])
    last = folder.rounds()[-1]
    failure = SiteFailure("CS", 2, "train", "raised", NASTY, NASTY, NASTY)
    folder.truncate_after(1)
    folder.append_round(replace(last, failures=(failure,)))
    page = write_report(folder.path, with_regions=False).read_text(encoding="utf-8")
    assert NASTY not in page
    assert "&lt;img src=x" in page
    texts = [text for chart in charts_of(folder.path / "report.html") for trace in chart["data"] for text in
             trace.get("text", [])]  # fmt: skip
    assert chart_text(NASTY) in texts, "the case is in a chart, as text that plotly does not read as markup"


def test_summary_gives_the_mean_over_sites_of_the_personalised_models(tmp_path: Path) -> None:
    """Sites have 2 cases and 1: (0.6 + 0.8) / 2 = 0.7 and 0.3, so 0.5; a mean over cases would be 0.567."""
    folder = make_run(tmp_path / "run", ("A", "B"), rounds=2)
    folder.cases_file.unlink()
    dice = {("A", "1"): 0.6, ("A", "2"): 0.8, ("B", "1"): 0.3}
    folder.write_cases(CaseScore(s, c, "test", "personalised", "x", value, 1, 1) for (s, c), value in dice.items())
    assert site_dice(folder.cases(), "personalised") == pytest.approx({"A": 0.7, "B": 0.3})
    assert "the mean Dice of the sites is 0.500" in page_of(folder)


def test_every_method_is_explained() -> None:
    union = get_args(Method)[0]
    assert {get_args(each.model_fields["name"].annotation)[0] for each in get_args(union)} == set(METHODS)


def test_a_method_of_one_s_own_is_explained_by_its_own_docstring_alone() -> None:
    class Mine(LocalMethod):
        """Sites do as I say. More of it."""

    class Plain(LocalMethod):
        pass

    mine, plain = (kind.model_construct(name="mine") for kind in (Mine, Plain))
    assert (explained(mine), explained(plain)) == ("Sites do as I say. More of it.", "a method of its own")


def test_every_kind_of_failure_is_explained() -> None:
    assert set(get_args(get_type_hints(SiteFailure)["kind"])) == set(FAILURES)


def test_passwords_in_addresses_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("uri: postgresql://ann:pa55@db/x\n")
    assert text_without_secrets(tmp_path / "config.yaml") == "uri: postgresql://***@db/x\n"
    (tmp_path / "config.yaml").write_text("a: http://ann:p@/'5@h:1/x?token=a'bc&user=b\nb: site@home, http://h/x\n")
    hidden = text_without_secrets(tmp_path / "config.yaml")
    assert hidden == "a: http://***@h:1/x?token=***&user=***\nb: site@home, http://h/x\n"
    for path in ("sqlite:////home/ann@hospital.org/mlflow.db", "file:///data/@shared/x", "runs/a?b=c"):
        assert without_secrets(path) == path


# --- every kind of run -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"name": "local"}, "every site trains alone"),
        ({"name": "pooled"}, "on the cases of all 3 sites"),
        ({"name": "fedavg"}, "a server averages the weights"),
        ({"name": "gossip_avg", "topology": {"name": "ring"}}, "sites average their weights"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_every_kind_of_method_has_a_page(tmp_path: Path, method: dict[str, Any], words: str) -> None:
    folder = make_run(tmp_path / "run", rounds=3, method=method)
    if method["name"] in ("local", "pooled"):
        without_pushes(folder)
    page = page_of(folder)
    assert words in page
    assert ("Nothing was sent" in page) == (method["name"] in ("local", "pooled"))


def test_server_stands_in_the_graph_beside_the_sites(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=2, method={"name": "fedavg"})
    record = folder.rounds()[-1]
    folder.truncate_after(1)
    folder.append_round(replace(record, pushes=(PushReceipt(2, "CS", "server", True, "", 5_000_000, 0.1),)))
    names = [trace.name for trace in gossip_graph(read_run(folder.path)).figure.data]
    assert names == ["CS", "DU", "FG", "server"]


def test_one_site_has_a_page(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", ("solo",), rounds=2))
    assert "One site (solo) trained a model" in page
    assert "mean of sites" not in re.sub(r"<p>.*?</p>", "", page), "a mean of one is no row of the table"


def test_unfinished_run_says_so_and_how_to_go_on(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=4)
    folder.cases_file.unlink()
    folder.write_state(RunState(4, "stopped", SITES))
    page = page_of(folder)
    assert f"gcml run --resume {folder.path}" in page
    assert "The final test has not run yet" in page


def test_run_without_a_single_round_has_a_page(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", made_up_config(tmp_path / "run"))
    assert "No round of 30 has ended yet" in page_of(folder)


def test_dropped_site_failure_and_refusal_are_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=1)
    record = made_up_round(2, SITES)
    failure = SiteFailure("DU", 2, "train", "late", "no answer for 60 s")
    push = PushReceipt(2, "CS", "FG", False, "label map differs", 100, 0.0)
    folder.append_round(replace(record, failures=(failure,), pushes=(push,)))
    folder.write_state(RunState(2, "finished", ("CS", "FG"), {}, {"DU": "lost three times"}))
    page = page_of(folder)
    for words in ("lost three times", "no answer for 60 s", "did not answer in time", "label map differs"):
        assert words in page


def test_model_that_failed_the_receivers_check_and_spent_privacy_are_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", ("A", "B"), rounds=1)
    record = replace(made_up_round(2, ("A", "B")), failures=(), pushes=())
    judged = Judgement("B", False, "its weights are 40 times as large", 40.0, 0.1, None, None)
    reports = [
        replace(report, privacy_epsilon=epsilon) for report, epsilon in zip(record.trained, (1.5, 2.25), strict=True)
    ]
    folder.append_round(replace(record, trained=(replace(reports[0], judged=(judged,)), reports[1])))
    page = page_of(folder)
    assert "its weights are 40 times as large" in page
    assert "at most epsilon 2.250 was spent (B)" in page


def test_folder_that_is_no_run_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("method,Dice\n")
    with pytest.raises(DataError, match=r"holds neither a run \(config.yaml\), nor folders of runs"):
        write_report(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        write_report(tmp_path / "nowhere")


# --- pictures ----------------------------------------------------------------------------------


def with_overlay(folder: RunFolder) -> RunFolder:
    folder.overlays("CS").mkdir(parents=True)
    Image.new("RGB", (40, 40), "red").save(folder.overlays("CS") / "best_case1.png")
    return folder


def test_overlays_are_inside_the_page_with_their_dice(tmp_path: Path) -> None:
    folder = with_overlay(make_run(tmp_path / "run", rounds=1))
    folder.write_cases([CaseScore("CS", "case1", "test", "personalised", "pancreas", 0.625, 1.0, 0.5)])
    page = page_of(folder)
    assert page.count('src="data:image/') == 1
    assert "CS, best case: case1 (Dice 0.625)" in page
    assert "holds pictures of patients" in page


def test_overlays_of_pooled_training_have_the_dice_of_their_sites_cases(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=1)
    folder.overlays("pooled").mkdir(parents=True)
    Image.new("RGB", (40, 40), "red").save(folder.overlays("pooled") / "best_CS_case_1.png")
    folder.write_cases([CaseScore("CS", "case_1", "test", "personalised", "pancreas", 0.625, 1.0, 0.5)])
    assert "pooled, best case: CS_case_1 (Dice 0.625)" in page_of(folder)


def test_page_without_images_holds_none_and_needs_no_warning(tmp_path: Path) -> None:
    page = page_of(with_overlay(make_run(tmp_path / "run", rounds=1)), with_images=False)
    assert "data:image/" not in page
    assert "holds pictures of patients" not in page


def test_picture_that_cannot_be_read_is_named_and_the_page_goes_on(tmp_path: Path) -> None:
    folder = with_overlay(make_run(tmp_path / "run", rounds=1))
    (folder.overlays("CS") / "worst_case2.png").write_bytes(b"no image")
    page = page_of(folder)
    assert "worst_case2.png" in page
    assert page.count('src="data:image/') == 1


# --- charts ------------------------------------------------------------------------------------


def test_slider_goes_from_all_rounds_to_each_round_with_pushes(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run").path)
    labels = [step.label for step in gossip_graph(run).figure.layout.sliders[0].steps]
    assert labels == ["all", *(str(record.plan.round_number) for record in run.rounds if record.pushes)]


def test_faults_on_purpose_stand_at_the_top_of_the_page(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "broken", chaos="kill:CS@r3"))
    words = "Faults were injected on purpose: kill:CS@r3. What this run gives is no result."
    assert page.index(words) < page.index('id="summary"')
    assert "on purpose" not in page_of(make_run(tmp_path / "sound"))


def test_faults_of_a_resume_stand_there_too(tmp_path: Path) -> None:
    """config.yaml is what the run began with."""
    folder = make_run(tmp_path / "run")
    for chaos in ("slow:CSx5", "", "kill:DU@r9", "kill:DU@r9"):
        folder.note_faults(chaos)
    assert folder.faults() == ("slow:CSx5", "kill:DU@r9")
    assert "on purpose: slow:CSx5; then kill:DU@r9." in page_of(folder)


def test_refused_push_has_a_cross_and_stands_in_the_map(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", ("A", "B"), rounds=1)
    without_pushes(folder)
    push = PushReceipt(2, "A", "B", False, "too old", 1_000_000, 0.0)
    folder.append_round(replace(made_up_round(2, ("A", "B")), pushes=(push, replace(push, accepted=True))))
    run = read_run(folder.path)
    assert [mark.text for mark in gossip_graph(run).figure.layout.annotations] == ["", "<b>\u2715</b>"]
    assert push_map(run).figure.data[1].text == ("<b>1</b><br>1 MB, 1 refused",)


def test_what_is_left_of_a_round_is_waiting() -> None:
    """A round of 12.5 s in which a site trained 10 s and validated 1 s; one that failed waited all of it."""
    record = replace(made_up_round(1, ("A", "B")), failures=())
    record = replace(record, trained=tuple(report for report in record.trained if report.site == "A"))
    assert stage_seconds([record]) == {
        "A": {WAITING: 1.5, "training": 10.0, "validation": 1.0},
        "B": {WAITING: 12.5},
    }


# --- command and browser -----------------------------------------------------------------------


def test_command_writes_the_page_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = make_run(tmp_path / "run", rounds=1), tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["gcml", "report", str(folder.path), "--out", str(out), "--no-regions"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert out.is_file()
    first, *others = capsys.readouterr().out.splitlines()
    assert first == f"reading {folder.path}, drawing its charts"
    assert str(out) in "".join(others)


def test_missing_plotly_is_told_with_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import_module = builtins.__import__

    def without_plotly(name: str, *args: Any) -> ModuleType:
        if name == "gcml_ray.report.page.write":
            raise ModuleNotFoundError("No module named 'plotly'", name="plotly")
        return import_module(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_plotly)
    monkeypatch.setattr(sys, "argv", ["gcml", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "pip install 'gcml-ray[report]'" in capsys.readouterr().err


def browser() -> str:
    """A Chromium; the test is skipped where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    return found or pytest.skip("no Chromium on this machine")


def test_browser_draws_every_chart_without_an_error(tmp_path: Path) -> None:
    program = browser()
    page = write_report(make_run(tmp_path / "run").path, with_regions=False)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", "--enable-logging=stderr"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    shown = subprocess.run(  # noqa: S603 - the browser found above, our own page
        [program, *options, profile, "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    body = shown.stdout[: shown.stdout.index("<footer>")]
    assert len(re.findall(r'class="chart js-plotly-plot"', body)) == len(charts_of(page)) > 5
    assert body.count('<svg class="main-svg"') >= len(charts_of(page))
    assert re.findall(r"CONSOLE.*", shown.stderr) == []
