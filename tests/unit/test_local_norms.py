"""Normalisation layers that stay at their site, for methods without a server (``method.share_norms: false``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from gcml_ray.config import Config
from gcml_ray.errors import ConfigError
from gcml_ray.model.weights import FlatModel, norm_parameters
from gcml_ray.training.trainer import SiteTrainer
from tests.makers import make_config
from tests.runs import run_real
from tests.trainer_runs import RING, TROUBLESOME, make_trainer, push_from_b, run, weights

LOCAL_NORMS = {"topology": RING, "buffers": "keep", "share_norms": False}
AFFINE = {
    "name": "unet",
    "options": {"channels": [4, 8], "strides": [2], "num_res_units": 1, "norm": ["INSTANCE", {"affine": True}]},
}
METHODS: dict[str, dict[str, Any]] = {
    "gossip_avg": {"name": "gossip_avg"},
    "gcml": {"name": "gcml", "merge": "select_best", "merge_first": "size_weighted"},
    "gml": {"name": "gml"},
    "defkt": {"name": "defkt"},
    "dpsgd": {"name": "dpsgd"},
}


def config_of(folder: Path, method: str = "gossip_avg", **sections: Any) -> Config:
    sections = {"network": AFFINE, "method": METHODS[method] | LOCAL_NORMS} | sections
    return make_config(folder, spatial_dims=2, **sections)


def norms_of(trainer: SiteTrainer) -> dict[str, Tensor]:
    module = trainer.local.model.module
    kept = norm_parameters(module)
    return {name: value.detach().clone() for name, value in module.named_parameters() if name in kept}


def test_a_push_lacks_two_numbers_a_channel_of_each_affine_norm(tmp_path: Path) -> None:
    trainer = make_trainer(config_of(tmp_path))
    layers = [layer for layer in trainer.local.model.module.modules() if isinstance(layer, nn.InstanceNorm2d)]
    assert layers
    num_kept = sum(2 * layer.num_features for layer in layers)
    assert trainer.local.model.num_sent == trainer.local.model.num_parameters - num_kept
    _, buffer = trainer.export("run", 1)
    assert buffer.shape == (trainer.local.model.num_sent,)


def test_norms_that_share_a_weight_are_kept_once() -> None:
    module = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    module[2].weight = module[1].weight
    model = FlatModel(module, send_buffers=False, keep_norms=True)
    assert model.num_sent == 3 + 3
    assert model.num_parameters == model.num_sent + 3 + 2 * 3


def test_mixing_leaves_local_norms_alone() -> None:
    """Half of 7 and half of 1 is 4 for the convolution, the norm of (1, 1) stays."""
    module = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1))
    model = FlatModel(module, send_buffers=False, keep_norms=True)
    model.flat.fill_(1.0)
    model.mix(torch.full((2,), 7.0), own_share=0.5)
    values = {name: value.flatten().tolist() for name, value in module.named_parameters()}
    assert values == {"0.weight": [1.0], "0.bias": [1.0], "1.weight": [4.0], "1.bias": [4.0]}


def test_an_incoming_model_has_the_receiver_s_norms(tmp_path: Path) -> None:
    trainer = make_trainer(config_of(tmp_path, "gcml"))
    run(trainer, [1])
    (message,) = trainer.exchange.incoming([push_from_b(trainer, 2)], own_round=1)
    peer = trainer.exchange.open_incoming(message).model
    assert torch.equal(peer.flat[: peer.num_sent], message.weights)
    assert torch.equal(peer.flat[peer.num_sent :], trainer.local.model.flat[peer.num_sent :])
    named = dict(peer.module.named_parameters())
    assert all(torch.equal(named[name], value) for name, value in norms_of(trainer).items())


@pytest.mark.parametrize("method", METHODS)
def test_sites_end_with_norms_of_their_own_and_resume_to_the_bit(tmp_path: Path, method: str) -> None:
    config = config_of(tmp_path, method, network=TROUBLESOME)
    whole = make_trainer(config, folder=tmp_path / "whole")
    before = norms_of(whole)
    run(whole, [1, 2, 3])
    assert all(not torch.equal(value, before[name]) for name, value in norms_of(whole).items()), "they are trained"
    run(make_trainer(config, folder=tmp_path / "stopped"), [1, 2])
    resumed = make_trainer(config, folder=tmp_path / "stopped", resume_round=2)
    run(resumed, [3])
    assert torch.equal(weights(resumed), weights(whole))


def test_a_federation_runs_with_local_norms(tmp_path: Path) -> None:
    """The norms of A and B go different ways, and every push is smaller."""
    config = config_of(tmp_path, "gcml", federation={"rounds": 3, "warmup_rounds": 0})
    done = run_real(config)
    assert (done.summary.status, done.failures()) == ("finished", [])
    assert all(push.accepted for push in done.folder.transfers())
    model = make_trainer(config, folder=tmp_path / "other").local.model
    assert {info.push_bytes for info in done.summary.infos} == {4 * model.num_sent}
    a, b = (load_file(done.folder.path / f"checkpoints/{site}/round_00003.safetensors") for site in "AB")
    for name in norm_parameters(model.module):
        assert not np.array_equal(a[f"model.{name}"], b[f"model.{name}"]), name


# --- the configuration -------------------------------------------------------------------------------


def test_sharing_them_is_the_default_and_changes_no_identity(tmp_path: Path) -> None:
    plain = make_config(tmp_path, method={"name": "gossip_avg", "topology": RING})
    shared = make_config(tmp_path, method={"name": "gossip_avg", "topology": RING, "share_norms": True})
    assert plain.identity == shared.identity != config_of(tmp_path).identity


def test_a_saved_configuration_is_accepted_again(tmp_path: Path) -> None:
    config = config_of(tmp_path, "gcml")
    assert Config.model_validate(config.model_dump(mode="json", by_alias=True)) == config


def test_statistics_cannot_travel_where_norms_stay(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="statistics too: set buffers: keep"):
        make_config(tmp_path, method={"name": "gossip_avg"} | LOCAL_NORMS | {"buffers": "send"})


def test_a_network_without_norm_weights_is_refused(tmp_path: Path) -> None:
    network = {"name": "unet", "options": {"channels": [4, 8], "strides": [2]}}
    with pytest.raises(ConfigError, match="it would be the same as with share_norms: true"):
        make_trainer(config_of(tmp_path, network=network))


def test_different_networks_are_refused(tmp_path: Path) -> None:
    """An incoming model of another kind cannot have the receiver's norms."""
    other = {"name": "unet", "options": {"channels": [4, 4], "strides": [2]}}
    with pytest.raises(ValueError, match="leave share_norms true"):
        config_of(tmp_path, "gml", site_networks={"B": other})
