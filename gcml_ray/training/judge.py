"""Judging an incoming model at its receiver, before it may touch the local one.

A push may be well formed and still do harm: random weights, turned signs, a model of wrong labels. The receiver
compares it with what that sender sent before (the same again is a replay, or of no use) and with its own model: norm,
direction (where all sites started from the same weights), and Dice on a patch of a few validation cases. The rules are
lenient, since models of very different hospitals are what mutual learning is for: as long as the own model has
learnt little nothing is refused for its Dice, and then only what is far worse. A sender that was refused before has
to do better. Our own; no paper.

Legend: S values of a push, P values of parameters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gcml_ray.config import Config
from gcml_ray.config.defence import DefenceConfig
from gcml_ray.methods.rounds import IncomingModel
from gcml_ray.model.learner import Learner
from gcml_ray.push.wire import checksum
from gcml_ray.records import Judgement
from gcml_ray.training.evaluation import Evaluator
from gcml_ray.training.exchange import Exchange
from gcml_ray.training.site_files import SiteFiles
from gcml_ray.training.site_learner import exchanged_network

MAX_SUSPICION = 4
PIECE_VALUES = 2**18  # of two vectors at a time: they stay in cache, and float32 sums of so many are exact enough
SHARE_PER_SUSPICION = 0.25  # each refusal raises the Dice that is asked for by a quarter, up to twice as much


@dataclass(frozen=True)
class Facts:
    """What the receiver has measured; None where a fact was not measured or means nothing.

    ``is_replay``: the sender's last push to this receiver was the same to the last bit, and see :func:`may_repeat`.
    ``norm_ratio``: |incoming| / |own|; ``cosine``: of the angle between both; ``dice`` and ``own_dice``: mean Dice of
    the incoming and the own model on the same patches of validation cases, ``dice`` perhaps on the first of them alone
    where these settled it.
    """

    is_replay: bool = False
    norm_ratio: float | None = None
    cosine: float | None = None
    dice: float | None = None
    own_dice: float | None = None


def may_repeat(config: Config) -> bool:
    """Whether an honest site may send identical weights twice: with ``select_best``, or once its epsilon is spent.

    Without either, a site that repeats an interrupted round sends the same once more; that one push is refused.
    """
    return getattr(config.method, "merge", "") == "select_best" or config.privacy.epsilon_limit is not None


# --- the rule --------------------------------------------------------------------------------


def objection(facts: Facts, defence: DefenceConfig, *, suspicion: int) -> str:
    """Why a model must be left out; empty where it may be learnt from.

    Args:
        facts: what was measured.
        defence: the thresholds.
        suspicion: how often its sender was refused, less how often it was accepted since; 0 to ``MAX_SUSPICION``.
    """
    if facts.is_replay:
        return "replay: exactly these weights came from this sender before"
    ratio, limit = facts.norm_ratio, defence.max_norm_ratio
    if ratio is not None and not 1 / limit <= ratio <= limit:
        return f"norm: {ratio:.3g} times that of the own weights, allowed is {1 / limit:.2g} to {limit:g}"
    if facts.cosine is not None and facts.cosine < defence.min_cosine:
        return (
            f"direction: cosine {facts.cosine:.2f} with the own weights, at least {defence.min_cosine:g} is asked for"
        )
    if facts.dice is None or facts.own_dice is None or facts.own_dice < defence.min_own_dice:
        return ""
    least = facts.own_dice * dice_share(defence, suspicion)
    if facts.dice < least:
        return (
            f"validation: Dice {facts.dice:.3f} on cases where the own model has {facts.own_dice:.3f}, "
            f"at least {least:.3f} is asked for"
        )
    return ""


def dice_share(defence: DefenceConfig, suspicion: int) -> float:
    """The share of the own Dice that a sender's model must reach."""
    return min(1.0, defence.min_dice_share * (1 + SHARE_PER_SUSPICION * min(suspicion, MAX_SUSPICION)))


def suspicion_after(suspicion: Mapping[str, int], judged: Sequence[Judgement]) -> dict[str, int]:
    """The suspicion against each sender after these judgements; senders without any are left out."""
    after = dict(suspicion)
    for judgement in judged:
        step = -1 if judgement.accepted else 1
        after[judgement.sender] = min(MAX_SUSPICION, max(0, after.get(judgement.sender, 0) + step))
    return {sender: count for sender, count in after.items() if count}


# --- measuring -------------------------------------------------------------------------------


