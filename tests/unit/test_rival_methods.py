"""The methods that GCML is compared with, against steps and means worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from gcml_ray.config import (
    DefKtMethod,
    DittoMethod,
    DpsgdMethod,
    FedAvgMethod,
    FederationConfig,
    FedProxMethod,
    OptimiserConfig,
    ProxyFlMethod,
)
from gcml_ray.data.site_data import Batch
from gcml_ray.gossip.graph import plan_round
from gcml_ray.methods import fedavg
from gcml_ray.methods.dpsgd import neighbour_share
from gcml_ray.model.learner import Learner, local_step
from gcml_ray.model.precision import Precision
from gcml_ray.model.weights import FlatModel, norm_parameters
from gcml_ray.push.wire import Buffer, PushHeader
from gcml_ray.records import Edge
from gcml_ray.training.server import size_weighted_mean
from tests.method_rounds import (
    PUSHES,
    Clock,
    after_local_steps,
    batch_of,
    cross_entropy,
    make_context,
    make_learner,
    message,
    run,
)

START = (0.1, 0.2, 0.3, 0.4)
OTHER = (0.5, -0.2, 0.1, 0.0)
RATE = 0.1  # of the learners in method_rounds.py: plain SGD
FEDAVG = FedAvgMethod(name="fedavg")
RING: dict[str, Any] = {"name": "ring"}
EXPONENTIAL: dict[str, Any] = {"name": "exponential"}


def pushed(learner: Learner, num_train: int) -> tuple[PushHeader, Buffer]:
    """A push of a learner, with the part of its header that the mean needs."""
    header = PushHeader("run", 1, "site", num_train, "", "", (), 0, "float32", "")
    return header, learner.model.flat.detach().numpy().copy()


def ditto(weight: float) -> DittoMethod:
    return DittoMethod.model_validate({"name": "ditto", "lambda": weight})


# --- FedAvg --------------------------------------------------------------------------------------


def test_the_servers_mean_is_weighted_by_training_cases() -> None:
    """(1 x 0 + 3 x 4) / 4 = 3 and (1 x 8 + 3 x 0) / 4 = 2."""
    headers = [PushHeader("run", 1, "s", cases, "", "", (), 2, "float32", "") for cases in (1, 3)]
    buffers = [np.array(values, dtype=np.float32) for values in ((0, 8), (4, 0))]
    assert size_weighted_mean(list(zip(headers, buffers, strict=True))).tolist() == [3, 2]


def quadratic_round(start: float, centre: float) -> Learner:
    """One step of rate 0.1 on (b - c)^2 / 2 for both biases: the image is 0, so the output is the bias."""
    learner = make_learner((0, 0, start, start))
    batch = Batch(image=torch.zeros(1, 1, 1, 1), label=torch.zeros(1, 1, 1, 1))

    def loss(heads: Sequence[Tensor], label: Tensor) -> Tensor:
        del label
        return 0.5 * (heads[0] - centre).square().sum()

    context = replace(make_context(Clock(), num_steps=1), batches=iter([batch]), loss=loss)
    fedavg.train_round(learner, [], context, FEDAVG)
    return learner


def test_fedavg_of_two_quadratic_sites_goes_to_the_weighted_mean_of_their_minima() -> None:
    """2 cases with the minimum at 1, 4 cases with it at -2: the mean's minimum is (2 - 8) / 6 = -1.

    A round is b - 0.1 (b + 1), so after k rounds from 0 it stands at -(1 - 0.9^k).
    """
    value = 0.0
    for number in range(1, 6):
        mean = size_weighted_mean([pushed(quadratic_round(value, 1), 2), pushed(quadratic_round(value, -2), 4)])
        value = float(mean[2])
        assert value == pytest.approx(-(1 - 0.9**number), abs=1e-6)


def test_fedavg_with_one_sgd_step_a_round_is_sgd_on_the_pooled_batch() -> None:
    """Batches of one size and sites of one size: the mean of the steps is the step of the mean gradient."""
    sites = [make_learner(START), make_learner(START)]
    pooled = make_learner(START)
    for number in range(4):
        batches = [batch_of(2 * number), batch_of(2 * number + 1)]
        for site, batch in zip(sites, batches, strict=True):
            context = replace(make_context(Clock(), num_steps=1), batches=iter([batch]))
            fedavg.train_round(site, [], context, FEDAVG)
        mean = torch.from_numpy(size_weighted_mean([pushed(site, 3) for site in sites]))
        for site in sites:
            site.model.load(mean)
        both = Batch(image=torch.cat([b.image for b in batches]), label=torch.cat([b.label for b in batches]))
        local_step(pooled, both, cross_entropy)
        torch.testing.assert_close(mean, pooled.model.flat, rtol=0, atol=1e-6)


# --- FedProx -------------------------------------------------------------------------------------


def test_fedprox_pulls_back_to_the_weights_that_the_round_began_with() -> None:
    """The first step has nothing to pull; the second is w1 - rate (g(w1) + mu (w1 - w0))."""
    mu = 0.5
    w0, w1, plain = (after_local_steps(START, num_steps) for num_steps in (0, 1, 2))
    local = make_learner(START)
    _, result = run(FedProxMethod(name="fedprox", mu=mu), local, num_steps=2)
    torch.testing.assert_close(local.model.flat, plain - RATE * mu * (w1 - w0), rtol=0, atol=1e-7)
    pull = 0.5 * mu * float((w1 - w0).square().sum())
    assert result.statistics.means()["proximal"] == pytest.approx((0 + pull) / 2)


@pytest.mark.parametrize(("mu", "phase"), [(0.0, "exchange"), (0.5, "warmup"), (0.5, "cooldown")])
def test_fedprox_without_mu_or_alone_is_local_training(mu: float, phase: str) -> None:
    local = make_learner(START)
    run(FedProxMethod(name="fedprox", mu=mu), local, phase=phase)
    assert torch.equal(local.model.flat, after_local_steps(START))


# --- FedBN ---------------------------------------------------------------------------------------


def norm_network() -> nn.Sequential:
    """4 + 4 + 6 parameters; the norm in the middle also has 4 statistics."""
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))


def test_fedbn_sends_everything_but_the_norm() -> None:
    model = FlatModel(norm_network(), send_buffers=False, keep_norms=True)
    assert [spec.name for spec in model.sent_layout] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert (model.num_sent, model.num_parameters, model.flat.numel()) == (10, 14, 18)
    assert FlatModel(norm_network(), send_buffers=True).num_sent == 18


def test_fedbn_leaves_norms_untouched_by_what_arrives() -> None:
    module = norm_network()
    model = FlatModel(module, send_buffers=False, keep_norms=True)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    model.load(torch.full((10,), 7.0))
    after = module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("1."))
    assert all(bool((after[name] == 7).all()) for name in before if not name.startswith("1."))


def test_fedbn_trains_its_norms() -> None:
    learner = Learner(
        norm_network(),
        send_buffers=False,
        optimiser=OptimiserConfig(name="sgd", learning_rate=0.1),
        precision=Precision("cpu", "none"),
        keep_norms=True,
    )
    before = {name: value.detach().clone() for name, value in learner.model.module.named_parameters()}
    local_step(learner, batch_of(1), cross_entropy)
    moved = {name for name, value in learner.model.module.named_parameters() if not torch.equal(value, before[name])}
    assert {"1.weight", "1.bias", "0.weight", "2.weight"} <= moved


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.GroupNorm(1, 2), {"1.weight", "1.bias"}),
        (nn.InstanceNorm2d(2, affine=True), {"1.weight", "1.bias"}),
        (nn.InstanceNorm2d(2), set()),
        (nn.LayerNorm([2, 3, 3]), {"1.weight", "1.bias"}),
        (nn.PReLU(), set()),
    ],
)
def test_norms_are_found_by_their_type(layer: nn.Module, expected: set[str]) -> None:
    assert norm_parameters(nn.Sequential(nn.Conv2d(1, 2, 1), layer)) == expected


# --- D-PSGD --------------------------------------------------------------------------------------


def mixing_matrix(topology: dict[str, Any], names: Sequence[str], round_number: int) -> np.ndarray[Any, Any]:
    """W[i, j]: the share of site j's weights in what site i goes on with."""
    method = DpsgdMethod.model_validate({"name": "dpsgd", "topology": topology})
    federation = FederationConfig(rounds=9, local_steps=1, warmup_rounds=0, cooldown_rounds=0)
    plan = plan_round(method, federation, round_number=round_number, num_train=dict.fromkeys(names, 1))
    matrix = np.zeros((len(names), len(names)))
    for edge in plan.edges:
        matrix[names.index(edge.receiver), names.index(edge.sender)] += neighbour_share(method)
    return matrix + np.diag(1 - matrix.sum(axis=1))


