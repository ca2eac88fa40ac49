"""The search file: strict, honest about what can be compared, and its trials' configurations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from gcml_ray.config import GcmlMethod
from gcml_ray.config.file import load_config, save_config, setting
from gcml_ray.errors import CheckpointError, ConfigError
from gcml_ray.records import RoundRecord
from gcml_ray.search.records import SearchRecord, TrialPoint, TrialRecord
from tests.search_makers import WEIGHT, make_search, record, write_search
from tune.node_cache import NAME_FILE, cache_folder
from tune.objective import TrialProgress
from tune.search_file import load_search, reopen_search, save_search
from tune.space import ChoiceDomain
from tune.trial_config import base_params, best_config, trial_config
from tune.watch import reason_of

# --- the file ----------------------------------------------------------------------------------


def test_every_problem_of_a_search_file_is_named_at_once(tmp_path: Path) -> None:
    space = {"method.dcml.beta": {"name": "log_uniform", "low": 0, "high": 1}, "method.merge": {"name": "list"}}
    with pytest.raises(ConfigError) as caught:
        load_search(write_search(tmp_path, space=space, budget={"trials": 0}, sceduler={}))
    text = str(caught.value)
    assert "space.method.dcml.beta.low: received 0" in text
    assert "space.method.merge.name: received 'list'; allowed: " in text
    assert "budget.trials: received 0" in text
    assert "sceduler: unknown key; did you mean 'scheduler'?" in text


def test_a_misspelt_searched_key_is_an_error_before_any_trial(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method.dcml.lamda.*no such key|method.dcml.lamda: unknown key"):
        make_search(tmp_path, space={"method.dcml.lamda": {"name": "uniform", "low": 0, "high": 1}})


def test_a_key_and_its_own_section_cannot_both_be_searched(tmp_path: Path) -> None:
    part, whole = "method.topology.name", "method.topology"
    choice = {"name": "choice", "values": ["ring", "matching"]}
    with pytest.raises(ConfigError, match=f"space.{part} is part of space.{whole}"):
        make_search(tmp_path, space={whole: choice, part: choice})


@pytest.mark.parametrize(
    "key", ["federation.seed", "federation.rounds", "data.split.test", "output.folder", "resources", "data"]
)
def test_what_trials_are_compared_by_cannot_be_searched(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"space.{key} cannot be searched"):
        make_search(tmp_path, space={key: {"name": "choice", "values": [1, 2]}})


def test_a_weight_that_the_fixed_variant_ignores_cannot_be_searched(tmp_path: Path) -> None:
    method = {"name": "gcml", "topology": {"name": "ring"}, "dcml": {"variant": "regional"}}
    space = {"method.dcml.beta": {"name": "uniform", "low": 0, "high": 1}}
    with pytest.raises(ConfigError, match=r"space.method.dcml.beta would be ignored by variant regional"):
        make_search(tmp_path, base={"method": method}, space=space)


def test_an_empty_range_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"low 0.5 must be below high 0.5"):
        make_search(tmp_path, space={"method.dcml.beta": {"name": "uniform", "low": 0.5, "high": 0.5}})


def test_a_grid_over_a_range_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"grid needs name: choice or integer.*method.dcml.lambda"):
        make_search(tmp_path, searcher={"name": "grid"})


def test_a_grid_larger_than_the_budget_is_an_error(tmp_path: Path) -> None:
    """3 x 4 points against 11 trials."""
    space = {
        "method.merge": {"name": "choice", "values": ["keep_local", "replace", "select_best"]},
        "federation.local_steps": {"name": "integer", "low": 1, "high": 4},
    }
    with pytest.raises(ConfigError, match=r"the grid has 12 points, budget.trials is 11"):
        make_search(tmp_path, searcher={"name": "grid"}, space=space, budget={"trials": 11})


def test_the_seed_that_chose_the_winner_cannot_test_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"final.seeds: 7 is the seed of the trials"):
        make_search(tmp_path, final={"seeds": [6, 7, 8]})


def test_fewer_than_three_final_seeds_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"final.seeds"):
        make_search(tmp_path, final={"seeds": [1, 2]})


def test_a_scheduler_that_would_cut_in_the_warm_up_is_an_error(tmp_path: Path) -> None:
    base = {"federation": {"rounds": 8, "local_steps": 2, "warmup_rounds": 3, "cooldown_rounds": 0, "seed": 7}}
    with pytest.raises(ConfigError, match=r"grace_rounds: received 3.*train alone in the first 3"):
        make_search(tmp_path, base=base, scheduler={"name": "asha", "grace_rounds": 3})


def test_grace_defaults_to_the_warm_up_and_a_quarter_of_the_rounds(tmp_path: Path) -> None:
    """3 + 8 // 4."""
    base = {"federation": {"rounds": 8, "local_steps": 2, "warmup_rounds": 3, "cooldown_rounds": 0, "seed": 7}}
    assert make_search(tmp_path, base=base, scheduler={"name": "asha"}).grace_rounds == 5


