"""What a report page reads from a run folder, and the questions that its sections ask of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gcml_ray.config import Config
from gcml_ray.config.file import load_config
from gcml_ray.files.run_folder import RunFolder, RunState
from gcml_ray.prediction.averages import site_means
from gcml_ray.records import BEFORE_GOSSIP, ENSEMBLE, PERSONALISED, SHARED, CaseScore, RoundRecord
from gcml_ray.report.words import natural_order


@dataclass(frozen=True)
class RunRecords:
    """One run as its folder tells it. ``scores`` are of test cases; ``state`` is None before the first round ended."""

    folder: RunFolder
    config: Config
    rounds: tuple[RoundRecord, ...]
    scores: tuple[CaseScore, ...]
    state: RunState | None

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site that was planned, in one order for the whole page."""
        return natural_order({site for record in self.rounds for site in record.plan.sites})

    @property
    def scored_sites(self) -> tuple[str, ...]:
        """The sites whose test cases were scored: with pooled training not the ones that trained."""
        return natural_order({score.site for score in self.scores})

    @property
    def rounds_done(self) -> int:
        """Rounds that all sites have behind them; without a barrier those of the slowest that is still there."""
        if self.config.federation.mode == "sync":
            return len(self.rounds)
        dropped = self.state.dropped if self.state else {}
        own = {report.site: report.round_number for record in self.rounds for report in record.trained}
        return min((number for site, number in own.items() if site not in dropped), default=0)

    @property
    def models(self) -> tuple[str, ...]:
        """The models that were tested, the personalised one last."""
        found = {score.model for score in self.scores}
        return tuple(model for model in (BEFORE_GOSSIP, SHARED, ENSEMBLE, PERSONALISED) if model in found)


def faults_notice(run: RunRecords) -> tuple[str, ...]:
    """The warning that a run was broken on purpose; none where it was not."""
    faults = run.folder.faults() or ((run.config.chaos,) if run.config.chaos else ())
    if not faults:
        return ()
    return (f"Faults were injected on purpose: {'; then '.join(faults)}. What this run gives is no result.",)


def read_run(path: Path) -> RunRecords:
    """Reads a run folder.

    Raises:
        CheckpointError: it is not one, or a file of it cannot be read.
        ConfigError: its configuration cannot be read.
    """
    folder = RunFolder.open(path)
    return RunRecords(
        folder=folder,
        config=load_config(folder.config_file),
        rounds=folder.rounds(),
        scores=tuple(score for score in folder.cases() if score.split == "test"),
        state=folder.read_state() if folder.state_file.exists() else None,
    )


def site_dice(scores: Sequence[CaseScore], model: str) -> dict[str, float]:
    """Mean Dice over cases and classes, by site."""
    means = site_means(score for score in scores if score.model == model)
    return {site: means[site] for site in natural_order(means)}
