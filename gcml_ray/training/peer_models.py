"""The last models that a site got from its peers, kept as they came, and the ensemble that it forms of them at the end.

Members are chosen on the site's validation cases (greedy forward selection, Caruana et al., "Ensemble selection from
libraries of models", ICML 2004, here without replacement): the best of the peers' models first, each one stays if the
validation Dice of the mean prediction grows. An ensemble may be the site's own model alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from gcml_ray.config import Config, NetworkConfig
from gcml_ray.methods.rounds import IncomingModel
from gcml_ray.records import PERSONALISED
from gcml_ray.training.ensemble import Ensemble, EnsembleMember
from gcml_ray.training.evaluation import Evaluator
from gcml_ray.training.exchange import Exchange
from gcml_ray.training.site_files import SiteFiles
from gcml_ray.training.site_learner import exchanged_network

log = logging.getLogger(__name__)


class PeerModels:
    """One site's models of its peers. Which they are is part of the site's checkpoint.

    Args:
        config: ``evaluation.ensemble_peers`` says how many are kept, each of another site.
        site: this site's name.
        files: where they lie.
        evaluator: measures Dice on the site's validation cases.
        exchange: opens what came in.
    """

    def __init__(self, config: Config, site: str, files: SiteFiles, evaluator: Evaluator, exchange: Exchange) -> None:
        self.config = config
        self.site = site
        self.files = files
        self.evaluator = evaluator
        self.exchange = exchange

    def keep(self, incoming: Sequence[IncomingModel], round_number: int) -> None:
        """Writes the models of a round as they came, and names the newest ones in the site's state.

        What is not sent of a model is the receiver's own, as it is after the round.
        """
        num_kept = self.config.evaluation.ensemble_peers
        if not num_kept:
            return
        kept = dict(self.files.state.peer_files)
        for push in incoming:
            model = self.exchange.open_incoming(push).model
            kept.pop(push.sender, None)  # the newest stand last
            kept[push.sender] = self.files.save_peer(push.sender, model, round_number)
        newest = dict(list(kept.items())[-num_kept:])
        self.files.state = replace(self.files.state, peer_files=newest)

    def choose(self) -> tuple[Ensemble, int]:
        """The ensemble and the round of the own model in it; its members' files get lasting names.

        Raises:
            CheckpointError: there is no personalised model, or a file is gone.
        """
        own, round_number = self._own()
        ensemble = Ensemble((own,))
        best = first = self.evaluator.validation_dice(ensemble)
        peers = [self._peer(site, name) for site, name in self.files.state.peer_files.items()]
        alone = {peer.site: self.evaluator.validation_dice(Ensemble((peer,))) for peer in peers}
        for peer in sorted(peers, key=lambda member: (-alone[member.site], member.site)):
            larger = ensemble.joined_by(peer)
            dice = self.evaluator.validation_dice(larger)
            if dice > best:
                ensemble, best = larger, dice
        chosen = ensemble.members[1:]
        names = ", ".join(member.site for member in chosen) or "nobody"
        log.info("site %s predicts together with %s: validation Dice %.3f, alone %.3f", self.site, names, best, first)
        self.files.keep_members([member.file for member in chosen])
        return ensemble, round_number

    def _own(self) -> tuple[EnsembleMember, int]:
        """The personalised model and its round."""
        learner = self.exchange.learner_for(self.config.network_of(self.site))
        round_number = self.files.load(PERSONALISED, learner.model)
        return EnsembleMember(self.site, self.files.state.best_file, learner, learner.model.flat.clone()), round_number

    def _peer(self, site: str, name: str) -> EnsembleMember:
        """A kept model of a peer."""
        network: NetworkConfig = exchanged_network(self.config, site)
        learner = self.exchange.learner_for(network)
        self.files.load_peer(name, learner.model)
        return EnsembleMember(site, name, learner, learner.model.flat.clone())
