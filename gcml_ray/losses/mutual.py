"""Deep contrastive mutual learning (DCML): how far a learner's prediction is from a peer's, and where that counts.

The contrast of right and wrong peer predictions is GCML's (Chen and Yuan, arXiv 2503.03883, IEEE TMI 2025);
its authors published no code, so the regions, the bound ``tau`` and the normalisation are our reading.
``regional`` is GML's form (arXiv 2401.06180), ``mutual`` is deep mutual learning (Zhang et al., CVPR 2018),
``contrast_soft`` is ours.

Legend:
    B batch, C output channels, *spatial = (H, W) or (D, H, W).
    K items compared at a voxel: 1 (softmax), C - 1 (softmax, class-wise: one foreground class against the rest)
    or C (sigmoid: one channel against its complement).
    P, Q probabilities of the learner and of the peer; y the target. Divergences are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows it by
from torch import Tensor

from gcml_ray.config import DcmlConfig


@dataclass(frozen=True)
class MutualStatistics:
    """What one mutual divergence consisted of: detached 0-dim tensors, left on their device.

    Attributes:
        pull: the term over R+ as it entered D, in nats.
        push: the term over R-, before ``beta`` and its sign, in nats; 0 for variants without one.
        pull_share: share of the compared items (voxels, or voxels x channels) that pull, 0 to 1.
        push_share: share that pushes.
        omega_share: share that lies in the region of interest Omega.
    """

    pull: Tensor
    push: Tensor
    pull_share: Tensor
    push_share: Tensor
    omega_share: Tensor


@dataclass(frozen=True)
class _Prediction:
    """What one model says, all (B, K or C, *spatial).

    ``log_yes`` and ``log_no`` are the logarithms of the probabilities that are compared: of yes and of no (K), or of
    every class (C), with ``log_no`` None. ``label`` is the hard prediction, boolean or integer, foreground above 0.
    """

    log_yes: Tensor
    log_no: Tensor | None
    label: Tensor

    def detach(self) -> _Prediction:
        """The same prediction detached from the graph (stop-gradient)."""
        return _Prediction(self.log_yes.detach(), None if self.log_no is None else self.log_no.detach(), self.label)


@dataclass(frozen=True)
class _Comparison:
    """Learner against peer, all (B, K, *spatial).

    ``truth``, ``learner`` and ``peer`` are hard labels, integer or boolean, with the foreground above 0.
    ``lead`` is the peer's lead q_y - p_y on the true class, None where no variant asks for it.
    """

    divergence: Tensor
    truth: Tensor
    learner: Tensor
    peer: Tensor
    lead: Tensor | None

    def omega(self) -> Tensor:
        """Region of interest: foreground in the truth or in either prediction."""
        return _foreground(self.truth) | _foreground(self.learner) | _foreground(self.peer)


def mutual_divergences(
    local_logits: Tensor, incoming_logits: Tensor, target: Tensor, *, dcml: DcmlConfig, sigmoid: bool
) -> tuple[Tensor, Tensor, MutualStatistics]:
    """D(P, sg[Q], y) in both directions: the mutual part of each model's loss, before lambda.

    docs/method.md, The divergence. P is the model that learns, Q the peer, detached here; each of the two models is
    P once. With KL = KL(Q || P) a voxel, Omega = {y > 0} or {p^ > 0} or {q^ > 0}, and the masked sum over a region
    divided by max(1, |region|), |Omega| or the volume (``dcml.normalise``):

    - ``contrast``: KL over R+ (peer right) - beta x min(KL, tau) over R- (peer wrong);
    - ``contrast_hinge``: KL over R+ + beta x max(0, tau - KL) over R-; never negative;
    - ``contrast_advantage``: as ``contrast``, but only where exactly one of the two is right;
    - ``contrast_soft``: as ``contrast`` over Omega, weighted by the lead of the better model on the true class;
    - ``regional``: KL over {y > 0}; ``mutual``: KL over everything; ``none``: 0.

    In sigmoid mode KL, Omega, R+ and R- are formed for each channel, and the sums run over voxels and
    channels together. ``dcml.classwise`` instead forms D for each class (softmax: one foreground class
    against the rest) and takes the mean over the classes that occur in ``target``.

    Computed in float32 outside autocast (float64 stays float64). Nothing is read back from the device.

    Args:
        local_logits: (B, C, *spatial), the main head of one model.
        incoming_logits: (B, C, *spatial), the main head of the other.
        target: softmax: integer labels (B, 1, *spatial); sigmoid: {0, 1} of shape (B, C, *spatial).
        dcml: variant, beta, tau and normalisation. Its ``weight`` is not applied, see :func:`mutual_weight`.
        sigmoid: whether channels are independent (nested regions) rather than exclusive classes.

    Returns:
        D for the first model to learn by, D for the second, both 0-dim tensors, and what the first consisted of.

    Raises:
        ValueError: where the shapes do not belong together.
    """
    _check_shapes(local_logits, incoming_logits, target, sigmoid=sigmoid)
    if dcml.variant == "none":
        zero, nothing = _nothing(local_logits)
        return zero, zero, nothing
    with torch.autocast(device_type=local_logits.device.type, enabled=False):
        truth = _truth(local_logits, target, dcml=dcml, sigmoid=sigmoid)
        local, incoming = (_predict(logits, dcml=dcml, sigmoid=sigmoid) for logits in (local_logits, incoming_logits))
        local_term, seen = _divergence(_compare(local, incoming.detach(), truth, target, dcml), dcml)
        incoming_term, _ = _divergence(_compare(incoming, local.detach(), truth, target, dcml), dcml)
        return local_term, incoming_term, seen


def _nothing(logits: Tensor) -> tuple[Tensor, MutualStatistics]:
    """The divergence of the variant that has none."""
    zero = logits.new_zeros((), dtype=torch.float32)
    return zero, MutualStatistics(zero, zero, zero, zero, zero)


def mutual_weight(dcml: DcmlConfig, exchange_round_index: int) -> float:
    """Lambda in one exchange round, with linear ramp-up.

    The first ``ramp_up_rounds`` exchange rounds get lambda x 1/(n+1), 2/(n+1), ..., n/(n+1), all later ones
    lambda: so no exchange round is spent on a weight of zero, and a ramp-up of one round is one.

    Args:
        dcml: gives lambda (``weight``) and ``ramp_up_rounds``.
        exchange_round_index: 0 for the first round with an exchange (warm-up rounds are not counted).

    Raises:
        ValueError: where the index is negative.
    """
    if exchange_round_index < 0:
        raise ValueError(f"exchange_round_index is {exchange_round_index}, the first exchange round is 0")
    return dcml.weight * min(1.0, (exchange_round_index + 1) / (dcml.ramp_up_rounds + 1))


# --- comparing two predictions ------------------------------------------------------------------


def _truth(logits: Tensor, target: Tensor, *, dcml: DcmlConfig, sigmoid: bool) -> Tensor:
    """The target as labels like those of :class:`_Prediction`."""
    if sigmoid:
        return target > 0
    return target == _foreground_classes(logits) if dcml.classwise else _comparable(target, logits.shape[1])


def _predict(logits: Tensor, *, dcml: DcmlConfig, sigmoid: bool) -> _Prediction:
    """What a model says by its logits (B, C, *spatial).

    Softmax: over all classes; class-wise each foreground class against the rest. Sigmoid: each channel against its
    complement; it is predicted where its probability exceeds 0.5.
    """
    logits = _full_precision(logits)
    if sigmoid:
        return _Prediction(F.logsigmoid(logits), F.logsigmoid(-logits), logits.detach() > 0)
    if not dcml.classwise:
        return _Prediction(logits.log_softmax(1), None, _comparable(_top_class(logits), logits.shape[1]))
    top = _top_class(logits)
    return _Prediction(*_log_one_and_rest(logits, top), top == _foreground_classes(logits))


def _compare(learner: _Prediction, peer: _Prediction, truth: Tensor, target: Tensor, dcml: DcmlConfig) -> _Comparison:
    """One divergence a voxel over all classes, or one a voxel and yes-or-no prediction."""
    lead, with_lead = None, dcml.variant == "contrast_soft"
    if learner.log_no is None or peer.log_no is None:
        divergence = _kl(learner.log_yes, peer.log_yes).sum(1, keepdim=True)
        if with_lead:
            true = target.long()
            lead = peer.log_yes.gather(1, true).exp() - learner.log_yes.detach().gather(1, true).exp()
    else:
        divergence = _kl(learner.log_yes, peer.log_yes) + _kl(learner.log_no, peer.log_no)
        if with_lead:
            advantage = peer.log_yes.exp() - learner.log_yes.detach().exp()
            lead = torch.where(truth, advantage, -advantage)
    # Rounding may leave -1e-8. A clamp at 0 would take the gradient away there, which is no rounding error.
    return _Comparison(divergence, truth, learner.label, peer.label, lead)


def _foreground_classes(logits: Tensor) -> Tensor:
    """The numbers 1 to C - 1, (1, C - 1, 1, ...)."""
    return torch.arange(1, logits.shape[1], device=logits.device).view(1, -1, *[1] * (logits.ndim - 2))


def _comparable(label: Tensor, num_classes: int) -> Tensor:
    """Labels (B, 1, *spatial) to be compared with one another: of two classes as booleans, which is faster."""
    return _foreground(label) if num_classes == 2 else label.long()


def _log_one_and_rest(logits: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of P_c and of 1 - P_c for the foreground classes, (B, C - 1, *spatial) each.

    log(1 - P_c) is exact enough from P_c unless c is the likeliest class; that one is summed from the others,
    because 1 - P rounds to 0 where a network is certain.

    Args:
        logits: (B, C, *spatial).
        top: the likeliest class, (B, 1, *spatial), integer or boolean.
    """
    log_p = logits.log_softmax(1)
    is_top = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, top.long(), value=True)
    rest_of_top = log_p.masked_fill(is_top, -torch.inf).logsumexp(1, keepdim=True)
    log_p, is_top = log_p[:, 1:], is_top[:, 1:]
    rest_of_others = torch.log1p(-log_p.exp().masked_fill(is_top, 0.0))
    return log_p, torch.where(is_top, rest_of_top, rest_of_others)


