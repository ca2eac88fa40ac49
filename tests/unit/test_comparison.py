import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gcml_ray.comparison.cells import (
    COLUMNS,
    Cell,
    check_same_cases,
    dice_over_seeds,
    holm,
    mean_interval,
    read_cell,
    signed_rank_p,
    site_verdicts,
    summarise,
    write_cell,
)
from gcml_ray.comparison.config import cell_config, load_comparison
from gcml_ray.comparison.table import markdown
from gcml_ray.config.file import load_config
from gcml_ray.errors import ConfigError, DataError
from gcml_ray.records import CaseScore
from tune.search_file import load_search

SITES = {"A": 6, "B": 10}


def cell(method: str, seed: int, *, lift: float, model: str = "personalised", sent: int = 0) -> Cell:
    """Sixteen cases: a fixed spread over cases, raised by ``lift`` at A and twice as much at B."""
    scores = tuple(
        CaseScore(site, f"{site}{index}", "test", model, "lesion", 0.5 + 0.01 * index + own_lift, 2.0, 0.9)
        for (site, count), own_lift in zip(SITES.items(), (lift, 2 * lift), strict=True)
        for index in range(count)
    )
    return Cell(method, seed, "cafe", sent, 10.0, 100, scores)


def test_cell_survives_the_file(tmp_path: Path) -> None:
    original = cell("gcml", 3, lift=0.1, sent=7)
    undefined = replace(original, scores=(replace(original.scores[0], hd95=math.nan), *original.scores[1:]))
    write_cell(tmp_path / "c.csv", undefined)
    back = read_cell(tmp_path / "c.csv")
    assert math.isnan(back.scores[0].hd95)
    assert replace(back, scores=back.scores[1:]) == replace(undefined, scores=undefined.scores[1:])


CUT_OFF = ",".join(COLUMNS) + "\ngcml,0,cafe,7,10.0,100,A,one,personalised,lesion"  # in the middle of a line
OUT_OF_RANGE = CUT_OFF + ",7,1.0,0.9\n"  # a Dice of 7
TORN = CUT_OFF + ",0.7,12"  # of 12.5, say