def test_overrides_reach_the_search_and_the_federation(tmp_path: Path) -> None:
    path = write_search(tmp_path, base_overrides=["federation.rounds=9", "federation.local_steps=5"])
    search = load_search(path, ("budget.trials=7",), ("federation.rounds=6",))
    assert search.config.budget.trials == 7
    assert (search.base.federation.rounds, search.base.federation.local_steps) == (6, 5)


def test_a_searched_key_cannot_be_overridden_but_the_space_can(tmp_path: Path) -> None:
    path = write_search(tmp_path)
    with pytest.raises(ConfigError, match=r"--set space\.method\.dcml\.lambda\.high=2: a searched key has dots"):
        load_search(path, ("space.method.dcml.lambda.high=2",))
    whole = "space={method.dcml.lambda: {name: uniform, low: 0, high: 2}}"
    assert load_search(path, (whole,)).config.space["method.dcml.lambda"].name == "uniform"


def test_a_wrong_base_is_told_as_the_key_of_the_search(tmp_path: Path) -> None:
    path = write_search(tmp_path, base_overrides=["federation.round=9"])
    with pytest.raises(
        ConfigError, match=r"search_file.yaml, the federation of its base, base_overrides and --base-set"
    ):
        load_search(path)
    (tmp_path / "base.yaml").unlink()
    with pytest.raises(
        ConfigError, match=r"search_file.yaml, base: cannot read .* starts at the folder of search_file"
    ):
        load_search(path)


def test_a_base_with_a_time_limit_is_refused(tmp_path: Path) -> None:
    path = write_search(tmp_path, base_overrides=["federation.time_limit_s=60"])
    with pytest.raises(ConfigError, match=r"federation\.time_limit_s is 60: trials that it ends have no last round"):
        load_search(path)


def test_a_saved_search_needs_no_other_file_and_may_be_moved(tmp_path: Path) -> None:
    search = make_search(tmp_path, base_overrides=["federation.rounds=6"])
    save_search(search)
    (tmp_path / "base.yaml").unlink()
    search.folder.rename(tmp_path / "moved")
    again = reopen_search(tmp_path / "moved")
    assert again.folder == tmp_path / "moved"
    assert again.base.federation.rounds == 6
    assert again.config.space == search.config.space


def test_a_folder_without_a_search_cannot_be_reopened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not the folder of a search"):
        reopen_search(tmp_path)


def test_the_search_of_the_phantom_is_in_order() -> None:
    search = load_search(Path(__file__).parents[2] / "configs" / "tune_phantom.yaml")
    assert search.config.budget.trials == 24
    assert base_params(search) == {
        "method.dcml.lambda": 0.1,
        "method.dcml.beta": 0.1,
        "method.dcml.tau": 1.0,
        "method.dcml.variant": "contrast",
        "method.merge": "keep_local",
        "method.topology": "matching(symmetric=true)",
    }


