"""Models of peers that are kept, the ensemble that a site forms with them, and its way into tables and predictions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from gcml_ray.config import Config, OptimiserConfig
from gcml_ray.data.datalist import read_datalist
from gcml_ray.errors import CheckpointError, ConfigError
from gcml_ray.methods.rounds import IncomingModel
from gcml_ray.model.checkpoint import load_model_file
from gcml_ray.model.learner import Learner
from gcml_ray.model.precision import Precision
from gcml_ray.prediction.inference import predict_labels
from gcml_ray.prediction.load import load_model
from gcml_ray.records import ENSEMBLE, PERSONALISED
from gcml_ray.training.ensemble import Ensemble, EnsembleMember
from gcml_ray.training.trainer import SiteTrainer
from tests.makers import make_config
from tests.runs import run_real
from tests.trainer_runs import RING, TROUBLESOME, make_trainer, order, push_from_b, run, weights


def config_of(folder: Path, *, num_peers: int = 2, **sections: Any) -> Config:
    sections = {"method": {"name": "gossip_avg", "topology": RING}, "network": TROUBLESOME} | sections
    return make_config(folder, spatial_dims=2, evaluation={"ensemble_peers": num_peers}, **sections)


def push_of(trainer: SiteTrainer, sender: str, value: float) -> IncomingModel:
    """A model whose every weight is one value."""
    return IncomingModel(sender, 4, torch.full((trainer.local.model.num_sent,), value))


# --- the mean ------------------------------------------------------------------------------------


def ensemble_of(*values: float) -> Ensemble:
    """Models of one weight that share a learner; the weight is the logit that :func:`logit` gives."""
    learner = Learner(
        nn.Linear(1, 1, bias=False),
        send_buffers=True,
        optimiser=OptimiserConfig(learning_rate=0.1),
        precision=Precision("cpu", "none"),
    )
    return Ensemble(tuple(EnsembleMember("A", "", learner, torch.tensor([value])) for value in values))


def logit(learner: Learner) -> Tensor:
    """A region's logit, (1, 1, 1)."""
    return learner.model.flat.clone().view(1, 1, 1)


def class_logits(learner: Learner) -> Tensor:
    """Logits of background and a class, (2, 1, 1)."""
    return torch.cat([torch.zeros(1, 1, 1), logit(learner)])


@pytest.mark.parametrize(("logits", "label"), [((4.0, -1.0, -1.0), 1), ((4.0, -1.0, -1.0, -1.0), 0)])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_probabilities_are_averaged_not_logits(logits: tuple[float, ...], label: int, sigmoid: bool) -> None:
    """0.982 and 0.269: with two of the latter the mean is 0.507, with three 0.447; means of logits are above 0."""
    scores = ensemble_of(*logits).scores(logit if sigmoid else class_logits, sigmoid=sigmoid)
    expected = sum(1 / (1 + math.exp(-value)) for value in logits) / len(logits) - 0.5
    assert float(scores[-1]) == pytest.approx(expected, abs=1e-6)
    assert int(predict_labels(scores, sigmoid=sigmoid)) == label


def test_one_member_decides_by_its_logits() -> None:
    assert ensemble_of(3.0).scores(logit, sigmoid=True).item() == 3.0


# --- what is kept -----------------------------------------------------------------------------------


def test_the_last_model_of_each_of_the_last_peers_is_kept_as_it_came(tmp_path: Path) -> None:
    """B, C, then B again, then D with room for two: B's second and D's."""
    trainer = make_trainer(config_of(tmp_path, num_sites=4))
    for number, (sender, value) in enumerate([("B", 0.1), ("C", 0.2), ("B", 0.3), ("D", 0.4)], start=2):
        trainer.peers.keep([push_of(trainer, sender, value)], number)
    assert trainer.state.peer_files == {"B": "peer_00004_B.safetensors", "D": "peer_00005_D.safetensors"}
    model = trainer.exchange.learner_for(trainer.config.network).model
    for sender, value in (("B", 0.3), ("D", 0.4)):
        facts = load_model_file(trainer.files.folder / trainer.state.peer_files[sender], model)
        assert torch.equal(model.flat[: model.num_sent], torch.full((model.num_sent,), value))
        assert facts["site"] == sender


