"""The moving average of the weights: the numbers, what it follows, where it is used, and that a resume keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gcml_ray.config import Config, OptimiserConfig
from gcml_ray.errors import CheckpointError, DamagedError
from gcml_ray.model.checkpoint import load_model_file, load_round, read_tensors, round_file, write_tensors
from gcml_ray.model.learner import Learner, local_step
from gcml_ray.model.precision import Precision
from gcml_ray.model.weight_average import WeightAverage, decay_at
from gcml_ray.model.weights import FlatModel
from gcml_ray.records import BEFORE_GOSSIP, PERSONALISED, SHARED
from gcml_ray.training.trainer import SiteTrainer
from tests.makers import make_config
from tests.method_rounds import batch_of, cross_entropy
from tests.runs import run_real
from tests.trainer_runs import RING, TROUBLESOME, make_trainer, order, push_from_b, run, weights

AVERAGED = {"weight_average": 0.5}


def averaged_model(values: tuple[float, ...], average: tuple[float, ...], *, decay: float = 0.9) -> FlatModel:
    """A 1x1 convolution of two weights and two biases."""
    model = FlatModel(nn.Conv2d(1, 2, 1), send_buffers=True)
    model.flat.copy_(torch.tensor(values))
    model.average = WeightAverage(torch.tensor(average, dtype=torch.float32), decay=decay)
    return model


def average_of(model: FlatModel) -> WeightAverage:
    assert model.average is not None
    return model.average


def own_average(trainer: SiteTrainer) -> Tensor:
    return average_of(trainer.own.model).values.clone()


# --- the numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_steps", "decay"), [(0, 0.1), (1, 2 / 11), (8, 0.5), (79, 80 / 89), (89, 0.9)])
def test_the_decay_rises_to_its_value(num_steps: int, decay: float) -> None:
    """(1 + t) / (10 + t): 1/10, 2/11, 9/18, 80/89 = 0.899; 90/99 = 0.909 is more than 0.9, which bounds it."""
    assert decay_at(num_steps, 0.9) == pytest.approx(decay)


def test_the_average_follows_two_steps() -> None:
    """From 0, decays 1/10 and 2/11: 0.9 x 10 = 9, then 9 x 2/11 + 20 x 9/11 = 18."""
    average = WeightAverage(torch.zeros(2), decay=0.99)
    average.follow(torch.full((2,), 10.0))
    assert average.values.tolist() == pytest.approx([9.0, 9.0])
    average.follow(torch.full((2,), 20.0))
    assert average.values.tolist() == pytest.approx([18.0, 18.0])
    assert average.num_steps == 2


def test_an_optimiser_step_is_followed_running_statistics_included() -> None:
    """SGD moves the weight by -0.5 x its gradient; the running mean moves by 0.1 x the batch mean; shares are 0.9."""
    learner = Learner(
        nn.BatchNorm1d(1),
        send_buffers=True,
        optimiser=OptimiserConfig(name="sgd", learning_rate=0.5),
        precision=Precision("cpu", "none"),
    )
    start = learner.model.flat.clone()
    learner.model.average = WeightAverage(learner.model.flat, decay=0.99)
    learner.apply_gradients(learner.model.module(torch.tensor([[2.0], [6.0]])).square().sum())
    assert not torch.equal(learner.model.flat, start)
    moved = 0.1 * start + 0.9 * learner.model.flat
    assert average_of(learner.model).values.tolist() == pytest.approx(moved.tolist())
    assert learner.model.flat[2].item() == pytest.approx(0.4), "running mean: 0.9 x 0 + 0.1 x 4"
    assert average_of(learner.model).values[2].item() == pytest.approx(0.36)


def test_the_average_changes_no_training_step() -> None:
    learners = [
        Learner(
            nn.Conv2d(1, 2, 1),
            send_buffers=True,
            optimiser=OptimiserConfig(learning_rate=0.1),
            precision=Precision("cpu", "none"),
        )
        for _ in range(2)
    ]
    learners[1].model.flat.copy_(learners[0].model.flat)
    learners[1].model.average = WeightAverage(learners[1].model.flat, decay=0.9)
    for step in range(3):
        for learner in learners:
            local_step(learner, batch_of(step), cross_entropy)
    assert torch.equal(learners[0].model.flat, learners[1].model.flat)


# --- what comes in ---------------------------------------------------------------------------------


def test_replaced_weights_begin_the_average_anew() -> None:
    model = averaged_model((1, 1, 1, 1), (2, 2, 2, 2))
    average_of(model).num_steps = 50
    model.load(torch.tensor([5.0, 6.0, 7.0, 8.0]))
    assert average_of(model).values.tolist() == [5, 6, 7, 8]
    assert average_of(model).num_steps == 0


def test_mixed_weights_reach_the_average_with_the_same_share() -> None:
    """Three quarters of the own: 0.75 x 1 + 0.25 x 5 = 2 for the weights, 0.75 x 3 + 0.25 x 5 = 3.5 for the average."""
    model = averaged_model((1, 1, 1, 1), (3, 3, 3, 3))
    average_of(model).num_steps = 50
    model.mix(torch.full((4,), 5.0), own_share=0.75)
    assert model.flat.tolist() == [2, 2, 2, 2]
    assert average_of(model).values.tolist() == [3.5, 3.5, 3.5, 3.5]
    assert average_of(model).num_steps == 50


def test_what_is_not_sent_keeps_its_average() -> None:
    """Two weights are sent, two running statistics stay."""
    model = FlatModel(nn.BatchNorm1d(1), send_buffers=False)
    model.average = WeightAverage(torch.tensor([1.0, 2.0, 3.0, 4.0]), decay=0.9)
    model.load(torch.tensor([9.0, 9.0]))
    assert average_of(model).values.tolist() == [9, 9, 3, 4]
    model.mix(torch.tensor([5.0, 5.0]), own_share=0.5)
    assert average_of(model).values.tolist() == [7, 7, 3, 4]


def test_a_snapshot_brings_the_average_back_with_its_age() -> None:
    model = averaged_model((1, 1, 1, 1), (2, 2, 2, 2))
    average_of(model).num_steps = 7
    snapshot = model.snapshot()
    model.load(torch.full((4,), 9.0))
    model.restore(snapshot)
    assert model.flat.tolist() == [1, 1, 1, 1]
    assert average_of(model).values.tolist() == [2, 2, 2, 2]
    assert average_of(model).num_steps == 7


def test_the_trained_weights_come_back_even_where_scoring_was_broken_off() -> None:
    model = averaged_model((1, 2, 3, 4), (5, 6, 7, 8))
    with model.averaged():
        assert model.flat.tolist() == [5, 6, 7, 8]
        assert model.module.state_dict()["bias"].tolist() == [7, 8]
    assert model.flat.tolist() == [1, 2, 3, 4]
    with pytest.raises(KeyboardInterrupt), model.averaged():
        raise KeyboardInterrupt
    assert model.flat.tolist() == [1, 2, 3, 4]


# --- a site ----------------------------------------------------------------------------------------


def with_average(folder: Path, **sections: Any) -> Config:
    sections.setdefault("optimiser", AVERAGED)
    return make_config(folder, network=TROUBLESOME, **sections)


def recorded(trainer: SiteTrainer, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights of every prediction that the trainer makes from now on."""
    seen: list[Tensor] = []
    predict = trainer.evaluator.predict

    def recording(learner: Learner, image: Tensor) -> Tensor:
        seen.append(learner.model.flat.clone())
        return predict(learner, image)

    monkeypatch.setattr(trainer.evaluator, "predict", recording)
    return seen