@pytest.mark.parametrize("num_sites", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("topology", [RING, EXPONENTIAL])
def test_mixing_matrix_is_doubly_stochastic(topology: dict[str, Any], num_sites: int) -> None:
    for number in (1, 2, 3):
        matrix = mixing_matrix(topology, "ABCDEFGH"[:num_sites], number)
        assert matrix.min() >= 0
        np.testing.assert_allclose(matrix.sum(axis=0), 1)
        np.testing.assert_allclose(matrix.sum(axis=1), 1)


def test_ring_of_three_has_thirds() -> None:
    np.testing.assert_allclose(mixing_matrix(RING, "ABC", 1), np.full((3, 3), 1 / 3))


@pytest.mark.parametrize("topology", [RING, EXPONENTIAL])
def test_mixing_leaves_the_mean_over_sites_as_it_is(topology: dict[str, Any]) -> None:
    method = DpsgdMethod.model_validate({"name": "dpsgd", "topology": topology})
    random = np.random.default_rng(0)
    values = {name: random.normal(size=4) for name in "ABCD"}
    federation = FederationConfig(rounds=4, local_steps=1, warmup_rounds=0, cooldown_rounds=0)
    edges = plan_round(method, federation, round_number=2, num_train=dict.fromkeys("ABCD", 1)).edges
    mixed = []
    for name in "ABCD":
        learner = make_learner(values[name])
        received = [message(edge.sender, values[edge.sender]) for edge in edges if edge.receiver == name]
        _, result = run(method, learner, received, num_steps=0)
        assert result.merge == "mixed"
        mixed.append(learner.model.flat.numpy())
    assert not np.allclose(mixed[0], values["A"])
    np.testing.assert_allclose(np.mean(mixed, axis=0), np.mean(list(values.values()), axis=0), atol=1e-6)


def test_a_missing_neighbours_share_stays_with_the_own_weights() -> None:
    """Ring: 2/3 x 0 + 1/3 x (1, 2, 3, 4)."""
    local = make_learner((0, 0, 0, 0))
    run(DpsgdMethod.model_validate({"name": "dpsgd", "topology": RING}), local, PUSHES[:1], num_steps=0)
    assert local.model.flat.tolist() == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3])


