"""Merging before and after the mutual steps, on models of four weights that all have one value."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gcml_ray.config import GossipAvgMethod, OptimiserConfig
from gcml_ray.methods import gossip_avg
from gcml_ray.methods.merging import merge_after, merge_before, own_share_by_score
from gcml_ray.methods.rounds import IncomingModel, RoundContext, RoundResult
from gcml_ray.model.learner import Learner
from gcml_ray.model.precision import Precision
from gcml_ray.model.weights import FlatModel, Snapshot

BEFORE, LOCAL, INCOMING = 0.0, 1.0, 3.0
PRECISION = Precision("cpu", "none")
SCORE = Callable[[Learner], float]


def make_learner(value: float) -> Learner:
    """A 1x1 convolution of two weights and two biases, all of them ``value``."""
    optimiser = OptimiserConfig(learning_rate=0.1)
    learner = Learner(nn.Conv2d(1, 2, 1), send_buffers=True, optimiser=optimiser, precision=PRECISION)
    learner.model.flat.fill_(value)
    return learner


def make_batchnorm_learner(value: float, *, send_buffers: bool) -> Learner:
    """Two weights and two running statistics."""
    optimiser = OptimiserConfig(learning_rate=0.1)
    learner = Learner(nn.BatchNorm2d(1), send_buffers=send_buffers, optimiser=optimiser, precision=PRECISION)
    learner.model.flat.fill_(value)
    return learner


def never(*_: Any) -> Any:
    raise AssertionError("this mode needs no score")


def context(*, num_train: int = 1, score: SCORE = never) -> RoundContext:
    return RoundContext(
        round_number=1,
        phase="exchange",
        exchange_index=0,
        num_steps=0,
        num_train=num_train,
        batches=iter(()),
        loss=never,
        sigmoid=False,
        learning_rate=never,
        score=score,
        open_incoming=never,
        on_step=never,
    )


def message(num_train: int = 1, *, value: float = 0.0, discount: float = 1.0) -> IncomingModel:
    return IncomingModel("B", num_train, torch.full((4,), value), discount=discount)


def scored_by_value(**scores: float) -> SCORE:
    """The score of a model by its first weight's name among before, local, incoming; anything else is the mix."""
    names = {BEFORE: "before", LOCAL: "local", INCOMING: "incoming"}
    return lambda learner: scores[names.get(float(learner.model.flat[0]), "mix")]


def merged(mode: str, *, num_train: int = 1, score: SCORE = never) -> tuple[Tensor, RoundResult]:
    """What is left of local = 1, incoming = 3 and before = 0, with 1 case at the sender."""
    local, result = make_learner(LOCAL), RoundResult()
    merge_after(
        local,
        make_learner(INCOMING),
        message(),
        context(num_train=num_train, score=score),
        result,
        mode=mode,
        before=Snapshot(torch.full((4,), BEFORE)) if mode == "select_best" else None,
    )
    return local.model.flat, result


def equals(flat: Tensor, value: float) -> bool:
    return torch.equal(flat, torch.full_like(flat, value))


# --- the share -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "other", "share"), [(0.6, 0.2, 0.75), (0.5, 0.5, 0.5), (0.8, 0.0, 1.0), (0.0, 0.8, 0.0), (0.0, 0.0, 0.5)]
)
def test_share_by_score_is_the_own_part_of_the_sum(own: float, other: float, share: float) -> None:
    assert own_share_by_score(own, other) == pytest.approx(share)


# --- before --------------------------------------------------------------------------------------


def test_a_restored_model_has_its_counters_back() -> None:
    """BatchNorm without a momentum weighs each batch by how many it has seen."""
    model = FlatModel(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, momentum=None)), send_buffers=True)
    before = model.snapshot()
    model.module(torch.ones(1, 1, 4, 4))
    assert {name: int(counter) for name, counter in model.counters().items()} == {"1.num_batches_tracked": 1}
    model.restore(before)
    assert {name: int(counter) for name, counter in model.counters().items()} == {"1.num_batches_tracked": 0}


