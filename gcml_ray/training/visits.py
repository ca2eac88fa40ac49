"""Cross-site evaluation: a site's personalised model travels to the others and is scored there; only scores come back.

The whole model travels, with the layers and statistics that its method keeps local, and so do personal models
that are otherwise never sent: it is the model as it is used at home that is scored. The data stay where they are.

Legend: F all values of a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from gcml_ray.config import Config, NetworkConfig
from gcml_ray.networks.registry import fingerprint
from gcml_ray.push.wire import Buffer, Expectation, PushHeader
from gcml_ray.records import PERSONALISED, EvaluationReport
from gcml_ray.training.evaluation import Evaluator
from gcml_ray.training.exchange import Exchange
from gcml_ray.training.site_files import SiteFiles
from gcml_ray.training.site_learner import WireFormat


class Visits:
    """What of one site travels to others to be scored, and what of others comes here.

    Args:
        config: the federation's configuration.
        site: this site's name.
        files: hold its personalised model.
        evaluator: scores models on its cases.
        exchange: has the learners that models are loaded into.
        on_progress: told (stage, case, number of cases).
    """

    def __init__(
        self,
        config: Config,
        site: str,
        files: SiteFiles,
        evaluator: Evaluator,
        exchange: Exchange,
        *,
        on_progress: Callable[[str, int, int], None],
    ) -> None:
        self.config = config
        self.site = site
        self.files = files
        self.evaluator = evaluator
        self.exchange = exchange
        self.on_progress = on_progress
        self.last_round = config.federation.rounds
        networks = [config.network, *config.site_networks.values()] if config.evaluation.cross_site else []
        self._formats = {fingerprint(network, config.data): self._whole(network) for network in networks}

    def export(self, run_id: str) -> tuple[PushHeader, Buffer]:
        """This site's personalised model, (F,), with its header. On a CPU a view: the transport copies.

        Raises:
            CheckpointError: it has none.
        """
        model = self.exchange.learner_for(self.config.network_of(self.site)).model
        self.files.load(PERSONALISED, model)
        buffer: Buffer = model.flat.detach().cpu().numpy()
        header = self._format_of(self.site).header(
            buffer, run_id=run_id, round_number=self.last_round, sender=self.site, num_train=self.exchange.num_train
        )
        return header, buffer

    def expectation(self, run_id: str, sender: str, *, peers: frozenset[str]) -> Expectation:
        """What a visitor must look like."""
        return self._format_of(sender).expectation(
            run_id, senders=peers, oldest_round=self.last_round, newest_round=self.last_round
        )

    def score(self, header: PushHeader, buffer: Buffer) -> EvaluationReport:
        """Scores a visitor, (F,), on this site's test cases; the report's ``model`` is the name of its own site."""
        learner = self.exchange.learner_for(self.config.network_of(header.sender))
        learner.model.flat.copy_(torch.from_numpy(buffer))
        return self.evaluator.evaluate(
            learner, split="test", model=header.sender, round_number=header.round_number, on_progress=self.on_progress
        )

    def _whole(self, network: NetworkConfig) -> WireFormat:
        """The format of all values of a model, whatever its method sends of it."""
        model = self.exchange.learner_for(network).model
        sent = WireFormat.of(self.config, network, model)
        num_values = model.flat.numel()
        return replace(sent, layout=model.layout, num_values=num_values, num_exact=num_values - model.num_parameters)

    def _format_of(self, site: str) -> WireFormat:
        return self._formats[fingerprint(self.config.network_of(site), self.config.data)]