def test_by_default_there_is_no_average(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path))
    assert trainer.local.model.average is None
    off = make_config(tmp_path, optimiser={"weight_average": 0.0, "push_average": False})
    assert off.identity == make_config(tmp_path).identity != make_config(tmp_path, optimiser=AVERAGED).identity


def test_the_average_is_what_is_validated_kept_and_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(with_average(tmp_path, federation={"warmup_rounds": 1}))
    seen = recorded(trainer, monkeypatch)
    trainer.train_round(order(1), [])
    average = own_average(trainer)
    assert not torch.equal(average, weights(trainer))
    assert all(torch.equal(flat, average) for flat in seen)
    assert len(seen) == 1
    trained = weights(trainer)
    for model in (PERSONALISED, BEFORE_GOSSIP, SHARED):
        trainer.evaluate(split="test", model=model)
        assert torch.equal(seen[-1], average), model
    assert torch.equal(weights(trainer), trained), "evaluating must not touch the model in training"
    kept = FlatModel(make_trainer(with_average(tmp_path)).local.model.module, send_buffers=True)
    load_model_file(trainer.files.folder / "personalised.safetensors", kept)
    assert torch.equal(kept.flat, average)


def test_training_itself_is_the_same_with_and_without_an_average(tmp_path: Path) -> None:
    """Where no merge rule asks for scores."""
    method = {"name": "gcml", "topology": RING, "merge": "size_weighted"}
    plain = make_trainer(make_config(tmp_path, network=TROUBLESOME, method=method), folder=tmp_path / "plain")
    averaged = make_trainer(with_average(tmp_path, method=method), folder=tmp_path / "averaged")
    run(plain, [1, 2, 3])
    run(averaged, [1, 2, 3])
    assert torch.equal(weights(plain), weights(averaged))