def test_the_overnight_search_and_its_short_form_are_in_order() -> None:
    """The short form's overrides are those of the file's own comment."""
    path = Path(__file__).parents[2] / "configs" / "tune_lgg.yaml"
    comment = path.read_text().partition("name: tune_lgg")[0].replace("\\\n#", "")
    words = next(line for line in comment.splitlines() if "tune_lgg_short" in line).split()
    given = {flag: tuple(b for a, b in pairwise(words) if a == flag) for flag in words}
    short = load_search(path, given["--set"], given["--base-set"])
    assert (short.base.federation.rounds, short.grace_rounds) == (12, 4)
    for search in (load_search(path), short):
        assert base_params(search)["optimiser.learning_rate"] == 2e-3


def test_the_federations_own_values_are_those_of_the_first_trial(tmp_path: Path) -> None:
    """A default that is written out in the choice is the same topology; null as warm-up is a tenth of the rounds."""
    space = {
        "method.topology": {"name": "choice", "values": [{"name": "matching"}, {"name": "push_k", "k": 1}]},
        "federation.warmup_rounds": {"name": "integer", "low": 0, "high": 2},
    }
    method = {"name": "gcml", "topology": {"name": "push_k", "k": 1}}
    federation = {"rounds": 10, "local_steps": 2, "seed": 7, "warmup_rounds": None, "cooldown_rounds": None}
    search = make_search(tmp_path, base={"method": method, "federation": federation}, space=space)
    assert base_params(search) == {"method.topology": "push_k(k=1)", "federation.warmup_rounds": 1}


def test_a_weight_that_the_federations_own_variant_ignores_takes_any_value(tmp_path: Path) -> None:
    method = {"name": "gcml", "topology": {"name": "ring"}, "dcml": {"variant": "regional"}}
    space = {
        "method.dcml.variant": {"name": "choice", "values": ["contrast", "regional"]},
        "method.dcml.beta": {"name": "uniform", "low": 0.2, "high": 1},
    }
    params = base_params(make_search(tmp_path, base={"method": method}, space=space))
    assert params == {"method.dcml.variant": "regional", "method.dcml.beta": 0.2}


def test_own_values_outside_the_space_are_all_named(tmp_path: Path) -> None:
    """The federation has lambda 0.1 and merges by select_best."""
    space = {
        "method.dcml.lambda": {"name": "log_uniform", "low": 0.2, "high": 1.0},
        "method.merge": {"name": "choice", "values": ["keep_local", "replace"]},
    }
    with pytest.raises(ConfigError) as caught:
        base_params(make_search(tmp_path, space=space))
    assert "space.method.dcml.lambda: the federation's own value, 0.1, is not in it" in str(caught.value)
    assert 'space.method.merge: the federation\'s own value, "select_best", is not in it' in str(caught.value)


# --- a trial's configuration -------------------------------------------------------------------


def test_a_trial_differs_from_the_federation_by_its_drawn_values_alone(tmp_path: Path) -> None:
    search = make_search(tmp_path)
    config = trial_config(search, {"method.dcml.lambda": 0.25}, folder=tmp_path / "trial")
    assert isinstance(config.method, GcmlMethod)
    assert config.method.dcml.weight == 0.25
    assert config.output.folder == str(tmp_path / "trial")
    assert not config.tracking.enabled
    assert config.data == search.base.data
    assert config.federation == search.base.federation


def test_trials_share_a_cache_of_cases_and_the_winner_has_none(tmp_path: Path) -> None:
    search = make_search(tmp_path)
    folder = cache_folder(search)
    assert folder is not None
    assert trial_config(search, {}, folder=tmp_path, cache=folder).data.cache_folder == folder
    assert best_config(search, {}).data.cache_folder is None
    own = make_search(tmp_path, base={"data": {"cache_folder": str(tmp_path / "kept")}})
    assert cache_folder(own) is None, "one that the federation names is its own and stays"