@pytest.mark.parametrize("text", ["", "method,seed\ngcml,0\n", "not a table", CUT_OFF, OUT_OF_RANGE, TORN])
def test_file_that_is_no_cell_says_what_to_do(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(DataError, match=r"c\.csv is not a cell .*delete it to have it run again"):
        read_cell(tmp_path / "c.csv")


def test_file_with_rows_of_another_cell_or_a_score_twice_is_refused(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_cell(tmp_path / f"{seed}.csv", cell("gcml", seed, lift=0.0))
    whole, other = ((tmp_path / f"{seed}.csv").read_text() for seed in (0, 1))
    rows = whole.splitlines(keepends=True)
    dice = whole.replace(",0.5,", ",,", 1)
    assert dice != whole
    for text, words in (
        (whole + "".join(other.splitlines(keepends=True)[1:]), "rows of several cells"),
        (whole + rows[-1], "a score twice"),
        (dice, "a score without Dice"),
    ):
        (tmp_path / "c.csv").write_text(text)
        with pytest.raises(DataError, match=f"not a cell of a comparison .*{words}"):
            read_cell(tmp_path / "c.csv")


def test_a_small_site_counts_as_much_as_a_large_one() -> None:
    """A: 0.5 + mean(0..5)/100 = 0.525; B: 0.5 + mean(0..9)/100 = 0.545; mean of the two, not of the 16 cases."""
    (row,) = summarise([cell("local", 0, lift=0.0)])
    assert row.site_dice == pytest.approx({"A": 0.525, "B": 0.545})
    assert row.dice == pytest.approx(0.535)


def test_seeds_are_averaged_and_their_spread_is_the_sample_deviation() -> None:
    """The lifts 0, 0.02 and 0.04 raise the mean of sites by 0, 0.03 and 0.06: mean 0.03, deviation 0.03."""
    (row,) = summarise([cell("local", seed, lift=0.02 * seed) for seed in range(3)])
    assert row.num_seeds == 3
    assert row.dice == pytest.approx(0.565)
    assert row.dice_sd == pytest.approx(0.03)


def test_a_site_that_one_seed_lacks_has_the_mean_of_the_others() -> None:
    whole, part = cell("a", 0, lift=0.0), cell("a", 1, lift=0.1)
    part = replace(part, scores=tuple(score for score in part.scores if score.site == whole.scores[0].site))
    first, second = (summarise(cells)[0].site_dice for cells in ([whole, part], [part, whole]))
    assert first == second
    assert set(first) == {score.site for score in whole.scores}


def test_rows_are_compared_with_the_best_over_cases() -> None:
    """Every case is lower by 0.1 (A) or 0.2 (B): difference -0.15 with no spread; 16 signs alike: p below 0.001."""
    best, worse = summarise([cell("local", 0, lift=0.0), cell("gcml", 0, lift=0.1)])
    assert (best.method, worse.method) == ("gcml", "local")
    assert (worse.difference, worse.low, worse.high) == pytest.approx((-0.15, -0.15, -0.15))
    assert worse.p_value < 0.001


def test_half_finished_methods_are_compared_over_their_common_seeds() -> None:
    """Seed 1 is worse for all: the best has seeds 0 and 1, b only seed 0, c only seed 2."""
    cells = [cell("a", 0, lift=0.2), cell("a", 1, lift=-0.1), cell("b", 0, lift=0.1), cell("c", 2, lift=-0.2)]
    rows = {row.method: row for row in summarise([replace(cells[0], seed=3), *cells])}
    assert [rows[name].num_seeds for name in "abc"] == [3, 1, 1]
    assert rows["b"].difference == pytest.approx(-0.15)  # 0.1 at A and 0.2 at B, over seed 0 alone
    assert math.isnan(rows["c"].difference)
    assert "nothing in common" in markdown(tuple(rows.values()), unit="mm")
    assert site_verdicts(cells, method="c", alone="a") == ()


def test_a_method_that_equals_the_best_is_not_told_apart() -> None:
    _, twin = summarise([cell("a", 0, lift=0.1), cell("b", 0, lift=0.1)])
    assert (twin.difference, twin.p_value) == (0.0, 1.0)


def test_pooled_training_is_a_bound_below_the_others_and_not_what_they_are_compared_with() -> None:
    cells = [cell("pooled", 0, lift=0.3), cell("local", 0, lift=0.0), cell("gcml", 0, lift=0.1)]
    rows = summarise(cells, bounds=("pooled",))
    assert [row.method for row in rows] == ["gcml", "local", "pooled"]
    assert [row.difference for row in rows] == pytest.approx([0.0, -0.15, 0.3])  # means of 0.1 and 0.2, 0.2 and 0.4


def test_cells_that_were_scored_on_other_cases_are_not_compared() -> None:
    whole = cell("gcml", 0, lift=0.1)
    cut = replace(whole, method="local", scores=whole.scores[:-1])
    check_same_cases({Path("a.csv"): whole, Path("b.csv"): replace(whole, seed=1)})
    for cells in ({Path("a.csv"): whole, Path("b.csv"): cut}, {Path("b.csv"): cut, Path("a.csv"): whole}):
        with pytest.raises(DataError, match=r"different cases: .* is only in a\.csv\. The datalist has changed"):
            check_same_cases(cells)


@pytest.mark.parametrize(
    ("differences", "p_value"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5], 2 / 2**5),  # of the 32 signs two are as one-sided
        ([0.0] * 14 + [0.1, 0.2, 0.3, 0.4, 0.5], 2 / 2**5),  # zeros say nothing: not 0.043, the normal approximation
        ([1.0] * 6, 2 / 2**6),
        ([1.0, 1.0, -1.0], 1.0),  # ranks 2, 2, 2: six of the eight signs have a sum of 2 in size, two have 6
        ([0.0, 0.0], 1.0),
    ],
)
def test_the_signed_rank_test_of_few_or_equal_differences_is_exact(differences: list[float], p_value: float) -> None:
    assert signed_rank_p(np.array(differences)) == pytest.approx(p_value)


def test_shared_models_get_a_row_of_their_own_and_others_none() -> None:
    both = replace(
        cell("ditto", 0, lift=0.1),
        scores=cell("ditto", 0, lift=0.1).scores
        + cell("ditto", 0, lift=0.0, model="shared").scores
        + cell("ditto", 0, lift=0.3, model="before_gossip").scores,
    )
    assert [(row.method, row.model) for row in summarise([both])] == [("ditto", "personalised"), ("ditto", "shared")]


