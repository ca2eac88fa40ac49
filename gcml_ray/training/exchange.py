"""What leaves a site and what comes in: pushes of its own model, second learners for its peers' models.

Legend: S values of a push.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from gcml_ray.config import Config, NetworkConfig, ProxyFlMethod, has_server
from gcml_ray.methods.rounds import IncomingModel
from gcml_ray.model.learner import Learner
from gcml_ray.networks.registry import fingerprint
from gcml_ray.privacy.pushes import PushNoise
from gcml_ray.push.wire import Buffer, Expectation, PushHeader
from gcml_ray.training.site_learner import WireFormat, build_learner, exchanged_network
from gcml_ray.training.workbench import SecondLearner

# Pushes are read-only, as the object store has them, and nobody writes to them.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")

Published = tuple[int, float, Tensor]  # the round that the weights come from, when they were kept, (S,)


class Exchange:
    """One site's pushes.

    Args:
        config: the federation's configuration.
        site: this site's name.
        local: the learner whose model is exchanged.
        num_train: this site's training cases, told with every push.
        second: learners for incoming models, by architecture, that it may share with other sites of its process.
        noise: what is added to every push; None adds nothing.
        published: what is pushed until :meth:`publish` is called, where a round was broken off without a barrier.
    """

    def __init__(
        self,
        config: Config,
        site: str,
        local: Learner,
        num_train: int,
        *,
        second: dict[str, SecondLearner] | None = None,
        noise: PushNoise | None = None,
        published: Published | None = None,
    ) -> None:
        self.config = config
        self.site = site
        self.local = local
        self.num_train = num_train
        self.device = local.model.flat.device
        self._second = {} if second is None else second
        self._scalers: dict[str, torch.amp.GradScaler] = {}
        self._formats = self._wire_formats()
        self._host = torch.empty(local.model.num_sent) if self.device.type == "cuda" else None
        self.published = published
        self.noise = noise

    # --- out ---------------------------------------------------------------------------------

    def publish(self, round_number: int) -> None:
        """Keeps a copy of the weights as they are after a round: what is pushed while the next one trains.

        The copy before stays whole for whoever still sends it.
        """
        self.published = (round_number, time.time(), self._outgoing().to("cpu", copy=True))

    def export(self, run_id: str, round_number: int) -> tuple[PushHeader, Buffer]:
        """The weights to push, (S,), with their header. On a CPU a view, not a copy: the transport copies.

        Args:
            run_id: identifies the run.
            round_number: the round the push is for; of published weights, the round they come from.
        """
        exported_at = time.time()
        if self.published is not None:
            round_number, exported_at, weights = self.published
        else:
            weights = self._outgoing()
            if self._host is not None:
                weights = self._host.copy_(weights)
        weights = weights.detach() if self.noise is None else self.noise.noised(weights.detach(), round_number)
        buffer: Buffer = weights.numpy()
        header = self._format_of(self.site).header(
            buffer,
            run_id=run_id,
            round_number=round_number,
            sender=self.site,
            num_train=self.num_train,
            exported_at=exported_at,
        )
        return header, buffer

    @property
    def push_bytes(self) -> int:
        """What a push of this site weighs as it travels; with ``topk`` one that is not the first to its receiver."""
        return self._format_of(self.site).push_bytes(self.config.wire)

    def _outgoing(self) -> Tensor:
        """What is pushed, (S,), a view: the weights as they are, or their average (``optimiser.push_average``)."""
        model = self.local.model
        if self.config.optimiser.push_average:
            assert model.average is not None
            return model.average.values[: model.num_sent]
        return model.flat[: model.num_sent]

    # --- in ----------------------------------------------------------------------------------

    def expectation(self, run_id: str, sender: str, *, peers: frozenset[str], own_round: int) -> Expectation:
        """What a push of ``sender`` must look like.

        Without a barrier it may be ``max_staleness`` rounds older than this site; else a peer's is for the next round
        and a server's ends the present one.
        """
        federation = self.config.federation
        if federation.mode == "async":
            oldest = max(0, own_round - federation.max_staleness)
        else:
            oldest = own_round + (0 if has_server(self.config.method) else 1)
        return self._format_of(sender).expectation(
            run_id, senders=peers, oldest_round=oldest, newest_round=federation.rounds
        )

    def incoming(self, pushes: Sequence[tuple[PushHeader, Buffer]], *, own_round: int) -> list[IncomingModel]:
        """Accepted pushes as models that a method can work with.

        Args:
            pushes: as they lay in the mailbox.
            own_round: how many rounds this site has done; without a barrier, what a push lacks of it is its staleness.
        """
        return [self._incoming(header, buffer, own_round) for header, buffer in pushes]

    def _incoming(self, header: PushHeader, buffer: Buffer, own_round: int) -> IncomingModel:
        """One push. Its weight falls with its staleness s as (1 + s)^-a (FedAsync, arXiv 1903.03934, section 5.2)."""
        weights = torch.from_numpy(buffer)
        if self.config.federation.mode == "sync":
            return IncomingModel(header.sender, header.num_train, weights)
        staleness = max(0, own_round - header.round_number)
        return IncomingModel(
            header.sender,
            header.num_train,
            weights,
            staleness=staleness,
            age_s=max(0.0, time.time() - header.exported_at),
            discount=(1 + staleness) ** -self.config.federation.staleness_exponent,
        )

    def open_incoming(self, push: IncomingModel) -> Learner:
        """Loads a push into the second learner: its weights, a fresh optimiser (our reading)."""
        network = exchanged_network(self.config, push.sender)
        learner = self.learner_for(network)
        self._second[fingerprint(network, self.config.data)].forget_unsent()
        if learner.model.layout == self.local.model.layout:  # what is not sent starts from the receiver's own
            learner.model.flat[learner.model.num_sent :].copy_(self.local.model.flat[learner.model.num_sent :])
            for name, counter in learner.model.counters().items():
                counter.copy_(self.local.model.counters()[name])
        learner.model.load(push.weights)
        learner.optimiser.forget()
        learner.model.module.train()
        return learner

    def learner_for(self, network: NetworkConfig) -> Learner:
        """The second learner, re-used from push to push; one for each architecture among the peers."""
        key = fingerprint(network, self.config.data)
        if key not in self._second:
            self._second[key] = SecondLearner.of(build_learner(self.config, self.site, network, self.device))
        learner = self._second[key].learner
        learner.scaler = self._scalers.setdefault(key, learner.precision.scaler())  # of fp16: a site's own
        return learner

    # --- formats -----------------------------------------------------------------------------

    def _wire_formats(self) -> dict[str, WireFormat]:
        """What the pushes of each architecture in this federation look like, by its fingerprint."""
        own = exchanged_network(self.config, self.site)
        networks = [own] if isinstance(self.config.method, ProxyFlMethod) else [*self.config.site_networks.values()]
        formats = {}
        for network in (self.config.network, *networks):
            model = self.local.model if network == own else self.learner_for(network).model
            formats[fingerprint(network, self.config.data)] = WireFormat.of(self.config, network, model)
        return formats

    def _format_of(self, site: str) -> WireFormat:
        return self._formats[fingerprint(exchanged_network(self.config, site), self.config.data)]
