"""Malformed checkpoints: a CheckpointError that names the file, or exactly the weights and state that were saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from torch import nn

from gcml_ray.config import OptimiserConfig
from gcml_ray.errors import CheckpointError, ConfigError
from gcml_ray.model.checkpoint import (
    SiteState,
    load_model_file,
    load_round,
    read_tensors,
    round_file,
    save_model,
    save_round,
)
from gcml_ray.model.learner import Learner
from gcml_ray.model.precision import Precision
from gcml_ray.model.start_weights import load_start_weights
from gcml_ray.records import PERSONALISED
from gcml_ray.training.site_files import SiteFiles
from tests.fakes import fake_config
from tests.faults.fuzzing import ODD_TEXT, inputs, outcome, spoilt_bytes, spoilt_values

STATE = SiteState("A", 3, "id", best_round=2, best_dice=0.25, best_file="model_00002.safetensors", suspicion={"B": 1})


def make_learner() -> Learner:
    """A few weights, a counter and moments."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimiser = OptimiserConfig(learning_rate=0.05, name="adamw")
    return Learner(module, send_buffers=True, optimiser=optimiser, precision=Precision("cpu", "none"))


def trained() -> Learner:
    learner = make_learner()
    for _ in range(2):
        learner.apply_gradients((learner.model.module(torch.randn(4, 3)) - 1).pow(2).sum())
    return learner


def content_of(learner: Learner) -> list[bytes]:
    """All of a learner, to the last bit."""
    moments = learner.optimiser.moments
    tensors = [learner.model.flat, *learner.model.counters().values(), *(moments[key] for key in sorted(moments))]
    return [tensor.detach().numpy().tobytes() for tensor in tensors]


class Saved:
    """A checkpoint and a model as they should be, and a learner to read others into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        learner = trained()
        self.expected = content_of(learner)
        save_round(folder, learner, STATE)
        self.path = round_file(folder, 3)
        self.round = self.path.read_bytes()
        self.model_path = folder / "model_00002.safetensors"
        save_model(self.model_path, learner.model, facts={"site": "A", "round": "2"})
        self.model = self.model_path.read_bytes()
        self.reader = make_learner()

    def check_round(self, content: bytes) -> None:
        """The property; whatever else the reader raises fails the test."""
        self.path.write_bytes(content)
        state = outcome(self.load, self.path, CheckpointError)
        if not isinstance(state, CheckpointError):
            assert state == STATE
            assert content_of(self.reader) == self.expected

    def load(self) -> SiteState:
        """Reads the checkpoint."""
        return load_round(self.folder, self.reader, site="A", round_number=3, identity="id")

    def check_model(self, content: bytes) -> None:
        """The same of a model to take away."""
        self.model_path.write_bytes(content)
        facts = outcome(lambda: load_model_file(self.model_path, self.reader.model), self.model_path, CheckpointError)
        if not isinstance(facts, CheckpointError):
            assert (facts["site"], facts["round"]) == ("A", "2")
            assert content_of(self.reader)[:2] == self.expected[:2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """One folder for all inputs of this file."""
    return Saved(tmp_path_factory.mktemp("fuzz"))


REFERENCE: list[bytes] = []  # the two files, made once; hypothesis draws before a fixture is there


def files() -> list[bytes]:
    if not REFERENCE:
        import tempfile  # noqa: PLC0415 - only here

        with tempfile.TemporaryDirectory() as folder:
            made = Saved(Path(folder))
        REFERENCE.extend([made.round, made.model])
    return REFERENCE


@inputs(0.5)
@given(st.deferred(lambda: spoilt_bytes(files()[0])))
def test_damaged_round(saved: Saved, content: bytes) -> None:
    saved.check_round(content)


@inputs(0.2)
@given(st.deferred(lambda: spoilt_bytes(files()[1])))
def test_damaged_model(saved: Saved, content: bytes) -> None:
    saved.check_model(content)


@st.composite
def any_header(draw: st.DrawFn) -> bytes:
    """A file of the format's own form, with a header that says anything, and some bytes."""
    shape = st.lists(st.one_of(st.integers(-1, 4), ODD_TEXT), max_size=3)
    kind = st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "U8", "x", 3])
    offsets = st.lists(st.integers(-4, 300), max_size=3)
    entry = st.fixed_dictionaries({"dtype": kind, "shape": shape, "data_offsets": offsets})
    header: dict[str, Any] = draw(st.dictionaries(ODD_TEXT, entry, max_size=3))
    header |= draw(st.dictionaries(st.just("__metadata__"), st.dictionaries(ODD_TEXT, ODD_TEXT, max_size=3)))
    text = json.dumps(header).encode()
    size = draw(st.sampled_from([len(text), len(text), len(text), 0, 2**40, 2**64 - 1]))
    return size.to_bytes(8, "little") + text + draw(st.binary(max_size=300))