def test_a_model_that_is_taken_over_brings_its_counters() -> None:
    own, other = (
        FlatModel(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, momentum=None)), send_buffers=False)
        for _ in range(2)
    )
    other.module(torch.ones(1, 1, 4, 4))
    own.take_over(other)
    assert torch.equal(own.flat, other.flat)
    assert {name: int(counter) for name, counter in own.counters().items()} == {"1.num_batches_tracked": 1}


def test_merge_first_none_changes_nothing_and_scores_nothing() -> None:
    local = make_learner(LOCAL)
    merge_before(local, make_learner(INCOMING), message(), context(), mode="none")
    assert equals(local.model.flat, LOCAL)


def test_merge_first_by_size() -> None:
    """3 own cases and 1 of the sender: 3/4 x 1 + 1/4 x 3 = 1.5."""
    local, incoming = make_learner(LOCAL), make_learner(INCOMING)
    merge_before(local, incoming, message(1), context(num_train=3), mode="size_weighted")
    assert equals(local.model.flat, 1.5)
    assert equals(incoming.model.flat, INCOMING)


def test_merge_first_by_validation() -> None:
    """Scores 0.2 and 0.6: a quarter of 1 and three quarters of 3 is 2.5."""
    local = make_learner(LOCAL)
    score = scored_by_value(local=0.2, incoming=0.6)
    merge_before(local, make_learner(INCOMING), message(), context(score=score), mode="val_weighted")
    assert equals(local.model.flat, 2.5)


# --- after ---------------------------------------------------------------------------------------


def test_keep_local_drops_the_incoming_model_and_scores_nothing() -> None:
    flat, result = merged("keep_local")
    assert equals(flat, LOCAL)
    assert (result.merge, result.candidate_dice, result.validation_dice) == ("keep_local", {}, None)


def test_replace_keeps_the_incoming_model() -> None:
    flat, result = merged("replace")
    assert equals(flat, INCOMING)
    assert result.merge == "replace"


def test_size_weighted_weighs_by_training_cases() -> None:
    """3 own cases and 1 of the sender: 3/4 x 1 + 1/4 x 3 = 1.5."""
    flat, result = merged("size_weighted", num_train=3)
    assert equals(flat, 1.5)
    assert result.merge == "size_weighted"


def test_val_weighted_weighs_by_validation_scores() -> None:
    """Scores 0.6 and 0.2: 3/4 x 1 + 1/4 x 3 = 1.5. The mix itself is not scored."""
    flat, result = merged("val_weighted", score=scored_by_value(local=0.6, incoming=0.2))
    assert equals(flat, 1.5)
    assert result.candidate_dice == {"local_after": 0.6, "incoming_after": 0.2}
    assert result.validation_dice is None


@pytest.mark.parametrize(
    ("best", "expected", "name"),
    [
        ("before", BEFORE, "local_before"),
        ("local", LOCAL, "local_after"),
        ("incoming", INCOMING, "incoming_after"),
    ],
)
def test_select_best_leaves_exactly_the_best_candidate(best: str, expected: float, name: str) -> None:
    scores = {"before": 0.5, "local": 0.5, "incoming": 0.5, "mix": 0.5} | {best: 0.7}
    flat, result = merged("select_best", score=scored_by_value(**scores))
    assert equals(flat, expected)
    assert (result.merge, result.validation_dice) == (name, 0.7)


def test_select_best_keeps_the_incoming_model_with_the_statistics_it_was_scored_with() -> None:
    """Statistics that are not sent were trained along with the incoming weights: both or neither."""
    local, incoming = (make_batchnorm_learner(value, send_buffers=False) for value in (LOCAL, INCOMING))
    around = context(score=lambda learner: float(learner.model.flat.min()))  # the least of weights and statistics
    result = RoundResult()
    before = make_batchnorm_learner(BEFORE, send_buffers=False).model.snapshot()
    merge_after(local, incoming, message(), around, result, mode="select_best", before=before)
    assert (result.merge, result.validation_dice) == ("incoming_after", INCOMING)
    assert equals(local.model.flat, INCOMING)


