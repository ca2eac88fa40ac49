"""Every method from configuration to test scores, with the real trainer in one process, on tiny pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from gcml_ray.config import Config
from gcml_ray.console.summary import run_table
from gcml_ray.data.datalist import read_datalist
from gcml_ray.data.pooling import origin, pooled_cases
from gcml_ray.errors import ConfigError, SiteError
from gcml_ray.methods import METHODS
from gcml_ray.report.run import write_plots
from tests.makers import make_config
from tests.runs import RecordingListener, run_real
from tests.trainer_runs import make_trainer

RING = {"name": "ring"}
KEYS: dict[str, dict[str, Any]] = {  # what each method needs beside its name
    "gossip_avg": {"topology": RING},
    "gml": {"topology": RING},
    "gcml": {"topology": RING},
    "defkt": {"topology": RING},
    "dpsgd": {"topology": RING},
    "proxyfl": {"topology": {"name": "exponential"}, "alpha": 0.5, "beta": 0.5},
    "fedprox": {"mu": 0.1},
    "ditto": {"lambda": 0.1},
}
NETWORK = {  # batch normalisation and dropout: whatever could go wrong with buffers and random numbers
    "name": "unet",
    "options": {"channels": [4, 8], "strides": [2], "num_res_units": 1, "norm": "BATCH", "dropout": 0.2},
}
ROUNDS = {"rounds": 4, "local_steps": 2, "warmup_rounds": 1, "cooldown_rounds": 1}
NUM_EXCHANGES = 2  # rounds 2 and 3


def config_of(folder: Path, name: str, **sections: Any) -> Config:
    method = {"name": name} | KEYS.get(name, {})
    sections = {"network": NETWORK, "federation": ROUNDS} | sections
    return make_config(folder, spatial_dims=2, method=method, **sections)


def num_pushes(name: str, num_sites: int) -> int:
    """What a round of exchange takes by the rule of each method; the ring of two has one push each way."""
    if name in ("local", "pooled"):
        return 0
    return 2 * num_sites if name in ("fedavg", "fedprox", "fedbn", "ditto") else num_sites


@pytest.mark.parametrize("name", METHODS)
def test_method_runs_from_configuration_to_test_scores_with_the_traffic_of_its_rule(tmp_path: Path, name: str) -> None:
    run = run_real(config_of(tmp_path, name))
    assert (run.summary.status, run.failures()) == ("finished", [])
    models = {"personalised", "before_gossip"} | ({"shared"} if name in ("ditto", "proxyfl") else set())
    assert {(score.site, score.model) for score in run.folder.cases()} == {(s, m) for s in "AB" for m in models}
    records = run.folder.rounds()
    assert all(report.num_steps == 2 and report.validation_dice is not None for r in records for report in r.trained)
    pushes = run.folder.transfers()
    push_bytes = run.summary.infos[0].push_bytes
    assert all(push.accepted for push in pushes)
    assert sum(push.size_bytes for push in pushes) == NUM_EXCHANGES * num_pushes(name, 2) * push_bytes
    assert run_table(run.summary.evaluations, unit="mm").row_count == 3  # A, B and their mean
    assert {path.name for path in write_plots(run.folder)} >= {"test_dice.png", "gossip_graph.png"}


def test_fedbn_sends_less_than_fedavg(tmp_path: Path) -> None:
    """What is left out: the weights and biases, running means and variances of all norms."""
    fedavg, fedbn = (make_trainer(config_of(tmp_path / name, name, data={}), site="A") for name in ("fedavg", "fedbn"))
    norms = [layer for layer in fedavg.local.model.module.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert norms
    num_left_out = sum(4 * layer.num_features for layer in norms)
    assert fedavg.local.model.num_sent - fedbn.local.model.num_sent == num_left_out


def test_fedbn_refuses_a_network_that_has_no_norm_to_keep(tmp_path: Path) -> None:
    network = {"name": "unet", "options": {"channels": [4, 8], "strides": [2]}}
    with pytest.raises(ConfigError, match="it would be fedavg"):
        make_trainer(config_of(tmp_path, "fedbn", network=network))


def test_plain_fedavg_scores_the_aggregated_model(tmp_path: Path) -> None:
    """Without a cool-down both sites end with the same weights, the server's."""
    rounds = ROUNDS | {"warmup_rounds": 0, "cooldown_rounds": 0}
    run = run_real(config_of(tmp_path, "fedavg", federation=rounds))
    sites = [load_file(run.folder.path / f"checkpoints/{site}/round_00004.safetensors") for site in "AB"]
    for key, values in sites[0].items():
        if key.startswith("model.") and "num_batches" not in key:
            np.testing.assert_array_equal(sites[1][key], values, err_msg=key)
    server = load_file(run.folder.path / "checkpoints/server/round_00004.safetensors")["weights"]
    sent = np.concatenate([v.ravel() for k, v in sites[0].items() if k.startswith("model.") and "num_b" not in k])
    np.testing.assert_array_equal(np.sort(server), np.sort(sent))


