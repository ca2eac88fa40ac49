"""What a record says, as MLflow's named numbers. Knows records only, not MLflow.

Every metric is logged with step = round. Without a barrier, and for a site that was late, that is the site's own round
for what its training reports, and the record's number for traffic and participation. A child run carries what one site
did, under the same names at every site, so that the UI draws all sites into one chart. The parent run carries what the
federation did, and each site's Dice under ``SITE/...`` so that federations can be sorted by it.

==========================================  ==========================================================
child run (a site)                          meaning
==========================================  ==========================================================
``train/loss/PART``                         mean over the steps of one part of the loss
``train/learning_rate``                     of the round's first step
``mutual/region_share/REGION``              share of the patch's voxels in a region of the mutual loss
``val/dice/after_round``                    validation Dice of the model the site goes on with
``val/candidate_dice/CANDIDATE``            validation Dice of what the merge chose from
``merge/kept/CANDIDATE``                    1 in rounds in which the merge kept it, else 0
``traffic/sent_bytes``, ``received_bytes``  on the wire, refused pushes included
``traffic/num_taken``, ``num_refused``      pushes of others to this site
``time/STAGE_s``                            seconds by stage
``memory/peak_mib``                         most host memory that the site's process has held, in 2^20 bytes
``privacy/epsilon``                         spent up to this round, where training or pushes are private
``participation/has_trained``               1, or 0 where no report of the site came in this round
``test/dice/MODEL``                         final test: mean over cases and classes
``test/dice_by_class/MODEL/CLASS``          final test: mean over cases
``test/hd95_UNIT/MODEL``                    mean where it is defined; UNIT is mm or voxel
``test/hd95_num_undefined/MODEL``           how often it is not
``test/surface_dice/MODEL``                 mean where it is defined
==========================================  ==========================================================

==========================================  ==========================================================
parent run (the federation)                 meaning
==========================================  ==========================================================
``val/dice/mean``, ``val/dice/worst``       over the sites that were evaluated in the round
``SITE/val/dice/after_round``               as in the child run
``privacy/epsilon_max``                     over the sites that report one
``test/dice_mean/MODEL``, ``dice_worst``    over the sites; likewise ``SITE/test/dice/MODEL``
``traffic/round_bytes``                     all pushes of the round
``traffic/num_accepted``, ``num_refused``   pushes
``defence/num_judged``, ``num_rejected``    incoming models that receivers judged, and did not let in
``participation/num_trained``, ...          ``num_failed``, ``num_senders``, ``num_receivers``
``time/round_s``, ``time/STAGE_s``          seconds
==========================================  ==========================================================
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from gcml_ray.prediction.averages import mean
from gcml_ray.records import EvaluationReport, PushReceipt, RoundRecord, TrainReport
from gcml_ray.wording import without_secrets

Metrics = dict[str, float]
_SPLIT_NAMES = {"train": "train", "validation": "val", "test": "test"}
_MAX_VALUE = 500  # characters of a parameter; MLflow's limit on the strictest of its stores


def federation_metrics(record: RoundRecord) -> Metrics:
    """The parent run's metrics of one round, by name."""
    dice = record.validation_dice
    metrics = {
        "time/round_s": record.seconds,
        "participation/num_trained": len(record.trained),
        "participation/num_failed": len({failure.site for failure in record.failures}),
        "participation/num_senders": len({push.sender for push in record.pushes}),
        "participation/num_receivers": len({push.receiver for push in record.pushes if push.accepted}),
        "traffic/round_bytes": _num_bytes(record.pushes),
        "traffic/num_accepted": sum(push.accepted for push in record.pushes),
        "traffic/num_refused": sum(not push.accepted for push in record.pushes),
    }
    metrics |= {f"time/{stage}_s": seconds for stage, seconds in record.stage_seconds.items()}
    metrics |= {f"{site}/val/dice/after_round": value for site, value in dice.items()}
    epsilons = [epsilon for report in record.trained if (epsilon := report.privacy_epsilon) is not None]
    if any(map(math.isfinite, epsilons)):
        metrics["privacy/epsilon_max"] = max(filter(math.isfinite, epsilons))
    if judged := [each for report in record.trained for each in report.judged]:
        rejected = sum(not each.accepted for each in judged)
        metrics |= {"defence/num_judged": len(judged), "defence/num_rejected": rejected}
    if dice:
        metrics |= {"val/dice/mean": mean(dice.values()), "val/dice/worst": _worst(dice.values())}
    return metrics