def test_select_best_can_keep_the_mix() -> None:
    """Scores 0.2 and 0.6 give the mix 1/4 x 1 + 3/4 x 3 = 2.5."""
    score = scored_by_value(before=0.1, local=0.2, incoming=0.6, mix=0.9)
    flat, result = merged("select_best", score=score)
    assert equals(flat, 2.5)
    assert (result.merge, result.validation_dice) == ("mix", 0.9)
    assert result.candidate_dice == {"local_before": 0.1, "local_after": 0.2, "incoming_after": 0.6, "mix": 0.9}


@pytest.mark.parametrize(
    ("tied", "kept"),
    [
        (("before", "local", "incoming", "mix"), "local_after"),
        (("before", "incoming", "mix"), "mix"),
        (("before", "incoming"), "incoming_after"),
    ],
)
def test_a_tie_goes_to_what_has_trained_on(tied: tuple[str, ...], kept: str) -> None:
    scores = dict.fromkeys(("before", "local", "incoming", "mix"), 0.2) | dict.fromkeys(tied, 0.6)
    assert merged("select_best", score=scored_by_value(**scores))[1].merge == kept


def test_models_that_all_score_zero_leave_the_trained_local_one() -> None:
    flat, result = merged("select_best", score=lambda _: 0.0)
    assert equals(flat, LOCAL)
    assert result.merge == "local_after"


@pytest.mark.parametrize("best", ["before", "local", "incoming", "mix"])
def test_select_best_never_changes_the_incoming_model(best: str) -> None:
    local, incoming = make_learner(LOCAL), make_learner(INCOMING)
    scores = dict.fromkeys(("before", "local", "incoming", "mix"), 0.2) | {best: 0.6}
    around = context(score=scored_by_value(**scores))
    merge_after(local, incoming, message(), around, RoundResult(), mode="select_best", before=Snapshot(torch.zeros(4)))
    assert equals(incoming.model.flat, INCOMING)


@pytest.mark.parametrize(("mode", "statistics"), [("replace", INCOMING), ("size_weighted", LOCAL)])
def test_statistics_that_are_not_sent_stay_with_the_weights_that_gathered_them(mode: str, statistics: float) -> None:
    """Those of the incoming model are of the receiver's cases, too: it was trained there."""
    local, incoming = (make_batchnorm_learner(value, send_buffers=False) for value in (LOCAL, INCOMING))
    merge_after(local, incoming, message(), context(), RoundResult(), mode=mode, before=None)
    assert equals(local.model.flat[:2], INCOMING if mode == "replace" else 2.0)
    assert equals(local.model.flat[2:], statistics)


def test_a_stale_model_weighs_less_in_the_mix_of_select_best() -> None:
    """Equal scores and a discount of a half: the mix is (2 LOCAL + INCOMING) / 3."""
    local, incoming = make_learner(LOCAL), make_learner(INCOMING)
    mix = torch.full((4,), (2 * LOCAL + INCOMING) / 3)

    def score(learner: Learner) -> float:
        return 0.9 if torch.allclose(learner.model.flat, mix) else 0.5

    stale, before = message(discount=0.5), Snapshot(torch.zeros(4))
    merge_after(local, incoming, stale, context(score=score), RoundResult(), mode="select_best", before=before)
    assert torch.allclose(local.model.flat, mix)


def test_a_stale_model_weighs_less_in_gossip_averaging() -> None:
    """3 own cases, 2 of the sender's at a discount of a half: (3 LOCAL + 1 INCOMING) / 4, and a second one (4, 1)."""
    local = make_learner(LOCAL)
    method = GossipAvgMethod.model_validate({"name": "gossip_avg", "topology": {"name": "ring"}})
    stale = message(2, value=INCOMING, discount=0.5)
    gossip_avg.train_round(local, [stale, stale], context(num_train=3), method)
    assert equals(local.model.flat, (3 * LOCAL + 2 * INCOMING) / 5)