def compare_weights(own: Tensor, incoming: Tensor, *, common_init: bool) -> Facts:
    """Norm ratio and cosine of two vectors of parameters, (P,), on one device.

    Args:
        own: the receiver's.
        incoming: the sender's.
        common_init: whether both started from the same weights; else their directions have nothing in common.
    """
    pieces = zip(torch.split(own, PIECE_VALUES), torch.split(incoming, PIECE_VALUES), strict=True)
    products = [torch.stack([torch.dot(a, a), torch.dot(b, b), torch.dot(a, b)]) for a, b in pieces]
    own_square, incoming_square, product = torch.stack(products).double().sum(0).tolist()
    ratio = math.sqrt(incoming_square / own_square) if own_square else float("inf")
    lengths = math.sqrt(own_square) * math.sqrt(incoming_square)
    return Facts(norm_ratio=ratio, cosine=product / lengths if common_init and lengths else None)


class Judge:
    """One receiver's judgements. What it remembers is part of the site's checkpoint.

    Args:
        config: its ``defence`` section says what to measure, and the thresholds.
        site: the receiver.
        files: hold the site's state.
        evaluator: measures Dice on the receiver's validation cases.
    """

    def __init__(self, config: Config, site: str, files: SiteFiles, evaluator: Evaluator) -> None:
        self.config = config
        self.site = site
        self.files = files
        self.evaluator = evaluator

    @property
    def is_active(self) -> bool:
        """Whether anything is checked at all."""
        return self.config.defence.weights or self.config.defence.validation

    def screen(
        self, arrived: Sequence[IncomingModel], own: Learner, exchange: Exchange
    ) -> tuple[list[IncomingModel], tuple[Judgement, ...]]:
        """The models that may be learnt from, and what was made of each.

        Args:
            arrived: the pushes of a round, (S,) each.
            own: the receiver's exchanged model.
            exchange: opens a push in a second learner.
        """
        state = self.files.state
        sums = {push.sender: checksum(push.weights.numpy()) for push in arrived}
        repeated = {sender for sender, own_sum in sums.items() if state.last_push.get(sender) == own_sum}
        own_dice = functools.cache(lambda: self.evaluator.patch_dice(own, self.config.defence.cases))
        judged = tuple(
            self._judge(push, own, own_dice, exchange, is_repeated=push.sender in repeated) for push in arrived
        )
        self.files.state = replace(
            self.files.state,
            suspicion=suspicion_after(state.suspicion, judged),
            last_push=state.last_push | sums,
            best_patch_dice=max([state.best_patch_dice, *(one.own_dice for one in judged if one.own_dice is not None)]),
        )
        return [push for push, one in zip(arrived, judged, strict=True) if one.accepted], judged

    def _judge(
        self,
        push: IncomingModel,
        own: Learner,
        own_dice: Callable[[], float],
        exchange: Exchange,
        *,
        is_repeated: bool,
    ) -> Judgement:
        """Measures one push, the cheapest first, no further than to the first objection."""
        defence = self.config.defence
        suspicion = self.files.state.suspicion.get(push.sender, 0)
        facts = Facts(is_replay=defence.weights and is_repeated and not may_repeat(self.config))
        reason = objection(facts, defence, suspicion=suspicion)
        networks = {exchanged_network(self.config, site).model_dump_json() for site in (self.site, push.sender)}
        if defence.weights and not reason and len(networks) == 1:
            size = min(own.model.num_parameters, own.model.num_sent)  # statistics of layers may differ by any factor
            incoming = push.weights[:size].to(own.model.flat.device)
            facts = compare_weights(own.model.flat[:size], incoming, common_init=self.config.federation.common_init)
            reason = objection(facts, defence, suspicion=suspicion)
        if defence.validation and not reason:

            def dice(enough: float) -> float:
                return self.evaluator.patch_dice(exchange.open_incoming(push), defence.cases, enough=enough)

            facts = self._scored(facts, dice, own_dice, suspicion=suspicion)
            reason = objection(facts, defence, suspicion=suspicion)
        return Judgement(push.sender, not reason, reason, facts.norm_ratio, facts.cosine, facts.dice, facts.own_dice)

    def _scored(
        self, facts: Facts, dice: Callable[[float], float], own_dice: Callable[[], float], *, suspicion: int
    ) -> Facts:
        """Adds the Dice of both models, or of one where that decides; measures the likely decisive one first.

        An own Dice below ``min_own_dice`` refuses nobody; an incoming Dice that would pass beside an own Dice of 1
        passes anyway. What the own model has reached so far, on whole validation cases or on these patches, says
        which of the two is likelier.
        """
        defence, state = self.config.defence, self.files.state
        share = dice_share(defence, suspicion)
        if max(state.best_dice, state.best_patch_dice) < defence.min_own_dice:
            facts = replace(facts, own_dice=own_dice())
            return facts if own_dice() < defence.min_own_dice else replace(facts, dice=dice(share * own_dice()))
        incoming = dice(share)
        return replace(facts, dice=incoming, own_dice=None if incoming >= share else own_dice())
