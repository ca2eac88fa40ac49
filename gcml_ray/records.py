"""The small records that cross module and process borders: frozen, typed, free of tensors.

Everything a site tells the driver is one of these. None holds weights, images or labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gcml_ray.errors import told

Phase = Literal["warmup", "exchange", "cooldown"]
Split = Literal["train", "validation", "test"]
RunOutcome = Literal["finished", "stopped", "failed"]  # to its end; asked to stop, and can be resumed; no site left
RunStatus = Literal["running", RunOutcome]

PERSONALISED = "personalised"  # a site's best model on its own validation cases
BEFORE_GOSSIP = "before_gossip"  # its model at the end of the warm-up
SHARED = "shared"  # what it exchanges where it trains a personal model beside it
ENSEMBLE = "ensemble"  # the personalised model together with models of its peers
WAITS_FOR_ROOM = "waits for room"  # the stage of a site that the cluster has no process for yet


@dataclass(frozen=True, order=True)
class Edge:
    """One push: ``sender``'s weights go to ``receiver``."""

    sender: str
    receiver: str


@dataclass(frozen=True)
class RoundPlan:
    """What happens in one round: who pushes to whom; everybody alive trains."""

    round_number: int
    phase: Phase
    sites: tuple[str, ...]
    edges: tuple[Edge, ...]


@dataclass(frozen=True)
class PushReceipt:
    """The receiver's answer to one push. ``reason`` is empty where it was accepted."""

    round_number: int
    sender: str
    receiver: str
    accepted: bool
    reason: str
    size_bytes: int
    seconds: float = 0.0


@dataclass(frozen=True)
class PushReport:
    """What a sender tells the driver after its pushes of a round."""

    site: str
    round_number: int
    receipts: tuple[PushReceipt, ...]


@dataclass(frozen=True)
class SiteInfo:
    """What a site tells the driver when it is ready to train. ``public_key`` (hex): what its pushes are signed with."""

    site: str
    num_train: int
    num_validation: int
    num_test: int
    num_parameters: int
    push_bytes: int
    device: str
    node: str
    pid: int
    restored_round: int
    seconds: float
    notes: tuple[str, ...] = ()
    public_key: str = ""


@dataclass(frozen=True)
class Peer:
    """What all sites are told of one of them.

    ``public_key`` (hex) is empty where pushes are not signed. ``num_train``: its training cases, as it told the driver
    when it started; None for a server, which has none of its own. ``incarnation`` counts its processes: another one
    than before has been restarted, or has left and joined again.
    """

    public_key: str = ""
    num_train: int | None = None
    incarnation: int = 1


@dataclass(frozen=True)
class TrainOrder:
    """What the driver asks of a site for one round."""

    round_number: int
    phase: Phase
    evaluate: bool
    checkpoint: bool


@dataclass(frozen=True)
class Judgement:
    """What a receiver made of one incoming model before it might touch its own; None where nothing was measured.

    ``reason`` is empty where the model was accepted. ``norm_ratio`` and ``cosine``: of the incoming to the own weights.
    ``dice``, ``own_dice``: of both models on the same patches of a few validation cases; ``dice`` on the first of them
    alone where that was enough.
    """

    sender: str
    accepted: bool
    reason: str
    norm_ratio: float | None
    cosine: float | None
    dice: float | None
    own_dice: float | None


@dataclass(frozen=True)
class TrainReport:
    """What a site tells the driver after a round.

    ``losses``: mean over the steps, by part (``segmentation``, ``mutual``, ``incoming_segmentation``...).
    ``regions``: mean share of the patch that lies in the pull and push regions and in Omega, 0 to 1.
    ``merge``: which model was kept after a mutual round (``local_after``, ``mix``...), empty otherwise.
    ``validation_dice``: mean over cases and foreground classes; None in rounds without evaluation.
    ``learning_rate``: of the first step. ``peak_memory_bytes``: of the process, in host memory.
    ``seconds``: by stage (``judge``, ``train``, ``merge``, ``validate``, ``checkpoint``).
    ``judged``: every incoming model; of those that were refused nothing else is told.
    ``privacy_epsilon``: spent by the site up to now, None without privacy; infinite without noise.
    ``staleness``, ``age_s``: how many rounds, and seconds, each peer's model was behind, in rounds without a barrier.
    """

    site: str
    round_number: int
    peers: tuple[str, ...]
    num_steps: int
    losses: dict[str, float]
    regions: dict[str, float]
    merge: str
    candidate_dice: dict[str, float]
    validation_dice: float | None
    is_best: bool
    seconds: dict[str, float]
    learning_rate: float
    peak_memory_bytes: int
    staleness: tuple[int, ...] = ()
    age_s: tuple[float, ...] = ()
    privacy_epsilon: float | None = None
    judged: tuple[Judgement, ...] = ()