def _top_class(logits: Tensor) -> Tensor:
    """The likeliest class, the first of equals, (B, 1, *spatial); booleans for two classes.

    By max, as argmax over this axis is ten times slower on a CPU; two are compared, faster again.
    """
    logits = logits.detach()
    if logits.shape[1] == 2:
        return logits[:, 1:] > logits[:, :1]
    return logits.max(1, keepdim=True).indices


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The summands Q log(Q/P) of KL(Q || P)."""
    return F.kl_div(log_p, log_q, reduction="none", log_target=True)


# --- regions and sums ---------------------------------------------------------------------------


def _foreground(label: Tensor) -> Tensor:
    return label if label.dtype == torch.bool else label > 0


def _weights(comparison: _Comparison, dcml: DcmlConfig, omega: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where, and how strongly, the learner is pulled and pushed: masks (or weights for contrast_soft).

    Returns:
        Pull and push, (B, K, *spatial) each; push is None for variants that never push.
    """
    truth, learner, peer = comparison.truth, comparison.learner, comparison.peer
    match dcml.variant:
        case "regional":
            return _foreground(truth), None
        case "mutual":
            return torch.ones_like(omega), None
        case "contrast_advantage":  # lies in Omega anyway: where just one of the two is right, one is foreground
            peer_right, learner_right = peer == truth, learner == truth
            return peer_right & ~learner_right, learner_right & ~peer_right
        case "contrast_soft":
            assert comparison.lead is not None
            lead = comparison.lead * omega
            return lead.clamp_min(0), (-lead).clamp_min(0) * (peer != truth)
        case _:
            peer_right = peer == truth
            return omega & peer_right, omega & ~peer_right


