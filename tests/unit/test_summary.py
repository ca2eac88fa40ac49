"""The last words of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gcml_ray.console.summary import run_facts, run_table, share_of_fedavg, where_things_are
from gcml_ray.gossip.trust import judged_counts
from gcml_ray.records import CaseScore, EvaluationReport, Judgement, PushReceipt, RoundPlan, RoundRecord
from tests.fakes import fake_config
from tests.unit.test_run_folder import make_report


def record_of(number: int, *sites: str) -> RoundRecord:
    """One second; each of these sites reports that it has trained for a quarter of a second."""
    plan = RoundPlan(number, "exchange", sites, ())
    return RoundRecord(plan, tuple(make_report(site, number) for site in sites), (), (), seconds=1.0)


@pytest.mark.parametrize(
    ("records", "share"),
    [
        ([record_of(1, "A", "B"), record_of(2, "A", "B")], 25),  # 4 x 0.25 s of 2 sites x 2 s
        ([record_of(1, "A"), record_of(2, "A"), record_of(3, "A", "B")], 17),  # B had 3 s as well: 4 x 0.25 of 6 s
        ([record_of(1, "A", "B"), record_of(2, "A")], 25),  # B has left after 1 s: 3 x 0.25 of 3 s
    ],
)
def test_share_of_training_is_of_the_time_that_each_site_had(records: list[RoundRecord], share: int) -> None:
    assert f"of the sites' time {share} % train" in run_facts(records, start_seconds=0.0)


def test_means_of_different_sites_are_not_compared() -> None:
    """B joined after the warm-up: the mean before has nothing to stand beside, the gain is that of A and C."""
    before = [report_of(site, "before_gossip", dice) for site, dice in (("A", 0.2), ("C", 0.4))]
    after = [report_of(site, "personalised", dice) for site, dice in (("A", 0.3), ("B", 0.9), ("C", 0.6))]
    table = run_table([*before, *after], unit="mm")
    cells = [list(column.cells)[-1] for column in table.columns]
    assert cells[:5] == ["mean of sites", "", "-", "0.600", "+0.150"]
    whole = run_table([*before, *(report for report in after if report.site != "B")], unit="mm")
    assert [list(column.cells)[-1] for column in whole.columns][2:5] == ["0.300", "0.450", "+0.150"]


def report_of(site: str, model: str, dice: float) -> EvaluationReport:
    """One case of one class."""
    score = CaseScore(site, "x", "test", model, "lesion", dice, 2.0, 0.9)
    return EvaluationReport(site, "test", model, 4, (score,), 0.1)


def test_rounds_that_a_site_missed_are_counted() -> None:
    """B is late in the first round and still busy in the second; what it was late with comes in the third."""
    late = replace(record_of(1, "A", "B"), trained=(make_report("A", 1),), late=("B",))
    busy = replace(record_of(2, "A"), left_out={"B": "busy"})
    back = replace(record_of(3, "A", "B"), trained=(*record_of(3, "A", "B").trained, make_report("B", 1)))
    assert "1 site round missed" in run_facts([late, busy, back], start_seconds=0.0)


def test_faults_on_purpose_come_first_in_the_last_words() -> None:
    facts = run_facts([record_of(1, "A")], start_seconds=0.0, chaos="kill:A@r1")
    assert facts.splitlines()[0].endswith("injected on purpose, what this run gives is no result: kill:A@r1")
    assert "purpose" not in run_facts([record_of(1, "A")], start_seconds=0.0)


def test_largest_memory_of_a_site_may_be_that_of_its_test() -> None:
    record = replace(record_of(1, "A"), trained=(replace(make_report("A", 1), peak_memory_bytes=2_000_000_000),))
    tested = EvaluationReport("A", "test", "personalised", 1, (), 1.0, peak_memory_bytes=3_000_000_000)
    assert "largest site 2000 MB" in run_facts([record], start_seconds=0.0)
    assert "largest site 3000 MB" in run_facts([record], start_seconds=0.0, evaluations=[tested])


def test_judged_models_are_counted_with_those_not_let_in() -> None:
    judged = tuple(Judgement("B", is_good, "", None, None, None, None) for is_good in (True, False, True))
    report = replace(make_report("A", 1), judged=judged)
    records = [replace(record_of(1, "A"), trained=(report,)), record_of(2, "A")]
    assert judged_counts(records) == (3, 1)
    assert "judged       3 incoming models by the receivers; 1 not let in" in run_facts(records, start_seconds=0.0)
    assert "judged" not in run_facts([record_of(2, "A")], start_seconds=0.0)


def pushed(sender: str, receiver: str, size_bytes: int, *, accepted: bool = True) -> PushReceipt:
    return PushReceipt(1, sender, receiver, accepted, "" if accepted else "late", size_bytes)


def test_traffic_is_set_beside_what_fedavg_would_send() -> None:
    """Two of three sites push 40 bytes in one of two exchange rounds: 80 of 2 x 3 x 40.

    The refused push does not count, nor the warm-up, in which FedAvg would send nothing either.
    """
    taken = (pushed("A", "B", 40), pushed("B", "A", 40), pushed("C", "A", 40, accepted=False))
    records = [replace(record_of(1, "A", "B", "C"), pushes=taken), record_of(2, "A", "B", "C")]
    alone = RoundPlan(3, "warmup", ("A", "B", "C"), ())
    records.append(replace(record_of(3, "A", "B", "C"), plan=alone))
    assert share_of_fedavg(records) == pytest.approx(80 / 240)
    assert "33% of FedAvg's uploads in the same rounds, 17% of both its ways" in run_facts(records, start_seconds=0.0)


@pytest.mark.parametrize("pushes", [(), (pushed("A", "server", 40), pushed("server", "A", 40))])
def test_traffic_without_gossip_is_not_set_beside_fedavg(pushes: tuple[PushReceipt, ...]) -> None:
    records = [replace(record_of(1, "A"), pushes=pushes)]
    assert share_of_fedavg(records) is None
    assert "FedAvg" not in run_facts(records, start_seconds=0.0)


def test_last_words_list_what_there_is(tmp_path: Path) -> None:
    config = fake_config(tmp_path)
    folder = Path(config.output.folder)
    always = [f"run folder   {folder}", f"one page     gcml report {folder}"]
    for name in ("plots", "overlays/A", "checkpoints/A"):
        (folder / name).mkdir(parents=True)
    (folder / "checkpoints/A/round_1.safetensors").touch()  # of a run that was stopped
    assert where_things_are(config).splitlines() == always
    for name in ("plots/losses.png", "overlays/A/c1.png", "checkpoints/A/personalised.safetensors", "cases.csv"):
        (folder / name).touch()
    assert where_things_are(config).splitlines() == [
        always[0],
        f"plots        {folder / 'plots'}",
        f"overlays     {folder / 'overlays'}",
        f"models       {folder / 'checkpoints'}",
        f"every case   {folder / 'cases.csv'}",
        always[1],
    ]


def test_one_of_a_thing_is_no_plural() -> None:
    facts = run_facts([replace(record_of(1, "A"), pushes=(pushed("A", "B", 1_000_000),))], start_seconds=0.0)
    assert "for 1 round\n" in facts
    assert "traffic      1 push, 1.0 MB; 0 refused; 0 site rounds missed" in facts
