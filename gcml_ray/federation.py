"""A federation from Python, for notebooks and scripts: ``Federation(config).run()``.

Beside the command line this is the other composition root: it may import ``actors``, inside its functions.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gcml_ray.callbacks import CallbackList, Progress
from gcml_ray.config import Config
from gcml_ray.config.differences import differences
from gcml_ray.config.file import load_config, parse_config, setting
from gcml_ray.errors import ConfigError
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.prediction.averages import mean
from gcml_ray.records import PERSONALISED, CaseScore, RoundRecord, RunStatus
from gcml_ray.wording import count

if TYPE_CHECKING:
    from gcml_ray.prediction.predict import PersonalModel


@dataclass(frozen=True)
class SiteScore:
    """Means of one site's model over its test cases and foreground classes; NaN where nothing is defined."""

    site: str
    model: str
    num_cases: int
    dice: float
    hd95: float
    surface_dice: float


@dataclass(frozen=True)
class ScoreTable:
    """A table that shows itself, in a notebook too; for pandas: ``DataFrame(table.rows, columns=table.columns)``."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float, ...], ...]

    def __str__(self) -> str:
        """Text, columns aligned."""
        cells = [self.columns, *(tuple(map(_cell, row)) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        rows = ["".join(f"<td>{escape(_cell(value))}</td>" for value in row) for row in self.rows]
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


@dataclass(frozen=True)
class FederationResult:
    """What a run left behind, read from its folder; :meth:`read` gives that of an earlier one.

    Attributes:
        status: ``finished``, ``stopped`` (it can be resumed), ``failed`` (no site was left) or ``running``.
        folder: the run folder.
        config: the configuration in the run folder.
        scores: one record a test case, class and model; empty until the run has finished.
        rounds: one record a round, oldest first.
        dropped: the reason for each site that was given up.
    """

    status: RunStatus
    folder: Path
    config: Config
    scores: tuple[CaseScore, ...]
    rounds: tuple[RoundRecord, ...]
    dropped: dict[str, str]

    @classmethod
    def read(cls, folder: str | Path) -> FederationResult:
        """The result of an earlier run, or what there is so far of one that is running.

        Raises:
            CheckpointError: the folder is not a run's, or its files cannot be read.
        """
        files = RunFolder.open(folder)
        state = files.read_state()
        config = load_config(files.config_file)
        return cls(state.status, files.path, config, files.cases(), files.rounds(), state.dropped)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that have scores, in the order of names."""
        return tuple(sorted({score.site for score in self.scores}))

    def site_scores(self, model: str = PERSONALISED) -> tuple[SiteScore, ...]:
        """A site's scores as means over its test cases and foreground classes, one record a site.

        Args:
            model: ``personalised``; ``before_gossip``, the site's own at the end of the warm-up; ``shared``, of methods
                with two models; ``ensemble``, together with its peers' models. Empty scores where a run has none.
        """
        chosen = [score for score in self.scores if score.model == model]
        return tuple(_site_score(site, model, [each for each in chosen if each.site == site]) for site in self.sites)

    def table(self) -> ScoreTable:
        """Every site and model, with the mean of sites below; HD95 in ``config.data.distance_unit``."""
        rows: list[tuple[str | int | float, ...]] = []
        for model in dict.fromkeys(score.model for score in self.scores):
            sites = self.site_scores(model)
            rows += [(each.site, model, each.num_cases, each.dice, each.hd95, each.surface_dice) for each in sites]
            means = (mean(getattr(each, name) for each in sites) for name in ("dice", "hd95", "surface_dice"))
            rows.append(("mean of sites", model, sum(each.num_cases for each in sites), *means))
        columns = ("site", "model", "cases", "Dice", f"HD95 ({self.config.data.distance_unit})", "surface Dice")
        return ScoreTable(columns, tuple(rows))

    def validation_dice(self) -> dict[str, tuple[tuple[int, float], ...]]:
        """By site: (round, mean validation Dice) of every round that validated it."""
        points: dict[str, list[tuple[int, float]]] = {}
        for record in self.rounds:
            for report in record.trained:
                if report.validation_dice is not None:
                    points.setdefault(report.site, []).append((report.round_number, report.validation_dice))
        return {site: tuple(points[site]) for site in sorted(points)}

    def model(self, site: str, *, device: str = "cpu", ensemble: bool = False, peers: bool = False) -> PersonalModel:
        """A site's personalised model, ready for new patients; see :func:`gcml_ray.prediction.load.load_model`."""
        from gcml_ray.prediction.load import load_model  # noqa: PLC0415 - torch only where a model is asked for

        return load_model(self.folder, site, device=device, ensemble=ensemble, peers=peers)

    def __str__(self) -> str:
        """Status and table."""
        table = self.table() if self.scores else "not tested yet"
        return f"{self.config.name}: {self.status}, {count(len(self.rounds), 'round')}, {self.folder}\n{table}"


