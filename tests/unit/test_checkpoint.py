import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from gcml_ray.config import OptimiserConfig
from gcml_ray.errors import CheckpointError, DamagedError
from gcml_ray.model import checkpoint
from gcml_ray.model.checkpoint import (
    SiteState,
    keep_as,
    load_model_file,
    load_round,
    read_tensors,
    round_file,
    save_model,
    save_round,
    saved_rounds,
)
from gcml_ray.model.learner import Learner
from gcml_ray.model.precision import Precision
from gcml_ray.model.weights import FlatModel

STATE = SiteState("A", 1, "id", best_round=1, best_dice=0.1 + 0.2, best_file="model_00001.safetensors")
OPTIMISERS: list[dict[str, Any]] = [
    {"name": "sgd"},
    {"name": "sgd", "momentum": 0.9},
    {"name": "adam", "amsgrad": True},
    {"name": "adamw"},
]


def make_learner(*, width: int = 2, **options: Any) -> Learner:
    torch.manual_seed(0)
    optimiser = OptimiserConfig(learning_rate=0.05, **({"name": "adamw"} | options))
    module = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
    return Learner(module, send_buffers=True, optimiser=optimiser, precision=Precision("cpu", "none"))


def train(learner: Learner, num_steps: int, *, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        output = learner.model.module(torch.randn(4, 3, generator=generator))
        learner.apply_gradients((output - 1).pow(3).abs().sum())


def moments(learner: Learner) -> dict[str, Tensor]:
    return dict(learner.optimiser.moments)


def restored(folder: Path, round_number: int = 1, **options: Any) -> Learner:
    learner = make_learner(**options)
    load_round(folder, learner, site="A", round_number=round_number, identity="id")
    return learner


# --- round trip ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIMISERS)
def test_a_round_comes_back_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    learner = make_learner(**options)
    train(learner, 3)
    save_round(tmp_path, learner, STATE)
    back = restored(tmp_path, **options)
    assert torch.equal(back.model.flat, learner.model.flat)
    assert back.model.counters()["1.num_batches_tracked"].item() == 3
    assert moments(back).keys() == moments(learner).keys()
    for key, value in moments(learner).items():
        assert torch.equal(moments(back)[key], value), key
        assert moments(back)[key].dtype == value.dtype, key


@pytest.mark.parametrize("options", OPTIMISERS)
def test_training_goes_on_after_a_restore_as_if_nothing_had_been(tmp_path: Path, options: dict[str, Any]) -> None:
    learner = make_learner(**options)
    train(learner, 3)
    save_round(tmp_path, learner, STATE)
    back = restored(tmp_path, **options)
    for each in (learner, back):
        train(each, 3, seed=1)
    assert torch.equal(back.model.flat, learner.model.flat)


def test_a_used_learner_goes_back_to_what_the_round_had(tmp_path: Path) -> None:
    """As when a site is one round ahead of the others."""
    learner = make_learner()
    save_round(tmp_path, learner, STATE)
    start = learner.model.flat.clone()
    train(learner, 3)
    load_round(tmp_path, learner, site="A", round_number=1, identity="id")
    assert torch.equal(learner.model.flat, start)
    assert moments(learner) == {}
    assert learner.model.counters()["1.num_batches_tracked"].item() == 0


def test_the_state_comes_back_to_the_last_digit(tmp_path: Path) -> None:
    save_round(tmp_path, make_learner(), STATE)
    assert load_round(tmp_path, make_learner(), site="A", round_number=1, identity="id") == STATE


def test_the_scaler_of_mixed_precision_comes_back(tmp_path: Path) -> None:
    learner, back = make_learner(), make_learner()
    for each in (learner, back):  # a scaler is switched off on a CPU; this one counts without a device
        each.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=True)
    learner.scaler.load_state_dict(learner.scaler.state_dict() | {"scale": 32.0, "_growth_tracker": 5})
    save_round(tmp_path, learner, STATE)
    load_round(tmp_path, back, site="A", round_number=1, identity="id")
    assert back.scaler.state_dict() == learner.scaler.state_dict()
    assert back.scaler.state_dict()["scale"] == 32.0


def test_weights_are_loaded_into_the_flat_vector_and_stay_its_views(tmp_path: Path) -> None:
    save_round(tmp_path, make_learner(), STATE)
    back = restored(tmp_path)
    back.model.flat.fill_(2.0)
    assert back.model.module.state_dict()["0.weight"].tolist() == [[2.0] * 3] * 2