# --- Ditto ---------------------------------------------------------------------------------------


def test_dittos_shared_model_is_fedavgs_and_the_personal_one_is_pulled_to_where_it_began() -> None:
    weight, anchor = 0.5, torch.tensor(START)
    expected = make_learner(OTHER)
    for step in range(3):  # v - rate (g(v) + lambda (v - w))
        pull = expected.model.flat.clone() - anchor
        local_step(expected, batch_of(step), cross_entropy)
        expected.model.flat.sub_(RATE * weight * pull)
    shared, personal = make_learner(START), make_learner(OTHER)
    run(ditto(weight), shared, personal=personal)
    assert torch.equal(shared.model.flat, after_local_steps(START))
    torch.testing.assert_close(personal.model.flat, expected.model.flat, rtol=0, atol=1e-6)


def test_ditto_trains_both_models_plainly_in_the_warmup() -> None:
    shared, personal = make_learner(START), make_learner(OTHER)
    run(ditto(0.5), shared, personal=personal, phase="warmup")
    assert torch.equal(shared.model.flat, after_local_steps(START))
    assert torch.equal(personal.model.flat, after_local_steps(OTHER))


def test_dittos_shared_model_rests_in_the_cooldown() -> None:
    shared, personal = make_learner(START), make_learner(OTHER)
    run(ditto(0.5), shared, personal=personal, phase="cooldown")
    assert torch.equal(shared.model.flat, torch.tensor(START))
    assert torch.equal(personal.model.flat, after_local_steps(OTHER))


