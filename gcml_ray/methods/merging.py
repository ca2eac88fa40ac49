"""What becomes of the local and the incoming weights: mixing before, merging after the mutual steps.

docs/method.md, What becomes of the two models (our reading, but ``keep_local``, which is GML's "instead of averaging or
merging", and ``replace``, which is Def-KT's). All weights are flat vectors; S values are those of a push.
"""

from __future__ import annotations

from gcml_ray.methods.rounds import IncomingModel, RoundContext, RoundResult
from gcml_ray.model.learner import Learner
from gcml_ray.model.weights import Snapshot


def own_share_by_score(own: float, other: float) -> float:
    """Share of the own weights by validation Dice, own / (own + other); 0.5 if both are 0."""
    return own / (own + other) if own + other > 0 else 0.5


def own_share_by_size(context: RoundContext, push: IncomingModel) -> float:
    """Share of the own weights by training cases, n_own / (n_own + d n_other); d < 1 discounts a stale push."""
    return context.num_train / (context.num_train + push.discount * push.num_train)


def merge_before(local: Learner, incoming: Learner, push: IncomingModel, context: RoundContext, *, mode: str) -> None:
    """Mixes the incoming weights into the local ones before the mutual steps (``merge_first``)."""
    if mode == "none":
        return
    if mode == "size_weighted":
        share = own_share_by_size(context, push)
    else:
        share = own_share_by_score(context.score(local), push.discount * context.score(incoming))
    local.model.mix(incoming.model.flat[: incoming.model.num_sent], own_share=share)


def merge_after(
    local: Learner,
    incoming: Learner,
    push: IncomingModel,
    context: RoundContext,
    result: RoundResult,
    *,
    mode: str,
    before: Snapshot | None,
) -> None:
    """Leaves in ``local`` the model that goes on, and says in ``result`` which one that is.

    Args:
        local: the receiver's model after the mutual steps; changed in place.
        incoming: the sender's model after the mutual steps.
        push: the push, for the sender's number of cases.
        context: for scores on the receiver's validation cases.
        result: gets ``merge``, ``candidate_dice`` and, where the kept model was scored, ``validation_dice``.
        mode: one of the merge modes of docs/method.md.
        before: the local model before it met this incoming one (``select_best`` only).
    """
    incoming_weights = incoming.model.flat[: incoming.model.num_sent]
    result.merge = mode
    result.validation_dice = None
    if mode == "size_weighted":
        local.model.mix(incoming_weights, own_share=own_share_by_size(context, push))
    elif mode == "val_weighted":
        scores = {"local_after": context.score(local), "incoming_after": context.score(incoming)}
        share = own_share_by_score(scores["local_after"], push.discount * scores["incoming_after"])
        local.model.mix(incoming_weights, own_share=share)
        result.candidate_dice = scores
    elif mode == "replace":
        local.model.take_over(incoming.model)  # with the statistics and norms that it trained here
    elif mode == "select_best":
        assert before is not None
        _select_best(local, incoming, push, context, result, before=before)


def _select_best(
    local: Learner,
    incoming: Learner,
    push: IncomingModel,
    context: RoundContext,
    result: RoundResult,
    *,
    before: Snapshot,
) -> None:
    """Keeps the best on validation of: local after, the mix, incoming after, local before.

    Ties, common with small validation sets, go to the earlier in that order: to the candidate with the most training.
    """
    after = local.model.snapshot()
    scores = {"local_after": context.score(local), "incoming_after": context.score(incoming)}
    incoming_weights = incoming.model.flat[: incoming.model.num_sent]
    share = own_share_by_score(scores["local_after"], push.discount * scores["incoming_after"])
    local.model.mix(incoming_weights, own_share=share)
    mixed = local.model.snapshot()
    scores["mix"] = context.score(local)
    local.model.restore(before)
    scores["local_before"] = context.score(local)
    best = max(("local_after", "mix", "incoming_after", "local_before"), key=lambda name: scores[name])
    if best == "incoming_after":
        local.model.take_over(incoming.model)  # with its statistics and norms, as it was scored, not with the own ones
    elif best != "local_before":
        local.model.restore(after if best == "local_after" else mixed)
    result.merge = best
    result.candidate_dice = scores
    result.validation_dice = scores[best]
