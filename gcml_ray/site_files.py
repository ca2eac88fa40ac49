"""One site's files: the rounds it can go back to, and the models that others take away."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from gcml_ray.checkpoint import SiteState, keep_as, load_model, load_round, save_model, save_round, saved_rounds
from gcml_ray.config import Config
from gcml_ray.data.contract import data_contract
from gcml_ray.errors import CheckpointError
from gcml_ray.learner import Learner
from gcml_ray.networks.registry import fingerprint
from gcml_ray.records import PERSONALISED
from gcml_ray.weights import FlatModel


class SiteFiles:
    """Reads and writes ``checkpoints/<site>``, and holds what the site knows beside its tensors.

    Args:
        config: the federation's configuration.
        site: this site's name.
        folder: the site's checkpoints.
    """

    def __init__(self, config: Config, site: str, folder: Path) -> None:
        self.config = config
        self.site = site
        self.folder = folder
        self.state = SiteState(site=site, round_number=0, identity=config.identity)

    def restore(self, local: Learner, personal: Learner | None, *, resume_round: int | None) -> None:
        """Goes to the round asked for: 0 stays at the start, None takes the newest there is.

        Raises:
            CheckpointError: it is missing, or belongs to something else.
        """
        rounds = saved_rounds(self.folder)
        if resume_round is None:
            resume_round = rounds[-1] if rounds else 0
        if resume_round == 0:
            return
        if resume_round not in rounds:
            raise CheckpointError(
                f"site {self.site} has no checkpoint of round {resume_round} in {self.folder} (found {rounds}); "
                "resume where the run was made, or start it anew in another output.folder"
            )
        self.state = load_round(
            self.folder,
            local,
            site=self.site,
            round_number=resume_round,
            identity=self.config.identity,
            personal=personal,
        )

    @property
    def newest_round(self) -> int:
        """The newest checkpoint of this site's own course; 0 where there is none."""
        rounds = [number for number in saved_rounds(self.folder) if number <= self.state.round_number]
        return rounds[-1] if rounds else 0

    def advance(self, round_number: int, own: Learner, *, dice: float | None, is_best: bool) -> None:
        """Moves the state to this round and writes the models that have to be kept.

        Args:
            round_number: the round that has just ended.
            own: the learner of the model that this site keeps for itself.
            dice: its validation Dice, where it was measured.
            is_best: whether that is the best one so far.
        """
        name = f"model_{round_number:05d}.safetensors"
        ends_warmup = round_number == self.config.federation.num_warmup
        if is_best or ends_warmup:
            self._save_model(self.folder / name, own.model, round_number, dice)
        self.state = replace(self.state, round_number=round_number)
        if is_best and dice is not None:
            self.state = replace(self.state, best_round=round_number, best_dice=dice, best_file=name)
        if ends_warmup:
            self.state = replace(self.state, before_gossip_file=name)

    def save(self, local: Learner, personal: Learner | None) -> None:
        """Writes the checkpoint of the round that the state is at."""
        save_round(self.folder, local, self.state, personal=personal)

    def load(self, model: str, into: FlatModel) -> int:
        """Loads the model ``personalised`` or ``before_gossip``; returns the round it comes from.

        Raises:
            CheckpointError: there is none.
        """
        name = self.state.best_file if model == PERSONALISED else self.state.before_gossip_file
        if not name:
            raise CheckpointError(f"site {self.site} has no {model} model: it was never evaluated or had no warm-up")
        facts = load_model(self.folder / name, into)
        return int(facts["round"])

    def keep_personalised(self) -> None:
        """The best model under its lasting name."""
        keep_as(self.folder / self.state.best_file, self.folder / "personalised.safetensors")

    def _save_model(self, path: Path, model: FlatModel, round_number: int, dice: float | None) -> None:
        """A model to take away, with what it says of itself."""
        network = self.config.network_of(self.site)
        facts = {
            "site": self.site,
            "round": str(round_number),
            "validation_dice": "" if dice is None else repr(dice),
            "method": self.config.method.name,
            "network": json.dumps(network.model_dump(mode="json", exclude={"start_from"})),
            "fingerprint": fingerprint(network, self.config.data),
            "data_contract": data_contract(self.config.data),
            "seed": str(self.config.federation.seed),
        }
        save_model(path, model, facts=facts)