def test_nobody_can_guess_where_a_search_will_keep_its_cases(tmp_path: Path) -> None:
    """Whoever makes the folder first could put cases of his own into it."""
    search = make_search(tmp_path)
    folder = cache_folder(search)
    assert cache_folder(search) == folder, "the same when the search is resumed"
    assert (search.folder / NAME_FILE).stat().st_mode & 0o077 == 0
    (search.folder / NAME_FILE).unlink()
    assert cache_folder(search) != folder


def test_a_section_can_be_a_choice(tmp_path: Path) -> None:
    choice = {"name": "choice", "values": [{"name": "ring"}, {"name": "push_k", "k": 2}]}
    search = make_search(tmp_path, space={"method.topology": choice})
    domain = search.config.space["method.topology"]
    assert isinstance(domain, ChoiceDomain)
    assert domain.labels == ("ring", "push_k(k=2)")
    config = trial_config(search, {"method.topology": domain.labels[1]}, folder=tmp_path)
    assert isinstance(config.method, GcmlMethod)
    assert config.method.topology.model_dump() == {"name": "push_k", "k": 2}


@pytest.mark.parametrize("variant", ["regional", "mutual", "none"])
def test_drawn_weights_that_the_drawn_variant_ignores_are_left_out(tmp_path: Path, variant: str) -> None:
    space = WEIGHT | {
        "method.dcml.beta": {"name": "uniform", "low": 0, "high": 1},
        "method.dcml.variant": {"name": "choice", "values": ["contrast", "regional", "mutual", "none"]},
    }
    params = {"method.dcml.lambda": 0.25, "method.dcml.beta": 0.5, "method.dcml.variant": variant}
    config = trial_config(make_search(tmp_path, space=space), params, folder=tmp_path)
    assert isinstance(config.method, GcmlMethod)
    assert config.method.dcml.variant == variant
    assert config.method.dcml.weight == (0.1 if variant == "none" else 0.25)


def test_values_that_contradict_the_federation_are_named(tmp_path: Path) -> None:
    search = make_search(tmp_path, space={"federation.warmup_rounds": {"name": "integer", "low": 1, "high": 9}})
    with pytest.raises(ConfigError, match=r"(?s)trial with warmup_rounds=9.*exceed rounds 4"):
        trial_config(search, {"federation.warmup_rounds": 9}, folder=tmp_path)


def test_a_trial_needs_no_placement_group_inside_its_own(tmp_path: Path) -> None:
    search = make_search(tmp_path, base={"resources": {"pool": "ray", "placement": "pg"}})
    assert trial_config(search, {}, folder=tmp_path).resources.placement == "none"


@pytest.mark.parametrize("variant", ["contrast", "regional", "none"])
def test_the_best_configuration_is_one_that_gcml_run_reads(tmp_path: Path, variant: str) -> None:
    space = WEIGHT | {"method.dcml.variant": {"name": "choice", "values": ["contrast", "regional", "none"]}}
    search = make_search(tmp_path, space=space)
    best = best_config(search, {"method.dcml.lambda": 0.25, "method.dcml.variant": variant})
    save_config(best, tmp_path / "best.yaml")
    assert load_config(tmp_path / "best.yaml") == best
    assert best.tracking == search.base.tracking


# --- what trials are judged by -----------------------------------------------------------------


def points_of(rounds: Sequence[RoundRecord], sites: Sequence[str]) -> list[TrialPoint]:
    progress = TrialProgress(sites)
    return [point for record in rounds if (point := progress.add(record)) is not None]


def test_a_site_is_judged_by_its_best_model_so_far() -> None:
    """A: 0.5, 0.8, 0.8; B: 0.7, 0.7, 0.9."""
    rounds = [record(1, {"A": 0.5, "B": 0.7}), record(2, {"A": 0.8, "B": 0.6}), record(3, {"A": 0.1, "B": 0.9})]
    points = points_of(rounds, ["A", "B"])
    assert [point.mean_dice for point in points] == pytest.approx([0.6, 0.75, 0.85])
    assert [point.worst_dice for point in points] == pytest.approx([0.5, 0.7, 0.8])


