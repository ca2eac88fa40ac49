"""Whole rounds of each method, on 1x1 convolutions and a handful of pixels."""

from typing import Any

import numpy as np
import pytest
import torch

from gcml_ray.config import (
    DefKtMethod,
    DpsgdMethod,
    FedAvgMethod,
    FedBnMethod,
    GcmlMethod,
    GmlMethod,
    GossipAvgMethod,
    LocalMethod,
    Method,
    PooledMethod,
)
from gcml_ray.methods import METHODS
from gcml_ray.methods.rounds import IncomingModel, share_steps
from tests.method_rounds import PUSHES, after_local_steps, make_learner, run

RING: dict[str, Any] = {"name": "ring"}
LOCAL = LocalMethod(name="local")
GOSSIP_AVG = GossipAvgMethod.model_validate({"name": "gossip_avg", "topology": RING})
GML = GmlMethod.model_validate({"name": "gml", "topology": RING})
DEFKT = DefKtMethod.model_validate({"name": "defkt", "topology": RING})
DPSGD = DpsgdMethod.model_validate({"name": "dpsgd", "topology": RING})


def gcml(**options: Any) -> GcmlMethod:
    return GcmlMethod.model_validate({"name": "gcml", "topology": RING, **options})


EVERY_METHOD = [
    LOCAL,
    GOSSIP_AVG,
    GML,
    *(gcml(merge=mode) for mode in ("keep_local", "val_weighted", "size_weighted", "select_best", "replace")),
    *(gcml(merge_first=mode, merge="keep_local") for mode in ("size_weighted", "val_weighted")),
    DEFKT,
    DPSGD,
    PooledMethod(name="pooled"),
    FedAvgMethod(name="fedavg"),
    FedBnMethod(name="fedbn"),
]
GOSSIPS = [method for method in EVERY_METHOD if hasattr(method, "topology")]
ELSEWHERE = {"fedprox", "ditto", "proxyfl"}  # never train alone in an exchange round; see test_rival_methods.py


def name_of(method: Method) -> str:
    return "-".join(str(getattr(method, key)) for key in ("name", "merge", "merge_first") if hasattr(method, key))


# --- what holds for every method -----------------------------------------------------------------


def test_every_method_is_tested_here() -> None:
    assert {method.name for method in EVERY_METHOD} == set(METHODS) - ELSEWHERE