@inputs(0.15)
@given(any_header())
def test_any_header(saved: Saved, content: bytes) -> None:
    saved.check_round(content)


@inputs(0.15)
@given(st.deferred(lambda: spoilt_values(json.loads(json.dumps(STATE.__dict__)))))
def test_state_with_wrong_values_in_a_file_without_checksum(saved: Saved, content: Any) -> None:
    """As an older version wrote it: what is read has its types, its round and no file outside the folder."""
    saved.path.write_bytes(saved.round)
    tensors, metadata = read_tensors(saved.path)
    save_file(tensors, saved.path, metadata=metadata | {"state": json.dumps(content)})
    state = outcome(saved.load, saved.path, CheckpointError)
    if isinstance(state, CheckpointError):
        return
    assert (state.site, state.round_number, state.identity) == ("A", 3, "id")
    assert all(type(getattr(state, name)) is type(value) for name, value in STATE.__dict__.items() if value is not None)
    assert all("/" not in name for name in state.model_files)


# --- exactly -------------------------------------------------------------------------------------


def test_every_single_flipped_bit_of_the_weights_is_noticed(saved: Saved) -> None:
    """8 bits of each byte behind the header."""
    start = 8 + int.from_bytes(saved.round[:8], "little")
    assert len(saved.round) - start > 100
    for at in range(start, len(saved.round)):
        content = bytearray(saved.round)
        content[at] ^= 1 << at % 8
        saved.path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is damaged: its bytes are not those that were written"):
            saved.load()


def rewritten(saved: Saved, change: Callable[[dict[str, Any], dict[str, str]], None]) -> None:
    """The checkpoint as it would be had something else been saved."""
    saved.path.write_bytes(saved.round)
    tensors, metadata = read_tensors(saved.path)
    change(tensors, metadata)
    save_file(tensors, saved.path, metadata=metadata)


CHANGES: dict[str, Callable[[dict[str, Any], dict[str, str]], None]] = {
    "holds another optimiser's state: exp_avg": lambda tensors, _: tensors.update(
        {"optimiser.exp_avg": np.zeros(3, dtype=np.float32)}
    ),
    "0.weight is float64 instead of float32": lambda tensors, _: tensors.update(
        {"model.0.weight": tensors["model.0.weight"].astype(np.float64)}
    ),
    "not a round's checkpoint": lambda _, metadata: metadata.update(state="[" * 100_000),
    "model files .*are not in its folder": lambda _, metadata: metadata.update(
        state=json.dumps(STATE.__dict__ | {"best_file": "../../B/model_00002.safetensors"})
    ),
}


@pytest.mark.parametrize("words", CHANGES)
def test_content_that_does_not_fit_is_refused(saved: Saved, words: str) -> None:
    rewritten(saved, CHANGES[words])
    with pytest.raises(CheckpointError, match=words):
        saved.load()


def test_round_under_another_rounds_name_is_refused(saved: Saved, tmp_path: Path) -> None:
    round_file(tmp_path, 5).write_bytes(saved.round)
    with pytest.raises(CheckpointError, match=r"round_00005\.safetensors is of round 3: it was copied or renamed"):
        load_round(tmp_path, saved.reader, site="A", round_number=5, identity="id")


@pytest.mark.parametrize("facts", [{"site": "B", "round": "2"}, {"site": "A", "round": "1"}, {"site": "A"}, {}])
def test_model_of_another_site_or_round_is_refused(tmp_path: Path, facts: dict[str, str]) -> None:
    """Two files swapped by hand: both are whole, and fit the network."""
    learner = make_learner()
    files = SiteFiles(fake_config(tmp_path / "run"), "A", tmp_path)
    files.state = replace(files.state, best_file="model_00002.safetensors")
    save_model(tmp_path / "model_00002.safetensors", learner.model, facts={"site": "A", "round": "2"})
    assert files.load(PERSONALISED, learner.model) == 2
    save_model(tmp_path / "model_00002.safetensors", learner.model, facts=facts)
    with pytest.raises(CheckpointError, match="it was copied or renamed"):
        files.load(PERSONALISED, learner.model)


def test_model_to_start_from_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    """It is read by another reader, which takes models of other programs too."""
    path, module = tmp_path / "model.safetensors", make_learner().model.module
    save_model(path, make_learner().model, facts={"site": "A", "round": "2"})
    config = fake_config(tmp_path / "run").data
    load_start_weights(module, str(path), config)
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"network\.start_from: .*model\.safetensors is damaged"):
        load_start_weights(module, str(path), config)


def test_folder_in_place_of_a_file_is_named(saved: Saved, tmp_path: Path) -> None:
    round_file(tmp_path, 3).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="is a folder, not a file"):
        load_round(tmp_path, saved.reader, site="A", round_number=3, identity="id")