def test_nothing_is_kept_by_default(tmp_path: Path) -> None:
    trainer = make_trainer(config_of(tmp_path, num_peers=0))
    run(trainer, [1, 2, 3])
    assert trainer.state.peer_files == {}
    assert not list(trainer.files.folder.glob("peer_*"))


def test_a_refused_model_is_not_kept(tmp_path: Path) -> None:
    """The same weights again are a replay."""
    trainer = make_trainer(config_of(tmp_path, defence={"weights": True, "max_norm_ratio": 1e9, "min_cosine": -1.0}))
    run(trainer, [1, 2])
    kept = dict(trainer.state.peer_files)
    assert kept == {"B": "peer_00002_B.safetensors"}
    header, buffer = push_from_b(trainer, 2)
    trainer.train_round(order(3), [(header, buffer)])
    assert trainer.state.peer_files == kept


@pytest.mark.parametrize("resume_round", [1, 2])
def test_a_resumed_site_keeps_the_models_of_its_own_course(tmp_path: Path, resume_round: int) -> None:
    config = config_of(tmp_path, num_peers=1, federation={"rounds": 3})
    whole = make_trainer(config, folder=tmp_path / "whole")
    run(whole, [1, 2, 3])
    stopped = make_trainer(config, folder=tmp_path / "stopped")
    run(stopped, range(1, resume_round + 2))
    resumed = make_trainer(config, folder=tmp_path / "stopped", resume_round=resume_round)
    assert resumed.state.peer_files == ({} if resume_round == 1 else {"B": "peer_00002_B.safetensors"})
    run(resumed, range(resume_round + 1, 4))
    assert resumed.state == whole.state
    assert torch.equal(weights(resumed), weights(whole))
    names = sorted(path.name for path in whole.files.folder.glob("peer_*"))
    assert names == ["peer_00002_B.safetensors", "peer_00003_B.safetensors"], "those that the last two rounds name"
    for name in names:
        mine, other = (load_file(trainer.files.folder / name) for trainer in (resumed, whole))
        assert mine.keys() == other.keys()
        assert all(np.array_equal(mine[key], other[key]) for key in mine)


# --- the choice -------------------------------------------------------------------------------------


class Scripted:
    """Validation Dice by the sites whose models predict together."""

    def __init__(self, dice: Mapping[str, float]) -> None:
        self.dice = dice
        self.asked: list[str] = []

    def validation_dice(self, model: Ensemble) -> float:
        """Looks it up."""
        self.asked.append("".join(member.site for member in model.members))
        return self.dice[self.asked[-1]]


@pytest.mark.parametrize(
    ("dice", "chosen"),
    [
        ({"A": 0.5, "B": 0.4, "C": 0.6, "AC": 0.55, "ACB": 0.55}, ["C"]),  # no more is no gain
        ({"A": 0.5, "B": 0.4, "C": 0.6, "AC": 0.55, "ACB": 0.56}, ["C", "B"]),
        ({"A": 0.5, "B": 0.4, "C": 0.4, "AB": 0.5, "AC": 0.51}, ["C"]),  # of equals in the order of names
        ({"A": 0.5, "B": 0.9, "C": 0.9, "AB": 0.4, "AC": 0.3}, []),  # good alone, no help
    ],
)
def test_a_peer_is_added_where_the_validation_dice_grows(
    tmp_path: Path, dice: dict[str, float], chosen: list[str]
) -> None:
    trainer = make_trainer(config_of(tmp_path, num_sites=3))
    run(trainer, [1], with_pushes=False)
    trainer.peers.keep([push_of(trainer, "B", 0.1), push_of(trainer, "C", 0.2)], 1)
    trainer.peers.evaluator = scripted = Scripted(dice)  # type: ignore[assignment]
    ensemble, round_number = trainer.peers.choose()
    assert [member.site for member in ensemble.members] == ["A", *chosen]
    assert round_number == 1
    assert scripted.asked == list(dice)
    names = json.loads((trainer.files.folder / "members.json").read_text())
    kept = [(trainer.files.folder / name).read_bytes() for name in names]
    assert kept == [(trainer.files.folder / trainer.state.peer_files[site]).read_bytes() for site in chosen]