# --- model files ---------------------------------------------------------------------------------


def test_a_model_file_has_the_networks_own_names_and_its_facts(tmp_path: Path) -> None:
    learner = make_learner()
    save_model(tmp_path / "m.safetensors", learner.model, facts={"site": "A", "round": "3"})
    with safe_open(tmp_path / "m.safetensors", framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
        assert handle.metadata().items() >= {"site": "A", "round": "3"}.items()
    plain = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    plain.load_state_dict(tensors)  # strict: every name and shape fits
    assert torch.equal(plain[0].weight, learner.model.module.state_dict()["0.weight"])


def test_a_model_file_comes_back_with_its_facts(tmp_path: Path) -> None:
    learner, other = make_learner(), make_learner()
    train(learner, 2)
    save_model(tmp_path / "m.safetensors", learner.model, facts={"round": "3"})
    assert load_model_file(tmp_path / "m.safetensors", other.model) == {"round": "3"}
    assert torch.equal(other.model.flat, learner.model.flat)
    assert other.model.counters()["1.num_batches_tracked"].item() == 2


# --- written whole or not at all -----------------------------------------------------------------


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make_learner()
    save_round(tmp_path, learner, STATE)
    before = round_file(tmp_path, 1).read_bytes()

    def half_written(tensors: object, path: Path, metadata: object) -> None:
        del tensors, metadata
        path.write_bytes(before[: len(before) // 2])
        raise OSError("no space left on device")

    train(learner, 1)
    monkeypatch.setattr(checkpoint, "save_file", half_written)
    with pytest.raises(CheckpointError, match=r"cannot be written .no space left.*make room"):
        save_round(tmp_path, learner, STATE)
    assert round_file(tmp_path, 1).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["round_00001.safetensors"], "the half file takes no room"


@pytest.mark.parametrize("where", ["tensors", "state"])
def test_a_flipped_bit_is_found(tmp_path: Path, where: str) -> None:
    """In the last tensor's bytes; and in the header, where it makes another round of it."""
    save_round(tmp_path, make_learner(), STATE)
    path = round_file(tmp_path, 1)
    content = path.read_bytes()
    if where == "tensors":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    else:
        told = rb"\"round_number\": 1"
        assert told in content
        path.write_bytes(content.replace(told, told[:-1] + b"3"))
    with pytest.raises(DamagedError, match="is damaged"):
        restored(tmp_path)


def test_a_file_of_an_older_version_has_no_checksum_and_is_read(tmp_path: Path) -> None:
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "old.safetensors", metadata={"site": "A"})
    tensors, facts = read_tensors(tmp_path / "old.safetensors")
    assert tensors["a"].tolist() == [1.0, 1.0]
    assert facts == {"site": "A"}


def test_nothing_is_left_beside_a_written_file(tmp_path: Path) -> None:
    save_round(tmp_path / "new" / "folder", make_learner(), STATE)
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["round_00001.safetensors"]


# --- what is kept --------------------------------------------------------------------------------


def test_three_rounds_and_the_models_they_name_are_kept(tmp_path: Path) -> None:
    """Best at round 1, then at 3; the end of the warm-up at 2. After round 5, rounds 3 to 5 name models 2 and 3.

    Three, as without a barrier a site's files may be two rounds ahead of the driver's: its last report may not be
    written down when the next round's checkpoint is.
    """
    learner = make_learner()
    state = replace(STATE, best_file="", best_dice=-1.0)
    for number in (1, 2, 3, 4, 5):
        name = f"model_{number:05d}.safetensors"
        save_model(tmp_path / name, learner.model, facts={})
        state = replace(state, round_number=number)
        if number in (1, 3):
            state = replace(state, best_file=name)
        if number == 2:
            state = replace(state, before_gossip_file=name)
        save_round(tmp_path, learner, state)
    assert saved_rounds(tmp_path) == [3, 4, 5]
    assert sorted(path.name for path in tmp_path.glob("model_*")) == [
        "model_00002.safetensors",
        "model_00003.safetensors",
    ]


def test_a_model_that_only_the_round_before_names_is_kept(tmp_path: Path) -> None:
    """A site may have to go back one round, and must find that round's best model."""
    learner = make_learner()
    for number in (1, 2):
        name = f"model_{number:05d}.safetensors"
        save_model(tmp_path / name, learner.model, facts={})
        save_round(tmp_path, learner, replace(STATE, round_number=number, best_file=name))
    assert len(list(tmp_path.glob("model_*"))) == 2


def test_rounds_of_an_abandoned_course_are_removed(tmp_path: Path) -> None:
    """Started anew at round 1 where rounds 8 and 9 still lie: round 1 stays, or nothing could be resumed."""
    for number in (8, 9, 1):
        save_round(tmp_path, make_learner(), replace(STATE, round_number=number))
    assert saved_rounds(tmp_path) == [1]


def test_an_unreadable_older_round_is_reported_and_does_not_stop_the_writing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_round(tmp_path, make_learner(), STATE)
    round_file(tmp_path, 1).write_bytes(b"broken")
    save_round(tmp_path, make_learner(), replace(STATE, round_number=2))
    assert saved_rounds(tmp_path) == [1, 2]
    assert "round_00001.safetensors cannot be read" in caplog.text


def test_saved_rounds_are_in_the_order_of_numbers_and_nothing_else_counts(tmp_path: Path) -> None:
    for name in ("round_100000.safetensors", "round_00009.safetensors", "round_00010.safetensors"):
        (tmp_path / name).touch()
    for name in ("round_00011.tmp", "round_x.safetensors", "model_00012.safetensors"):
        (tmp_path / name).touch()
    assert saved_rounds(tmp_path) == [9, 10, 100000]


def test_a_missing_folder_has_no_rounds(tmp_path: Path) -> None:
    assert saved_rounds(tmp_path / "nowhere") == []


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "identity", "words"),
    [
        ("B", "id", "belongs to site A, not to B: put B's own file back there"),
        ("A", "other", "belongs to configuration id, not to other: resume with the configuration that"),
    ],
)
def test_a_checkpoint_of_another_site_or_configuration_is_refused(
    tmp_path: Path, site: str, identity: str, words: str
) -> None:
    save_round(tmp_path, make_learner(), STATE)
    with pytest.raises(CheckpointError, match=words):
        load_round(tmp_path, make_learner(), site=site, round_number=1, identity=identity)


