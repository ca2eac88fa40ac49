"""ProxyFL: a private model that never leaves its site, and a proxy that travels; the two learn from each other.

Kalra, Wen, Cresswell, Volkovs, Tizhoosh: "Decentralized federated learning through proxy model sharing", Nature
Communications 14, 2023, arXiv 2111.11343. Private loss (1 - alpha) L_seg + alpha KL, the proxy's the same with
beta; after each round the proxy is handed on along a one-peer exponential graph, and replaces the receiver's.
The divergence is that of deep mutual learning: KL(peer || learner), mean over all voxels, peer without gradient.

Our reading: the differential privacy of the paper's proxies is no part of the method, but an option of all
(``gcml_ray/privacy/training.py``), for both models. A proxy keeps its site's optimiser moments when its weights are
replaced. Private models start from weights of their own, other than the proxy's, and may have a network of their
own (``site_networks``). Warm-up: both take plain steps. Cool-down: the private model takes plain steps, the proxy
stays. A site holds two networks with gradients and moments.
"""

from __future__ import annotations

from collections.abc import Sequence

from gcml_ray.config import Method, ProxyFlMethod
from gcml_ray.data.site_data import Batch
from gcml_ray.losses.mutual import mutual_divergences
from gcml_ray.methods.defkt import MUTUAL
from gcml_ray.methods.local import train_alone
from gcml_ray.methods.rounds import IncomingModel, RoundContext, RoundResult, run_steps
from gcml_ray.model.learner import Learner, Statistics, local_step


def train_round(
    local: Learner, incoming: Sequence[IncomingModel], context: RoundContext, method: Method
) -> RoundResult:
    """Takes over the proxy that came in, then steps of private model and proxy on every batch.

    Args:
        local: the proxy.
        incoming: at most one other site's proxy.
        context: its ``personal`` is the private model.
        method: alpha and beta.
    """
    assert isinstance(method, ProxyFlMethod)
    assert context.personal is not None
    private = context.personal
    for push in incoming:
        local.model.load(push.weights)
    if context.phase == "cooldown":
        return train_alone(private, context)
    result = RoundResult(merge="replace" if incoming else "")

    def step(batch: Batch) -> Statistics:
        if context.phase == "warmup":
            proxy = local_step(local, batch, context.loss)
            return local_step(private, batch, context.loss) | {"shared_segmentation": proxy["segmentation"]}
        return proxy_step(private, local, batch, context, alpha=method.alpha, beta=method.beta)

    run_steps([private, local], step, context, result, num_steps=context.num_steps)
    return result


def proxy_step(
    private: Learner, proxy: Learner, batch: Batch, context: RoundContext, *, alpha: float, beta: float
) -> Statistics:
    """One step of both models on a batch of (B, C, *spatial) patches; neither's gradient reaches the other."""
    private_heads, proxy_heads = private.forward(batch.image), proxy.forward(batch.image)
    private_loss, proxy_loss = context.loss(private_heads, batch.label), context.loss(proxy_heads, batch.label)
    sigmoid = context.sigmoid
    private_term, proxy_term, _ = mutual_divergences(
        private_heads[0], proxy_heads[0], batch.label, dcml=MUTUAL, sigmoid=sigmoid
    )
    private.apply_gradients((1 - alpha) * private_loss + alpha * private_term)
    proxy.apply_gradients((1 - beta) * proxy_loss + beta * proxy_term)
    return {
        "segmentation": private_loss.detach(),
        "shared_segmentation": proxy_loss.detach(),
        "mutual": private_term.detach(),
        "shared_mutual": proxy_term.detach(),
    }