def test_an_ensemble_without_peers_scores_as_the_personalised_model(tmp_path: Path) -> None:
    trainer = make_trainer(config_of(tmp_path))
    run(trainer, [1], with_pushes=False)
    own = trainer.evaluate(split="test", model=PERSONALISED)
    together = trainer.evaluate(split="test", model=ENSEMBLE)
    assert [score.dice for score in together.scores] == [score.dice for score in own.scores]
    assert {score.model for score in together.scores} == {"ensemble"}


# --- a run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gossip_avg", "gcml", "gml", "defkt", "dpsgd"])
def test_every_method_with_peers_tests_ensembles_too(tmp_path: Path, name: str) -> None:
    done = run_real(config_of(tmp_path, method={"name": name, "topology": RING}))
    assert (done.summary.status, done.failures()) == ("finished", [])
    models = {"personalised", "before_gossip", "ensemble"}
    assert {(score.site, score.model) for score in done.folder.cases()} == {(s, m) for s in "AB" for m in models}


def test_prediction_with_peers_is_what_was_tested(tmp_path: Path) -> None:
    """B's model is made a member by hand; the mask of A's test case is that of the ensemble in the run."""
    config = config_of(tmp_path)
    run_real(config)
    trainer = make_trainer(config, resume_round=config.federation.rounds)
    trainer.files.keep_members([trainer.state.peer_files["B"]])
    model = load_model(config.output.folder, "A", peers=True)
    assert [facts.site for facts in model.facts] == ["A", "B"]
    own, _ = trainer.peers._own()
    ensemble = Ensemble((own, trainer.peers._peer("B", trainer.state.peer_files["B"])))
    (sample,) = trainer.data.split("test")
    expected = trainer.evaluator.predict(ensemble, sample.image)
    (case,) = [c for c in read_datalist(config.data.datalist) if (c.site, c.split) == ("A", "test")]
    found = model.predict(case.images)
    np.testing.assert_array_equal(found.masks[0], expected[0].numpy() == 1)


def test_an_ensemble_that_was_never_tested_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run_real(config)
    (Path(config.output.folder) / "checkpoints/A/members.json").unlink()
    with pytest.raises(CheckpointError, match="site A has not tested its ensemble"):
        load_model(config.output.folder, "A", peers=True)
    with pytest.raises(ConfigError, match="an ensemble is of all sites' models or of those that a site chose"):
        load_model(config.output.folder, "A", peers=True, ensemble=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read"),
        ("{}", "a list of files"),
        ('["member_01.safetensors", "member_01.safetensors"]', "each once"),
        ("[1]", "1 is no member's file"),
        ('["../B/personalised.safetensors"]', "is no member's file"),
    ],
)
def test_damaged_list_of_members_is_refused(tmp_path: Path, text: str, words: str) -> None:
    config = config_of(tmp_path)
    run_real(config)
    (Path(config.output.folder) / "checkpoints/A/members.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"members\.json .*{words}"):
        load_model(config.output.folder, "A", peers=True)


def test_a_run_that_kept_no_peers_has_no_ensemble_to_predict_with(tmp_path: Path) -> None:
    config = config_of(tmp_path, num_peers=0)
    run_real(config)
    with pytest.raises(ConfigError, match="no site kept any"):
        load_model(config.output.folder, "A", peers=True)


# --- the configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["local", "fedavg", "proxyfl"])
def test_methods_whose_sites_get_no_peers_models_are_refused(tmp_path: Path, name: str) -> None:
    keys = {"topology": RING, "alpha": 0.5, "beta": 0.5} if name == "proxyfl" else {}
    with pytest.raises(ValueError, match=f"ensemble_peers would be ignored: with method {name} no site gets"):
        config_of(tmp_path, method={"name": name} | keys)


def test_the_default_changes_no_identity(tmp_path: Path) -> None:
    plain = make_config(tmp_path)
    assert make_config(tmp_path, evaluation={"ensemble_peers": 0}).identity == plain.identity
    assert make_config(tmp_path, evaluation={"ensemble_peers": 1}).identity != plain.identity