def test_holm_multiplies_by_what_is_left_and_never_falls() -> None:
    """Sorted 0.01, 0.02, 0.03 x 3, 2, 1 = 0.03, 0.04, 0.03 -> 0.03, 0.04, 0.04."""
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_interval_of_one_site_is_students() -> None:
    """Mean 0.1, sample deviation 0.1, t(0.975, 5 degrees of freedom) = 2.571: 0.1 -+ 2.571 x 0.1 / sqrt(6)."""
    spread = np.array([-1.0, 1.0, -1.0, 1.0, -1.0, 1.0]) * np.sqrt(5 / 6)
    low, high = mean_interval([0.1 + 0.1 * spread])
    assert (low, high) == pytest.approx((0.1 - 0.10495, 0.1 + 0.10495), abs=1e-4)


def test_a_site_without_a_true_difference_is_told_apart_in_one_of_twenty() -> None:
    samples = np.random.default_rng(0).normal(size=(2000, 6))
    wrong = sum(low > 0 or high < 0 for low, high in (mean_interval([sample]) for sample in samples))
    assert 0.035 < wrong / 2000 < 0.065


def test_interval_of_several_sites_has_welchs_degrees_of_freedom() -> None:
    """t(0.975, 2.951 degrees of freedom) = 3.212, so half the width is 3.212 x sqrt(11/6) / 2 sites.

    Variances of the two means are 1/2 and 4/3, together 11/6; (11/6)^2 / ((1/2)^2 / 1 + (4/3)^2 / 2) = 2.951.
    """
    by_site = [np.array([3.0, 3.0]) + np.array([-1.0, 1.0]) / np.sqrt(2), np.array([3.0, 5.0, 7.0])]
    low, high = mean_interval(by_site)
    assert (low, high) == pytest.approx((4.0 - 2.1745, 4.0 + 2.1745), abs=1e-3)


