"""One site's files: the rounds it can go back to, and the models that others take away."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gcml_ray.config import Config
from gcml_ray.data.contract import data_contract
from gcml_ray.data.datalist import Case
from gcml_ray.errors import CheckpointError, DamagedError, NoModelError
from gcml_ray.files.run_folder import KEPT_ROUNDS, MEMBERS_FILE, MODEL_FILE
from gcml_ray.files.whole_files import clear_drafts, replace_file
from gcml_ray.model.checkpoint import (
    SiteState,
    damaged_file,
    keep_as,
    load_model_file,
    load_round,
    round_file,
    save_model,
    save_round,
    saved_rounds,
)
from gcml_ray.model.learner import Learner
from gcml_ray.model.weights import FlatModel
from gcml_ray.networks.registry import fingerprint
from gcml_ray.records import PERSONALISED
from gcml_ray.training.known_cases import check_splits, keep_cases, warn_of_changed_images

log = logging.getLogger(__name__)


def _model_name(round_number: int) -> str:
    """The file of a site's own model of a round."""
    return f"model_{round_number:05d}.safetensors"


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
        self._cases: Sequence[Case] = ()  # not written down yet
        self._is_anew = True

    def restore(
        self, local: Learner, personal: Learner | None, *, resume_round: int, cases: Sequence[Case] = ()
    ) -> None:
        """Goes to the round asked for; 0 stays at the start.

        Where its file is damaged or lost, the round before it that was kept.

        Args:
            local: gets the weights.
            personal: the second model, of methods with two.
            resume_round: the round.
            cases: the site's, each with its split; compared with what was kept, and kept with the next checkpoint.

        Raises:
            DataError: a case is in another split than before (:mod:`gcml_ray.training.known_cases`).
            CheckpointError: it is missing or damaged with none shortly before it, or belongs to something else.
        """
        clear_drafts(self.folder)
        self._check_cases(cases, anew=resume_round == 0)
        rounds = saved_rounds(self.folder)
        if resume_round == 0:  # also of a round that failed before the first checkpoint
            self.state = SiteState(site=self.site, round_number=0, identity=self.config.identity)
            return
        candidates = [number for number in reversed(rounds) if number <= resume_round]
        oldest = resume_round - KEPT_ROUNDS * self.config.output.checkpoint_every
        if not candidates or candidates[0] < oldest:
            raise CheckpointError(
                f"site {self.site} has no checkpoint of round {resume_round} in {self.folder} (found {rounds}); "
                "resume where the run was made, leave the site out (`gcml site remove`, then resume), or start anew in "
                "another output.folder"
            )
        if candidates[0] < resume_round and not damaged_file(self.folder, resume_round).exists():
            words = "site %s goes on from its checkpoint of round %d: that of round %d is not in %s any more"
            log.warning(words, self.site, candidates[0], resume_round, self.folder)
        damaged: dict[int, DamagedError] = {}
        for number in candidates:
            try:
                self._load_round(local, personal, number)
            except DamagedError as error:
                if number == candidates[-1]:
                    raise DamagedError(
                        f"{error}. There is no older checkpoint of site {self.site}: bring the file back, leave the "
                        "site out (`gcml site remove`, then resume), or start anew in another output.folder"
                    ) from error
                damaged[number] = error
            else:
                break
        for number, cause in damaged.items():
            round_file(self.folder, number).replace(damaged_file(self.folder, number))
            log.warning("site %s goes on from the checkpoint before round %d: %s", self.site, number, cause)

    def _check_cases(self, cases: Sequence[Case], *, anew: bool) -> None:
        """Checks the splits against the saved ones; saves them with the next checkpoint."""
        if not anew:
            check_splits(self.folder, cases, source=self.config.data.datalist)
            warn_of_changed_images(self.folder, cases)
        if cases:
            self._cases, self._is_anew = cases, anew

    def _load_round(self, local: Learner, personal: Learner | None, number: int) -> None:
        """Goes to a round whose checkpoint is there."""
        self.state = load_round(
            self.folder,
            local,
            site=self.site,
            round_number=number,
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
        name = _model_name(round_number)
        ends_warmup = round_number == self.config.federation.num_warmup
        if is_best or ends_warmup:
            self._save_model(self.folder / name, own.model, round_number, dice)
        self.state = replace(self.state, round_number=round_number)
        if is_best and dice is not None:
            self.state = replace(self.state, best_round=round_number, best_dice=dice, best_file=name)
        if ends_warmup:
            self.state = replace(self.state, before_gossip_file=name)

    def save(self, local: Learner, personal: Learner | None) -> None:
        """Writes the checkpoint of the round that the state is at; beside the first one, what the cases are."""
        if self._cases:
            keep_cases(self.folder, self._cases, anew=self._is_anew)
            self._cases = ()
        save_round(self.folder, local, self.state, personal=personal)

    def load(self, model: str, into: FlatModel) -> int:
        """Loads the model ``personalised`` or ``before_gossip``; returns the round it comes from.

        Raises:
            NoModelError: there never was one.
            CheckpointError: its file is gone, or is another one than its name says.
        """
        name = self.state.best_file if model == PERSONALISED else self.state.before_gossip_file
        if not name:
            raise NoModelError(f"site {self.site} has no {model} model: it was never evaluated or had no warm-up")
        path = self.folder / name
        try:
            facts = load_model_file(path, into)
        except CheckpointError as error:
            facts, path = self._load_kept(model, into, lost=error), self.folder / MODEL_FILE
        site, number = facts.get("site"), facts.get("round", "")
        if site != self.site or not number.isdecimal() or name != _model_name(int(number)):
            raise CheckpointError(
                f"{path} is the model of site {site}, round {number or 'unknown'}: it was copied or "
                "renamed; put the right one back"
            )
        if path.name == MODEL_FILE:
            keep_as(path, self.folder / name)
        return int(number)

    def _load_kept(self, model: str, into: FlatModel, *, lost: CheckpointError) -> dict[str, str]:
        """The best model as an earlier test has kept it, in the place of a file that is gone or damaged."""
        kept = self.folder / MODEL_FILE
        if model != PERSONALISED or not kept.exists():
            raise CheckpointError(
                f"the {model} model of site {self.site} is lost: {lost}. Bring the file back; without it the rounds "
                "have to be run again, in another output.folder"
            ) from lost
        facts = load_model_file(kept, into)
        log.warning("site %s takes %s, which an earlier test has kept: %s", self.site, kept.name, lost)
        return facts

    def keep_personalised(self) -> None:
        """The best model under its lasting name."""
        keep_as(self.folder / self.state.best_file, self.folder / MODEL_FILE)

    def save_peer(self, site: str, model: FlatModel, round_number: int) -> str:
        """Writes a model that came from another site in this round; returns the name of its file."""
        name = f"peer_{round_number:05d}_{site}.safetensors"
        self._save_model(self.folder / name, model, round_number, None, site=site)
        return name

    def load_peer(self, name: str, into: FlatModel) -> None:
        """Loads a model of another site.

        Raises:
            CheckpointError: its file is gone.
        """
        load_model_file(self.folder / name, into)

    def keep_members(self, names: Sequence[str]) -> None:
        """The peers' models of an ensemble, in their order, under lasting names; those of an earlier one go."""
        for path in (self.folder / MEMBERS_FILE, *self.folder.glob("member_*.safetensors")):
            path.unlink(missing_ok=True)
        members = [f"member_{index:02d}.safetensors" for index in range(1, len(names) + 1)]
        for name, member in zip(names, members, strict=True):
            keep_as(self.folder / name, self.folder / member)
        replace_file(self.folder / MEMBERS_FILE, json.dumps(members))

    def _save_model(
        self, path: Path, model: FlatModel, round_number: int, dice: float | None, *, site: str | None = None
    ) -> None:
        """A model to take away, with what it says of itself: this site's, or another's."""
        network = self.config.network_of(site or self.site)
        facts = {
            "site": site or self.site,
            "round": str(round_number),
            "validation_dice": "" if dice is None else repr(dice),
            "method": self.config.method.name,
            "network": json.dumps(network.model_dump(mode="json", exclude={"start_from"})),
            "fingerprint": fingerprint(network, self.config.data),
            "data_contract": data_contract(self.config.data),
            "seed": str(self.config.federation.seed),
        }
        save_model(path, model, facts=facts)