def test_a_site_that_was_never_evaluated_counts_zero() -> None:
    (point,) = points_of([record(1, {"A": 0.5})], ["A", "B"])
    assert (point.mean_dice, point.worst_dice) == (0.25, 0.0)


def test_an_undefined_score_does_not_count() -> None:
    points = points_of([record(1, {"A": 0.5}), record(2, {"A": float("nan")})], ["A"])
    assert [point.round_number for point in points] == [1]


def test_rounds_without_evaluation_give_no_point_but_their_traffic_counts() -> None:
    """2 + 3 megabytes; 2 s a round."""
    rounds = [
        record(1, {"A": None, "B": None}, sent_bytes=2_000_000),
        record(2, {"A": 0.5, "B": 0.7}, sent_bytes=3_000_000),
    ]
    (point,) = points_of(rounds, ["A", "B"])
    assert (point.round_number, point.megabytes, point.seconds) == (2, 5.0, 4.0)


def test_dice_per_megabyte_is_by_what_a_site_sends() -> None:
    """Mean Dice 0.6, 6 MB from two sites: 0.6 / (1 + 3)."""
    point = TrialPoint(1, {"A": 0.5, "B": 0.7}, 6.0, 1.0)
    assert point.value("dice_per_megabyte") == pytest.approx(0.15)


def test_only_finished_trials_can_win() -> None:
    """The cut one is ahead, but in a shorter run."""
    high, low = TrialPoint(2, {"A": 0.9}, 0, 1), TrialPoint(4, {"A": 0.6}, 0, 1)
    trials = (TrialRecord(1, "a", "cut", points=(high,)), TrialRecord(2, "b", "finished", points=(low,)))
    best = SearchRecord("x", "mean_dice", 4, trials).best
    assert best is not None
    assert best.number == 2


def test_the_front_holds_what_no_other_trial_beats_in_both() -> None:
    """Dice and MB: (0.5, 1) and (0.7, 3) stay; (0.5, 2) loses to the first, (0.6, 4) to the second."""
    results = [(0.5, 1.0), (0.7, 3.0), (0.5, 2.0), (0.6, 4.0)]
    trials = tuple(
        TrialRecord(number, str(number), "finished", points=(TrialPoint(4, {"A": dice}, megabytes, 1.0),))
        for number, (dice, megabytes) in enumerate(results, start=1)
    )
    assert [trial.number for trial in SearchRecord("x", "dice_and_megabytes", 4, trials).front] == [1, 2]


def test_two_objectives_with_a_scheduler_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dice_and_megabytes needs searcher tpe and scheduler none"):
        make_search(tmp_path, objective="dice_and_megabytes", searcher={"name": "tpe"}, scheduler={"name": "asha"})


def test_no_finished_trial_means_no_winner() -> None:
    assert SearchRecord("x", "mean_dice", 4, (TrialRecord(1, "a", "failed"),)).best is None


def test_the_reason_of_a_failure_is_that_of_its_innermost_error() -> None:
    inner, outer = ValueError("tau must be positive"), RuntimeError("the task failed\nTraceback ...")
    outer.__cause__ = inner
    assert reason_of(outer) == "tau must be positive"


def test_of_two_reports_of_a_late_site_the_better_counts() -> None:
    late = record(2, {"A": 0.8}).trained
    both = record(3, {"A": None})
    (point,) = points_of([replace(both, trained=(*late, *both.trained))], ["A"])
    assert point.mean_dice == 0.8


def test_the_folder_of_a_search_may_hold_what_yaml_reads_otherwise(tmp_path: Path) -> None:
    search = load_search(write_search(tmp_path), (setting("folder", f"{tmp_path}/a: #2"),))
    assert str(search.folder) == search.base.output.folder == f"{tmp_path}/a: #2"
    save_search(search)
    assert reopen_search(search.folder).folder == search.folder