@pytest.mark.parametrize("stop_after", [1, 2, 3])
@pytest.mark.parametrize("name", ["fedavg", "ditto", "proxyfl"])
def test_resume_is_exact_to_the_bit(tmp_path: Path, name: str, stop_after: int) -> None:
    whole = run_real(config_of(tmp_path / "whole", name))
    config = config_of(tmp_path / "broken", name)
    run_real(config, listener=RecordingListener(stop_after=stop_after))
    resumed = run_real(config, resume=True)
    for site in "AB":
        file = f"checkpoints/{site}/round_00004.safetensors"
        mine, other = load_file(whole.folder.path / file), load_file(resumed.folder.path / file)
        assert any(key.startswith("personal.") for key in mine) == (name != "fedavg")
        assert mine.keys() == other.keys()
        for key, values in mine.items():
            np.testing.assert_array_equal(other[key], values, err_msg=f"{site} {key}")
    assert resumed.folder.cases() == whole.folder.cases()


def test_dittos_models_start_alike_and_proxyfls_do_not(tmp_path: Path) -> None:
    ditto, proxyfl = (make_trainer(config_of(tmp_path / name, name)) for name in ("ditto", "proxyfl"))
    assert ditto.personal is not None
    assert proxyfl.personal is not None
    assert torch.equal(ditto.local.model.flat, ditto.personal.model.flat)
    assert not torch.equal(proxyfl.local.model.flat, proxyfl.personal.model.flat)


def test_proxyfl_takes_private_networks_of_different_kinds(tmp_path: Path) -> None:
    other = {"name": "unet", "options": {"channels": [4, 4], "strides": [2], "num_res_units": 0}}
    run = run_real(config_of(tmp_path, "proxyfl", site_networks={"B": other}))
    assert (run.summary.status, run.failures()) == ("finished", [])
    assert all(push.accepted for push in run.folder.transfers())


# --- pooled --------------------------------------------------------------------------------------


def test_pooled_training_has_the_cases_of_all_sites_in_their_own_splits(tmp_path: Path) -> None:
    """A has 3 and B 4 training cases, each one to validate and one to test."""
    config = config_of(tmp_path, "pooled")
    trainer = make_trainer(config, site="pooled")
    assert [trainer.data.num_cases(split) for split in ("train", "validation", "test")] == [7, 2, 2]
    cases = pooled_cases(read_datalist(config.data.datalist), ["A", "B"], config)
    assert origin("pooled", cases[0].name) == ("A", "c0")
    assert origin("A", "x:y") == ("A", "x:y")


def test_pooled_validation_is_the_mean_over_sites(tmp_path: Path) -> None:
    """Site B's two validation cases count as much as the one of A."""
    config = config_of(tmp_path, "pooled")
    trainer = make_trainer(config, site="pooled")
    cases = {origin("pooled", sample.case)[0]: sample for sample in trainer.data.split("validation")}
    trainer.data._samples["validation"] = (cases["A"], cases["B"], cases["B"])
    together = trainer.evaluator.validation_dice(trainer.local)
    alone = []
    for site in "AB":
        trainer.data._samples["validation"] = (cases[site],)
        alone.append(trainer.evaluator.validation_dice(trainer.local))
    assert together == pytest.approx(np.mean(alone))


def test_pooled_takes_as_many_steps_as_one_site(tmp_path: Path) -> None:
    run = run_real(config_of(tmp_path, "pooled"))
    assert [[report.site for report in record.trained] for record in run.folder.rounds()] == [["pooled"]] * 4
    assert sum(report.num_steps for report in run.listener.trained) == 4 * 2


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["server", "pooled"])
def test_reserved_names_are_no_sites(tmp_path: Path, name: str) -> None:
    config = config_of(tmp_path, "fedavg")
    datalist = Path(config.data.datalist)
    datalist.write_text(datalist.read_text().replace('"site": "B"', f'"site": "{name}"'))
    with pytest.raises(ConfigError, match=f"site name '{name}' is reserved"):
        run_real(config)


@pytest.mark.parametrize("name", ["fedavg", "ditto", "dpsgd", "defkt", "pooled"])
def test_methods_that_mix_weights_refuse_different_networks(tmp_path: Path, name: str) -> None:
    other = {"name": "unet", "options": {"channels": [4, 4], "strides": [2]}}
    with pytest.raises(ValueError, match="site_networks gives sites different networks"):
        config_of(tmp_path, name, site_networks={"B": other})


def test_pooled_cases_cannot_stay_on_their_nodes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="promises that none leaves its node"):
        config_of(tmp_path, "pooled", resources={"pool": "ray", "placement": "label"})


def test_servers_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, "fedavg")
    run_real(config, listener=RecordingListener(stop_after=2))
    changed = config.model_copy(update={"optimiser": config.optimiser.model_copy(update={"learning_rate": 0.5})})
    with pytest.raises(SiteError, match="belongs to another configuration"):
        run_real(changed, resume=True)