METHODS = {
    "select_best": {"name": "gcml", "topology": RING, "merge": "select_best"},
    "merge_first": {"name": "gcml", "topology": RING, "merge": "val_weighted", "merge_first": "size_weighted"},
    "gossip_avg": {"name": "gossip_avg", "topology": RING},
    "defkt": {"name": "defkt", "topology": RING},
    "proxyfl": {"name": "proxyfl", "topology": RING, "alpha": 0.5, "beta": 0.5},
}


@pytest.mark.parametrize("push_average", [False, True])
@pytest.mark.parametrize("method", list(METHODS))
def test_a_resumed_run_has_the_average_of_one_that_never_stopped(
    tmp_path: Path, method: str, push_average: bool
) -> None:
    optimiser = AVERAGED | {"push_average": push_average}
    config = with_average(tmp_path, method=METHODS[method], optimiser=optimiser)
    whole = make_trainer(config, folder=tmp_path / "whole")
    run(whole, [1, 2, 3])
    run(make_trainer(config, folder=tmp_path / "stopped"), [1, 2])
    resumed = make_trainer(config, folder=tmp_path / "stopped", resume_round=2)
    run(resumed, [3])
    assert torch.equal(weights(resumed), weights(whole))
    assert torch.equal(own_average(resumed), own_average(whole))
    assert average_of(resumed.own.model).num_steps == average_of(whole.own.model).num_steps
    assert resumed.state == whole.state


def test_a_checkpoint_without_an_average_is_refused_where_one_is_needed(tmp_path: Path) -> None:
    """It cannot happen with one configuration, whose identity is checked first; so by hand."""
    config = make_config(tmp_path)
    run(make_trainer(config), [1])
    trainer = make_trainer(config)
    trainer.local.model.average = WeightAverage(trainer.local.model.flat, decay=0.5)
    with pytest.raises(CheckpointError, match="holds no average of the weights"):
        trainer.files.restore(trainer.local, None, resume_round=1)


@pytest.mark.parametrize("num_steps", [None, np.array([1, 2]), np.array(0.5)])
def test_an_average_without_its_number_of_steps_is_damaged(tmp_path: Path, num_steps: Any) -> None:
    config = with_average(tmp_path)
    run(make_trainer(config), [1])
    trainer = make_trainer(config)
    path = round_file(trainer.files.folder, 1)
    tensors, facts = read_tensors(path)
    del tensors["average.num_steps"]
    write_tensors(path, tensors if num_steps is None else tensors | {"average.num_steps": num_steps}, facts)
    identity = trainer.state.identity
    with pytest.raises(DamagedError, match="an average of the weights without its number of steps"):
        load_round(trainer.files.folder, trainer.local, site="A", round_number=1, identity=identity)