# --- ProxyFL and Def-KT ----------------------------------------------------------------------------


def sgd_step(weights: Tensor, peer: Tensor, batch: Batch, *, own_share: float, peer_share: float) -> Tensor:
    """One step on own_share x CE + peer_share x KL(peer || own), means over all pixels, with plain torch."""
    own = weights.clone().requires_grad_()

    def logits(vector: Tensor) -> Tensor:
        return F.conv2d(batch.image, vector[:2].reshape(2, 1, 1, 1), vector[2:])

    divergence = F.kl_div(F.log_softmax(logits(own), 1), F.softmax(logits(peer), 1).detach(), reduction="none").sum(
        dim=1
    )
    loss = own_share * F.cross_entropy(logits(own), batch.label[:, 0]) + peer_share * divergence.mean()
    (gradient,) = torch.autograd.grad(loss, own)
    return (own - RATE * gradient).detach()


def proxyfl(alpha: float, beta: float) -> ProxyFlMethod:
    return ProxyFlMethod.model_validate({"name": "proxyfl", "topology": EXPONENTIAL, "alpha": alpha, "beta": beta})


def test_proxyfl_steps_are_those_written_by_hand() -> None:
    private, proxy = torch.tensor(OTHER), torch.tensor(START)
    for step in range(3):
        private, proxy = (
            sgd_step(private, proxy, batch_of(step), own_share=0.7, peer_share=0.3),
            sgd_step(proxy, private, batch_of(step), own_share=0.4, peer_share=0.6),
        )
    local, personal = make_learner(START), make_learner(OTHER)
    run(proxyfl(0.3, 0.6), local, personal=personal)
    torch.testing.assert_close(personal.model.flat, private, rtol=0, atol=1e-6)
    torch.testing.assert_close(local.model.flat, proxy, rtol=0, atol=1e-6)


def test_the_incoming_proxy_replaces_the_own_one_and_not_the_private_model() -> None:
    local, personal = make_learner(START), make_learner(OTHER)
    _, result = run(proxyfl(0.3, 0.6), local, PUSHES[:1], personal=personal, num_steps=0)
    assert local.model.flat.tolist() == [1, 2, 3, 4]
    assert torch.equal(personal.model.flat, torch.tensor(OTHER))
    assert result.merge == "replace"


@pytest.mark.parametrize(("phase", "proxy"), [("warmup", after_local_steps(START)), ("cooldown", torch.tensor(START))])
def test_proxyfl_alone_takes_plain_steps_and_its_proxy_rests_in_the_cooldown(phase: str, proxy: Tensor) -> None:
    local, personal = make_learner(START), make_learner(OTHER)
    run(proxyfl(0.3, 0.6), local, personal=personal, phase=phase)
    assert torch.equal(personal.model.flat, after_local_steps(OTHER))
    assert torch.equal(local.model.flat, proxy)


def test_defkt_goes_on_with_the_incoming_model_after_mutual_steps_written_by_hand() -> None:
    local, incoming = torch.tensor(START), PUSHES[0].weights.clone()
    for step in range(3):
        local, incoming = (
            sgd_step(local, incoming, batch_of(step), own_share=1, peer_share=1),
            sgd_step(incoming, local, batch_of(step), own_share=1, peer_share=1),
        )
    receiver = make_learner(START)
    _, result = run(DefKtMethod.model_validate({"name": "defkt", "topology": RING}), receiver, PUSHES[:1])
    torch.testing.assert_close(receiver.model.flat, incoming, rtol=0, atol=1e-6)
    assert result.merge == "replace"


# --- plans -----------------------------------------------------------------------------------------


def test_with_a_server_everybody_sends_to_it_and_it_to_everybody() -> None:
    federation = FederationConfig(rounds=3, local_steps=1, warmup_rounds=1, cooldown_rounds=1)
    plans = [plan_round(FEDAVG, federation, round_number=n, num_train={"A": 1, "B": 2}) for n in (1, 2, 3)]
    edges = (Edge("A", "server"), Edge("B", "server"), Edge("server", "A"), Edge("server", "B"))
    assert [plan.edges for plan in plans] == [(), edges, ()]
    assert plans[1].sites == ("A", "B")