@pytest.mark.parametrize("method", EVERY_METHOD, ids=name_of)
def test_without_an_incoming_model_every_method_trains_alone(method: Method) -> None:
    local = make_learner()
    clock, result = run(method, local)
    assert torch.equal(local.model.flat, after_local_steps((0.1, 0.2, 0.3, 0.4)))
    assert (result.merge, result.candidate_dice, result.validation_dice) == ("", {}, None)
    assert set(result.statistics.means()) == {"segmentation"}
    assert clock.opened == []


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("num_incoming", [1, 2])
@pytest.mark.parametrize("method", GOSSIPS, ids=name_of)
def test_a_round_has_as_many_optimiser_steps_whatever_came_in(
    method: Method, num_incoming: int, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = make_learner()
    steps: list[None] = []
    step = local.optimiser.step
    monkeypatch.setattr(local.optimiser, "step", lambda: steps.append(step()))
    clock, result = run(method, local, PUSHES[:num_incoming], num_steps=num_steps)
    assert len(steps) == result.num_steps == num_steps
    assert clock.done == list(range(1, num_steps + 1))
    assert sorted(set(clock.rates)) == list(range(num_steps))


@pytest.mark.parametrize("method", GOSSIPS, ids=name_of)
def test_what_came_in_is_never_written_to(method: Method) -> None:
    buffers = [np.array((1, 2, 3, 4), dtype=np.float32), np.array((-1, 0, 1, 0), dtype=np.float32)]
    kept = [buffer.copy() for buffer in buffers]
    pushes = [IncomingModel(name, 2, torch.from_numpy(part)) for name, part in zip("BC", buffers, strict=True)]
    run(method, make_learner(), pushes)
    assert all(np.array_equal(*pair) for pair in zip(buffers, kept, strict=True))


@pytest.mark.parametrize("method", GOSSIPS, ids=name_of)
def test_a_round_is_repeatable_bit_for_bit(method: Method) -> None:
    one, other = make_learner(), make_learner()
    run(method, one, PUSHES)
    run(method, other, PUSHES)
    assert torch.equal(one.model.flat, other.model.flat)


@pytest.mark.parametrize(
    ("num_steps", "num_parts", "expected"),
    [(6, 1, [6]), (6, 2, [3, 3]), (7, 3, [3, 2, 2]), (8, 3, [3, 3, 2]), (1, 3, [1, 0, 0])],
)
def test_steps_are_shared_out_and_the_first_take_what_is_left(
    num_steps: int, num_parts: int, expected: list[int]
) -> None:
    assert share_steps(num_steps, num_parts) == expected


# --- local ---------------------------------------------------------------------------------------


def test_local_refuses_an_incoming_model() -> None:
    with pytest.raises(AssertionError, match="local takes no incoming model"):
        run(LOCAL, make_learner(), PUSHES)


# --- gossip averaging ------------------------------------------------------------------------------


def test_gossip_averaging_weighs_one_push_by_size() -> None:
    """2 own cases, 2 of the sender: the plain mean of (0.1, 0.2, 0.3, 0.4) and (1, 2, 3, 4)."""
    local = make_learner()
    _, result = run(GOSSIP_AVG, local, PUSHES[:1], num_steps=0)
    assert local.model.flat.tolist() == pytest.approx([0.55, 1.1, 1.65, 2.2])
    assert result.merge == "size_weighted"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_gossip_averaging_over_several_pushes_is_one_mean_in_any_order(order: tuple[int, int]) -> None:
    """Cases 2, 2 and 4: (2 w + 2 b + 4 c) / 8, e.g. the first (0.2 + 2 - 4) / 8 = -0.225."""
    local = make_learner()
    run(GOSSIP_AVG, local, [PUSHES[place] for place in order], num_steps=0)
    assert local.model.flat.tolist() == pytest.approx([-0.225, 0.55, 1.325, 1.1])


def test_gossip_averaging_trains_from_the_mean() -> None:
    local = make_learner((0, 0, 0, 0))
    run(GOSSIP_AVG, local, PUSHES[:1])
    assert torch.equal(local.model.flat, after_local_steps((0.5, 1, 1.5, 2)))


# --- GML and GCML ----------------------------------------------------------------------------------


def test_gml_keeps_the_local_model_and_learns_from_the_incoming_one() -> None:
    local = make_learner()
    clock, result = run(GML, local, PUSHES[:1])
    assert result.merge == "keep_local"
    assert {"mutual", "incoming_segmentation", "incoming_mutual"} <= set(result.statistics.means())
    assert not torch.equal(local.model.flat, after_local_steps((0.1, 0.2, 0.3, 0.4)))
    assert float((local.model.flat - make_learner().model.flat).norm()) < 0.5  # far from the peer at (1, 2, 3, 4)
    assert clock.opened == ["B"]


def test_gml_with_lambda_zero_is_local_training() -> None:
    local = make_learner()
    run(GmlMethod.model_validate({"name": "gml", "topology": RING, "lambda": 0.0}), local, PUSHES)
    assert torch.equal(local.model.flat, after_local_steps((0.1, 0.2, 0.3, 0.4)))


def test_gml_and_gcml_with_the_regional_variant_and_keep_local_are_one() -> None:
    gml, same = make_learner(), make_learner()
    run(GML, gml, PUSHES)
    run(gcml(merge="keep_local", dcml={"variant": "regional", "lambda": GML.weight}), same, PUSHES)
    assert torch.equal(gml.model.flat, same.model.flat)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"merge": "keep_local"}, [0, 0, 0, 0]),
        ({"merge": "replace"}, [1, 2, 3, 4]),
        ({"merge": "size_weighted"}, [0.5, 1, 1.5, 2]),  # 2 cases each
        # Scores 1 / (1 + sum of |w|): 1 and 1/11, so 11/12 x 0 + 1/12 x (1, 2, 3, 4).
        ({"merge": "val_weighted"}, [1 / 12, 2 / 12, 3 / 12, 4 / 12]),
        ({"merge": "select_best"}, [0, 0, 0, 0]),
        ({"merge": "keep_local", "merge_first": "size_weighted"}, [0.5, 1, 1.5, 2]),
        ({"merge": "keep_local", "merge_first": "val_weighted"}, [1 / 12, 2 / 12, 3 / 12, 4 / 12]),
        # First the mean (0.5, 1, 1.5, 2), then its mean with (1, 2, 3, 4).
        ({"merge": "size_weighted", "merge_first": "size_weighted"}, [0.75, 1.5, 2.25, 3]),
    ],
)
def test_gcml_merges_as_the_mode_says(options: dict[str, str], expected: list[float]) -> None:
    local = make_learner((0, 0, 0, 0))
    _, result = run(gcml(**options), local, PUSHES[:1], num_steps=0)
    assert local.model.flat.tolist() == pytest.approx(expected)
    assert result.merge == ("local_after" if options["merge"] == "select_best" else options["merge"])