@pytest.mark.parametrize("sizes", [(4, 4, 7, 4), (12, 9, 3, 3), (3, 3, 3)])
def test_sites_without_a_true_difference_are_told_apart_in_one_of_twenty(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    intervals = [mean_interval([rng.normal(size=size) for size in sizes]) for _ in range(1000)]
    assert 0.02 < sum(low > 0 or high < 0 for low, high in intervals) / 1000 < 0.07


def test_a_site_with_one_case_leaves_no_interval() -> None:
    assert all(map(math.isnan, mean_interval([np.array([0.1]), np.array([0.1, 0.2])])))
    few = [replace(each, scores=each.scores[-11:]) for each in (cell("a", 0, lift=0.1), cell("b", 0, lift=0.0))]
    (_, line) = markdown(summarise(few), unit="mm").splitlines()[2:]
    assert "| -15.0 | - | <0.001 |" in line


def test_what_differs_by_rounding_alone_is_no_difference() -> None:
    """0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1."""
    one = [cell("gcml", seed, lift=0.1 * (seed + 1)) for seed in range(3)]
    two = [cell("local", seed, lift=0.1 * (3 - seed)) for seed in range(3)]
    assert all("not told apart" in line for line in site_verdicts([*one, *two], method="gcml", alone="local")[1:])
    assert summarise([*one, *two])[1].p_value == 1.0


def test_pairs_are_averaged_over_seeds() -> None:
    pairs = dice_over_seeds([cell("a", 0, lift=0.0), cell("a", 1, lift=0.1)], "personalised")
    assert pairs["A", "A0"] == pytest.approx(0.55)
    assert pairs["B", "B0"] == pytest.approx(0.6)


def verdicts(*, lift: float, **options: str) -> tuple[str, ...]:
    return site_verdicts(
        [cell("local", 0, lift=0.0), cell("gcml", 0, lift=lift)], **({"method": "gcml", "alone": "local"} | options)
    )


def test_verdict_says_better_or_worse_by_how_much_and_how_sure() -> None:
    better = "A: gcml is better than local, +10.0 Dice points (95 % interval +10.0 to +10.0, 6 test cases)"
    assert verdicts(lift=0.1)[1] == better
    worse = "B: gcml is worse than local, -20.0 Dice points (95 % interval -20.0 to -20.0, 10 test cases)"
    assert verdicts(lift=-0.1)[2] == worse
    assert verdicts(lift=0.0)[1].startswith("A: gcml and local are not told apart, +0.0 Dice points (95 % interval")


def test_first_verdict_counts_the_sites() -> None:
    assert verdicts(lift=0.1)[0] == "gcml against local: better at 2 of 2 sites, worse at 0, not told apart at 0"
    assert verdicts(lift=0.0)[0] == "gcml against local: better at 0 of 2 sites, worse at 0, not told apart at 2"


def test_few_cases_are_never_called_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five differences of one sign: Wilcoxon's p cannot be below 2 / 2**5 = 0.06."""
    monkeypatch.setitem(SITES, "A", 5)
    assert (
        verdicts(lift=0.1)[1]
        == "A: gcml and local are not told apart, +10.0 Dice points: 5 test cases, too few to tell"
    )


def test_without_common_cases_there_is_no_verdict() -> None:
    assert site_verdicts([cell("gcml", 0, lift=0.1)], method="gcml", alone="local") == ()


COMPARISON = """
name: c
base: {base}
seeds: [4]
common: {{federation.rounds: 9, federation.local_steps: 3}}
methods:
  local: {{method: {{name: local}}}}
  gcml: {{federation.rounds: 7}}
output: {folder}/runs
results: {folder}/results
"""


def test_a_cell_is_the_base_with_the_common_and_the_methods_changes(tmp_path: Path) -> None:
    base = Path(__file__).parents[2] / "configs" / "phantom.yaml"
    (tmp_path / "c.yaml").write_text(COMPARISON.format(base=base, folder=tmp_path))
    comparison = load_comparison(tmp_path / "c.yaml")
    config = cell_config(comparison, "gcml", 4, ["federation.local_steps=2"])
    assert (config.federation.rounds, config.federation.seed, config.federation.local_steps) == (7, 4, 2)
    assert config.output.folder == f"{tmp_path}/runs/gcml_seed4"
    alone = cell_config(comparison, "local", 4, [])
    assert (alone.method.name, alone.federation.rounds, alone.federation.local_steps) == ("local", 9, 3)


def test_a_cell_waits_for_late_sites_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    base = Path(__file__).parents[2] / "configs" / "phantom.yaml"
    (tmp_path / "c.yaml").write_text(COMPARISON.format(base=base, folder=tmp_path))
    comparison = load_comparison(tmp_path / "c.yaml")
    asked = cell_config(comparison, "gcml", 4, ["federation.late_factor=3"])
    patient = cell_config(comparison, "gcml", 4, [])
    assert (patient.federation.late_factor, asked.federation.late_factor) == (None, 3.0)
    assert patient.identity == asked.identity


def test_verdict_over_a_method_that_is_not_compared_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(COMPARISON.format(base="b.yaml", folder=tmp_path) + "focus: ditto\n")
    with pytest.raises(ConfigError, match="focus: 'ditto' is not among methods"):
        load_comparison(tmp_path / "c.yaml")


def test_seed_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    text = COMPARISON.format(base="b.yaml", folder=tmp_path)
    (tmp_path / "c.yaml").write_text(re.sub("seeds: .*", "seeds: [4, 0, 4]", text))
    with pytest.raises(ConfigError, match=r"seeds: \[4, 0, 4\] names one twice"):
        load_comparison(tmp_path / "c.yaml")


@pytest.mark.parametrize("name", ["a/b", "a|b", "a\\b"])
def test_a_method_whose_name_is_no_file_and_no_cell_of_a_table_is_refused(tmp_path: Path, name: str) -> None:
    text = COMPARISON.format(base="b.yaml", folder=tmp_path).replace("methods:\n", f"methods:\n  '{name}': {{}}\n")
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"methods: 'a.*names folders, files and a table's line"):
        load_comparison(tmp_path / "c.yaml")


def test_a_faulty_comparison_is_told_its_own_keys(tmp_path: Path) -> None:
    text = COMPARISON.format(base="b.yaml", folder=tmp_path)
    (tmp_path / "c.yaml").write_text(text.replace("seeds:", "seedz:"))
    with pytest.raises(ConfigError) as error:
        load_comparison(tmp_path / "c.yaml")
    assert "seeds: missing; required: a list" in str(error.value)
    assert "seedz: unknown key; did you mean 'seeds'?" in str(error.value)


