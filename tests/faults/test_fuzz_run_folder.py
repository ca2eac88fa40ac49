"""Malformed files of a run folder: a CheckpointError that names the file, or records whose fields have their types."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from gcml_ray.errors import CheckpointError
from gcml_ray.files.record_json import to_json
from gcml_ray.files.run_folder import RunFolder, RunState
from gcml_ray.records import CaseScore, Judgement, RoundRecord, to_plain
from tests.faults.fuzzing import inputs, outcome, spoilt_bytes, spoilt_values
from tests.made_up_run import made_up_round

SITES = ("CS", "DU")
ROUNDS = tuple(made_up_round(number, SITES) for number in (11, 12, 13))
JUDGED = dataclasses.replace(ROUNDS[0].trained[0], judged=(Judgement("DU", False, "norm", 4.0, None, 0.1, 0.2),))
ROUNDS = (dataclasses.replace(ROUNDS[0], trained=(JUDGED, *ROUNDS[0].trained[1:])), *ROUNDS[1:])
LINES = "".join(to_json(record) + "\n" for record in ROUNDS).encode()
STATE = RunState(13, "stopped", SITES, {"CS": 13, "DU": 12}, {"HT": "died"})
SCORES = (
    CaseScore("CS", "c1", "test", "personalised", "lesion, left", 0.5, 2.0, 0.9),
    CaseScore("DU", 'c"2', "test", "before_gossip", "lesion", 1.0, math.nan, 0.0),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """One folder for all inputs of this file."""
    run = RunFolder(tmp_path_factory.mktemp("fuzz"))
    run.write_cases(SCORES)
    return run


def has_its_type(kind: Any, value: Any) -> bool:
    """Whether a value is what its annotation says, all the way down."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return type(value) is kind and all(has_its_type(hints[name], getattr(value, name)) for name in hints)
    if origin is tuple:
        return type(value) is tuple and all(has_its_type(arguments[0], each) for each in value)
    if origin is dict:
        return type(value) is dict and all(has_its_type(arguments[1], each) for each in value.values())
    if origin in (types.UnionType, typing.Union):
        return any(has_its_type(argument, value) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    return type(value) is kind


def read(path: Path, content: bytes, reader: Callable[[], Any]) -> Any:
    """What a reader makes of a file; None where it refuses it."""
    path.write_bytes(content)
    made = outcome(reader, path, CheckpointError)
    return None if isinstance(made, CheckpointError) else made


def check_rounds(folder: RunFolder, content: bytes) -> None:
    """What was written whole is read, or refused; only the end of the file may be missing."""
    rounds = read(folder.rounds_file, content, folder.rounds)
    if rounds is None:
        return
    assert all(has_its_type(RoundRecord, record) for record in rounds)
    assert content.count(b"\n") <= len(rounds) <= content.count(b"\n") + 1
    numbers = [record.plan.round_number for record in rounds]
    assert numbers == sorted(set(numbers))
    folder.rounds_file.write_text("".join(to_json(record) + "\n" for record in rounds), encoding="utf-8")
    assert repr(folder.rounds()) == repr(rounds)  # NaN is not equal to itself


@inputs(0.2)
@given(spoilt_bytes(LINES))
def test_damaged_rounds(folder: RunFolder, content: bytes) -> None:
    check_rounds(folder, content)


@inputs(0.4)
@given(spoilt_values([to_plain(record) for record in ROUNDS]))
def test_rounds_with_wrong_values(folder: RunFolder, content: Any) -> None:
    check_rounds(folder, "".join(json.dumps(line) + "\n" for line in content).encode())


@inputs(0.1)
@given(spoilt_bytes(to_json(STATE).encode()))
def test_damaged_state(folder: RunFolder, content: bytes) -> None:
    assert has_its_type(RunState | None, read(folder.state_file, content, folder.read_state))


@inputs(0.1)
@given(spoilt_values(to_plain(STATE)))
def test_state_with_wrong_values(folder: RunFolder, content: Any) -> None:
    assert has_its_type(RunState | None, read(folder.state_file, json.dumps(content).encode(), folder.read_state))


@inputs(0.2)
@given(
    spoilt_bytes(b"site,case,split,model,class_name,dice,hd95,surface_dice\n" * 1 + b"A,c,test,m,x,0.5,2.0,0.9\n" * 2)
)
def test_damaged_scores(folder: RunFolder, content: bytes) -> None:
    scores = read(folder.cases_file, content, folder.cases)
    for score in scores or ():
        assert has_its_type(CaseScore, score)
        assert math.isnan(score.dice) or 0 <= score.dice < 1.001


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        to_json(ROUNDS[1]).replace('"round_number": 12', '"round_number": ' + "9" * 5000),
        to_json(ROUNDS[1]).replace('"seconds": 12.5', '"seconds": 1' + "0" * 400),
        to_json(ROUNDS[1]).replace('"seconds": 12.5', '"seconds": NaN'),
        to_json(ROUNDS[1]).replace('"seconds": 12.5', '"seconds": true'),
        to_json(ROUNDS[1]).replace('"phase": "exchange"', '"phase": "war"'),
        to_json(ROUNDS[1]).replace('"sites": ["CS", "DU"]', '"sites": "CS"'),
        to_json(ROUNDS[0]),
        "",
    ],
    ids=str.__len__,
)
def test_line_that_is_no_round_is_refused_also_at_the_end(folder: RunFolder, line: str) -> None:
    """A newline behind it says that it was written whole: no crash has torn it."""
    for lines in ([ROUNDS[0], line, ROUNDS[2]], [ROUNDS[0], line]):
        text = "".join((each if isinstance(each, str) else to_json(each)) + "\n" for each in lines)
        folder.rounds_file.write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"rounds\.jsonl, line 2 cannot be read"):
            folder.rounds()


def test_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for path, reader in (
        (run.rounds_file, run.rounds), (run.state_file, run.read_state), (run.cases_file, run.cases)
    ):  # fmt: skip
        path.mkdir()
        with pytest.raises(CheckpointError, match=path.name):
            reader()