@dataclass(frozen=True)
class AdoptReport:
    """What a site tells the driver after it took the server's weights; the fields are those of :class:`TrainReport`.

    ``has_adopted`` is false where no weights had arrived: the site goes on with its own.
    """

    site: str
    round_number: int
    has_adopted: bool
    validation_dice: float | None
    is_best: bool
    seconds: dict[str, float]
    peak_memory_bytes: int


@dataclass(frozen=True)
class CaseScore:
    """One case, one foreground class, one model. A distance is NaN where it is undefined."""

    site: str
    case: str
    split: Split
    model: str
    class_name: str
    dice: float
    hd95: float
    surface_dice: float


@dataclass(frozen=True)
class EvaluationReport:
    """All case scores of one site, split and model. ``peak_memory_bytes``: of the process so far, in host memory."""

    site: str
    split: Split
    model: str
    round_number: int
    scores: tuple[CaseScore, ...]
    seconds: float
    peak_memory_bytes: int = 0


def by_site(report: EvaluationReport) -> tuple[EvaluationReport, ...]:
    """A report for each site whose cases were scored: one, but for a model that was trained on pooled cases."""
    sites = sorted({score.site for score in report.scores}) or [report.site]
    if sites == [report.site]:
        return (report,)
    return tuple(
        dataclasses.replace(report, site=site, scores=tuple(score for score in report.scores if score.site == site))
        for site in sites
    )


@dataclass(frozen=True)
class SiteStatus:
    """A site's answer to a status call while it works."""

    site: str
    round_number: int
    stage: str
    step: int
    num_steps: int


@dataclass(frozen=True)
class SiteFailure:
    """A call to a site that did not succeed. ``kind``: ``raised``, ``died``, ``unreachable`` or ``late``.

    ``culprit``: the site that was working when a process of several ended; empty for its own failure.
    """

    site: str
    round_number: int
    stage: str
    kind: Literal["raised", "died", "unreachable", "late"]
    message: str
    error_type: str = ""
    traceback: str = ""
    culprit: str = ""

    @property
    def words(self) -> str:
        """What happened; of an error in somebody's own code also where."""
        return told(self.message, self.error_type, self.traceback)


LEFT = "left"  # how the reason of a departure on purpose begins, among those of sites that were dropped


def lost_sites(dropped: Mapping[str, str]) -> tuple[str, ...]:
    """Of dropped sites, with the reason of each, those that were given up, not those that left on purpose."""
    return tuple(site for site, reason in dropped.items() if not reason.startswith(LEFT))


@dataclass(frozen=True)
class RoundRecord:
    """One line of ``rounds.jsonl``: everything the driver knows about a finished round.

    ``late``: sites that were not waited for. What they report later is among ``trained`` of the round in which it came.
    ``left_out``: sites that were not in the plan, and why: ``restarting``, or ``busy`` with a round they were late in.
    """

    plan: RoundPlan
    trained: tuple[TrainReport, ...]
    pushes: tuple[PushReceipt, ...]
    failures: tuple[SiteFailure, ...]
    seconds: float
    finished_at: str = ""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    late: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def skipped(self) -> tuple[str, ...]:
        """The sites that take part in the run and did not train in this round."""
        trained = {report.site for report in self.trained}
        return tuple(sorted({*self.plan.sites, *self.left_out} - trained))

    def missed(self, site: str) -> bool:
        """Whether a site did not train in this round; without a barrier, whether its training failed."""
        failed = {failure.site for failure in self.failures if failure.stage == "train"}
        trained = {*(report.site for report in self.trained), *self.late}  # a late site's report comes later
        return site in {*self.skipped, *failed} - trained

    @property
    def validation_dice(self) -> dict[str, float]:
        """Validation Dice by site, of those that were validated in this round."""
        return {report.site: report.validation_dice for report in self.trained if report.validation_dice is not None}


def to_plain(record: Any) -> dict[str, Any]:
    """A record as nested plain dicts, lists and numbers, ready for JSON."""
    return dataclasses.asdict(record)
