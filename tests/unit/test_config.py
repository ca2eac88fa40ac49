from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gcml_ray.config import Config, GcmlMethod
from gcml_ray.config.file import load_config, parse_config, save_config
from gcml_ray.errors import ConfigError
from tests.config_files import CONFIG, problems, values, write

# --- reading YAML ----------------------------------------------------------------------------


def test_file_becomes_the_config_it_describes(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    assert config.data.patch_size == (32, 32, 16)
    assert isinstance(config.method, GcmlMethod)
    assert config.method.dcml.weight == 0.3
    assert config.federation.num_cooldown == 5


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "1E-3", "+1e-3", ".1e-2", "10e-4", "0.001"])
def test_exponent_without_a_point_is_a_number(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path, CONFIG.replace("1e-3", text))).optimiser.learning_rate == 0.001


def test_duplicate_key_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path, CONFIG.replace("  learning_rate: 1e-3", "  learning_rate: 1e-3\n  learning_rate: 2e-3"))
    with pytest.raises(ConfigError, match="line 11: key 'learning_rate' stands already on line 10"):
        load_config(path)


def test_duplicate_key_on_one_line_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, CONFIG.replace("{lambda: 0.3}", "{lambda: 0.3, lambda: 0.4}"))
    with pytest.raises(ConfigError, match="line 14: key 'lambda' stands already on line 14"):
        load_config(path)


def test_merge_key_may_change_an_inherited_key(tmp_path: Path) -> None:
    text = CONFIG + "site_networks:\n  A: &a {name: unet, options: {}}\n  B: &b {<<: *a, name: sanet}\n  C: {<<: *b}\n"
    config = load_config(write(tmp_path, text), ["method={name: local}"])
    assert [config.site_networks[site].name for site in "ABC"] == ["unet", "sanet", "sanet"]


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: No such file"):
        load_config(tmp_path / "nothing.yaml")