def _divergence(comparison: _Comparison, dcml: DcmlConfig) -> tuple[Tensor, MutualStatistics]:
    """D and its parts from a comparison: masked sums, their denominators, the mean over classes."""
    distance, omega = comparison.divergence, comparison.omega()
    axes = [axis for axis in range(distance.ndim) if axis != 1 or not dcml.classwise]
    pull_weight, push_weight = _weights(comparison, dcml, omega)
    omega_count = omega.sum(axes)

    def masked_mean(values: Tensor, weight: Tensor) -> Tensor:
        is_mask = weight.dtype == torch.bool  # soft weights have no region of their own but Omega
        total = (torch.where(weight, values, 0.0) if is_mask else values * weight).sum(axes)
        if dcml.normalise == "volume":
            return total / (values.numel() // total.numel())
        count = weight.sum(axes) if dcml.normalise == "region" and is_mask else omega_count
        return total / count.clamp_min(1)

    pull = _over_classes(masked_mean(distance, pull_weight), comparison.truth, axes)
    if push_weight is None:
        push = torch.zeros_like(pull, requires_grad=False)
        loss = pull
    else:
        hinge = dcml.variant == "contrast_hinge"
        bounded = (dcml.tau - distance).clamp_min(0) if hinge else distance.clamp_max(dcml.tau)
        push = _over_classes(masked_mean(bounded, push_weight), comparison.truth, axes)
        loss = pull + dcml.beta * push if hinge else pull - dcml.beta * push
    return loss, MutualStatistics(
        pull=pull.detach(),
        push=push.detach(),
        pull_share=_share(pull_weight),
        push_share=torch.zeros_like(pull, requires_grad=False) if push_weight is None else _share(push_weight),
        omega_share=omega_count.sum() / omega.numel(),
    )


def _over_classes(values: Tensor, truth: Tensor, axes: list[int]) -> Tensor:
    """The mean over the classes that occur in the target; a 0-dim tensor (not class-wise) passes through."""
    if values.ndim == 0:
        return values
    present = _foreground(truth).sum(axes) > 0
    return (values * present).sum() / present.sum().clamp_min(1)


def _share(weight: Tensor) -> Tensor:
    """Share of the items with a weight above 0."""
    return torch.count_nonzero(weight) / weight.numel()


# --- checks -------------------------------------------------------------------------------------


def _full_precision(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _check_shapes(learner: Tensor, peer: Tensor, target: Tensor, *, sigmoid: bool) -> None:
    """Raise ValueError with the shapes at odds."""
    if learner.shape != peer.shape or learner.ndim not in (4, 5):
        raise ValueError(
            f"learner logits {tuple(learner.shape)} and peer logits {tuple(peer.shape)} must have one shape, "
            "(B, C, H, W) or (B, C, D, H, W): both models must predict the same classes of the same patch"
        )
    if not sigmoid and learner.shape[1] < 2:
        raise ValueError(f"logits {tuple(learner.shape)}: softmax needs the background and at least one more class")
    channels = learner.shape[1] if sigmoid else 1
    if target.shape != (learner.shape[0], channels, *learner.shape[2:]):
        wanted = "(B, C, *spatial), one channel a region" if sigmoid else "(B, 1, *spatial), integer labels"
        raise ValueError(
            f"target {tuple(target.shape)} does not belong to logits {tuple(learner.shape)}: expected {wanted}"
        )
