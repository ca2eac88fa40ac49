"""The folder of one run: what the driver writes as it goes, and what reports and a resume read back.

=====================  =====================================================================
``config.yaml``        the configuration, whole
``rounds.jsonl``       one :class:`~gcml_ray.records.RoundRecord` per line; the truth about the run
``transfers.csv``      one push per row, derived from the rounds
``cases.csv``          one row per case, class and model
``cross_site.csv``     the same for personalised models at all sites; ``model`` is the site it is of
``state.json``         how far the run is and which sites are alive
``tracking.json``      the ids of its MLflow runs
``chaos.txt``          the faults that it was run with on purpose, one text per line; else there is none
``checkpoints/SITE/``  what a site needs to resume, and its models
``plots/``             figures of the run
``overlays/SITE/``     reference and prediction drawn on images
``requests/``          what ``gcml site`` asks of a run in progress
``report.html``        the page of ``gcml report``
``log.txt``            the log
``.lock``              held by the driver while it runs
=====================  =====================================================================

A crash may tear the last line of ``rounds.jsonl``: it is ignored on reading and cut off by the next
append. All other files are replaced as a whole.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from gcml_ray.config import Config
from gcml_ray.errors import CheckpointError, ConfigError, write_remedy
from gcml_ray.files.folder_lock import not_writable
from gcml_ray.files.record_json import from_json, to_json
from gcml_ray.files.site_names import check_site_name
from gcml_ray.files.tables import case_table, read_case_table, transfer_rows, transfer_table
from gcml_ray.files.whole_files import replace_file
from gcml_ray.records import CaseScore, PushReceipt, RoundRecord, RunStatus, lost_sites
from gcml_ray.wording import in_shell

KEPT_ROUNDS = 3  # of a site's checkpoints: without a barrier it may be two rounds ahead of what the driver has written
TRACKING_FILE = "tracking.json"
MODEL_FILE = "personalised.safetensors"  # of a site, once it has been tested
MEMBER_FILE = re.compile(r"member_\d{2,}\.safetensors")  # of an ensemble
MEMBERS_FILE = "members.json"  # names the files of an ensemble beside the site's own model; the last to be written
_MARKERS = ("rounds.jsonl", "state.json")  # a run that failed to start has neither, and may be tried again


@dataclass(frozen=True)
class RunState:
    """How far a run is; round 0 is the start.

    ``last_complete_round`` is the round to resume from, ``alive`` who takes part or is on the way, ``dropped`` the
    reason for each site that no longer does. ``site_rounds`` has the checkpoint of that round of each site, dropped
    ones too (an older one where it was skipped or dropped, 0 for none). ``followed`` is the round up to which
    ``federation.schedule`` was followed, where that is an earlier one than ``last_complete_round``.
    """

    last_complete_round: int
    status: RunStatus
    alive: tuple[str, ...]
    site_rounds: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    followed: int | None = None

    @property
    def lost(self) -> tuple[str, ...]:
        """The sites that were given up, without those that left on purpose."""
        return lost_sites(self.dropped)


class RunFolder:
    """The files of one run. One process appends (the driver); any number may read meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.rounds_file = path / "rounds.jsonl"
        self.transfers_file = path / "transfers.csv"
        self.cases_file = path / "cases.csv"
        self.cross_site_file = path / "cross_site.csv"
        self.state_file = path / "state.json"
        self.tracking_file = path / TRACKING_FILE
        self.log_file = path / "log.txt"
        self.faults_file = path / "chaos.txt"
        self.plots = path / "plots"
        self._is_repaired = False
        self.is_ours: Callable[[], bool] | None = None  # given by the lock of who writes here: see folder_lock

    @property
    def is_taken(self) -> bool:
        """Whether a run has begun here; a folder with a configuration alone is of a run that failed to start."""
        return any((self.path / name).exists() for name in _MARKERS)

    @classmethod
    def create(cls, path: str | Path, config: Config) -> RunFolder:
        """Make the folder of a new run and write its ``config.yaml``.

        Raises:
            ConfigError: the folder already holds a run, or cannot be made or written.
        """
        from gcml_ray.config.file import save_config  # noqa: PLC0415 - reading a run needs no YAML

        folder = cls(Path(path))
        try:
            if folder.is_taken:
                raise ConfigError(
                    f"output.folder: {folder.path} already holds a run. Continue it with "
                    f"`gcml run --resume {in_shell(folder.path)}`, or set another output.folder"
                )
            folder.plots.mkdir(parents=True, exist_ok=True)
            save_config(config, folder.config_file)
            folder.tracking_file.unlink(missing_ok=True)  # of a run that failed to start
        except OSError as error:
            raise not_writable(folder.path, error) from error
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The folder of a run that was started earlier.

        Raises:
            CheckpointError: there is no such folder, or it holds no ``config.yaml``.
        """
        folder = cls(Path(path))
        if not folder.config_file.is_file():
            problem = "holds no config.yaml" if folder.path.is_dir() else "is not a folder"
            raise CheckpointError(f"{folder.path} is not the folder of a run: it {problem}. Give a run's output.folder")
        return folder

    def check_present(self) -> None:
        """Refuses to go on in a folder that somebody has removed or moved during the run.

        Raises:
            CheckpointError: its ``config.yaml`` is gone, or another run has begun under its name.
        """
        if not self.config_file.exists():
            problem = f"{self.config_file} was there when the run began and is not any more"
        elif self.is_ours is not None and not self.is_ours():
            problem = f"another run has begun in {self.path}, which is not the folder any more where this one began"
        else:
            return
        raise CheckpointError(
            f"{problem}: the run folder was removed or moved. If it was moved, go on with `gcml run --resume` and its "
            "new place, without what lies under the old name; if it is lost, start anew in another output.folder"
        )

    def checkpoints(self, site: str) -> Path:
        """The folder of a site's checkpoints; it need not exist yet."""
        return self.path / "checkpoints" / check_site_name(site)

    def sites_with_model(self) -> list[str]:
        """The sites whose personalised model lies here, by name."""
        return sorted(path.parent.name for path in (self.path / "checkpoints").glob(f"*/{MODEL_FILE}"))

    def overlays(self, site: str) -> Path:
        """The folder of a site's overlays; it need not exist yet."""
        return self.path / "overlays" / check_site_name(site)

    # --- faults on purpose -------------------------------------------------------------------

    def note_faults(self, chaos: str) -> None:
        """Adds the ``chaos`` that the run is started or resumed with to ``chaos.txt``, if there is any.

        Raises:
            CheckpointError: the disk does not take it.
        """
        known = self.faults()
        if chaos and chaos not in known:
            with self._writing(self.faults_file):
                replace_file(self.faults_file, "".join(f"{text}\n" for text in (*known, chaos)))

    def faults(self) -> tuple[str, ...]:
        """Every ``chaos`` that some part of the run was made with."""
        if not self.faults_file.is_file():
            return ()
        return tuple(self.faults_file.read_text(encoding="utf-8", errors="replace").splitlines())

    # --- rounds --------------------------------------------------------------------------------

    def append_round(self, record: RoundRecord) -> None:
        """Add a finished round; it is on disk when this returns.

        Raises:
            CheckpointError: the disk does not take it.
        """
        with self._writing(self.rounds_file):
            if not self._is_repaired:
                self._rewrite(self.rounds())
            _append(self.rounds_file, to_json(record) + "\n")
            # it follows from the rounds: nothing would be lost
            _append(self.transfers_file, transfer_rows(record.pushes), syncs=False)

    def replace_last_round(self, record: RoundRecord) -> None:
        """Write the last round anew, with what has come since.

        Raises:
            CheckpointError: the disk does not take it.
        """
        with self._writing(self.rounds_file):
            self._rewrite((*self.rounds()[:-1], record))

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Says what to do where a file cannot be written, or no longer belongs to this run."""
        if self.is_ours is not None:
            self.check_present()
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be written ({error.strerror}): the run stops here. {write_remedy(error).capitalize()}, "
                f"then `gcml run --resume {in_shell(self.path)}`"
            ) from error

    def rounds(self) -> tuple[RoundRecord, ...]:
        """All finished rounds, oldest first; empty before the first one.

        A round that a site did again, after it had gone back to a checkpoint, counts where it was done last.

        Raises:
            CheckpointError: the file, or a line that was written whole, cannot be read, or rounds are out of order.
        """
        if not self.rounds_file.exists():
            return ()
        try:
            content = self.rounds_file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{self.rounds_file} cannot be read ({error.strerror})") from error
        lines = content.split(b"\n")
        torn = lines.pop()  # what stands behind the last newline: nothing, or what a crash has left
        records = [self._round(number, line) for number, line in enumerate(lines, start=1)]
        with contextlib.suppress(ValueError):
            records += [from_json(RoundRecord, torn.decode())] if torn else []
        numbers = [record.plan.round_number for record in records]
        for line, (before, after) in enumerate(itertools.pairwise(numbers), start=2):
            if after <= before:
                raise CheckpointError(
                    f"{self.rounds_file}, line {line} cannot be read: it holds round {after} after round {before}"
                )
        return _without_repeated(records)

    def _round(self, number: int, line: bytes) -> RoundRecord:
        """One line."""
        try:
            return from_json(RoundRecord, line.decode())
        except ValueError as error:
            raise CheckpointError(
                f"{self.rounds_file}, line {number} cannot be read: {error}. Bring the file back, or take the line "
                "out: tables, plots and the choice of peers then do without this round"
            ) from error

    def truncate_after(self, round_number: int) -> None:
        """Forget the rounds after ``round_number``, as a resume from that round does.

        Raises:
            CheckpointError: the file cannot be read, or the disk does not take it.
        """
        kept = [record for record in self.rounds() if record.plan.round_number <= round_number]
        with self._writing(self.rounds_file):
            self._rewrite(kept)

    def transfers(self) -> tuple[PushReceipt, ...]:
        """Every push of the run, accepted or not."""
        return tuple(receipt for record in self.rounds() for receipt in record.pushes)

    def _rewrite(self, records: Iterable[RoundRecord]) -> None:
        """Replace ``rounds.jsonl`` and, after it, the transfers that follow from it."""
        kept = tuple(records)
        replace_file(self.rounds_file, "".join(to_json(record) + "\n" for record in kept))
        replace_file(self.transfers_file, transfer_table(receipt for record in kept for receipt in record.pushes))
        self._is_repaired = True

    # --- state ---------------------------------------------------------------------------------

    def write_state(self, state: RunState) -> None:
        """Replace ``state.json``.

        Raises:
            CheckpointError: the disk does not take it.
        """
        with self._writing(self.state_file):
            replace_file(self.state_file, to_json(state) + "\n")

    def read_state(self) -> RunState:
        """The state that was written last.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        try:
            return from_json(RunState, self.state_file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.state_file} does not exist: no round of this run has ended yet") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.state_file} cannot be read: {error}. Bring the file back to resume the run; where it is "
                "deleted, the run's models, rounds and scores can be used without it"
            ) from error

    # --- cases ---------------------------------------------------------------------------------

    def write_cases(self, scores: Iterable[CaseScore]) -> None:
        """Add case scores. All earlier rows of the same (site, split, model) are replaced by them.

        Raises:
            CheckpointError: the disk does not take them.
        """
        new = tuple(scores)
        groups = {(score.site, score.split, score.model) for score in new}
        kept = [score for score in self.cases() if (score.site, score.split, score.model) not in groups]
        with self._writing(self.cases_file):
            replace_file(self.cases_file, case_table((*kept, *new)))

    def cases(self) -> tuple[CaseScore, ...]:
        """All case scores written so far; an empty cell comes back as NaN.

        Raises:
            CheckpointError: a row cannot be read.
        """
        return read_case_table(self.cases_file)

    def write_cross_site(self, scores: Iterable[CaseScore]) -> None:
        """Replaces the scores of models at all sites; ``model`` is the name of the site whose model it is.

        Raises:
            CheckpointError: the disk does not take them.
        """
        with self._writing(self.cross_site_file):
            replace_file(self.cross_site_file, case_table(scores))

    def cross_site(self) -> tuple[CaseScore, ...]:
        """The scores of :meth:`write_cross_site`; none where ``evaluation.cross_site`` was off.

        Raises:
            CheckpointError: a row cannot be read.
        """
        return read_case_table(self.cross_site_file)


def _without_repeated(records: Sequence[RoundRecord]) -> tuple[RoundRecord, ...]:
    """Removes the earlier report of every round that a site did twice, which happens only without a barrier."""
    last = {(report.site, report.round_number): at for at, one in enumerate(records) for report in one.trained}
    found = []
    for at, record in enumerate(records):
        again = {one.site for one in record.trained if last[one.site, one.round_number] != at}
        if again:
            trained = tuple(report for report in record.trained if report.site not in again)
            sites = tuple(site for site in record.plan.sites if site not in again)
            record = replace(record, trained=trained, plan=replace(record.plan, sites=sites))  # noqa: PLW2901
        found.append(record)
    return tuple(found)


# --- files -------------------------------------------------------------------------------------


def _append(path: Path, text: str, *, syncs: bool = True) -> None:
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        if syncs:
            os.fsync(file.fileno())