@pytest.mark.parametrize("name", ["ditto", "proxyfl"])
def test_of_two_models_it_is_the_site_s_own_that_is_averaged(tmp_path: Path, name: str) -> None:
    method = {"name": "ditto", "lambda": 0.1} if name == "ditto" else METHODS["proxyfl"]
    trainer = make_trainer(with_average(tmp_path, method=method))
    assert trainer.personal is not None
    assert (trainer.personal.model.average is not None, trainer.local.model.average) == (True, None)
    both = make_trainer(with_average(tmp_path, method=method, optimiser=AVERAGED | {"push_average": True}))
    assert both.personal is not None
    assert None not in (both.personal.model.average, both.local.model.average)


# --- pushes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("push_average", [False, True])
def test_the_average_is_pushed_where_asked(tmp_path: Path, mode: str, push_average: bool) -> None:
    config = with_average(tmp_path, optimiser=AVERAGED | {"push_average": push_average}, federation={"mode": mode})
    trainer = make_trainer(config)
    run(trainer, [1])
    _, buffer = trainer.export("run", 2)
    expected = own_average(trainer) if push_average else weights(trainer)
    np.testing.assert_array_equal(buffer, expected[: trainer.local.model.num_sent].numpy())


def test_without_a_barrier_a_restored_site_pushes_the_average_it_had(tmp_path: Path) -> None:
    optimiser = AVERAGED | {"push_average": True}
    config = with_average(tmp_path, optimiser=optimiser, federation={"mode": "async"})
    trainer = make_trainer(config)
    run(trainer, [1])
    resumed = make_trainer(config, resume_round=1)
    np.testing.assert_array_equal(resumed.export("run", 2)[1], trainer.export("run", 2)[1])


def test_the_server_s_weights_begin_the_average_anew(tmp_path: Path) -> None:
    trainer = make_trainer(with_average(tmp_path, method={"name": "fedavg"}))
    trainer.train_round(order(2, evaluate=False, checkpoint=False), [])
    assert average_of(trainer.local.model).num_steps == 2
    header, buffer = push_from_b(trainer, 2)
    trainer.adopt(order(2), [(header, buffer)])
    np.testing.assert_array_equal(own_average(trainer)[: len(buffer)].numpy(), buffer)
    assert average_of(trainer.local.model).num_steps == 0


# --- a federation --------------------------------------------------------------------------------------

KEYS: dict[str, dict[str, Any]] = {
    "gcml": {"topology": RING},
    "dpsgd": {"topology": RING},
    "proxyfl": {"topology": RING, "alpha": 0.5, "beta": 0.5},
    "fedbn": {},
    "ditto": {"lambda": 0.1},
}
DP_SGD = {"mode": "dp_sgd", "noise_multiplier": 1.0, "max_grad_norm": 1.0, "delta": 1e-3, "seeded": True}
UPDATE_NOISE = {"mode": "update_noise", "noise_multiplier": 0.01, "max_update_norm": 1.0, "delta": 1e-3, "seeded": True}


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        *((name, {"network": TROUBLESOME}) for name in KEYS),
        ("gcml", {"privacy": DP_SGD}),
        ("gcml", {"privacy": UPDATE_NOISE}),
        ("gcml", {"federation": {"mode": "async"}}),
    ],
)
def test_methods_run_with_averages_that_are_pushed_too(tmp_path: Path, name: str, sections: dict[str, Any]) -> None:
    """An average of private steps, or one that leaves with noise, promises what its weights do."""
    optimiser = AVERAGED | {"push_average": True}
    config = make_config(tmp_path, spatial_dims=2, method={"name": name} | KEYS[name], optimiser=optimiser, **sections)
    done = run_real(config)
    assert (done.summary.status, done.failures()) == ("finished", [])
    assert all(push.accepted for push in done.folder.transfers())
    assert {score.model for score in done.folder.cases()} >= {"personalised", "before_gossip"}


# --- the configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.0, -0.1])
def test_a_decay_outside_0_to_1_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match=r"weight_average"):
        make_config(tmp_path, optimiser={"weight_average": value})


def test_pushing_an_average_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="push_average has no average to push: set weight_average"):
        make_config(tmp_path, optimiser={"push_average": True})


@pytest.mark.parametrize("name", ["local", "pooled"])
def test_pushing_it_by_a_method_that_pushes_nothing_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"push_average would be ignored: method {name} pushes nothing"):
        make_config(tmp_path, method={"name": name}, optimiser=AVERAGED | {"push_average": True})