class Federation:
    """One federation, from its configuration to its results.

    Args:
        config: a configuration, its YAML file, or plain nested values as from such a file.
        overrides: ``section.key=value``, as for ``gcml run --set``, or values by ``section.key``.

    Raises:
        ConfigError: the configuration cannot be read or is wrong; every problem is named.

    Example::

        from gcml_ray import Federation

        result = Federation("configs/phantom.yaml", overrides=["federation.rounds=5"]).run()
        print(result.table())
    """

    def __init__(
        self, config: Config | str | Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()
    ) -> None:
        self.config = _as_config(config, overrides)
        self._stop = threading.Event()

    @classmethod
    def open(cls, folder: str | Path) -> Federation:
        """The federation of an earlier run, to go on with by ``run(resume=True)``; the folder may have been moved.

        Raises:
            CheckpointError: the folder is not a run's.
        """
        return cls(load_config(RunFolder.open(folder).config_file).in_folder(Path(folder)))

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.output.folder)

    @property
    def sites(self) -> tuple[str, ...]:
        """Who trains.

        Raises:
            GcmlError: the datalist cannot be used, or does not have a site that the configuration names.
        """
        from actors.run import sites_of  # noqa: PLC0415 - composition root

        return sites_of(self.config)

    def run(
        self, callbacks: Sequence[object] | None = None, *, resume: bool = False, finish: bool = False
    ) -> FederationResult:
        """Runs to the end, or to where :meth:`stop` or an interrupt ends it.

        Args:
            callbacks: see :mod:`gcml_ray.callbacks`; None shows one line of progress, an empty list nothing.
            resume: go on with the run in :attr:`folder`; what does not decide the result may have changed since:
                ``tracking``, ``output``, timeouts, and ``resources`` but for ``amp`` and ``compile``.
            finish: with ``resume``: train no round that is left; test the models as they are, and keep them.

        Returns:
            The result; its ``status`` says whether the run finished. One that was stopped before all sites were ready
            has left nothing to resume: :meth:`run` it again.

        Raises:
            KeyboardInterrupt: the run was interrupted; ``run(resume=True)`` goes on from the newest checkpoints.
            GcmlError: the input, the cluster or a site's start is at fault; the message says what to change.
        """
        from actors.run import run_federation  # noqa: PLC0415 - composition root

        if finish and not resume:
            raise ConfigError("finish=True ends a run that has begun: give resume=True with it")
        if resume:
            self._check_resumed()
        listener = CallbackList([Progress()] if callbacks is None else callbacks)
        status = "failed"
        try:
            summary = run_federation(self.config, listener=listener, stop=self._stop, resume=resume, finish=finish)
            status = summary.status
        except KeyboardInterrupt:
            status = "stopped"
            raise
        finally:
            self._stop.clear()
            listener.on_end(status)
        if not RunFolder(self.folder).state_file.exists():  # stopped while the sites started: there is nothing to read
            return FederationResult(status, self.folder, self.config, (), (), {})
        return FederationResult.read(self.folder)

    def stop(self) -> None:
        """Asks the run, or the next one where none is going on, to end after the round in flight.

        From a callback or another thread.

        It can be resumed, and with ``run(resume=True, finish=True)`` it is tested as it is.
        """
        self._stop.set()

    def _check_resumed(self) -> None:
        """A resume under another configuration would be neither the old run nor a new one."""
        saved = load_config(RunFolder.open(self.folder).config_file)
        if saved.identity != self.config.identity:
            raise ConfigError(
                f"resume: the run in {self.folder} has another configuration, it differs in "
                f"{differences(saved, self.config)}. Use Federation.open({str(self.folder)!r}), or start "
                "a new run in another output.folder"
            )


def _as_config(config: Config | str | Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any]) -> Config:
    """The configuration with its overrides."""
    if isinstance(overrides, str):
        overrides = [overrides]
    if isinstance(overrides, Mapping):
        overrides = [setting(key, value) for key, value in overrides.items()]
    if isinstance(config, str | Path):
        return load_config(config, overrides)
    if isinstance(config, Config):
        if not overrides:
            return config
        config = config.model_dump(mode="json", by_alias=True)
    return parse_config(config, overrides, source="configuration")


def _site_score(site: str, model: str, scores: Sequence[CaseScore]) -> SiteScore:
    """Means over cases and classes."""
    return SiteScore(
        site=site,
        model=model,
        num_cases=len({score.case for score in scores}),
        dice=mean(score.dice for score in scores),
        hd95=mean(score.hd95 for score in scores),
        surface_dice=mean(score.surface_dice for score in scores),
    )


def _cell(value: str | int | float) -> str:
    return ("-" if value != value else f"{value:.3f}") if isinstance(value, float) else str(value)  # noqa: PLR0124 - NaN
