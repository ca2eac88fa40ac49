"""The words of ``chaos``: what each means, and what is refused with a hint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gcml_ray.chaos import Fault, check_sites, faults_of, parse_chaos
from gcml_ray.config import Config
from gcml_ray.config.file import load_config
from gcml_ray.errors import ConfigError
from tests.fakes import fake_config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kill:CS", {"stage": "train"}),
        ("kill:CS@r3", {"stage": "train", "first_round": 3, "last_round": 3}),
        ("kill:CS@r3@merge", {"stage": "merge", "first_round": 3, "last_round": 3}),
        ("kill:CS@merge@r3", {"stage": "merge", "first_round": 3, "last_round": 3}),
        ("hang:CS@r3-", {"stage": "train", "first_round": 3}),
        ("raise:CS@r3-r8", {"stage": "train", "first_round": 3, "last_round": 8}),
        ("raise:CS@load", {"stage": "load"}),
        ("oom:CS@push", {"stage": "push"}),
        ("disk:CS@r2", {"stage": "checkpoint", "first_round": 2, "last_round": 2}),
        ("nan:CS@r2", {"first_round": 2, "last_round": 2}),
        ("slow:CSx2.5", {"factor": 2.5}),
        ("scale:CSx100@r2-", {"factor": 100.0, "first_round": 2}),
        ("flip:CS", {}),
    ],
)
def test_a_fault_is_read(text: str, expected: dict[str, Any]) -> None:
    assert parse_chaos(text) == (Fault(text.partition(":")[0], "CS", text, **expected),)


def test_names_of_sites_may_look_like_factors_and_arrows() -> None:
    slow, lie = parse_chaos("slow:Ax5x3, impersonate:F-Gx2->C-S")
    assert (slow.site, slow.factor) == ("Ax5", 3.0)
    assert (lie.site, lie.victim, lie.factor) == ("F-Gx2", "C-S", 1.0)


def test_several_faults_keep_their_order_and_empty_parts_are_nothing() -> None:
    assert [fault.text for fault in parse_chaos(" kill:A@r1,, flip:B ,")] == ["kill:A@r1", "flip:B"]
    assert parse_chaos("") == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kil:CS", "'kil:CS': must be KIND:SITE with one of the kinds kill, hang"),
        ("kill", "must be KIND:SITE"),
        ("kill:", "write kill:SITE"),
        ("kill:C S", "write kill:SITE"),
        ("slow:HT", "write slow:SITEx5"),
        ("slow:HTx0.5", "factor 0.5 must be at least 1"),
        ("scale:HTx0", "factor 0 must be above 0"),
        ("impersonate:FG", "write impersonate:SITE->SITE"),
        ("flip:A->B", "write flip:SITE"),
        ("kill:A@foo", "@foo is not known; write @r3, @r3-, @r3-r8 or a stage: load, train, merge"),
        ("flip:A@merge", "flip takes no stage"),
        ("disk:A@train", "or a stage: checkpoint"),
        ("kill:A@r3@r4", "at most one stage and one round"),
        ("kill:A@load@r3", "@load goes without a round"),
        ("kill:A@r0", "count from 1"),
        ("kill:A@r5-r3", "is no round"),
        ("kill:A@r5r7", "is no round"),
        ("kill:A@r2, kill:A@r2", "A: the same fault stands there 2 times"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_is_allowed(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_chaos(text)
    assert words in str(raised.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"'kil:A'.*'slow:B'"):
        parse_chaos("kil:A, flip:C, slow:B")


@pytest.mark.parametrize(
    ("text", "rounds"), [("@r3", [3]), ("@r3-r4", [3, 4]), ("@r4-", [4, 5]), ("", [1, 2, 3, 4, 5])]
)
def test_a_fault_covers_its_rounds(text: str, rounds: list[int]) -> None:
    (fault,) = parse_chaos(f"kill:A{text}")
    assert [number for number in range(1, 6) if fault.covers(number)] == rounds


def test_only_breakdowns_of_a_single_round_happen_once() -> None:
    faults = parse_chaos("kill:A@r3, disk:A@r3, kill:A@r4-r5, raise:A, flip:A@r3, slow:Ax2@r3")
    assert [fault.text for fault in faults if fault.happens_once] == ["kill:A@r3", "disk:A@r3"]


def test_markers_of_different_faults_differ() -> None:
    faults = parse_chaos("kill:A@r3, kill:A@r4, kill:A@r3@merge, raise:A@r3, nan:A@r3")
    assert len({fault.marker for fault in faults}) == len(faults)


def test_faults_of_a_site_are_its_own() -> None:
    assert [fault.text for fault in faults_of("kill:A@r1, flip:B, nan:A@r2", "A")] == ["kill:A@r1", "nan:A@r2"]


def test_sites_that_are_not_there_are_named() -> None:
    with pytest.raises(ConfigError, match=r"chaos names \['X', 'Y'\], not among the sites of this federation: \['A'"):
        check_sites("kill:X, impersonate:A->Y, nan:B", ["A", "B"])


@pytest.mark.parametrize("text", ["nan:server", "labels:server@r2", "kill:server@merge", "raise:server@load"])
def test_what_a_server_cannot_do_is_refused_rather_than_never_happening(text: str) -> None:
    with pytest.raises(ConfigError, match=f"chaos '{text}' cannot happen: a server has no cases"):
        check_sites(text, ["A", "B"], server="server")


def test_a_server_may_break_down_only_where_there_is_one() -> None:
    check_sites("kill:server, raise:server@push, disk:server@r3, slow:serverx2, flip:server", ["A"], server="server")
    with pytest.raises(ConfigError, match="chaos names"):
        check_sites("kill:server", ["A"])


# --- in the configuration ------------------------------------------------------------------------


def test_configuration_names_the_key_and_what_is_allowed(tmp_path: Path) -> None:
    values = fake_config(tmp_path).model_dump(mode="json", by_alias=True)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="chaos: 'kil:A': must be KIND:SITE"):
        load_config(file, ["chaos=kil:A"])


def test_chaos_is_no_part_of_the_identity_so_a_resume_can_drop_it(tmp_path: Path) -> None:
    calm = fake_config(tmp_path)
    wild = Config.model_validate(calm.model_dump(by_alias=True) | {"chaos": "kill:A@r2"})
    assert wild.chaos == "kill:A@r2"
    assert wild.identity == calm.identity