def test_folder_and_binary_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "image.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match=r"image\.yaml: not a UTF-8 text file"):
        load_config(tmp_path / "image.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)


def test_broken_yaml_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml: line 4: not valid YAML"):
        load_config(write(tmp_path, "name: x\ndata:\n  labels: [a\nnetwork: 3\n"))


@pytest.mark.parametrize(("text", "received"), [("", "an empty file"), ("- a\n", "a list"), ("hello\n", "a str")])
def test_top_level_must_be_a_mapping(tmp_path: Path, text: str, received: str) -> None:
    with pytest.raises(ConfigError, match=f"top level must be sections .* not {received}"):
        load_config(write(tmp_path, text))


def test_python_objects_are_never_built(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not valid YAML: could not determine a constructor"):
        load_config(write(tmp_path, "name: !!python/object/apply:os.getcwd []\n"))


# --- saving ----------------------------------------------------------------------------------


def test_saved_config_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@settings(max_examples=50, deadline=None)
@given(
    name=st.one_of(st.text(min_size=1), st.sampled_from(["1e-3", "on", "null", "~", "2024-01-01", "a: b", "1_0", "é"])),
    rate=st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False),
)
def test_any_text_and_number_survive_saving(tmp_path_factory: pytest.TempPathFactory, name: str, rate: float) -> None:
    config = Config.model_validate(values(name=name, optimiser={"learning_rate": rate}, output={"folder": "/o"}))
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    save_config(config, path)
    loaded = load_config(path)
    assert (loaded.name, loaded.optimiser) == (config.name, config.optimiser)


def test_saved_file_uses_the_names_of_the_config_file(tmp_path: Path) -> None:
    save_config(load_config(write(tmp_path)), tmp_path / "saved.yaml")
    saved = yaml.safe_load((tmp_path / "saved.yaml").read_text())
    assert saved["method"]["dcml"]["lambda"] == 0.3
    assert "weight" not in saved["method"]["dcml"]


# --- problems --------------------------------------------------------------------------------


def test_all_problems_are_listed_at_once_in_one_line_each(tmp_path: Path) -> None:
    text = CONFIG.replace("rounds: 20", "rounds: 2.5").replace("name: push_k, k: 2", "name: pushk")
    lines = problems(write(tmp_path, text.replace("[32, 32, 16]", "[32, big, 16]").replace("true", "'yes'")))
    assert lines == [
        "  data.spacing_is_real: received 'yes'; must be a valid boolean",
        "  data.patch_size[1]: received 'big'; must be a valid integer",
        "  method.topology.name: received 'pushk'; "
        "allowed: 'bernoulli' or 'exponential' or 'matching' or 'push_k' or 'ring' or 'usefulness'",
        "  federation.rounds: received 2.5; must be a valid integer",
    ]


def test_missing_key_says_what_it_should_hold(tmp_path: Path) -> None:
    lines = problems(write(tmp_path, CONFIG.replace("  learning_rate: 1e-3", "  weight_decay: 0.1")))
    assert lines == ["  optimiser.learning_rate: missing; required: a number above 0"]


def test_missing_sections_say_what_they_need(tmp_path: Path) -> None:
    lines = problems(write(tmp_path, "name: x\n"))
    assert "  federation: missing; required: a section with rounds, local_steps" in lines
    start = "  method: missing; required: a section whose name is 'defkt' or 'ditto' or 'dpsgd' or 'fedavg' or"
    assert any(line.startswith(start) for line in lines)
    assert len(lines) == 6


def test_unknown_key_suggests_the_closest_one_and_lists_all(tmp_path: Path) -> None:
    (line,) = problems(write(tmp_path, CONFIG.replace("{lambda: 0.3}", "{lamda: 0.3}")))
    assert line.startswith("  method.dcml.lamda: unknown key; did you mean 'lambda'? allowed: variant, lambda, beta")


@pytest.mark.parametrize("name", ["fedsgd", "GCML", 3])
def test_unknown_method_lists_the_methods(name: str | int) -> None:
    with pytest.raises(ConfigError, match=rf"method\.name: received .*{name}.*; allowed: .*'gcml' or 'gml' or"):
        parse_config(values(method={"name": name}), source="test")


def test_method_without_a_name_lists_the_methods(tmp_path: Path) -> None:
    (line,) = problems(write(tmp_path), "method={merge: replace}")
    assert line.startswith("  method.name: missing; allowed: 'defkt' or")


def test_key_of_another_method_names_the_method_and_how_to_replace_it(tmp_path: Path) -> None:
    lines = problems(write(tmp_path), "method.name=gml")
    assert lines == [
        "  method.dcml: method 'gml' has no such key; allowed: buffers, share_norms, topology, max_incoming, name, "
        "lambda. To change method, replace it whole, e.g. --set 'method={name: local}'"
    ]


def test_key_of_another_topology_names_the_topology(tmp_path: Path) -> None:
    (line,) = problems(write(tmp_path), "method.topology.name=ring")
    assert line.startswith("  method.topology.k: method.topology 'ring' has no such key")


def test_contradiction_between_keys_is_told_at_their_section(tmp_path: Path) -> None:
    assert problems(write(tmp_path), "data.patch_size=[8, 8]") == [
        "  data: patch_size has 2 numbers, spatial_dims is 3"
    ]


def test_a_run_that_may_end_after_any_round_writes_each_one(tmp_path: Path) -> None:
    (line,) = problems(write(tmp_path), "federation.time_limit_s=60", "output.checkpoint_every=5")
    assert "time_limit_s may end a run after any round" in line
    assert "set checkpoint_every to 1" in line


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("data.regions={}", "data: regions is empty: name at least one"),
        ("data.orientation=RA", "data.orientation: received 'RA'; must be one letter each of L or R, P or A, I or S"),
        ("data.orientation=RRS", "data.orientation: received 'RRS'; must be one letter each of L or R, P or A, I or S"),
        ("data.augment.flip_axes=[0, 0]", "data.augment: flip_axes (0, 0) names an axis twice"),
        ("federation.sites=[north, south, north]", "federation.sites: north stands in it more than once"),
        (
            "federation={rounds: 4, local_steps: 1, mode: async, round_deadline_s: 9.0}",
            "federation: round_deadline_s would be ignored: with mode async",
        ),
        ("federation.max_staleness=3", "federation: max_staleness would be ignored: with mode sync"),
    ],
)
def test_what_would_break_later_or_be_ignored_is_told(tmp_path: Path, override: str, problem: str) -> None:
    (line,) = problems(write(tmp_path), override)
    assert line.startswith(f"  {problem}")