def problems_of(text: str, folder: Path, *overrides: str) -> str:
    """What is said of a comparison of the phantom in which ``local`` and ``gcml`` are compared."""
    (folder / "c.yaml").write_text(text.format(base=CONFIGS / "phantom.yaml", folder=folder))
    with pytest.raises(ConfigError) as error:
        load_comparison(folder / "c.yaml", overrides)
    return str(error.value)


def test_wrong_changes_are_told_with_their_methods_all_at_once(tmp_path: Path) -> None:
    """One mistake in each method, one in ``common``."""
    text = COMPARISON.replace("name: local}}", "name: lokal}}").replace("gcml: {{", "gcml: {{federation.round: 7, ")
    told = problems_of(text.replace("federation.local_steps", "federation.steps"), tmp_path)
    assert told.startswith(f"comparison {tmp_path}/c.yaml: 3 problem(s)")
    assert "\n  local: method.name: received 'lokal'" in told
    assert "\n  gcml: federation.round: unknown key; did you mean 'rounds'?" in told
    assert "phantom.yaml, common or --set): federation.steps: unknown key" in told


def test_a_base_that_is_not_there_is_told_as_the_key_of_the_comparison(tmp_path: Path) -> None:
    told = problems_of(COMPARISON.replace("{base}", "b.yaml"), tmp_path)
    assert told.startswith(f"{tmp_path}/c.yaml, base: cannot read configuration {tmp_path}/b.yaml")
    assert told.endswith("A relative base starts at the folder of c.yaml")


@pytest.mark.parametrize(
    ("override", "key"),
    [("seeds=[1]", "seeds"), ("methods.gcml={}", "methods"), ("output=runs", "output"), ("federation.seed=1", "seeds")],
)
def test_override_of_a_key_of_the_comparison_belongs_into_its_file(tmp_path: Path, override: str, key: str) -> None:
    told = problems_of(COMPARISON, tmp_path, override)
    assert f"--set {override}: {key} is a key of the comparison file, change it there" in told


CONFIGS = Path(__file__).parents[2] / "configs"
COMPARISONS = sorted([*CONFIGS.glob("compare_*.yaml"), *CONFIGS.glob("ablate_*.yaml")])
OTHERS = sorted(set(CONFIGS.glob("*.yaml")) - set(COMPARISONS))


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_every_cell_of_a_shipped_comparison_is_a_valid_configuration(path: Path) -> None:
    comparison = load_comparison(path)
    assert [cell_config(comparison, method, 0, []).name for method in comparison.methods] == list(comparison.methods)


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_no_two_lines_of_a_shipped_comparison_are_the_same_federation(path: Path) -> None:
    comparison = load_comparison(path)
    identities = {method: cell_config(comparison, method, 0, []).identity for method in comparison.methods}
    assert len(set(identities.values())) == len(identities), identities


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_every_other_shipped_configuration_loads(path: Path) -> None:
    if path.stem.startswith("tune_"):
        assert load_search(path, (), ()).config.name
    else:
        assert load_config(path).name == path.stem


@pytest.mark.parametrize(
    ("name", "words", "command"),
    [
        ("phantom", "the configuration of a federation", "run"),
        ("compare_phantom", "a comparison file", "compare"),
        ("tune_phantom", "a search file", "tune"),
    ],
)
def test_file_of_another_kind_is_told_with_its_command(name: str, words: str, command: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    readers: dict[str, Callable[[Path], object]] = {"run": load_config, "compare": load_comparison, "tune": load_search}
    for read in (read for other, read in readers.items() if other != command):
        with pytest.raises(ConfigError) as error:
            read(path)
        assert str(error.value) == f"{path} is {words}: gcml {command} {path}"


def test_names_and_folders_of_a_comparison_may_hold_what_yaml_reads_otherwise(tmp_path: Path) -> None:
    text = COMPARISON.replace("name: c", "name: '2024'").replace("{folder}/runs", '"{folder}/a: #2 \u00e9"')
    (tmp_path / "c.yaml").write_text(text.format(base=CONFIGS / "phantom.yaml", folder=tmp_path), encoding="utf-8")
    config = cell_config(load_comparison(tmp_path / "c.yaml"), "gcml", 4, [])
    assert config.output.folder == f"{tmp_path}/a: #2 \u00e9/gcml_seed4"
    assert config.tracking.experiment == "2024"