def site_metrics(record: RoundRecord, site: str) -> Metrics:
    """A child run's traffic and participation in one round, by name."""
    sent = [push for push in record.pushes if push.sender == site]
    received = [push for push in record.pushes if push.receiver == site]
    return {
        "participation/has_trained": float(any(report.site == site for report in record.trained)),
        "traffic/sent_bytes": _num_bytes(sent),
        "traffic/received_bytes": _num_bytes(received),
        "traffic/num_taken": sum(push.accepted for push in received),
        "traffic/num_refused": sum(not push.accepted for push in received),
    }


def training_metrics(report: TrainReport) -> Metrics:
    """A child run's metrics of what a site's round of training has reported, by name."""
    metrics = {"train/learning_rate": report.learning_rate, "memory/peak_mib": report.peak_memory_bytes / 2**20}
    metrics |= {f"train/loss/{part}": value for part, value in report.losses.items()}
    metrics |= {f"mutual/region_share/{region}": value for region, value in report.regions.items()}
    metrics |= {f"val/candidate_dice/{name}": value for name, value in report.candidate_dice.items()}
    metrics |= {f"time/{stage}_s": seconds for stage, seconds in report.seconds.items()}
    if report.privacy_epsilon is not None and math.isfinite(report.privacy_epsilon):
        metrics["privacy/epsilon"] = report.privacy_epsilon
    if report.merge:
        candidates = {*report.candidate_dice, report.merge}
        metrics |= {f"merge/kept/{name}": float(name == report.merge) for name in candidates}
    if report.validation_dice is not None:
        metrics["val/dice/after_round"] = report.validation_dice
    return metrics


def score_metrics(report: EvaluationReport, *, distance_unit: str) -> Metrics:
    """A child run's metrics of one evaluation; means leave out undefined values, whose number is said."""
    split, model = _SPLIT_NAMES[report.split], report.model
    metrics = {
        f"{split}/dice/{model}": mean(score.dice for score in report.scores),
        f"{split}/hd95_{distance_unit}/{model}": mean(score.hd95 for score in report.scores),
        f"{split}/hd95_num_undefined/{model}": float(sum(math.isnan(score.hd95) for score in report.scores)),
        f"{split}/surface_dice/{model}": mean(score.surface_dice for score in report.scores),
    }
    for name in dict.fromkeys(score.class_name for score in report.scores):
        values = (score.dice for score in report.scores if score.class_name == name)
        metrics[safe_key(f"{split}/dice_by_class/{model}/{name}")] = mean(values)
    return metrics


def federation_score_metrics(reports: Sequence[EvaluationReport]) -> Metrics:
    """The parent run's metrics of one evaluation: reports of all sites on one split and model."""
    split, model = _SPLIT_NAMES[reports[0].split], reports[0].model
    dice = {report.site: mean(score.dice for score in report.scores) for report in reports}
    metrics = {f"{site}/{split}/dice/{model}": value for site, value in dice.items()}
    return metrics | {
        f"{split}/dice_mean/{model}": mean(dice.values()),
        f"{split}/dice_worst/{model}": _worst(dice.values()),
    }


def flat_params(plain: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested keys joined by dots, values as JSON (text as it is), cut at 500 characters, without secrets."""
    flat: dict[str, str] = {}
    for key, value in plain.items():
        if isinstance(value, dict) and value:
            flat |= flat_params(value, f"{prefix}{key}.")
            continue
        text = without_secrets(value if isinstance(value, str) else json.dumps(value))
        flat[safe_key(prefix + key)] = text if len(text) <= _MAX_VALUE else text[: _MAX_VALUE - 3] + "..."
    return flat


def safe_key(key: str) -> str:
    """A key that MLflow accepts: letters, digits, ``_ - . : /`` and space; no part empty or all dots."""
    parts = re.sub(r"[^\w\-./: ]", "_", key)[:250].split("/")
    return "/".join(part if part.strip(".") else "_" for part in parts)


def _num_bytes(pushes: Iterable[PushReceipt]) -> int:
    return sum(push.size_bytes for push in pushes)


def _worst(values: Iterable[float]) -> float:
    """Lowest of the finite values, NaN where there is none."""
    return min((value for value in values if math.isfinite(value)), default=math.nan)