def test_contradiction_between_sections_is_told(tmp_path: Path) -> None:
    (line,) = problems(write(tmp_path), "loss.class_weights=[1, 1, 1]")
    assert line == "  across sections: loss.class_weights has 3 numbers for 2 outputs"


def test_incoming_models_without_a_step_are_refused(tmp_path: Path) -> None:
    """The last of them, untrained here, would take the place of what the site has learnt."""
    path = write(tmp_path)
    changes = ("method={name: defkt, topology: {name: push_k, k: 2}, max_incoming: 2}", "federation.local_steps=1")
    (line,) = problems(path, *changes)
    assert "method.max_incoming 2 is more than federation.local_steps 1" in line
    assert load_config(path, [changes[0], "federation.local_steps=2"]).method.max_incoming == 2


def test_value_where_a_section_belongs_is_told(tmp_path: Path) -> None:
    assert problems(write(tmp_path), "tracking=off") == [
        "  tracking: received False; must be a section of 'key: value' lines"
    ]


def test_unquoted_yaml_word_where_text_belongs_says_to_quote_it(tmp_path: Path) -> None:
    """A site called NO is the boolean false in YAML 1.1."""
    (line,) = problems(write(tmp_path), "federation.sites=[SE, NO]")
    assert line == "  federation.sites[1]: received False; must be text, not bool: put it in quotes"


def test_empty_text_where_a_name_belongs_is_told(tmp_path: Path) -> None:
    assert problems(write(tmp_path), "name=''") == ["  name: received ''; must be text that is not empty"]


def test_list_that_is_too_short_is_told(tmp_path: Path) -> None:
    (line,) = problems(write(tmp_path), "data.patch_size=[16]")
    assert line == "  data.patch_size: received [16]; must be 2 or more of them, not 1"


def test_text_where_a_list_belongs_is_told(tmp_path: Path) -> None:
    assert problems(write(tmp_path), "data.channels=t1") == ["  data.channels: received 't1'; must be a list, [a, b]"]


def test_wrong_items_do_not_make_a_list_too_short(tmp_path: Path) -> None:
    """Two of three numbers are wrong; that only one good one is left is no problem of its own."""
    assert len(problems(write(tmp_path), "data.patch_size=[8, 0, a]")) == 2


def test_error_opens_with_the_file_and_the_number_of_problems(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.yaml: 1 problem\(s\)\n  federation\.rounds: received 0"):
        load_config(path, ["federation.rounds=0"])


@pytest.mark.parametrize(
    "dcml",
    [
        "{variant: regional, beta: 0.2}",
        "{variant: none, lambda: 0.2}",
        "{variant: mutual, tau: 2.0}",
        "{variant: mutual, normalise: omega}",
    ],
)
def test_dcml_setting_that_the_variant_would_ignore_is_refused(tmp_path: Path, dcml: str) -> None:
    with pytest.raises(ConfigError, match=r"method.*would be ignored by variant (regional|none|mutual)"):
        load_config(write(tmp_path), [f"method.dcml={dcml}"])


def test_packaged_demo_is_the_phantom_configuration() -> None:
    """``gcml demo`` must work from an installed package, without the folder ``configs``; both say the same."""
    root = Path(__file__).parents[2]
    assert load_config(root / "gcml_ray" / "demo.yaml") == load_config(root / "configs" / "phantom.yaml")
