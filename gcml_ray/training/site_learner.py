"""Building a site's models as its method wants them, and what pushes of such a model look like.

Legend: S values of a push.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gcml_ray.config import Config, NetworkConfig, ProxyFlMethod, keeps_norms, sends_buffers
from gcml_ray.config.wire import WireConfig
from gcml_ray.data.contract import data_contract
from gcml_ray.errors import ConfigError
from gcml_ray.model.learner import Learner
from gcml_ray.model.precision import Precision
from gcml_ray.model.start_weights import load_start_weights
from gcml_ray.model.weight_average import WeightAverage
from gcml_ray.model.weights import FlatModel
from gcml_ray.networks.registry import build_network, check_sizes, fingerprint
from gcml_ray.privacy.training import check_network
from gcml_ray.push.payload import push_bytes
from gcml_ray.push.wire import WIRE_DTYPE, Buffer, Expectation, PushHeader, TensorSpec, checksum
from gcml_ray.seeding import derive_seed


def exchanged_network(config: Config, site: str) -> NetworkConfig:
    """The network of what a site pushes: its own; with ProxyFL, whose proxies are alike everywhere, the common one."""
    return config.network if isinstance(config.method, ProxyFlMethod) else config.network_of(site)


def check_networks(config: Config, site: str, device: torch.device) -> None:
    """Whether the networks that a site trains take patches and windows of the sizes asked for, tried on its device.

    Raises:
        ConfigError: one does not; names the key and a size that fits.
    """
    own, sent = config.network_of(site), exchanged_network(config, site)
    for network in (own,) if own == sent else (own, sent):
        check_sizes(network, config.data, window=config.evaluation.window_size, device=device)


def build_learner(
    config: Config, site: str, network: NetworkConfig, device: torch.device, *, is_private: bool = False
) -> Learner:
    """A learner with its initial weights: common to all sites, or the site's own (``federation.common_init``).

    With ``network.start_from`` they are those of a file, whatever ``common_init`` says.

    Args:
        config: the federation's configuration.
        site: whose learner.
        network: its network.
        device: where it works.
        is_private: draw other weights than those of the exchanged models.

    Raises:
        ConfigError: the network cannot be built, or has nothing that the method could keep local.
    """
    keys = (("init", "private") if is_private else ("init",)) + (() if config.federation.common_init else (site,))
    with torch.random.fork_rng(devices=[]):  # a learner built between two steps must not change dropout
        torch.default_generator.manual_seed(derive_seed(config.federation.seed, *keys))  # a GPU's is not forked
        module = build_network(network, config.data)
    start_from = _start_from(config, site, network, is_private=is_private)
    if start_from is not None:
        load_start_weights(module, start_from, config.data)
    module = module.to(device)
    if config.privacy.mode == "dp_sgd":
        check_network(module, name=network.name)
    keep_norms = keeps_norms(config.method)
    learner = Learner(
        module,
        send_buffers=sends_buffers(config.method),
        optimiser=config.optimiser,
        precision=Precision(device.type, config.resources.amp),
        keep_norms=keep_norms,
        is_compiled=config.resources.compile,
    )
    if keep_norms and learner.model.num_sent + learner.model.num_frozen == learner.model.flat.numel():
        other = "fedavg" if config.method.name == "fedbn" else "the same as with share_norms: true"
        raise ConfigError(
            f"method {config.method.name} keeps normalisation layers local, but network {network.name} has none with "
            f"weights or statistics: it would be {other}. "
            "Choose a norm that has them in network.options (norm: BATCH, or norm: [INSTANCE, {affine: true}])"
        )
    return learner


def start_averages(config: Config, local: Learner, personal: Learner | None) -> None:
    """Gives a moving average to the model that a site keeps for itself, and to that which it pushes if averages are.

    Args:
        config: its ``optimiser`` section says whether there are any.
        local: the exchanged model.
        personal: the site's own beside it, for methods with two.
    """
    optimiser = config.optimiser
    if optimiser.weight_average == 0:
        return
    learners = {personal or local, local} if optimiser.push_average else {personal or local}
    for learner in learners:
        learner.model.average = WeightAverage(learner.model.flat, decay=optimiser.weight_average)


def _start_from(config: Config, site: str, network: NetworkConfig, *, is_private: bool) -> str | None:
    """The weights to start from; a private model has none of the common network's, only those of its own site."""
    return network.start_from if not is_private or site in config.site_networks else None


@dataclass(frozen=True)
class WireFormat:
    """What the pushes of one architecture look like; S = ``num_values``.

    ``num_exact``: how many values at the end are buffers (statistics), which no encoding may round: a variance that
    fell below 0 would spoil the model.
    """

    fingerprint: str
    contract: str
    layout: tuple[TensorSpec, ...]
    num_values: int
    num_exact: int

    @classmethod
    def of(cls, config: Config, network: NetworkConfig, model: FlatModel) -> WireFormat:
        """The format of a model of this network."""
        return cls(
            fingerprint(network, config.data),
            data_contract(config.data),
            model.sent_layout,
            num_values=model.num_sent,
            num_exact=max(0, model.num_sent - model.num_parameters),
        )

    def push_bytes(self, wire: WireConfig) -> int:
        """What a push weighs as it travels; with ``topk`` one that is not the first to its receiver."""
        return push_bytes(wire, self.num_values, num_exact=self.num_exact)

    def header(
        self,
        buffer: Buffer,
        *,
        run_id: str,
        round_number: int,
        sender: str,
        num_train: int,
        exported_at: float = 0.0,
    ) -> PushHeader:
        """What travels beside a buffer (S,)."""
        return PushHeader(
            run_id=run_id,
            round_number=round_number,
            sender=sender,
            num_train=num_train,
            fingerprint=self.fingerprint,
            contract=self.contract,
            layout=self.layout,
            num_values=self.num_values,
            dtype=WIRE_DTYPE,
            checksum=checksum(buffer),
            num_exact=self.num_exact,
            exported_at=exported_at,
        )

    def expectation(self, run_id: str, *, senders: frozenset[str], oldest_round: int, newest_round: int) -> Expectation:
        """What a push of this format must say to be taken."""
        return Expectation(
            run_id=run_id,
            senders=senders,
            fingerprint=self.fingerprint,
            contract=self.contract,
            layout=self.layout,
            num_values=self.num_values,
            oldest_round=oldest_round,
            newest_round=newest_round,
            num_exact=self.num_exact,
        )