def test_before_means_before_merge_first() -> None:
    """The start at 0 scores best: averaging first and training both lead away from it, and it comes back exactly."""
    local = make_learner((0, 0, 0, 0))
    _, result = run(gcml(merge="select_best", merge_first="size_weighted"), local, PUSHES[:1], num_steps=1)
    assert result.merge == "local_before"
    assert local.model.flat.tolist() == [0, 0, 0, 0]


def test_select_best_reports_the_score_of_what_it_kept() -> None:
    local = make_learner()
    _, result = run(gcml(merge="select_best"), local, PUSHES[:1])
    assert set(result.candidate_dice) == {"local_before", "local_after", "incoming_after", "mix"}
    assert result.validation_dice == max(result.candidate_dice.values())
    assert result.validation_dice == 1 / (1 + float(local.model.flat.abs().sum()))


def test_gcml_trains_the_incoming_model_too() -> None:
    clock, _ = run(gcml(merge="keep_local"), make_learner(), PUSHES[:1])
    assert not torch.equal(clock.peers[0].model.flat, PUSHES[0].weights)


def test_several_incoming_models_follow_one_another() -> None:
    """``replace`` twice: what the first one left is replaced by the second."""
    local = make_learner()
    clock, _ = run(gcml(merge="replace"), local, PUSHES, num_steps=0)
    assert clock.opened == ["B", "C"]
    assert local.model.flat.tolist() == [-1, 0, 1, 0]


def test_ramp_up_weakens_the_first_exchange_rounds() -> None:
    """With 1 ramp-up round the first exchange round has half of lambda."""
    ramped, half = make_learner(), make_learner()
    run(gcml(merge="keep_local", dcml={"lambda": 0.4, "ramp_up_rounds": 1}), ramped, PUSHES[:1])
    run(gcml(merge="keep_local", dcml={"lambda": 0.2}), half, PUSHES[:1])
    assert torch.equal(ramped.model.flat, half.model.flat)
    run(gcml(merge="keep_local", dcml={"lambda": 0.4, "ramp_up_rounds": 1}), ramped, PUSHES[:1], exchange_index=1)
    run(gcml(merge="keep_local", dcml={"lambda": 0.4}), half, PUSHES[:1], exchange_index=1)
    assert torch.equal(ramped.model.flat, half.model.flat)