def test_a_checkpoint_of_another_architecture_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    save_round(tmp_path, make_learner(), STATE)
    other = make_learner(width=5)
    start = other.model.flat.clone()
    with pytest.raises(CheckpointError, match=r"holds another network: 0\.bias, 0\.weight.* differ; check network"):
        load_round(tmp_path, other, site="A", round_number=1, identity="id")
    assert torch.equal(other.model.flat, start)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"round_00001\.safetensors does not exist"):
        restored(tmp_path)


@pytest.mark.parametrize("damage", ["half", "header", "empty", "text"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    save_round(tmp_path, make_learner(), STATE)
    whole = round_file(tmp_path, 1).read_bytes()
    parts = {"half": whole[: len(whole) // 2], "header": b"\xff" * 8 + whole[8:], "empty": b"", "text": b"not a model"}
    round_file(tmp_path, 1).write_bytes(parts[damage])
    with pytest.raises(CheckpointError, match=r"round_00001\.safetensors cannot be read \(.+\)$"):
        restored(tmp_path)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"scaler": "{}"},
        {"state": "no json", "scaler": "{}"},
        {"state": json.dumps({"site": "A", "surprise": 1}), "scaler": "{}"},
    ],
)
def test_a_file_without_a_sites_state_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"x": np.zeros(1, dtype=np.float32)}, round_file(tmp_path, 1), metadata=metadata)
    with pytest.raises(CheckpointError, match="is not a round's checkpoint of this version"):
        restored(tmp_path)


def test_a_model_file_of_another_architecture_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "m.safetensors", FlatModel(nn.Linear(3, 2), send_buffers=True), facts={})
    with pytest.raises(CheckpointError, match="holds another network"):
        load_model_file(tmp_path / "m.safetensors", make_learner().model)


def test_a_kept_copy_outlives_the_file_it_was_made_of(tmp_path: Path) -> None:
    learner, back = make_learner(), make_learner()
    train(learner, 2)
    save_model(tmp_path / "model_00001.safetensors", learner.model, facts={"round": "1"})
    keep_as(tmp_path / "model_00001.safetensors", tmp_path / "personalised.safetensors")
    save_round(tmp_path, learner, replace(STATE, round_number=2, best_file=""))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["personalised.safetensors", "round_00002.safetensors"]
    assert load_model_file(tmp_path / "personalised.safetensors", back.model) == {"round": "1"}
    assert torch.equal(back.model.flat, learner.model.flat)
